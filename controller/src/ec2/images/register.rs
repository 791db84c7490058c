//! `RegisterImage` and `DeregisterImage`.

use tokio::io::AsyncReadExt as _;

use super::super::model::{
    ArchitectureValues, DeregisterImageRequest, DeregisterImageResult, RegisterImageRequest, RegisterImageResult,
    ResourceType,
};
use super::super::{Context, Refusal, lookup, tagging};
use super::keep;
use super::manifest::{Manifest, Part, SIZE_MOST};
use crate::clock;
use crate::ids::ImageId;
use crate::s3::objects;
use crate::s3::store::StoreError;
use crate::state::images::{self, Image};
use crate::state::tags;

fn invalid_manifest(message: impl Into<String>) -> Refusal {
    Refusal::client("InvalidManifest", message)
}

/// `RegisterImage` from `bucket/…/manifest.json`.
pub(crate) async fn register_image(
    context: &Context,
    request: RegisterImageRequest,
) -> Result<RegisterImageResult, Refusal> {
    refuse_unserved(&request)?;
    let location = request.image_location.as_deref().ok_or_else(|| Refusal::missing_parameter("ImageLocation"))?;
    let (bucket, key) =
        location.trim_start_matches('/').split_once('/').filter(|(_, key)| !key.is_empty()).ok_or_else(|| {
            Refusal::invalid_parameter(format!(
                "Invalid value '{location}' for ImageLocation: write bucket/…/manifest.json"
            ))
        })?;
    let tags = tagging::requested(&request.tag_specifications, ResourceType::IMAGE)?;
    let manifest = read_manifest(context, location, bucket, key).await?;
    let folder = key.rsplit_once('/').map_or("", |(folder, _)| folder);

    let locked = keep::lock().await;
    let mut pinned = Vec::new();
    let registered = async {
        for (name, part) in manifest.parts() {
            keep_part(context, bucket, folder, name, part, &mut pinned).await?;
        }
        write(context, &request, location, &manifest, &tags).await
    }
    .await;
    if registered.is_err() {
        // A part that was kept for nothing goes again; when that fails, the next `tidy` does it.
        if let Err(error) = keep::let_go(&context.cloud, &pinned, &locked).await {
            tracing::warn!(%error, "parts of an image that was refused are still there");
        }
    }
    Ok(RegisterImageResult { image_id: Some(registered?.to_string()) })
}

fn refuse_unserved(request: &RegisterImageRequest) -> Result<(), Refusal> {
    let unwanted = [
        ("KernelId", request.kernel_id.is_some()),
        ("RamdiskId", request.ramdisk_id.is_some()),
        ("BlockDeviceMapping", !request.block_device_mappings.is_empty()),
        ("UefiData", request.uefi_data.is_some()),
        ("TpmSupport", request.tpm_support.is_some()),
        ("VirtualizationType", request.virtualization_type.as_deref().is_some_and(|kind| kind != "hvm")),
        ("Architecture", request.architecture.as_ref().is_some_and(|a| *a != ArchitectureValues::X86_64)),
    ];
    match unwanted.into_iter().find(|(_, given)| *given) {
        Some((name, _)) => Err(Refusal::client(
            "UnsupportedOperation",
            format!("The parameter {name} is not served by this cloud: an image is described by its manifest alone"),
        )),
        None => Ok(()),
    }
}

async fn read_manifest(context: &Context, location: &str, bucket: &str, key: &str) -> Result<Manifest, Refusal> {
    let store = &context.cloud.s3;
    let (object, file) =
        store.open_object(context.account(), bucket, key).await.map_err(|error| store_error(error, location))?;
    if object.size > SIZE_MOST {
        return Err(invalid_manifest(format!(
            "The object {location} has {} bytes: an image's manifest has at most {SIZE_MOST}",
            object.size
        )));
    }
    let mut text = Vec::new();
    file.take(SIZE_MOST).read_to_end(&mut text).await.map_err(|error| Refusal::internal(&error))?;
    Manifest::parse(&text).map_err(|why| invalid_manifest(format!("The manifest {location} is not valid: {why}")))
}

