//! `DescribeNetworkInterfaces`. An instance has one interface, which comes and goes with it.

use super::filters::{self, Table, flag, one, word};
use super::instances::Surroundings;
use super::model::{
    DescribeNetworkInterfacesRequest, DescribeNetworkInterfacesResult, NetworkInterface, NetworkInterfaceAssociation,
    NetworkInterfaceAttachment, NetworkInterfacePrivateIpAddress, NetworkInterfaceStatus, NetworkInterfaceType,
};
use super::{Context, Refusal, lookup, pages};
use crate::clock;
use crate::state::addresses::Address;
use crate::state::instances::{self, Instance};
use crate::state::lifecycle::InstanceState;

const INTERFACES: Table<NetworkInterface> = &[
    ("network-interface-id", |eni| one(&eni.network_interface_id)),
    ("addresses.private-ip-address", |eni| of_addresses(eni, |held| one(&held.private_ip_address))),
    ("addresses.primary", |eni| of_addresses(eni, |held| flag(held.primary))),
    ("addresses.association.public-ip", |eni| of_addresses(eni, |held| public_ip(&held.association))),
    ("association.public-ip", |eni| public_ip(&eni.association)),
    ("attachment.instance-id", |eni| eni.attachment.as_ref().map_or_else(Vec::new, |held| one(&held.instance_id))),
    ("attachment.attachment-id", |eni| eni.attachment.as_ref().map_or_else(Vec::new, |held| one(&held.attachment_id))),
    ("availability-zone", |eni| one(&eni.availability_zone)),
    ("group-id", |eni| eni.groups.iter().flatten().filter_map(|group| group.group_id.clone()).collect()),
    ("group-name", |eni| eni.groups.iter().flatten().filter_map(|group| group.group_name.clone()).collect()),
    ("mac-address", |eni| one(&eni.mac_address)),
    ("owner-id", |eni| one(&eni.owner_id)),
    ("private-dns-name", |eni| one(&eni.private_dns_name)),
    ("private-ip-address", |eni| one(&eni.private_ip_address)),
    ("source-dest-check", |eni| flag(eni.source_dest_check)),
    ("status", |eni| word(&eni.status)),
    ("subnet-id", |eni| one(&eni.subnet_id)),
    ("vpc-id", |eni| one(&eni.vpc_id)),
];

fn of_addresses(eni: &NetworkInterface, field: fn(&NetworkInterfacePrivateIpAddress) -> Vec<String>) -> Vec<String> {
    eni.private_ip_addresses.iter().flatten().flat_map(field).collect()
}

fn public_ip(association: &Option<NetworkInterfaceAssociation>) -> Vec<String> {
    association.iter().filter_map(|association| association.public_ip.clone()).collect()
}

/// `DescribeNetworkInterfaces`.
pub(crate) async fn describe_network_interfaces(
    context: &Context,
    request: DescribeNetworkInterfacesRequest,
) -> Result<DescribeNetworkInterfacesResult, Refusal> {
    let mut snapshot = context.cloud.db.snapshot().await?;
    let mut wanted = Vec::new();
    if request.network_interface_ids.is_empty() {
        wanted = instances::of_account(&mut snapshot, context.account()).await?;
        wanted.retain(|one| one.state != InstanceState::Terminated);
    }
    for id in &request.network_interface_ids {
        wanted.push(lookup::by_interface(&mut snapshot, context.account(), id).await?);
    }
    let domain = context.cloud.config.private_domain();
    let around = Surroundings::read(&mut snapshot, context.account(), domain).await?;
    drop(snapshot);
    let shown = wanted.iter().map(|one| interface(one, &around)).collect();
    let shown = filters::select(shown, &request.filters, INTERFACES)?;
    let key = |eni: &NetworkInterface| eni.network_interface_id.clone().unwrap_or_default();
    let (interfaces, next_token) = pages::page(shown, key, request.max_results, request.next_token.as_deref())?;
    Ok(DescribeNetworkInterfacesResult { network_interfaces: Some(interfaces), next_token })
}

fn interface(instance: &Instance, around: &Surroundings) -> NetworkInterface {
    let addresses: Vec<_> = instance
        .addresses()
        .map(|held| NetworkInterfacePrivateIpAddress {
            association: around.standing_for(instance, held).map(association),
            primary: Some(held == instance.private_ip.0),
            private_dns_name: Some(around.private_name(held)),
            private_ip_address: Some(held.to_string()),
        })
        .collect();
    NetworkInterface {
        association: around.standing_for(instance, instance.private_ip.0).map(association),
        attachment: Some(NetworkInterfaceAttachment {
            attach_time: Some(clock::date(instance.launched_ns)),
            attachment_id: Some(instance.attachment_id.to_string()),
            delete_on_termination: Some(true),
            device_index: Some(0),
            network_card_index: Some(0),
            instance_id: Some(instance.id.to_string()),
            instance_owner_id: Some(instance.account_id.clone()),
            status: Some(super::model::AttachmentStatus::ATTACHED),
            ..NetworkInterfaceAttachment::default()
        }),
        availability_zone: around.zone(instance),
        description: Some(String::new()),
        groups: Some(around.groups(instance)),
        interface_type: Some(NetworkInterfaceType::INTERFACE),
        ipv6_addresses: Some(Vec::new()),
        mac_address: Some(instance.mac.clone()),
        network_interface_id: Some(instance.interface_id.to_string()),
        owner_id: Some(instance.account_id.clone()),
        private_dns_name: Some(around.private_name(instance.private_ip.0)),
        private_ip_address: Some(instance.private_ip.0.to_string()),
        private_ip_addresses: Some(addresses),
        requester_managed: Some(false),
        source_dest_check: Some(instance.source_dest_check),
        status: Some(NetworkInterfaceStatus::IN_USE),
        subnet_id: Some(instance.subnet_id.to_string()),
        tag_set: Some(Vec::new()),
        vpc_id: around.vpc(instance),
        ..NetworkInterface::default()
    }
}

fn association(held: &Address) -> NetworkInterfaceAssociation {
    NetworkInterfaceAssociation {
        allocation_id: Some(held.allocation_id.to_string()),
        association_id: held.association_id.as_ref().map(ToString::to_string),
        ip_owner_id: Some(held.account_id.clone()),
        public_dns_name: Some(String::new()),
        public_ip: Some(held.public_ip.clone()),
        ..NetworkInterfaceAssociation::default()
    }
}
