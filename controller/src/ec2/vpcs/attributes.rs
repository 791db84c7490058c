//! `DescribeVpcAttribute` and `ModifyVpcAttribute`.
//!
//! Names are answered for in every VPC (netd's resolver), and nobody counts its addresses, so the two attributes about these cannot be changed. Whether
//! instances have public host names is kept as it is set: tools set it and read it back, and no instance of this cloud has one.

use super::own;
use crate::ec2::model::{
    AttributeBooleanValue, DescribeVpcAttributeRequest, DescribeVpcAttributeResult, ModifyVpcAttributeRequest,
    VpcAttributeName,
};
use crate::ec2::{Context, Refusal, lookup};
use crate::state::vpcs;

/// `DescribeVpcAttribute`.
pub(crate) async fn describe_vpc_attribute(
    context: &Context,
    request: DescribeVpcAttributeRequest,
) -> Result<DescribeVpcAttributeResult, Refusal> {
    let mut tx = context.cloud.db.snapshot().await?;
    let vpc = lookup::vpc(&mut tx, context.account(), &request.vpc_id).await?;
    let value = |name: VpcAttributeName, value: bool| {
        (request.attribute == name).then_some(AttributeBooleanValue { value: Some(value) })
    };
    Ok(DescribeVpcAttributeResult {
        enable_dns_hostnames: value(VpcAttributeName::ENABLEDNSHOSTNAMES, vpc.dns_hostnames),
        enable_dns_support: value(VpcAttributeName::ENABLEDNSSUPPORT, true),
        enable_network_address_usage_metrics: value(VpcAttributeName::ENABLENETWORKADDRESSUSAGEMETRICS, false),
        vpc_id: Some(vpc.id.into()),
    })
}

/// `ModifyVpcAttribute`: one attribute, as in EC2.
pub(crate) async fn modify_vpc_attribute(context: &Context, request: ModifyVpcAttributeRequest) -> Result<(), Refusal> {
    let mut tx = context.cloud.db.begin().await?;
    let vpc = own(lookup::vpc(&mut tx, context.account(), &request.vpc_id).await?)?;
    let given =
        [&request.enable_dns_hostnames, &request.enable_dns_support, &request.enable_network_address_usage_metrics];
    if given.into_iter().flatten().count() != 1 {
        return Err(Refusal::client("InvalidParameterCombination", "Change exactly one attribute in one call"));
    }
    let value = |given: &Option<AttributeBooleanValue>| given.as_ref().and_then(|given| given.value);
    if value(&request.enable_dns_support) == Some(false) {
        return Err(Refusal::unserved("EnableDnsSupport=false"));
    }
    if value(&request.enable_network_address_usage_metrics) == Some(true) {
        return Err(Refusal::unserved("EnableNetworkAddressUsageMetrics=true"));
    }
    if let Some(on) = value(&request.enable_dns_hostnames) {
        vpcs::set_dns_hostnames(&mut tx, &vpc.id, on).await?;
    }
    context.commit(tx).await
}