/// Keeps one part by its digest; refuses it when it is not what the manifest says.
async fn keep_part(
    context: &Context,
    bucket: &str,
    folder: &str,
    name: &str,
    part: &Part,
    pinned: &mut Vec<String>,
) -> Result<(), Refusal> {
    let key = if folder.is_empty() { part.key.clone() } else { format!("{folder}/{}", part.key) };
    let at = format!("{bucket}/{key}");
    let blob = objects::pin(&context.cloud.s3, context.account(), bucket, &key)
        .await
        .map_err(|error| store_error(error, &format!("{at} (the image's {name})")))?;
    pinned.push(blob.sha256.clone());
    if blob.sha256 != part.sha256 {
        return Err(invalid_manifest(format!(
            "The digest of the image's {name} ({at}) does not match: the manifest says sha256 {}, the object has {}; \
             upload it again, or correct the manifest",
            part.sha256, blob.sha256
        )));
    }
    if blob.size != part.size {
        return Err(invalid_manifest(format!(
            "The size of the image's {name} ({at}) does not match: the manifest says {} bytes, the object has {}",
            part.size, blob.size
        )));
    }
    Ok(())
}

/// What the object store refuses is a manifest that cannot be used; the rest is ours.
fn store_error(error: StoreError, what: &str) -> Refusal {
    match error {
        StoreError::Refused(error) => {
            invalid_manifest(format!("Cannot read {what} from the object store: {}", StoreError::Refused(error)))
        }
        other => Refusal::internal(&other),
    }
}

async fn write(
    context: &Context,
    request: &RegisterImageRequest,
    location: &str,
    manifest: &Manifest,
    tags: &[super::super::model::Tag],
) -> Result<ImageId, Refusal> {
    let size = |part: &Part| part.size.cast_signed();
    let image = Image {
        id: ImageId::random(),
        account_id: context.account().to_owned(),
        name: request.name.clone(),
        description: request.description.clone().or_else(|| manifest.description.clone()),
        location: location.to_owned(),
        architecture: manifest.architecture.clone(),
        kernel_sha256: manifest.kernel.sha256.clone(),
        kernel_size: size(&manifest.kernel),
        initrd_sha256: manifest.initrd.as_ref().map(|part| part.sha256.clone()),
        initrd_size: manifest.initrd.as_ref().map(size),
        root_sha256: manifest.root.as_ref().map(|part| part.sha256.clone()),
        root_size: manifest.root.as_ref().map(size),
        cmdline: manifest.cmdline.clone(),
        runs_on_software_kvm: manifest.runs_on_software_kvm,
        created_ns: clock::now(),
        deregistered_ns: None,
    };
    let mut tx = context.cloud.db.begin().await?;
    if let Some(other) = images::by_name(&mut tx, context.account(), &image.name).await? {
        return Err(Refusal::client(
            "InvalidAMIName.Duplicate",
            format!(
                "AMI name {} is already in use by AMI {}: choose another, or deregister that one",
                other.name, other.id
            ),
        ));
    }
    images::insert(&mut tx, &image).await?;
    tagging::write(&mut tx, context.account(), image.id.as_str(), ResourceType::IMAGE.as_str(), tags).await?;
    context.commit(tx).await?;
    Ok(image.id)
}

/// `DeregisterImage`. Instances that boot from it go on, and can be stopped and started.
pub(crate) async fn deregister_image(
    context: &Context,
    request: DeregisterImageRequest,
) -> Result<DeregisterImageResult, Refusal> {
    let id = lookup::image_id(&request.image_id)?;
    let locked = keep::lock().await;
    let mut tx = context.cloud.db.begin().await?;
    lookup::image(&mut tx, context.account(), &id).await?;
    images::deregister(&mut tx, &id).await?;
    tags::remove_all(&mut tx, context.account(), id.as_str()).await?;
    let unused = images::forget_unused(&mut tx).await?;
    context.commit(tx).await?;
    if let Err(error) = keep::let_go(&context.cloud, &unused, &locked).await {
        tracing::warn!(%error, image = %id, "parts of a deregistered image are still there");
    }
    Ok(DeregisterImageResult { r#return: Some(true), ..Default::default() })
}
