//! An instance as EC2's answers show it, put together from what the state knows.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use sqlx::SqliteConnection;

use super::super::model::{
    self, ArchitectureValues, AttachmentStatus, BootModeValues, CpuOptions, DeviceType, EbsInstanceBlockDevice,
    GroupIdentifier, HttpTokensState, HypervisorType, InstanceBlockDeviceMapping, InstanceMetadataEndpointState,
    InstanceMetadataOptionsResponse, InstanceMetadataOptionsState, InstanceNetworkInterface,
    InstanceNetworkInterfaceAssociation, InstanceNetworkInterfaceAttachment, InstancePrivateIpAddress, Monitoring,
    MonitoringState, NetworkInterfaceStatus, Placement, Reservation, Tenancy, VirtualizationType,
};
use super::super::tagging;
use crate::clock;
use crate::error::Result;
use crate::ids::{InstanceId, SecurityGroupId, SubnetId};
use crate::state::addresses::{self, Address};
use crate::state::instances::{self, Instance};
use crate::state::lifecycle::InstanceState;
use crate::state::network::{self, Subnet};
use crate::state::{security_groups, tags};

/// The root disk's name, to EC2's tools and to the guest.
pub(in crate::ec2) const ROOT_DEVICE: &str = "/dev/vda";

/// What is needed beside the instances' own rows.
pub(in crate::ec2) struct Surroundings {
    account: String,
    subnets: HashMap<SubnetId, Subnet>,
    groups: HashMap<SecurityGroupId, String>,
    /// Elastic IPs that stand for something, by instance.
    public_ips: HashMap<InstanceId, Vec<Address>>,
    tags: HashMap<String, Vec<tags::Tag>>,
    domain: String,
}

impl Surroundings {
    pub async fn read(connection: &mut SqliteConnection, account: &str, domain: String) -> Result<Surroundings> {
        // Also those that were deleted: terminated instances show their zone still.
        let subnets = network::subnets_of_all_times(connection).await?;
        let groups = security_groups::of_account(connection, account).await?;
        let mut public_ips: HashMap<InstanceId, Vec<Address>> = HashMap::new();
        for held in addresses::of_account(connection, account).await? {
            if let Some(instance) = held.instance_id.clone() {
                public_ips.entry(instance).or_default().push(held);
            }
        }
        Ok(Surroundings {
            account: account.to_owned(),
            subnets: subnets.into_iter().map(|subnet| (subnet.id.clone(), subnet)).collect(),
            groups: groups.into_iter().map(|group| (group.id, group.name)).collect(),
            public_ips,
            tags: tags::by_resource(connection, account).await?,
            domain,
        })
    }

    /// Instances under their reservations, each reservation once, by its id; its instances in the order of their launch.
    pub fn reservations(&self, mut instances: Vec<Instance>) -> Vec<Reservation> {
        instances.sort_by(|a, b| (&a.reservation_id, a.launch_index).cmp(&(&b.reservation_id, b.launch_index)));
        let mut out: Vec<Reservation> = Vec::new();
        for instance in instances {
            let id = instance.reservation_id.to_string();
            let answer = self.instance(&instance);
            match out.last_mut() {
                Some(last) if last.reservation_id.as_ref() == Some(&id) => {
                    last.instances.get_or_insert_default().push(answer);
                }
                _ => out.push(Reservation {
                    reservation_id: Some(id),
                    owner_id: Some(self.account.clone()),
                    // Groups of the reservation itself are of EC2-Classic.
                    groups: Some(Vec::new()),
                    instances: Some(vec![answer]),
                    ..Default::default()
                }),
            }
        }
        out
    }

    pub fn zone(&self, instance: &Instance) -> Option<String> {
        self.subnets.get(&instance.subnet_id).map(|subnet| subnet.zone.clone())
    }

    pub fn instance(&self, instance: &Instance) -> model::Instance {
        let gone = instance.state == InstanceState::Terminated;
        let live = |value: String| (!gone).then_some(value);
        let private_name = self.private_name(instance.private_ip.0);
        model::Instance {
            instance_id: Some(instance.id.to_string()),
            image_id: Some(instance.image_id.to_string()),
            state: Some(state(instance.state)),
            state_reason: state_reason(instance),
            state_transition_reason: Some(instance.transition.clone()),
            instance_type: Some(instance.instance_type.clone()),
            key_name: instance.key_name.clone(),
            launch_time: Some(clock::date(instance.launched_ns)),
            ami_launch_index: Some(instance.launch_index),
            client_token: instance.client_token.clone(),
            placement: Some(Placement {
                availability_zone: self.zone(instance),
                group_name: Some(String::new()),
                tenancy: Some(Tenancy::DEFAULT),
                ..Default::default()
            }),
            private_dns_name: Some(if gone { String::new() } else { private_name }),
            public_dns_name: Some(String::new()),
            private_ip_address: live(instance.private_ip.0.to_string()),
            public_ip_address: self.standing_for(instance, instance.private_ip.0).map(|held| held.public_ip.clone()),
            subnet_id: live(instance.subnet_id.to_string()),
            vpc_id: self.vpc(instance).filter(|_| !gone),
            security_groups: Some(if gone { Vec::new() } else { self.groups(instance) }),
            network_interfaces: Some(if gone { Vec::new() } else { vec![self.interface(instance)] }),
            block_device_mappings: Some(if gone { Vec::new() } else { root_disk(instance) }),
            root_device_name: Some(ROOT_DEVICE.to_owned()),
            root_device_type: Some(DeviceType::EBS),
            source_dest_check: Some(instance.source_dest_check),
            architecture: Some(ArchitectureValues::X86_64),
            virtualization_type: Some(VirtualizationType::HVM),
            hypervisor: Some(HypervisorType::XEN),
            boot_mode: Some(BootModeValues::LEGACY_BIOS),
            ebs_optimized: Some(false),
            ena_support: Some(false),
            platform_details: Some("Linux/UNIX".to_owned()),
            cpu_options: Some(CpuOptions {
                core_count: i32::try_from(instance.vcpus).ok(),
                threads_per_core: Some(1),
                ..Default::default()
            }),
            metadata_options: Some(metadata_options()),
            monitoring: Some(Monitoring { state: Some(MonitoringState::DISABLED), ..Default::default() }),
            product_codes: Some(Vec::new()),
            tags: tagging::answer(self.tags.get(instance.id.as_str())),
            ..Default::default()
        }
    }

