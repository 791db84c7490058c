//! Where things are: the one region, its zones, the default VPC, the subnets.
//!
//! A zone is there from the time the operator added its first node; it is `available` while a node of it
//! attends. These things are the cloud's, the same for every account.

use super::filters::{self, Table, flag, one, word};
use super::model::{
    AvailabilityZone, AvailabilityZoneOptInStatus, AvailabilityZoneState, DescribeAvailabilityZonesRequest,
    DescribeAvailabilityZonesResult, DescribeRegionsRequest, DescribeRegionsResult, DescribeSubnetsRequest,
    DescribeSubnetsResult, DescribeVpcsRequest, DescribeVpcsResult, Region, Subnet, SubnetState, Tenancy, Vpc,
    VpcCidrBlockAssociation, VpcCidrBlockState, VpcCidrBlockStateCode, VpcState,
};
use super::{Context, Refusal, pages, tagging};
use crate::nodes;
use crate::state::{network, tags};

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

const VPCS: Table<Vpc> = &[
    ("vpc-id", |vpc| one(&vpc.vpc_id)),
    ("cidr", |vpc| one(&vpc.cidr_block)),
    ("cidr-block-association.cidr-block", |vpc| one(&vpc.cidr_block)),
    ("is-default", |vpc| flag(vpc.is_default)),
    ("isDefault", |vpc| flag(vpc.is_default)),
    ("state", |vpc| word(&vpc.state)),
    ("owner-id", |vpc| one(&vpc.owner_id)),
];

const SUBNETS: Table<Subnet> = &[
    ("subnet-id", |subnet| one(&subnet.subnet_id)),
    ("vpc-id", |subnet| one(&subnet.vpc_id)),
    ("availability-zone", |subnet| one(&subnet.availability_zone)),
    ("availabilityZone", |subnet| one(&subnet.availability_zone)),
    ("cidr-block", |subnet| one(&subnet.cidr_block)),
    ("cidrBlock", |subnet| one(&subnet.cidr_block)),
    ("default-for-az", |subnet| flag(subnet.default_for_az)),
    ("defaultForAz", |subnet| flag(subnet.default_for_az)),
    ("state", |subnet| word(&subnet.state)),
    ("owner-id", |subnet| one(&subnet.owner_id)),
    ("map-public-ip-on-launch", |subnet| flag(subnet.map_public_ip_on_launch)),
];

/// Refuses when something that was named is not there.
fn all_there<'a>(
    wanted: &[String],
    there: impl Iterator<Item = &'a str> + Clone,
    refusal: impl Fn(&str) -> Refusal,
) -> Result<(), Refusal> {
    let missing = wanted.iter().find(|wanted| !there.clone().any(|name| name == wanted.as_str()));
    missing.map_or(Ok(()), |missing| Err(refusal(missing)))
}

fn is_wanted(wanted: &[String], value: &Option<String>) -> bool {
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
    let subnets = network::subnets(&mut *context.cloud.db.snapshot().await?).await?;
    let mut zones: Vec<AvailabilityZone> = subnets
        .into_iter()
        .map(|subnet| {
            let attended = nodes.iter().any(|node| node.zone == subnet.zone && node.connected);
            zone(&context.cloud.region, subnet.zone, attended)
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

/// `DescribeVpcs`.
pub(crate) async fn describe_vpcs(
    context: &Context,
    request: DescribeVpcsRequest,
) -> Result<DescribeVpcsResult, Refusal> {
    let mut tx = context.cloud.db.snapshot().await?;
    let vpc = network::default_vpc(&mut tx).await?;
    let tags = tags::by_resource(&mut tx, context.account()).await?;
    all_there(&request.vpc_ids, [vpc.id.as_str()].into_iter(), |id| {
        Refusal::client("InvalidVpcID.NotFound", format!("The vpc ID '{id}' does not exist"))
    })?;
    let cidr = vpc.cidr()?.to_string();
    let block = VpcCidrBlockAssociation {
        association_id: Some(vpc.id.as_str().replacen("vpc-", "vpc-cidr-assoc-", 1)),
        cidr_block: Some(cidr.clone()),
        cidr_block_state: Some(VpcCidrBlockState {
            state: Some(VpcCidrBlockStateCode::ASSOCIATED),
            ..VpcCidrBlockState::default()
        }),
    };
    let answer = Vpc {
        cidr_block: Some(cidr),
        cidr_block_association_set: Some(vec![block]),
        instance_tenancy: Some(Tenancy::DEFAULT),
        is_default: Some(true),
        owner_id: Some(context.account().to_owned()),
        state: Some(VpcState::AVAILABLE),
        tags: tagging::answer(tags.get(vpc.id.as_str())),
        vpc_id: Some(vpc.id.into()),
        ..Vpc::default()
    };
    let vpcs = filters::select(vec![answer], &request.filters, VPCS)?;
    let key = |vpc: &Vpc| vpc.vpc_id.clone().unwrap_or_default();
    let (vpcs, next_token) = pages::page(vpcs, key, request.max_results, request.next_token.as_deref())?;
    Ok(DescribeVpcsResult { vpcs: Some(vpcs), next_token })
}

/// `DescribeSubnets`.
pub(crate) async fn describe_subnets(
    context: &Context,
    request: DescribeSubnetsRequest,
) -> Result<DescribeSubnetsResult, Refusal> {
    let mut tx = context.cloud.db.snapshot().await?;
    let tags = tags::by_resource(&mut tx, context.account()).await?;
    let mut subnets = Vec::new();
    for subnet in network::subnets(&mut tx).await? {
        let used = network::addresses_in_use(&mut tx, &subnet.id).await?.len();
        let free = subnet.instance_addresses()?.count().saturating_sub(used);
        subnets.push(Subnet {
            availability_zone: Some(subnet.zone.clone()),
            availability_zone_id: Some(subnet.zone.clone()),
            available_ip_address_count: Some(i32::try_from(free).unwrap_or(i32::MAX)),
            cidr_block: Some(subnet.cidr()?.to_string()),
            default_for_az: Some(true),
            map_public_ip_on_launch: Some(false),
            assign_ipv6_address_on_creation: Some(false),
            owner_id: Some(context.account().to_owned()),
            state: Some(SubnetState::AVAILABLE),
            tags: tagging::answer(tags.get(subnet.id.as_str())),
            vpc_id: Some(subnet.vpc_id.into()),
            subnet_id: Some(subnet.id.into()),
            ..Subnet::default()
        });
    }
    all_there(&request.subnet_ids, subnets.iter().filter_map(|subnet| subnet.subnet_id.as_deref()), |id| {
        Refusal::client("InvalidSubnetID.NotFound", format!("The subnet ID '{id}' does not exist"))
    })?;
    subnets.retain(|subnet| is_wanted(&request.subnet_ids, &subnet.subnet_id));
    let subnets = filters::select(subnets, &request.filters, SUBNETS)?;
    let key = |subnet: &Subnet| subnet.subnet_id.clone().unwrap_or_default();
    let (subnets, next_token) = pages::page(subnets, key, request.max_results, request.next_token.as_deref())?;
    Ok(DescribeSubnetsResult { subnets: Some(subnets), next_token })
}
