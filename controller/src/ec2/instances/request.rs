//! What `RunInstances` asks for, read into types that the rest may trust.
//!
//! Parameters that would change what the caller gets and that this cloud does not serve are refused
//! by name; those that only tune what is not there (monitoring, credits) are taken and have no effect.

use std::net::Ipv4Addr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::super::instance_types::{self, InstanceType};
use super::super::model::{self, BlockDeviceMapping, ResourceType, RunInstancesRequest, Tag};
use super::super::private_addresses::{self, Asked};
use super::super::{Refusal, lookup, tagging};
use super::view::ROOT_DEVICE;
use crate::ids::{ImageId, SubnetId};
use crate::state::images::Image;
use crate::state::lifecycle::ShutdownBehavior;

/// EC2's bound, before base64 (EC2 User Guide, "User data").
const USER_DATA_MOST: usize = 16 * 1024;
/// Instances of one call.
const COUNT_MOST: i32 = 1000;
const GIB: i64 = 1 << 30;
/// EC2's largest volume, in GiB.
const VOLUME_MOST: i32 = 16_384;

/// A launch that can be tried.
pub(super) struct Launch {
    pub image: ImageId,
    pub instance_type: &'static InstanceType,
    pub min_count: usize,
    pub max_count: usize,
    pub client_token: Option<String>,
    pub key_name: Option<String>,
    pub user_data: Option<Vec<u8>>,
    pub security_group_ids: Vec<String>,
    pub security_group_names: Vec<String>,
    pub subnet: Option<SubnetId>,
    pub zone: Option<String>,
    pub private_ip: Option<Ipv4Addr>,
    pub secondary: Asked,
    pub shutdown_behavior: ShutdownBehavior,
    pub instance_tags: Vec<Tag>,
    pub volume_tags: Vec<Tag>,
    root_gib: Option<i32>,
}

impl Launch {
    pub fn of(request: RunInstancesRequest) -> Result<Launch, Refusal> {
        refuse_unserved(&request)?;
        let (min_count, max_count) = counts(request.min_count, request.max_count)?;
        let image = request.image_id.as_deref().ok_or_else(|| Refusal::missing_parameter("ImageId"))?;
        let network = Network::of(&request)?;
        let instance_type = instance_type(request.instance_type.as_deref())?;
        private_addresses::check_limit(instance_type.name, network.secondary.count())?;
        if (network.private_ip.is_some() || matches!(network.secondary, Asked::These(_))) && max_count > 1 {
            return Err(Refusal::client(
                "InvalidParameterCombination",
                "PrivateIpAddress can be given for one instance only: set MaxCount to 1 or leave it out",
            ));
        }
        let placement = request.placement.unwrap_or_default();
        let (instance_tags, volume_tags) = tags(request.tag_specifications)?;
        Ok(Launch {
            image: lookup::image_id(image)?,
            instance_type,
            min_count,
            max_count,
            client_token: request.client_token,
            key_name: request.key_name,
            user_data: request.user_data.as_deref().map(user_data).transpose()?,
            security_group_ids: network.group_ids,
            security_group_names: request.security_groups,
            subnet: network.subnet,
            zone: placement.availability_zone,
            private_ip: network.private_ip,
            secondary: network.secondary,
            shutdown_behavior: match request.instance_initiated_shutdown_behavior {
                Some(behavior) if behavior == model::ShutdownBehavior::TERMINATE => ShutdownBehavior::Terminate,
                _ => ShutdownBehavior::Stop,
            },
            instance_tags,
            volume_tags,
            root_gib: root_gib(&request.block_device_mappings)?,
        })
    }

    /// Size of the root disk: what was asked for, and at least the image's. 0: no root disk.
    pub fn root_bytes(&self, image: &Image) -> Result<i64, Refusal> {
        let least = image.root().map_or(0, |root| root.size);
        match self.root_gib {
            None => Ok(least),
            Some(_) if least == 0 => Err(Refusal::client(
                "InvalidBlockDeviceMapping",
                format!("The image {} has no root disk whose size could be chosen", image.id),
            )),
            Some(gib) if i64::from(gib) * GIB < least => Err(Refusal::client(
                "InvalidBlockDeviceMapping",
                format!(
                    "Volume of size {gib}GB is smaller than the image's root disk, expect size >= {}GB",
                    least.cast_unsigned().div_ceil(GIB.cast_unsigned())
                ),
            )),
            Some(gib) => Ok(i64::from(gib) * GIB),
        }
    }
}

fn counts(min: i32, max: i32) -> Result<(usize, usize), Refusal> {
    if min < 1 || max < min || max > COUNT_MOST {
        return Err(Refusal::invalid_parameter(format!(
            "MinCount {min} and MaxCount {max} are not possible: 1 <= MinCount <= MaxCount <= {COUNT_MOST}"
        )));
    }
    // In bounds by the line above.
    Ok((usize::try_from(min).unwrap_or(1), usize::try_from(max).unwrap_or(1)))
}

