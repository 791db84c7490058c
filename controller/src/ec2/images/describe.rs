//! `DescribeImages`.

use std::collections::HashMap;

use super::super::filters::{self, Table, flag, one, word};
use super::super::instances::ROOT_DEVICE;
use super::super::model::{
    self, ArchitectureValues, BlockDeviceMapping, BootModeValues, DescribeImagesRequest, DescribeImagesResult,
    DeviceType, EbsBlockDevice, HypervisorType, ImageState, ImageTypeValues, VirtualizationType,
};
use super::super::{Context, Refusal, lookup, pages, tagging};
use crate::clock;
use crate::state::images::{self, Image};
use crate::state::tags;

const IMAGES: Table<model::Image> = &[
    ("image-id", |image| one(&image.image_id)),
    ("name", |image| one(&image.name)),
    ("description", |image| one(&image.description)),
    ("state", |image| word(&image.state)),
    ("architecture", |image| word(&image.architecture)),
    ("owner-id", |image| one(&image.owner_id)),
    ("is-public", |image| flag(image.public)),
    ("manifest-location", |image| one(&image.image_location)),
    ("image-type", |image| word(&image.image_type)),
    ("root-device-name", |image| one(&image.root_device_name)),
    ("root-device-type", |image| word(&image.root_device_type)),
    ("virtualization-type", |image| word(&image.virtualization_type)),
    ("hypervisor", |image| word(&image.hypervisor)),
];

/// `DescribeImages`: the account's own; there are no shared or public ones.
pub(crate) async fn describe_images(
    context: &Context,
    request: DescribeImagesRequest,
) -> Result<DescribeImagesResult, Refusal> {
    let account = context.account();
    let mut snapshot = context.cloud.db.snapshot().await?;
    let tags = tags::by_resource(&mut snapshot, account).await?;
    let mut found = images::of_account(&mut snapshot, account).await?;
    if !request.image_ids.is_empty() {
        let ids = request.image_ids.iter().map(|id| lookup::image_id(id)).collect::<Result<Vec<_>, _>>()?;
        for id in &ids {
            lookup::image(&mut snapshot, account, id).await?;
        }
        found.retain(|image| ids.contains(&image.id));
    }
    drop(snapshot);
    let own = |owner: &String| owner == "self" || owner == account;
    if !request.owners.is_empty() && !request.owners.iter().any(own) {
        found.clear();
    }
    let described = found.iter().map(|image| answer(image, &tags)).collect();
    let selected = filters::select(described, &request.filters, IMAGES)?;
    let key = |image: &model::Image| one(&image.image_id).concat();
    let (images, next_token) = pages::page(selected, key, request.max_results, request.next_token.as_deref())?;
    Ok(DescribeImagesResult { images: Some(images), next_token })
}

fn answer(image: &Image, tags: &HashMap<String, Vec<tags::Tag>>) -> model::Image {
    const GIB: u64 = 1 << 30;
    let root = image.root().map(|root| BlockDeviceMapping {
        device_name: Some(ROOT_DEVICE.to_owned()),
        ebs: Some(EbsBlockDevice {
            delete_on_termination: Some(true),
            volume_size: i32::try_from(root.size.cast_unsigned().div_ceil(GIB)).ok(),
            encrypted: Some(false),
            ..Default::default()
        }),
        ..Default::default()
    });
    model::Image {
        image_id: Some(image.id.to_string()),
        name: Some(image.name.clone()),
        description: image.description.clone(),
        owner_id: Some(image.account_id.clone()),
        image_location: Some(image.location.clone()),
        creation_date: Some(creation_date(image.created_ns)),
        state: Some(ImageState::AVAILABLE),
        public: Some(false),
        architecture: Some(ArchitectureValues::X86_64),
        image_type: Some(ImageTypeValues::MACHINE),
        boot_mode: Some(BootModeValues::LEGACY_BIOS),
        platform_details: Some("Linux/UNIX".to_owned()),
        usage_operation: Some("RunInstances".to_owned()),
        root_device_name: Some(ROOT_DEVICE.to_owned()),
        root_device_type: Some(DeviceType::EBS),
        virtualization_type: Some(VirtualizationType::HVM),
        hypervisor: Some(HypervisorType::XEN),
        ena_support: Some(false),
        block_device_mappings: Some(root.into_iter().collect()),
        tags: tagging::answer(tags.get(image.id.as_str())),
        ..Default::default()
    }
}

/// A text in the model, in the form of the other times.
fn creation_date(unix_ns: i64) -> String {
    let date = clock::date(unix_ns);
    let (hour, minute, second) = date.to_hms();
    format!("{}T{hour:02}:{minute:02}:{second:02}.{:03}Z", date.date(), date.millisecond())
}
