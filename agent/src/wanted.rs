//! The border: desired state as it came over the wire becomes types that the rest may trust.
//!
//! One instance that cannot be understood is refused by itself and never stands in another's way,
//! nor is it taken for one that is gone.

use crate::api::{self, DesiredInstance};
use crate::ids::{BadName, Digest, InstanceId};
use serde::{Deserialize, Serialize};

/// What an instance's task has to bring about. Metadata is not in here: it is served, not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub power: Power,
    /// Reboots asked for so far.
    pub reboots: u64,
    /// Names the request that launched or last started the instance: a new one is a new start.
    pub trace: String,
    pub machine: Machine,
    pub interface: String,
}

impl Wanted {
    /// True when an instance that rests has to be started now that this is wanted instead of `old`.
    pub fn starts_anew(&self, old: Option<&Self>) -> bool {
        self.power == Power::On
            && old.is_none_or(|old| old.power == Power::Off || old.trace != self.trace || old.reboots < self.reboots)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    On,
    Off,
}

/// The machine to build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    pub vcpus: u8,
    pub memory_mib: u64,
    pub image: Image,
    /// Bytes of the root disk as the guest sees it.
    pub root_bytes: u64,
}

/// What to boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    pub id: String,
    pub kernel: Part,
    pub initrd: Option<Part>,
    pub root: Option<Part>,
    pub cmdline: String,
    pub runs_on_software_kvm: bool,
}

impl Image {
    /// The parts with the names they have in measurements and messages.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, &Part)> {
        [("kernel", Some(&self.kernel)), ("initrd", self.initrd.as_ref()), ("root", self.root.as_ref())]
            .into_iter()
            .filter_map(|(name, part)| Some((name, part?)))
    }
}

/// One file of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    pub sha256: Digest,
    /// Bytes.
    pub size: u64,
}

/// Why a desired instance cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unclear {
    #[error(transparent)]
    Name(#[from] BadName),
    #[error("its power is neither on nor off: controller and agent are of different versions")]
    Power,
    #[error("it has no boot image")]
    NoImage,
    #[error("its image {0} has no kernel")]
    NoKernel(String),
    #[error("{0} vCPUs: a machine has 1 to 32")]
    Vcpus(u32),
    #[error("{0} MiB of memory: a machine has at least 1")]
    Memory(u64),
}

/// The instance's id and what is wanted of it.
pub fn parse(desired: &DesiredInstance) -> Result<(InstanceId, Wanted), (Option<InstanceId>, Unclear)> {
    let id: InstanceId = desired.id.parse().map_err(|error: BadName| (None, error.into()))?;
    match parse_wanted(desired) {
        Ok(wanted) => Ok((id, wanted)),
        Err(unclear) => Err((Some(id), unclear)),
    }
}

fn parse_wanted(desired: &DesiredInstance) -> Result<Wanted, Unclear> {
    let power = match desired.power() {
        api::Power::On => Power::On,
        api::Power::Off => Power::Off,
        api::Power::Unspecified => return Err(Unclear::Power),
    };
    let vcpus = match u8::try_from(desired.vcpus) {
        Ok(count @ 1..=32) => count,
        _ => return Err(Unclear::Vcpus(desired.vcpus)),
    };
    if desired.memory_mib == 0 {
        return Err(Unclear::Memory(desired.memory_mib));
    }
    let image = parse_image(desired.image.as_ref().ok_or(Unclear::NoImage)?)?;
    let root_bytes = desired.root_bytes.max(image.root.as_ref().map_or(0, |root| root.size));
    Ok(Wanted {
        power,
        reboots: desired.reboots,
        trace: desired.trace.clone(),
        machine: Machine { vcpus, memory_mib: desired.memory_mib, image, root_bytes },
        interface: desired.interface.clone(),
    })
}

fn parse_image(image: &api::BootImage) -> Result<Image, Unclear> {
    let part = |blob: &Option<api::BlobRef>| -> Result<Option<Part>, Unclear> {
        // A message that is there but empty is what some writers send for "unset".
        match blob {
            Some(blob) if !blob.sha256.is_empty() => Ok(Some(Part { sha256: blob.sha256.parse()?, size: blob.size })),
            _ => Ok(None),
        }
    };
    Ok(Image {
        id: image.image_id.clone(),
        kernel: part(&image.kernel)?.ok_or_else(|| Unclear::NoKernel(image.image_id.clone()))?,
        initrd: part(&image.initrd)?,
        root: part(&image.root)?,
        cmdline: image.cmdline.clone(),
        runs_on_software_kvm: image.runs_on_software_kvm,
    })
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn desired() -> DesiredInstance {
        DesiredInstance {
            id: "i-0123456789abcdef0".into(),
            power: api::Power::On as i32,
            vcpus: 1,
            memory_mib: 128,
            interface: "eni-0123456789abcdef0".into(),
            trace: "trace-1".into(),
            image: Some(api::BootImage {
                image_id: "ami-1".into(),
                kernel: Some(api::BlobRef { sha256: "0".repeat(64), size: 10 }),
                root: Some(api::BlobRef { sha256: "1".repeat(64), size: 4096 }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_whole_instance_is_understood() {
        let (id, wanted) = parse(&desired()).unwrap();
        assert_eq!(id.as_str(), "i-0123456789abcdef0");
        assert_eq!(wanted.machine.root_bytes, 4096, "the disk is at least as large as the image");
        assert_eq!(wanted.machine.image.parts().map(|(name, _)| name).collect::<Vec<_>>(), ["kernel", "root"]);
    }

    #[test]
    fn what_is_missing_or_out_of_range_is_named() {
        let refusal = |change: fn(&mut DesiredInstance)| {
            let mut one = desired();
            change(&mut one);
            parse(&one).unwrap_err().1
        };
        assert_eq!(refusal(|one| one.power = 0), Unclear::Power);
        assert_eq!(refusal(|one| one.vcpus = 33), Unclear::Vcpus(33));
        assert_eq!(refusal(|one| one.memory_mib = 0), Unclear::Memory(0));
        assert_eq!(refusal(|one| one.image = None), Unclear::NoImage);
        assert!(matches!(refusal(|one| one.id = "../../etc".into()), Unclear::Name(BadName::Instance(_))));
        assert!(matches!(
            refusal(|one| one.image.as_mut().unwrap().kernel.as_mut().unwrap().sha256 = "../x".into()),
            Unclear::Name(BadName::Digest(_))
        ));
    }
}
