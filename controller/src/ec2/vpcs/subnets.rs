//! Subnets: made, described and deleted.
//!
//! A subnet is in one zone, and on each of the zone's nodes that has an instance of it. Its segment's number, where the cloud's segments have numbers, is
//! given out in the call that makes it, so that one without a number is never answered for.

use sqlx::SqliteConnection;

use super::{cidr, own};
use crate::ec2::filters::{self, Table, flag, one, word};
use crate::ec2::model::{
    CreateSubnetRequest, CreateSubnetResult, DeleteSubnetRequest, DescribeSubnetsRequest, DescribeSubnetsResult,
    ResourceType, Subnet, SubnetState, Tag,
};
use crate::ec2::places::{all_there, is_wanted};
use crate::ec2::{Context, Refusal, lookup, pages, tagging};
use crate::error::Error;
use crate::nodes::segments;
use crate::state::network::{self, Subnet as Row};
use crate::state::{instances, tags, vpcs};

/// Of one VPC: EC2's quota.
const SUBNETS_MOST: usize = 200;

const SUBNETS: Table<Subnet> = &[
    ("subnet-id", |subnet| one(&subnet.subnet_id)),
    ("vpc-id", |subnet| one(&subnet.vpc_id)),
    ("availability-zone", |subnet| one(&subnet.availability_zone)),
    ("availabilityZone", |subnet| one(&subnet.availability_zone)),
    ("availability-zone-id", |subnet| one(&subnet.availability_zone_id)),
    ("cidr", |subnet| one(&subnet.cidr_block)),
    ("cidr-block", |subnet| one(&subnet.cidr_block)),
    ("cidrBlock", |subnet| one(&subnet.cidr_block)),
    ("default-for-az", |subnet| flag(subnet.default_for_az)),
    ("defaultForAz", |subnet| flag(subnet.default_for_az)),
    ("state", |subnet| word(&subnet.state)),
    ("owner-id", |subnet| one(&subnet.owner_id)),
    ("map-public-ip-on-launch", |subnet| flag(subnet.map_public_ip_on_launch)),
];

/// `CreateSubnet`.
pub(crate) async fn create_subnet(
    context: &Context,
    request: CreateSubnetRequest,
) -> Result<CreateSubnetResult, Refusal> {
    refuse_unserved(&request)?;
    let text = request.cidr_block.as_deref().ok_or_else(|| Refusal::missing_parameter("CidrBlock"))?;
    let tags = tagging::requested(&request.tag_specifications, ResourceType::SUBNET)?;
    let mut tx = context.cloud.db.begin().await?;
    let vpc = own(lookup::vpc(&mut tx, context.account(), &request.vpc_id).await?)?;
    let mut there = vpcs::subnets_of_account(&mut tx, context.account()).await?;
    there.retain(|subnet| subnet.vpc_id == vpc.id);
    if there.len() >= SUBNETS_MOST {
        let message = format!("The maximum number of subnets of a VPC ({SUBNETS_MOST}) has been reached.");
        return Err(Refusal::client("SubnetLimitExceeded", message));
    }
    let others = there.iter().map(Row::cidr).collect::<Result<Vec<_>, _>>()?;
    let network = cidr::of_subnet(text, vpc.cidr()?, &others)?;
    let zone = zone(&mut tx, &request).await?;
    let subnet = vpcs::insert_subnet(&mut tx, &vpc.id, &zone, network).await?;
    segments::give_number(&mut tx, &context.cloud, &subnet.id).await.map_err(|error| match error {
        Error::Node(full) => Refusal::client("SubnetLimitExceeded", full),
        other => other.into(),
    })?;
    tagging::write(&mut tx, context.account(), subnet.id.as_str(), ResourceType::SUBNET.as_str(), &tags).await?;
    let shown = shown(context, &mut tx, subnet, (!tags.is_empty()).then_some(tags)).await?;
    context.commit(tx).await?;
    Ok(CreateSubnetResult { subnet: Some(shown) })
}

fn refuse_unserved(request: &CreateSubnetRequest) -> Result<(), Refusal> {
    let unwanted = [
        ("Ipv6CidrBlock", request.ipv6_cidr_block.is_some()),
        ("Ipv6Native", request.ipv6_native == Some(true)),
        ("OutpostArn", request.outpost_arn.is_some()),
        ("Ipv4IpamPoolId", request.ipv4_ipam_pool_id.is_some()),
        ("Ipv4NetmaskLength", request.ipv4_netmask_length.is_some()),
        ("Ipv6IpamPoolId", request.ipv6_ipam_pool_id.is_some()),
    ];
    match unwanted.into_iter().find(|(_, given)| *given) {
        Some((name, _)) => Err(Refusal::unserved(name)),
        None => Ok(()),
    }
}

