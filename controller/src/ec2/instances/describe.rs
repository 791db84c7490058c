//! `DescribeInstances`.

use super::super::filters::{self, Table, flag, one, word};
use super::super::model::{self, DescribeInstancesRequest, DescribeInstancesResult, Reservation};
use super::super::{Context, Refusal, lookup, pages};
use super::view::Surroundings;
use crate::state::instances;

const INSTANCES: Table<model::Instance> = &[
    ("instance-id", |i| one(&i.instance_id)),
    ("image-id", |i| one(&i.image_id)),
    ("instance-type", |i| one(&i.instance_type)),
    ("instance-state-name", |i| i.state.as_ref().map_or_else(Vec::new, |state| word(&state.name))),
    ("instance-state-code", |i| i.state.iter().filter_map(|s| s.code).map(|code| code.to_string()).collect()),
    ("key-name", |i| one(&i.key_name)),
    ("client-token", |i| one(&i.client_token)),
    ("availability-zone", |i| i.placement.as_ref().map_or_else(Vec::new, |p| one(&p.availability_zone))),
    ("private-ip-address", |i| one(&i.private_ip_address)),
    ("private-dns-name", |i| one(&i.private_dns_name)),
    ("ip-address", |i| one(&i.public_ip_address)),
    ("subnet-id", |i| one(&i.subnet_id)),
    ("vpc-id", |i| one(&i.vpc_id)),
    ("architecture", |i| word(&i.architecture)),
    ("root-device-name", |i| one(&i.root_device_name)),
    ("root-device-type", |i| word(&i.root_device_type)),
    ("virtualization-type", |i| word(&i.virtualization_type)),
    ("source-dest-check", |i| flag(i.source_dest_check)),
    ("launch-index", |i| i.ami_launch_index.iter().map(ToString::to_string).collect()),
    ("state-reason-code", |i| i.state_reason.as_ref().map_or_else(Vec::new, |reason| one(&reason.code))),
    ("group-id", group_ids),
    ("instance.group-id", group_ids),
    ("group-name", group_names),
    ("instance.group-name", group_names),
    ("network-interface.network-interface-id", |i| interfaces(i, |eni| one(&eni.network_interface_id))),
    ("network-interface.mac-address", |i| interfaces(i, |eni| one(&eni.mac_address))),
    ("network-interface.addresses.private-ip-address", |i| {
        interfaces(i, |eni| {
            eni.private_ip_addresses.iter().flatten().filter_map(|held| held.private_ip_address.clone()).collect()
        })
    }),
    ("block-device-mapping.volume-id", |i| {
        let mappings = i.block_device_mappings.iter().flatten();
        mappings.filter_map(|mapping| mapping.ebs.as_ref()?.volume_id.clone()).collect()
    }),
];

fn group_ids(instance: &model::Instance) -> Vec<String> {
    instance.security_groups.iter().flatten().filter_map(|group| group.group_id.clone()).collect()
}

fn group_names(instance: &model::Instance) -> Vec<String> {
    instance.security_groups.iter().flatten().filter_map(|group| group.group_name.clone()).collect()
}

fn interfaces(
    instance: &model::Instance,
    field: impl Fn(&model::InstanceNetworkInterface) -> Vec<String>,
) -> Vec<String> {
    instance.network_interfaces.iter().flatten().flat_map(field).collect()
}

/// `DescribeInstances`. A reservation is shown with those of its instances that pass the filters.
pub(crate) async fn describe_instances(
    context: &Context,
    request: DescribeInstancesRequest,
) -> Result<DescribeInstancesResult, Refusal> {
    if request.max_results.is_some() && !request.instance_ids.is_empty() {
        return Err(Refusal::client(
            "InvalidParameterCombination",
            "The parameters InstanceId and MaxResults cannot be used together: leave one of them out",
        ));
    }
    let mut snapshot = context.cloud.db.snapshot().await?;
    let wanted = if request.instance_ids.is_empty() {
        instances::of_account(&mut snapshot, context.account()).await?
    } else {
        lookup::instances(&mut snapshot, context.account(), &request.instance_ids).await?
    };
    let domain = context.cloud.config.private_domain();
    let surroundings = Surroundings::read(&mut snapshot, context.account(), domain).await?;
    drop(snapshot);

    let mut reservations = reservation_filters(surroundings.reservations(wanted), &request.filters);
    let filters: Vec<model::Filter> =
        request.filters.iter().filter(|filter| !is_of_reservation(filter)).cloned().collect();
    for reservation in &mut reservations {
        let instances = reservation.instances.take().unwrap_or_default();
        reservation.instances = Some(filters::select(instances, &filters, INSTANCES)?);
    }
    // An unknown filter is refused also when there is nothing to filter.
    filters::select(Vec::new(), &filters, INSTANCES)?;
    reservations.retain(|reservation| reservation.instances.as_ref().is_some_and(|list| !list.is_empty()));
    let (reservations, next_token) =
        pages::page(reservations, key, request.max_results, request.next_token.as_deref())?;
    Ok(DescribeInstancesResult { reservations: Some(reservations), next_token })
}

fn is_of_reservation(filter: &model::Filter) -> bool {
    matches!(filter.name.as_deref(), Some("reservation-id" | "owner-id"))
}

fn reservation_filters(reservations: Vec<Reservation>, filters: &[model::Filter]) -> Vec<Reservation> {
    let passes = |reservation: &Reservation, filter: &model::Filter| {
        let field = match filter.name.as_deref() {
            Some("reservation-id") => &reservation.reservation_id,
            _ => &reservation.owner_id,
        };
        filter.values.iter().flatten().any(|value| Some(value) == field.as_ref())
    };
    let of_reservation: Vec<&model::Filter> = filters.iter().filter(|filter| is_of_reservation(filter)).collect();
    reservations
        .into_iter()
        .filter(|reservation| of_reservation.iter().all(|filter| passes(reservation, filter)))
        .collect()
}

/// Pages are in the order of reservations' ids, which never change: the time of a launch does, when an instance is started again.
fn key(reservation: &Reservation) -> String {
    reservation.reservation_id.clone().unwrap_or_default()
}