    /// The elastic IP that stands for one of the instance's addresses.
    pub fn standing_for(&self, instance: &Instance, private_ip: Ipv4Addr) -> Option<&Address> {
        let private_ip = private_ip.to_string();
        self.public_ips.get(&instance.id)?.iter().find(|held| held.private_ip.as_ref() == Some(&private_ip))
    }

    /// The name that follows from a private address.
    pub fn private_name(&self, private_ip: Ipv4Addr) -> String {
        format!("{}.{}", instances::short_name(private_ip), self.domain)
    }

    pub fn vpc(&self, instance: &Instance) -> Option<String> {
        self.subnets.get(&instance.subnet_id).map(|subnet| subnet.vpc_id.to_string())
    }

    pub fn groups(&self, instance: &Instance) -> Vec<GroupIdentifier> {
        let group = |id: &SecurityGroupId| GroupIdentifier {
            group_id: Some(id.to_string()),
            group_name: self.groups.get(id).cloned(),
        };
        instance.security_groups.iter().map(group).collect()
    }

    fn interface(&self, instance: &Instance) -> InstanceNetworkInterface {
        let association = |private_ip: Ipv4Addr| {
            self.standing_for(instance, private_ip).map(|held| InstanceNetworkInterfaceAssociation {
                public_ip: Some(held.public_ip.clone()),
                public_dns_name: Some(String::new()),
                ip_owner_id: Some(self.account.clone()),
                ..Default::default()
            })
        };
        let addresses = instance.addresses().map(|held| InstancePrivateIpAddress {
            primary: Some(held == instance.private_ip.0),
            private_ip_address: Some(held.to_string()),
            private_dns_name: Some(self.private_name(held)),
            association: association(held),
        });
        InstanceNetworkInterface {
            network_interface_id: Some(instance.interface_id.to_string()),
            subnet_id: Some(instance.subnet_id.to_string()),
            vpc_id: self.vpc(instance),
            owner_id: Some(self.account.clone()),
            description: Some(String::new()),
            interface_type: Some("interface".to_owned()),
            status: Some(NetworkInterfaceStatus::IN_USE),
            mac_address: Some(instance.mac.clone()),
            private_ip_address: Some(instance.private_ip.0.to_string()),
            private_dns_name: Some(self.private_name(instance.private_ip.0)),
            source_dest_check: Some(instance.source_dest_check),
            groups: Some(self.groups(instance)),
            ipv6_addresses: Some(Vec::new()),
            attachment: Some(InstanceNetworkInterfaceAttachment {
                attachment_id: Some(instance.attachment_id.to_string()),
                device_index: Some(0),
                network_card_index: Some(0),
                status: Some(AttachmentStatus::ATTACHED),
                attach_time: Some(clock::date(instance.launched_ns)),
                delete_on_termination: Some(true),
                ..Default::default()
            }),
            private_ip_addresses: Some(addresses.collect()),
            association: association(instance.private_ip.0),
            ..Default::default()
        }
    }
}

/// EC2's `InstanceState`.
pub(super) fn state(state: InstanceState) -> model::InstanceState {
    use model::InstanceStateName as Name;
    let name = match state {
        InstanceState::Pending => Name::PENDING,
        InstanceState::Running => Name::RUNNING,
        InstanceState::Stopping => Name::STOPPING,
        InstanceState::Stopped => Name::STOPPED,
        InstanceState::ShuttingDown => Name::SHUTTING_DOWN,
        InstanceState::Terminated => Name::TERMINATED,
    };
    model::InstanceState { code: Some(state.code()), name: Some(name) }
}

fn state_reason(instance: &Instance) -> Option<model::StateReason> {
    match (&instance.state_code, &instance.state_message) {
        (None, None) if instance.state == InstanceState::Pending => {
            Some(model::StateReason { code: Some("pending".to_owned()), message: Some("pending".to_owned()) })
        }
        (None, None) => None,
        (code, message) => Some(model::StateReason { code: code.clone(), message: message.clone() }),
    }
}

fn root_disk(instance: &Instance) -> Vec<InstanceBlockDeviceMapping> {
    if instance.root_bytes == 0 {
        return Vec::new();
    }
    vec![InstanceBlockDeviceMapping {
        device_name: Some(ROOT_DEVICE.to_owned()),
        ebs: Some(EbsInstanceBlockDevice {
            volume_id: Some(instance.volume_id.to_string()),
            status: Some(AttachmentStatus::ATTACHED),
            attach_time: Some(clock::date(instance.launched_ns)),
            delete_on_termination: Some(true),
            ..Default::default()
        }),
    }]
}

/// The agent's metadata service answers both versions.
fn metadata_options() -> InstanceMetadataOptionsResponse {
    InstanceMetadataOptionsResponse {
        state: Some(InstanceMetadataOptionsState::APPLIED),
        http_endpoint: Some(InstanceMetadataEndpointState::ENABLED),
        http_tokens: Some(HttpTokensState::OPTIONAL),
        http_put_response_hop_limit: Some(1),
        ..Default::default()
    }
}
