//! VPCs: made, described and deleted here.
//!
//! * `cidr.rs`: which networks a VPC and its subnets may have.
//! * `attributes.rs`: a VPC's attributes.
//! * `subnets.rs`: subnets made, described and deleted.
//! * `route_tables.rs`: what routes there are, and that there are no network ACLs.
//!
//! An account sees the cloud's default VPC, in which each zone has a subnet, as its own default one, and beside it those that it made. The default one
//! is everybody's, so nobody changes it. VPCs know nothing of one another: two may have the same network, and their instances the same addresses.

mod attributes;
mod cidr;
mod route_tables;
mod subnets;

use super::filters::{self, Table, flag, one, word};
use super::model::{
    CreateVpcRequest, CreateVpcResult, DeleteVpcRequest, DescribeVpcsRequest, DescribeVpcsResult, ResourceType, Tag,
    Tenancy, Vpc, VpcCidrBlockAssociation, VpcCidrBlockState, VpcCidrBlockStateCode, VpcState,
};
use super::places::{all_there, is_wanted};
use super::{Context, Refusal, lookup, pages, tagging};
use crate::state::network::Vpc as Row;
use crate::state::{nodes, security_groups, tags, vpcs};
pub(super) use attributes::{describe_vpc_attribute, modify_vpc_attribute};
pub(super) use route_tables::{describe_network_acls, describe_route_tables};
pub(super) use subnets::{create_subnet, delete_subnet, describe_subnets};

/// EC2's quota of one region (Amazon VPC User Guide, "Amazon VPC quotas"), the default one counted.
const VPCS_MOST: usize = 5;

const VPCS: Table<Vpc> = &[
    ("vpc-id", |vpc| one(&vpc.vpc_id)),
    ("cidr", |vpc| one(&vpc.cidr_block)),
    ("cidr-block-association.cidr-block", |vpc| one(&vpc.cidr_block)),
    ("is-default", |vpc| flag(vpc.is_default)),
    ("isDefault", |vpc| flag(vpc.is_default)),
    ("state", |vpc| word(&vpc.state)),
    ("owner-id", |vpc| one(&vpc.owner_id)),
];

/// `CreateVpc`.
pub(crate) async fn create_vpc(context: &Context, request: CreateVpcRequest) -> Result<CreateVpcResult, Refusal> {
    refuse_unserved(&request)?;
    let text = request.cidr_block.as_deref().ok_or_else(|| Refusal::missing_parameter("CidrBlock"))?;
    let tags = tagging::requested(&request.tag_specifications, ResourceType::VPC)?;
    let mut tx = context.cloud.db.begin().await?;
    let uplinks = nodes::all(&mut tx).await?.into_iter().filter_map(|node| node.facts?.uplink_address.parse().ok());
    let cidr = cidr::of_vpc(text, context.cloud.config.public_pools.iter().copied().chain(uplinks))?;
    if vpcs::of_account(&mut tx, context.account()).await?.len() >= VPCS_MOST {
        let message = format!("The maximum number of VPCs ({VPCS_MOST}) has been reached: delete one.");
        return Err(Refusal::client("VpcLimitExceeded", message));
    }
    let vpc = vpcs::insert(&mut tx, context.account(), cidr).await?;
    security_groups::ensure_default(&mut tx, context.account(), &vpc.id).await?;
    tagging::write(&mut tx, context.account(), vpc.id.as_str(), ResourceType::VPC.as_str(), &tags).await?;
    context.commit(tx).await?;
    Ok(CreateVpcResult { vpc: Some(shown(context, vpc, (!tags.is_empty()).then_some(tags))?) })
}

fn refuse_unserved(request: &CreateVpcRequest) -> Result<(), Refusal> {
    let unwanted = [
        ("AmazonProvidedIpv6CidrBlock", request.amazon_provided_ipv6_cidr_block == Some(true)),
        ("Ipv6Pool", request.ipv6_pool.is_some()),
        ("Ipv6CidrBlock", request.ipv6_cidr_block.is_some()),
        ("Ipv4IpamPoolId", request.ipv4_ipam_pool_id.is_some()),
        ("Ipv4NetmaskLength", request.ipv4_netmask_length.is_some()),
        ("Ipv6IpamPoolId", request.ipv6_ipam_pool_id.is_some()),
        ("VpcEncryptionControl", request.vpc_encryption_control.is_some()),
        ("InstanceTenancy", request.instance_tenancy.as_ref().is_some_and(|given| *given != Tenancy::DEFAULT)),
    ];
    match unwanted.into_iter().find(|(_, given)| *given) {
        Some((name, _)) => Err(Refusal::unserved(name)),
        None => Ok(()),
    }
}