fn instance_type(name: Option<&str>) -> Result<&'static InstanceType, Refusal> {
    let name = name.unwrap_or(instance_types::DEFAULT);
    instance_types::find(name).ok_or_else(|| {
        Refusal::invalid_parameter(format!("Invalid value '{name}' for InstanceType: see DescribeInstanceTypes"))
    })
}

fn user_data(encoded: &str) -> Result<Vec<u8>, Refusal> {
    let bytes = STANDARD
        .decode(encoded.trim())
        .map_err(|_| Refusal::invalid_parameter("Invalid BASE64 encoding of user data: UserData must be base64"))?;
    if bytes.len() > USER_DATA_MOST {
        return Err(Refusal::invalid_parameter(format!(
            "User data is limited to {USER_DATA_MOST} bytes; these are {}",
            bytes.len()
        )));
    }
    Ok(bytes)
}

/// Where the instance is to be, from the request's own members or from its one interface.
struct Network {
    subnet: Option<SubnetId>,
    private_ip: Option<Ipv4Addr>,
    secondary: Asked,
    group_ids: Vec<String>,
}

impl Network {
    fn of(request: &RunInstancesRequest) -> Result<Network, Refusal> {
        let private_ip = |text: &Option<String>| text.as_deref().map(private_addresses::parse).transpose();
        let subnet = |text: &Option<String>| text.as_deref().map(lookup::subnet_id).transpose();
        match request.network_interfaces.as_slice() {
            [] => Ok(Network {
                subnet: subnet(&request.subnet_id)?,
                private_ip: private_ip(&request.private_ip_address)?,
                secondary: Asked::Any(0),
                group_ids: request.security_group_ids.clone(),
            }),
            [interface] => {
                let twice = request.subnet_id.is_some()
                    || request.private_ip_address.is_some()
                    || !request.security_group_ids.is_empty();
                if twice {
                    return Err(Refusal::client(
                        "InvalidParameterCombination",
                        "Network interfaces and an instance-level subnet, address or security group \
                         may not be specified on the same request",
                    ));
                }
                refuse_unserved_interface(interface)?;
                let (primary, secondary) = addresses(interface)?;
                Ok(Network {
                    subnet: subnet(&interface.subnet_id)?,
                    private_ip: private_ip(&primary)?,
                    secondary,
                    group_ids: interface.groups.clone().unwrap_or_default(),
                })
            }
            _ => Err(Refusal::unserved("NetworkInterface.2")),
        }
    }
}

/// The addresses that an interface is to have. The primary one may be among `PrivateIpAddresses`.
fn addresses(interface: &model::InstanceNetworkInterfaceSpecification) -> Result<(Option<String>, Asked), Refusal> {
    let (mut primary, mut secondary) = (interface.private_ip_address.clone(), Vec::new());
    for given in interface.private_ip_addresses.iter().flatten() {
        let address = given
            .private_ip_address
            .clone()
            .ok_or_else(|| Refusal::missing_parameter("NetworkInterface.1.PrivateIpAddresses.PrivateIpAddress"))?;
        if given.primary != Some(true) {
            secondary.push(address);
        } else if primary.replace(address).is_some() {
            return Err(Refusal::client("InvalidParameterCombination", "An interface has one primary address"));
        }
    }
    Ok((primary, Asked::of(&secondary, interface.secondary_private_ip_address_count.filter(|count| *count != 0))?))
}

fn refuse_unserved_interface(interface: &model::InstanceNetworkInterfaceSpecification) -> Result<(), Refusal> {
    let unwanted = [
        ("NetworkInterfaceId", interface.network_interface_id.is_some()),
        ("AssociatePublicIpAddress", interface.associate_public_ip_address == Some(true)),
        ("DeviceIndex", interface.device_index.is_some_and(|index| index != 0)),
        ("Ipv6AddressCount", interface.ipv6_address_count.is_some_and(|n| n > 0)),
        ("Ipv6Addresses", interface.ipv6_addresses.as_ref().is_some_and(|list| !list.is_empty())),
    ];
    match unwanted.into_iter().find(|(_, given)| *given) {
        Some((name, _)) => Err(Refusal::unserved(&format!("NetworkInterface.1.{name}"))),
        None => Ok(()),
    }
}

