//! Where things are: the one region and its zones.
//!
//! A zone is there from the time the operator added its first node; it is `available` while a node of it
//! attends. These things are the cloud's, the same for every account.

use super::filters::{self, Table, one, word};
use super::model::{
    AvailabilityZone, AvailabilityZoneOptInStatus, AvailabilityZoneState, DescribeAvailabilityZonesRequest,
    DescribeAvailabilityZonesResult, DescribeRegionsRequest, DescribeRegionsResult, Region,
};
use super::{Context, Refusal};
use crate::nodes;
use crate::state::network;

const REGIONS: Table<Region> = &[
    ("region-name", |region| one(&region.region_name)),
    ("endpoint", |region| one(&region.endpoint)),
    ("opt-in-status", |region| one(&region.opt_in_status)),
];

const ZONES: Table<AvailabilityZone> = &[
    ("zone-name", |zone| one(&zone.zone_name)),
    ("zone-id", |zone| one(&zone.zone_id)),
    ("zone-type", |zone| one(&zone.zone_type)),
    ("region-name", |zone| one(&zone.region_name)),
    ("state", |zone| word(&zone.state)),
    ("opt-in-status", |zone| word(&zone.opt_in_status)),
    ("group-name", |zone| one(&zone.group_name)),
];

/// Refuses when something that was named is not there.
pub(super) fn all_there<'a>(
    wanted: &[String],
    there: impl Iterator<Item = &'a str> + Clone,
    refusal: impl Fn(&str) -> Refusal,
) -> Result<(), Refusal> {
    let missing = wanted.iter().find(|wanted| !there.clone().any(|name| name == wanted.as_str()));
    missing.map_or(Ok(()), |missing| Err(refusal(missing)))
}

pub(super) fn is_wanted(wanted: &[String], value: &Option<String>) -> bool {
    wanted.is_empty() || value.as_ref().is_some_and(|value| wanted.contains(value))
}

/// `DescribeRegions`.
pub(crate) async fn describe_regions(
    context: &Context,
    request: DescribeRegionsRequest,
) -> Result<DescribeRegionsResult, Refusal> {
    let name = context.cloud.region.clone();
    all_there(&request.region_names, [name.as_str()].into_iter(), |wanted| {
        Refusal::invalid_parameter(format!("Invalid region: {wanted}. This cloud is the region {name}."))
    })?;
    let region = Region {
        endpoint: Some(context.cloud.config.listen.to_string()),
        opt_in_status: Some("opt-in-not-required".to_owned()),
        region_name: Some(name),
        ..Region::default()
    };
    Ok(DescribeRegionsResult { regions: Some(filters::select(vec![region], &request.filters, REGIONS)?) })
}

/// `DescribeAvailabilityZones`.
pub(crate) async fn describe_availability_zones(
    context: &Context,
    request: DescribeAvailabilityZonesRequest,
) -> Result<DescribeAvailabilityZonesResult, Refusal> {
    let nodes = nodes::list(&context.cloud).await?;
    let names = network::zones(&mut *context.cloud.db.snapshot().await?).await?;
    let mut zones: Vec<AvailabilityZone> = names
        .into_iter()
        .map(|name| {
            let attended = nodes.iter().any(|node| node.zone == name && node.connected);
            zone(&context.cloud.region, name, attended)
        })
        .collect();
    let names = zones.iter().filter_map(|zone| zone.zone_name.as_deref());
    let unknown = |zone: &str| {
        Refusal::invalid_parameter(format!(
            "Invalid availability zone: [{zone}]. Nodes are added with `mallee node add`."
        ))
    };
    all_there(&request.zone_names, names.clone(), unknown)?;
    all_there(&request.zone_ids, zones.iter().filter_map(|zone| zone.zone_id.as_deref()), unknown)?;
    zones.retain(|zone| is_wanted(&request.zone_names, &zone.zone_name) && is_wanted(&request.zone_ids, &zone.zone_id));
    Ok(DescribeAvailabilityZonesResult { availability_zones: Some(filters::select(zones, &request.filters, ZONES)?) })
}

fn zone(region: &str, name: String, attended: bool) -> AvailabilityZone {
    let state = if attended { AvailabilityZoneState::AVAILABLE } else { AvailabilityZoneState::UNAVAILABLE };
    AvailabilityZone {
        group_name: Some(region.to_owned()),
        messages: Some(Vec::new()),
        network_border_group: Some(region.to_owned()),
        opt_in_status: Some(AvailabilityZoneOptInStatus::OPT_IN_NOT_REQUIRED),
        region_name: Some(region.to_owned()),
        state: Some(state),
        zone_id: Some(name.clone()),
        zone_name: Some(name),
        zone_type: Some("availability-zone".to_owned()),
        ..AvailabilityZone::default()
    }
}