/// The zone that was asked for, by its name, which is its id too; else the first.
async fn zone(connection: &mut SqliteConnection, request: &CreateSubnetRequest) -> Result<String, Refusal> {
    let zones = network::zones(connection).await?;
    let invalid = |zone: &str| {
        Refusal::invalid_parameter(format!(
            "Value ({zone}) for parameter availabilityZone is invalid. Subnets can currently only be created in the \
             following availability zones: {}.",
            zones.join(", ")
        ))
    };
    let asked: Vec<&String> =
        [&request.availability_zone, &request.availability_zone_id].into_iter().flatten().collect();
    if let Some(unknown) = asked.iter().find(|asked| !zones.contains(asked)) {
        return Err(invalid(unknown));
    }
    match asked.as_slice() {
        [] => zones.first().cloned().ok_or_else(|| invalid("")),
        [one] => Ok((*one).clone()),
        [name, id, ..] if name == id => Ok((*name).clone()),
        _ => Err(Refusal::client(
            "InvalidParameterCombination",
            "AvailabilityZone and AvailabilityZoneId are not of the same zone",
        )),
    }
}

/// `DeleteSubnet`.
pub(crate) async fn delete_subnet(context: &Context, request: DeleteSubnetRequest) -> Result<(), Refusal> {
    let mut tx = context.cloud.db.begin().await?;
    let subnet = lookup::subnet(&mut tx, context.account(), &lookup::subnet_id(&request.subnet_id)?).await?;
    own(lookup::vpc(&mut tx, context.account(), subnet.vpc_id.as_str()).await?)?;
    if !instances::on_subnet(&mut tx, &subnet.id).await?.is_empty() {
        let message =
            format!("The subnet '{}' has dependencies and cannot be deleted: terminate its instances", subnet.id);
        return Err(Refusal::client("DependencyViolation", message));
    }
    tags::remove_all(&mut tx, context.account(), subnet.id.as_str()).await?;
    vpcs::delete_subnet(&mut tx, &subnet.id).await?;
    context.commit(tx).await
}

/// `DescribeSubnets`.
pub(crate) async fn describe_subnets(
    context: &Context,
    request: DescribeSubnetsRequest,
) -> Result<DescribeSubnetsResult, Refusal> {
    let mut tx = context.cloud.db.snapshot().await?;
    let tags = tags::by_resource(&mut tx, context.account()).await?;
    let mut subnets = Vec::new();
    for subnet in vpcs::subnets_of_account(&mut tx, context.account()).await? {
        let tags = tagging::answer(tags.get(subnet.id.as_str()));
        subnets.push(shown(context, &mut tx, subnet, tags).await?);
    }
    all_there(&request.subnet_ids, subnets.iter().filter_map(|subnet| subnet.subnet_id.as_deref()), lookup::no_subnet)?;
    subnets.retain(|subnet| is_wanted(&request.subnet_ids, &subnet.subnet_id));
    let subnets = filters::select(subnets, &request.filters, SUBNETS)?;
    let key = |subnet: &Subnet| subnet.subnet_id.clone().unwrap_or_default();
    let (subnets, next_token) = pages::page(subnets, key, request.max_results, request.next_token.as_deref())?;
    Ok(DescribeSubnetsResult { subnets: Some(subnets), next_token })
}

async fn shown(
    context: &Context,
    connection: &mut SqliteConnection,
    subnet: Row,
    tags: Option<Vec<Tag>>,
) -> Result<Subnet, Refusal> {
    let used = network::addresses_in_use(connection, &subnet.id).await?.len();
    let free = subnet.instance_addresses()?.count().saturating_sub(used);
    let (region, account) = (&context.cloud.region, context.account());
    Ok(Subnet {
        availability_zone: Some(subnet.zone.clone()),
        available_ip_address_count: Some(i32::try_from(free).unwrap_or(i32::MAX)),
        cidr_block: Some(subnet.cidr()?.to_string()),
        default_for_az: Some(subnet.is_default),
        map_public_ip_on_launch: Some(false),
        assign_ipv6_address_on_creation: Some(false),
        owner_id: Some(account.to_owned()),
        state: Some(SubnetState::AVAILABLE),
        subnet_arn: Some(format!("arn:aws:ec2:{region}:{account}:subnet/{}", subnet.id)),
        tags,
        vpc_id: Some(subnet.vpc_id.into()),
        subnet_id: Some(subnet.id.into()),
        availability_zone_id: Some(subnet.zone),
        ..Subnet::default()
    })
}