/// `DeleteVpc`. Its default security group goes with it.
pub(crate) async fn delete_vpc(context: &Context, request: DeleteVpcRequest) -> Result<(), Refusal> {
    let mut tx = context.cloud.db.begin().await?;
    let vpc = own(lookup::vpc(&mut tx, context.account(), &request.vpc_id).await?)?;
    let subnets = vpcs::subnets_of_account(&mut tx, context.account()).await?;
    let mut groups = security_groups::of_account(&mut tx, context.account()).await?;
    groups.retain(|group| group.vpc_id == vpc.id);
    let has_subnet = subnets.iter().any(|subnet| subnet.vpc_id == vpc.id);
    if has_subnet || groups.iter().any(|group| group.name != security_groups::DEFAULT_NAME) {
        let message = format!(
            "The vpc '{}' has dependencies and cannot be deleted: delete its subnets and security groups first",
            vpc.id
        );
        return Err(Refusal::client("DependencyViolation", message));
    }
    for group in groups {
        tags::remove_all(&mut tx, context.account(), group.id.as_str()).await?;
        security_groups::delete(&mut tx, &group.id).await?;
    }
    tags::remove_all(&mut tx, context.account(), vpc.id.as_str()).await?;
    vpcs::delete(&mut tx, &vpc.id).await?;
    context.commit(tx).await
}

/// Refuses to change the cloud's default VPC.
fn own(vpc: Row) -> Result<Row, Refusal> {
    if vpc.is_default() {
        let message = format!("{} is the default VPC of all accounts of this cloud: make one of your own", vpc.id);
        return Err(Refusal::client("OperationNotPermitted", message));
    }
    Ok(vpc)
}

/// `DescribeVpcs`.
pub(crate) async fn describe_vpcs(
    context: &Context,
    request: DescribeVpcsRequest,
) -> Result<DescribeVpcsResult, Refusal> {
    let mut tx = context.cloud.db.snapshot().await?;
    let seen = vpcs::of_account(&mut tx, context.account()).await?;
    let tags = tags::by_resource(&mut tx, context.account()).await?;
    drop(tx);
    all_there(&request.vpc_ids, seen.iter().map(|vpc| vpc.id.as_str()), lookup::no_vpc)?;
    let mut shown = seen
        .into_iter()
        .map(|vpc| {
            let tags = tagging::answer(tags.get(vpc.id.as_str()));
            shown(context, vpc, tags)
        })
        .collect::<Result<Vec<_>, _>>()?;
    shown.retain(|vpc| is_wanted(&request.vpc_ids, &vpc.vpc_id));
    let selected = filters::select(shown, &request.filters, VPCS)?;
    let key = |vpc: &Vpc| vpc.vpc_id.clone().unwrap_or_default();
    let (vpcs, next_token) = pages::page(selected, key, request.max_results, request.next_token.as_deref())?;
    Ok(DescribeVpcsResult { vpcs: Some(vpcs), next_token })
}

fn shown(context: &Context, vpc: Row, tags: Option<Vec<Tag>>) -> Result<Vpc, Refusal> {
    let cidr = vpc.cidr()?.to_string();
    let block = VpcCidrBlockAssociation {
        association_id: Some(vpc.id.as_str().replacen("vpc-", "vpc-cidr-assoc-", 1)),
        cidr_block: Some(cidr.clone()),
        cidr_block_state: Some(VpcCidrBlockState {
            state: Some(VpcCidrBlockStateCode::ASSOCIATED),
            ..VpcCidrBlockState::default()
        }),
    };
    Ok(Vpc {
        cidr_block: Some(cidr),
        cidr_block_association_set: Some(vec![block]),
        instance_tenancy: Some(Tenancy::DEFAULT),
        is_default: Some(vpc.is_default()),
        owner_id: Some(context.account().to_owned()),
        state: Some(VpcState::AVAILABLE),
        tags,
        vpc_id: Some(vpc.id.into()),
        ..Vpc::default()
    })
}