fn refuse_unserved(request: &RunInstancesRequest) -> Result<(), Refusal> {
    let tenancy = request.placement.as_ref().and_then(|placement| placement.tenancy.as_ref());
    let unwanted = [
        ("IamInstanceProfile", request.iam_instance_profile.is_some()),
        ("InstanceMarketOptions", request.instance_market_options.is_some()),
        ("LaunchTemplate", request.launch_template.is_some()),
        ("KernelId", request.kernel_id.is_some()),
        ("RamdiskId", request.ramdisk_id.is_some()),
        ("Ipv6AddressCount", request.ipv6_address_count.is_some_and(|count| count > 0)),
        ("Ipv6Address", !request.ipv6_addresses.is_empty()),
        ("DisableApiTermination", request.disable_api_termination == Some(true)),
        ("DisableApiStop", request.disable_api_stop == Some(true)),
        ("EnclaveOptions", request.enclave_options.as_ref().is_some_and(|o| o.enabled == Some(true))),
        ("HibernationOptions", request.hibernation_options.as_ref().is_some_and(|o| o.configured == Some(true))),
        ("SecondaryInterface", !request.secondary_interfaces.is_empty()),
        ("CpuOptions", request.cpu_options.is_some()),
        ("Placement.Tenancy", tenancy.is_some_and(|tenancy| *tenancy != model::Tenancy::DEFAULT)),
    ];
    match unwanted.into_iter().find(|(_, given)| *given) {
        Some((name, _)) => Err(Refusal::unserved(name)),
        None => Ok(()),
    }
}

/// The root disk's size in GiB out of the mappings; other disks are refused.
fn root_gib(mappings: &[BlockDeviceMapping]) -> Result<Option<i32>, Refusal> {
    let mut size = None;
    for (index, mapping) in mappings.iter().enumerate() {
        let device = mapping.device_name.as_deref().unwrap_or_default();
        if device != ROOT_DEVICE {
            return Err(Refusal::client(
                "InvalidBlockDeviceMapping",
                format!(
                    "BlockDeviceMapping.{}: the only disk here is the root disk, {ROOT_DEVICE}; '{device}' is not served yet",
                    index + 1
                ),
            ));
        }
        let Some(ebs) = &mapping.ebs else { continue };
        if ebs.snapshot_id.is_some() || ebs.delete_on_termination == Some(false) || ebs.encrypted == Some(true) {
            return Err(Refusal::unserved(&format!(
                "BlockDeviceMapping.{}.Ebs with SnapshotId, Encrypted or DeleteOnTermination=false",
                index + 1
            )));
        }
        if let Some(gib) = ebs.volume_size {
            if !(1..=VOLUME_MOST).contains(&gib) {
                return Err(Refusal::invalid_parameter(format!(
                    "Invalid value '{gib}' for the root disk's VolumeSize: 1 to {VOLUME_MOST} GiB"
                )));
            }
            size = Some(gib);
        }
    }
    Ok(size)
}

/// Tags for the instances and for their root disks.
fn tags(specifications: Vec<model::TagSpecification>) -> Result<(Vec<Tag>, Vec<Tag>), Refusal> {
    let of_volume =
        |specification: &model::TagSpecification| specification.resource_type.as_ref() == Some(&ResourceType::VOLUME);
    let (volumes, instances): (Vec<_>, Vec<_>) = specifications.into_iter().partition(of_volume);
    Ok((tagging::requested(&instances, ResourceType::INSTANCE)?, tagging::requested(&volumes, ResourceType::VOLUME)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> RunInstancesRequest {
        RunInstancesRequest {
            image_id: Some("ami-0123456789abcdef0".into()),
            instance_type: Some("t3.nano".into()),
            min_count: 1,
            max_count: 1,
            ..Default::default()
        }
    }

    fn code(request: RunInstancesRequest) -> String {
        Launch::of(request).map(|_| ()).unwrap_err().code.into_owned()
    }

    #[test]
    fn what_is_asked_for_is_understood_or_refused() {
        assert!(Launch::of(request()).is_ok());
        assert_eq!(code(RunInstancesRequest { min_count: 2, ..request() }), "InvalidParameterValue");
        assert_eq!(code(RunInstancesRequest { image_id: Some("x".into()), ..request() }), "InvalidAMIID.Malformed");
        assert_eq!(code(RunInstancesRequest { user_data: Some("!".into()), ..request() }), "InvalidParameterValue");
        assert_eq!(code(RunInstancesRequest { kernel_id: Some("aki-1".into()), ..request() }), "UnsupportedOperation");
        let too_much = STANDARD.encode(vec![b'x'; USER_DATA_MOST + 1]);
        assert_eq!(code(RunInstancesRequest { user_data: Some(too_much), ..request() }), "InvalidParameterValue");
        let fixed = RunInstancesRequest { private_ip_address: Some("172.31.0.9".into()), max_count: 2, ..request() };
        assert_eq!(code(fixed), "InvalidParameterCombination");
    }

    #[test]
    fn only_the_root_disk_has_a_size() {
        let mapping = |device: &str, gib| BlockDeviceMapping {
            device_name: Some(device.into()),
            ebs: Some(model::EbsBlockDevice { volume_size: Some(gib), ..Default::default() }),
            ..Default::default()
        };
        assert_eq!(root_gib(&[mapping(ROOT_DEVICE, 3)]).unwrap(), Some(3));
        assert!(root_gib(&[mapping("/dev/sdb", 3)]).is_err());
        assert!(root_gib(&[mapping(ROOT_DEVICE, 0)]).is_err());
    }
}
