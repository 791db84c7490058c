//! Security groups: made, described and deleted here.
//!
//! * `permissions.rs`: from the two ways in which EC2 lets rules be written to the rules that they mean.
//! * `rules.rs`: rules authorised, revoked and described.
//! * `membership.rs`: which groups an instance is in, at its launch and afterwards.
//!
//! A change that concerns running instances gives their nodes a new desired state; netd there makes it one transaction. As in EC2,
//! connections that are under way are not interrupted by it.

mod membership;
mod permissions;
mod rules;

use std::collections::{BTreeSet, HashMap};

use super::filters::{self, Table, one};
use super::model::{
    CreateSecurityGroupRequest, CreateSecurityGroupResult, DeleteSecurityGroupRequest, DeleteSecurityGroupResult,
    DescribeSecurityGroupsRequest, DescribeSecurityGroupsResult, IpPermission, ResourceType, SecurityGroup,
};
use super::{Context, Refusal, lookup, pages, tagging};
use crate::ids::{SecurityGroupId, VpcId};
use crate::state::security_groups::{self, DEFAULT_NAME, Rule, SecurityGroup as Row};
use crate::state::{Tx, network, nodes, tags};
pub(crate) use membership::{chosen, modify_instance_attribute, modify_network_interface_attribute};
pub(crate) use rules::{
    authorize_security_group_egress, authorize_security_group_ingress, describe_security_group_rules, over_quota,
    revoke_security_group_egress, revoke_security_group_ingress,
};

/// EC2's bounds (Amazon VPC User Guide, "Amazon VPC quotas").
const GROUPS_MOST: usize = 2500;
/// Of names and descriptions, in characters.
const TEXT_MOST: usize = 255;

/// A field of the rules of one direction.
type Field = fn(&IpPermission) -> Vec<String>;

fn of_rules(permissions: &Option<Vec<IpPermission>>, field: Field) -> Vec<String> {
    permissions.iter().flatten().flat_map(field).collect()
}

fn number(value: Option<i32>) -> Vec<String> {
    value.iter().map(i32::to_string).collect()
}

const CIDR: Field = |rule| rule.ip_ranges.iter().flatten().filter_map(|range| range.cidr_ip.clone()).collect();
const CIDR6: Field = |rule| rule.ipv6_ranges.iter().flatten().filter_map(|range| range.cidr_ipv6.clone()).collect();
const PEER: Field = |rule| rule.user_id_group_pairs.iter().flatten().filter_map(|pair| pair.group_id.clone()).collect();
const PEER_NAME: Field =
    |rule| rule.user_id_group_pairs.iter().flatten().filter_map(|pair| pair.group_name.clone()).collect();
const PREFIX_LIST: Field =
    |rule| rule.prefix_list_ids.iter().flatten().filter_map(|list| list.prefix_list_id.clone()).collect();
const PROTOCOL: Field = |rule| one(&rule.ip_protocol);
const FROM_PORT: Field = |rule| number(rule.from_port);
const TO_PORT: Field = |rule| number(rule.to_port);

const GROUPS: Table<SecurityGroup> = &[
    ("group-id", |group| one(&group.group_id)),
    ("group-name", |group| one(&group.group_name)),
    ("description", |group| one(&group.description)),
    ("vpc-id", |group| one(&group.vpc_id)),
    ("owner-id", |group| one(&group.owner_id)),
    ("ip-permission.cidr", |group| of_rules(&group.ip_permissions, CIDR)),
    ("ip-permission.ipv6-cidr", |group| of_rules(&group.ip_permissions, CIDR6)),
    ("ip-permission.from-port", |group| of_rules(&group.ip_permissions, FROM_PORT)),
    ("ip-permission.group-id", |group| of_rules(&group.ip_permissions, PEER)),
    ("ip-permission.group-name", |group| of_rules(&group.ip_permissions, PEER_NAME)),
    ("ip-permission.prefix-list-id", |group| of_rules(&group.ip_permissions, PREFIX_LIST)),
    ("ip-permission.protocol", |group| of_rules(&group.ip_permissions, PROTOCOL)),
    ("ip-permission.to-port", |group| of_rules(&group.ip_permissions, TO_PORT)),
    ("egress.ip-permission.cidr", |group| of_rules(&group.ip_permissions_egress, CIDR)),
    ("egress.ip-permission.ipv6-cidr", |group| of_rules(&group.ip_permissions_egress, CIDR6)),
    ("egress.ip-permission.from-port", |group| of_rules(&group.ip_permissions_egress, FROM_PORT)),
    ("egress.ip-permission.group-id", |group| of_rules(&group.ip_permissions_egress, PEER)),
    ("egress.ip-permission.group-name", |group| of_rules(&group.ip_permissions_egress, PEER_NAME)),
    ("egress.ip-permission.prefix-list-id", |group| of_rules(&group.ip_permissions_egress, PREFIX_LIST)),
    ("egress.ip-permission.protocol", |group| of_rules(&group.ip_permissions_egress, PROTOCOL)),
    ("egress.ip-permission.to-port", |group| of_rules(&group.ip_permissions_egress, TO_PORT)),
];

