//! `DescribeRouteTables` and `DescribeNetworkAcls`.
//!
//! Each VPC has its main route table, which all of its subnets have: what is for the VPC is routed within it. There is no other, and none can be made, for
//! the way to the outside is not a route to a gateway but the node's own, which every VPC has. Network ACLs there are none: security groups are what lets
//! traffic pass.

use crate::ec2::filters::{self, Table, flag, one};
use crate::ec2::model::{
    DescribeNetworkAclsRequest, DescribeNetworkAclsResult, DescribeRouteTablesRequest, DescribeRouteTablesResult,
    NetworkAcl, Route, RouteOrigin, RouteState, RouteTable, RouteTableAssociation, RouteTableAssociationState,
    RouteTableAssociationStateCode,
};
use crate::ec2::places::{all_there, is_wanted};
use crate::ec2::{Context, Refusal, pages};
use crate::state::network::Vpc;
use crate::state::vpcs;

const TABLES: Table<RouteTable> = &[
    ("route-table-id", |table| one(&table.route_table_id)),
    ("vpc-id", |table| one(&table.vpc_id)),
    ("owner-id", |table| one(&table.owner_id)),
    ("association.main", |table| of_associations(table, |held| flag(held.main))),
    ("association.route-table-association-id", |table| {
        of_associations(table, |held| one(&held.route_table_association_id))
    }),
    ("association.route-table-id", |table| of_associations(table, |held| one(&held.route_table_id))),
    ("association.subnet-id", |table| of_associations(table, |held| one(&held.subnet_id))),
    ("route.destination-cidr-block", |table| {
        table.routes.iter().flatten().filter_map(|route| route.destination_cidr_block.clone()).collect()
    }),
];

const ACLS: Table<NetworkAcl> = &[
    ("default", |acl| flag(acl.is_default)),
    ("network-acl-id", |acl| one(&acl.network_acl_id)),
    ("owner-id", |acl| one(&acl.owner_id)),
    ("vpc-id", |acl| one(&acl.vpc_id)),
    ("association.subnet-id", |acl| {
        acl.associations.iter().flatten().filter_map(|held| held.subnet_id.clone()).collect()
    }),
];

fn of_associations(table: &RouteTable, field: fn(&RouteTableAssociation) -> Vec<String>) -> Vec<String> {
    table.associations.iter().flatten().flat_map(field).collect()
}

/// `DescribeRouteTables`.
pub(crate) async fn describe_route_tables(
    context: &Context,
    request: DescribeRouteTablesRequest,
) -> Result<DescribeRouteTablesResult, Refusal> {
    let seen = vpcs::of_account(&mut *context.cloud.db.snapshot().await?, context.account()).await?;
    let mut tables = seen.iter().map(|vpc| main_table(context, vpc)).collect::<Result<Vec<_>, _>>()?;
    let ids = tables.iter().filter_map(|table| table.route_table_id.as_deref());
    all_there(&request.route_table_ids, ids, |id| {
        Refusal::client("InvalidRouteTableID.NotFound", format!("The routeTable ID '{id}' does not exist"))
    })?;
    tables.retain(|table| is_wanted(&request.route_table_ids, &table.route_table_id));
    let tables = filters::select(tables, &request.filters, TABLES)?;
    let key = |table: &RouteTable| table.route_table_id.clone().unwrap_or_default();
    let (tables, next_token) = pages::page(tables, key, request.max_results, request.next_token.as_deref())?;
    Ok(DescribeRouteTablesResult { route_tables: Some(tables), next_token })
}

/// A VPC has one, which is named after it.
fn main_table(context: &Context, vpc: &Vpc) -> Result<RouteTable, Refusal> {
    let id = |prefix: &str| Some(vpc.id.as_str().replacen("vpc-", prefix, 1));
    let local = Route {
        destination_cidr_block: Some(vpc.cidr()?.to_string()),
        gateway_id: Some("local".to_owned()),
        origin: Some(RouteOrigin::CREATEROUTETABLE),
        state: Some(RouteState::ACTIVE),
        ..Route::default()
    };
    let association = RouteTableAssociation {
        main: Some(true),
        route_table_association_id: id("rtbassoc-"),
        route_table_id: id("rtb-"),
        association_state: Some(RouteTableAssociationState {
            state: Some(RouteTableAssociationStateCode::ASSOCIATED),
            ..RouteTableAssociationState::default()
        }),
        ..RouteTableAssociation::default()
    };
    Ok(RouteTable {
        associations: Some(vec![association]),
        owner_id: Some(context.account().to_owned()),
        propagating_vgws: Some(Vec::new()),
        route_table_id: id("rtb-"),
        routes: Some(vec![local]),
        tags: Some(Vec::new()),
        vpc_id: Some(vpc.id.to_string()),
    })
}

/// `DescribeNetworkAcls`.
pub(crate) async fn describe_network_acls(
    _context: &Context,
    request: DescribeNetworkAclsRequest,
) -> Result<DescribeNetworkAclsResult, Refusal> {
    all_there(&request.network_acl_ids, std::iter::empty(), |id| {
        Refusal::client("InvalidNetworkAclID.NotFound", format!("The networkAcl ID '{id}' does not exist"))
    })?;
    Ok(DescribeNetworkAclsResult {
        network_acls: Some(filters::select(Vec::new(), &request.filters, ACLS)?),
        next_token: None,
    })
}