/// `CreateSecurityGroup`.
pub(crate) async fn create_security_group(
    context: &Context,
    request: CreateSecurityGroupRequest,
) -> Result<CreateSecurityGroupResult, Refusal> {
    check_name(&request.group_name)?;
    check_text("GroupDescription", &request.description)?;
    let tags = tagging::requested(&request.tag_specifications, ResourceType::SECURITY_GROUP)?;
    let mut tx = context.cloud.db.begin().await?;
    let Groups { default_vpc, own } = groups(&mut tx, context).await?;
    let vpc = match &request.vpc_id {
        Some(id) => lookup::vpc(&mut tx, context.account(), id).await?.id,
        None => default_vpc,
    };
    if own.iter().any(|group| group.vpc_id == vpc && group.name == request.group_name) {
        let message = format!("The security group '{}' already exists for VPC '{vpc}'", request.group_name);
        return Err(Refusal::client("InvalidGroup.Duplicate", message));
    }
    if own.len() >= GROUPS_MOST {
        let message = format!("The maximum number of security groups ({GROUPS_MOST}) has been reached: delete one.");
        return Err(Refusal::client("SecurityGroupLimitExceeded", message));
    }
    let group = Row {
        id: SecurityGroupId::random(),
        account_id: context.account().to_owned(),
        vpc_id: vpc,
        name: request.group_name,
        description: request.description,
    };
    security_groups::insert(&mut tx, &group).await?;
    security_groups::insert_rule(&mut tx, &Rule::egress_to_everywhere(&group.id)).await?;
    let kind = ResourceType::SECURITY_GROUP;
    tagging::write(&mut tx, context.account(), group.id.as_str(), kind.as_str(), &tags).await?;
    context.commit(tx).await?;
    Ok(CreateSecurityGroupResult {
        group_id: Some(group.id.into()),
        tags: (!tags.is_empty()).then_some(tags),
        ..CreateSecurityGroupResult::default()
    })
}

fn check_name(name: &str) -> Result<(), Refusal> {
    check_text("GroupName", name)?;
    if name.is_empty() || name.starts_with("sg-") {
        return Err(Refusal::invalid_parameter(format!(
            "Invalid group name '{name}': it may not be empty nor begin with 'sg-'"
        )));
    }
    if name == DEFAULT_NAME {
        return Err(Refusal::client("InvalidGroup.Reserved", format!("The security group '{name}' is reserved")));
    }
    Ok(())
}

/// EC2's alphabet and length for a group's texts.
fn check_text(parameter: &str, text: &str) -> Result<(), Refusal> {
    let good = |c: char| c.is_ascii_alphanumeric() || " ._-:/()#,@[]+=&;{}!$*".contains(c);
    if text.chars().count() > TEXT_MOST || !text.chars().all(good) {
        return Err(Refusal::invalid_parameter(format!(
            "Invalid value for {parameter}: at most {TEXT_MOST} characters out of a-z, A-Z, 0-9, spaces and ._-:/()#,@[]+=&;{{}}!$*"
        )));
    }
    Ok(())
}

/// `DeleteSecurityGroup`.
pub(crate) async fn delete_security_group(
    context: &Context,
    request: DeleteSecurityGroupRequest,
) -> Result<DeleteSecurityGroupResult, Refusal> {
    let mut tx = context.cloud.db.begin().await?;
    let group = named(&mut tx, context, request.group_id.as_deref(), request.group_name.as_deref()).await?;
    if group.name == DEFAULT_NAME {
        let message = format!("the specified group: \"{}\" name: \"default\" cannot be deleted by a user", group.id);
        return Err(Refusal::client("CannotDelete", message));
    }
    let rules = security_groups::rules_of_account(&mut tx, context.account()).await?;
    let named = rules.iter().any(|rule| rule.group_id != group.id && rule.peer_group.as_ref() == Some(&group.id));
    if named || security_groups::is_used(&mut tx, &group.id).await? {
        let message = format!(
            "resource {} has a dependent object: take instances out of it, and rules of other groups that name it away",
            group.id
        );
        return Err(Refusal::client("DependencyViolation", message));
    }
    tags::remove_all(&mut tx, context.account(), group.id.as_str()).await?;
    security_groups::delete(&mut tx, &group.id).await?;
    context.commit(tx).await?;
    Ok(DeleteSecurityGroupResult { r#return: Some(true), group_id: Some(group.id.into()) })
}

/// The account's group that a request names by its id, or by its name in the default VPC.
async fn named(tx: &mut Tx, context: &Context, id: Option<&str>, name: Option<&str>) -> Result<Row, Refusal> {
    let Groups { default_vpc, own } = groups(tx, context).await?;
    match (id, name) {
        (Some(id), _) => by_id(&own, id).cloned(),
        (None, Some(name)) => by_name(&own, &default_vpc, name).cloned(),
        (None, None) => Err(Refusal::missing_parameter("GroupId")),
    }
}

/// An account's groups.
struct Groups {
    /// Where groups are looked for that are named without a VPC.
    default_vpc: VpcId,
    own: Vec<Row>,
}

/// All of the account's, among them its default one in the default VPC, which is made when somebody first looks at it.
async fn groups(tx: &mut Tx, context: &Context) -> Result<Groups, Refusal> {
    let default_vpc = network::default_vpc(tx).await?.id;
    security_groups::ensure_default(tx, context.account(), &default_vpc).await?;
    Ok(Groups { default_vpc, own: security_groups::of_account(tx, context.account()).await? })
}

fn by_id<'a>(own: &'a [Row], id: &str) -> Result<&'a Row, Refusal> {
    let id = SecurityGroupId::parse(id).map_err(lookup::malformed("InvalidGroupId.Malformed", "security group id"))?;
    own.iter().find(|group| group.id == id).ok_or_else(|| not_found(id.as_str(), ""))
}

fn by_name<'a>(own: &'a [Row], vpc: &VpcId, name: &str) -> Result<&'a Row, Refusal> {
    let found = own.iter().find(|group| group.vpc_id == *vpc && group.name == name);
    found.ok_or_else(|| not_found(name, &format!(" in VPC '{vpc}'")))
}

fn not_found(group: &str, place: &str) -> Refusal {
    Refusal::client("InvalidGroup.NotFound", format!("The security group '{group}' does not exist{place}"))
}

/// Gives the nodes that groups concern a new desired state in `tx`, unless the call gave it one already; to be woken after the commit.
pub(crate) async fn touch(
    tx: &mut Tx,
    groups: &[SecurityGroupId],
    already: &BTreeSet<String>,
) -> Result<BTreeSet<String>, Refusal> {
    let mut concerned = security_groups::nodes_concerned(tx, groups).await?;
    concerned.retain(|node| !already.contains(node));
    for node in &concerned {
        nodes::touch(tx, node).await?;
    }
    Ok(concerned)
}

pub(crate) fn wake(context: &Context, concerned: &BTreeSet<String>) {
    concerned.iter().for_each(|node| context.cloud.nodes.wake(node));
}

/// `DescribeSecurityGroups`.
pub(crate) async fn describe_security_groups(
    context: &Context,
    request: DescribeSecurityGroupsRequest,
) -> Result<DescribeSecurityGroupsResult, Refusal> {
    let mut tx = context.cloud.db.begin().await?;
    let Groups { default_vpc, own } = groups(&mut tx, context).await?;
    let rules = security_groups::rules_of_account(&mut tx, context.account()).await?;
    let tags = tags::by_resource(&mut tx, context.account()).await?;
    tx.commit().await?;
    let wanted_ids = request.group_ids.iter().map(|id| by_id(&own, id)).collect::<Result<Vec<_>, _>>()?;
    let wanted_names = request.group_names.iter().map(|name| by_name(&own, &default_vpc, name));
    let wanted_names = wanted_names.collect::<Result<Vec<_>, _>>()?;
    let is_in = |wanted: &[&Row], group: &Row| wanted.is_empty() || wanted.iter().any(|one| one.id == group.id);
    let mut by_group: HashMap<&SecurityGroupId, Vec<&Rule>> = HashMap::new();
    for rule in &rules {
        by_group.entry(&rule.group_id).or_default().push(rule);
    }
    let groups = own
        .iter()
        .filter(|group| is_in(&wanted_ids, group) && is_in(&wanted_names, group))
        .map(|group| {
            let rules = by_group.get(&group.id).map_or(&[][..], Vec::as_slice);
            SecurityGroup {
                description: Some(group.description.clone()),
                group_id: Some(group.id.to_string()),
                group_name: Some(group.name.clone()),
                ip_permissions: Some(permissions::shown(rules, false, group)),
                ip_permissions_egress: Some(permissions::shown(rules, true, group)),
                owner_id: Some(group.account_id.clone()),
                tags: tagging::answer(tags.get(group.id.as_str())),
                vpc_id: Some(group.vpc_id.to_string()),
                ..SecurityGroup::default()
            }
        })
        .collect();
    let groups = filters::select(groups, &request.filters, GROUPS)?;
    let key = |group: &SecurityGroup| group.group_id.clone().unwrap_or_default();
    let (groups, next_token) = pages::page(groups, key, request.max_results, request.next_token.as_deref())?;
    Ok(DescribeSecurityGroupsResult { security_groups: Some(groups), next_token })
}
