//! Rules authorised, revoked and described.

use std::collections::{BTreeSet, HashMap};

use super::permissions::{Asked, Own, in_words, protocol_name};
use super::{named, touch, wake};
use crate::ec2::filters::{self, Table, flag, one};
use crate::ec2::model::{
    AuthorizeSecurityGroupEgressRequest, AuthorizeSecurityGroupEgressResult, AuthorizeSecurityGroupIngressRequest,
    AuthorizeSecurityGroupIngressResult, DescribeSecurityGroupRulesRequest, DescribeSecurityGroupRulesResult,
    ReferencedSecurityGroup, ResourceType, RevokeSecurityGroupEgressRequest, RevokeSecurityGroupEgressResult,
    RevokeSecurityGroupIngressRequest, RevokeSecurityGroupIngressResult, RevokedSecurityGroupRule, SecurityGroupRule,
    TagSpecification,
};
use crate::ec2::{Context, Refusal, lookup, pages, tagging};
use crate::ids::{SecurityGroupId, SecurityGroupRuleId};
use crate::state::prefix_lists::{self, PrefixList};
use crate::state::security_groups::{self, Rule};
use crate::state::tags;

/// Of one group in one direction: EC2's quota.
const RULES_MOST: usize = 60;

const RULES: Table<SecurityGroupRule> = &[
    ("group-id", |rule| one(&rule.group_id)),
    ("security-group-rule-id", |rule| one(&rule.security_group_rule_id)),
    ("is-egress", |rule| flag(rule.is_egress)),
];

/// The rules that a request is about. The four requests have these members and no trait in common.
macro_rules! asked {
    ($request:ident) => {
        Asked {
            permissions: $request.ip_permissions,
            protocol: $request.ip_protocol,
            from_port: $request.from_port,
            to_port: $request.to_port,
            cidr: $request.cidr_ip,
            peer_name: $request.source_security_group_name,
            peer_owner: $request.source_security_group_owner_id,
        }
    };
}

/// The group of a request.
struct Of {
    id: Option<String>,
    name: Option<String>,
    egress: bool,
}

/// `AuthorizeSecurityGroupIngress`.
pub(crate) async fn authorize_security_group_ingress(
    context: &Context,
    request: AuthorizeSecurityGroupIngressRequest,
) -> Result<AuthorizeSecurityGroupIngressResult, Refusal> {
    let asked = asked!(request);
    let of = Of { id: request.group_id, name: request.group_name, egress: false };
    let rules = authorize(context, of, asked, &request.tag_specifications).await?;
    Ok(AuthorizeSecurityGroupIngressResult { r#return: Some(true), security_group_rules: Some(rules) })
}

/// `AuthorizeSecurityGroupEgress`.
pub(crate) async fn authorize_security_group_egress(
    context: &Context,
    request: AuthorizeSecurityGroupEgressRequest,
) -> Result<AuthorizeSecurityGroupEgressResult, Refusal> {
    let asked = asked!(request);
    let of = Of { id: Some(request.group_id), name: None, egress: true };
    let rules = authorize(context, of, asked, &request.tag_specifications).await?;
    Ok(AuthorizeSecurityGroupEgressResult { r#return: Some(true), security_group_rules: Some(rules) })
}

async fn authorize(
    context: &Context,
    of: Of,
    asked: Asked,
    specifications: &[TagSpecification],
) -> Result<Vec<SecurityGroupRule>, Refusal> {
    let wanted_tags = tagging::requested(specifications, ResourceType::SECURITY_GROUP_RULE)?;
    let mut tx = context.cloud.db.begin().await?;
    let group = named(&mut tx, context, of.id.as_deref(), of.name.as_deref()).await?;
    let own = security_groups::of_account(&mut tx, context.account()).await?;
    let lists = prefix_lists::of_account(&mut tx, context.account()).await?;
    let rules = asked.rules(Own { groups: &own, prefix_lists: &lists }, &group, of.egress)?;
    let mut there = security_groups::rules_of_account(&mut tx, context.account()).await?;
    there.retain(|rule| rule.group_id == group.id && rule.egress == of.egress);
    if let Some(twice) = rules.iter().find(|rule| there.iter().any(|other| other.allows_same(rule))) {
        let message = format!("the specified rule \"{}\" already exists", in_words(twice));
        return Err(Refusal::client("InvalidPermission.Duplicate", message));
    }
    there.extend(rules.iter().cloned());
    if !over_quota(&there, &lists).is_empty() {
        let message = format!("The maximum number of rules per security group ({RULES_MOST}) has been reached.");
        return Err(Refusal::client("RulesPerSecurityGroupLimitExceeded", message));
    }
    let kind = ResourceType::SECURITY_GROUP_RULE;
    for rule in &rules {
        security_groups::insert_rule(&mut tx, rule).await?;
        tagging::write(&mut tx, context.account(), rule.id.as_str(), kind.as_str(), &wanted_tags).await?;
    }
    let concerned = touch(&mut tx, std::slice::from_ref(&group.id), &BTreeSet::new()).await?;
    let tags = tags::by_resource(&mut tx, context.account()).await?;
    context.commit(tx).await?;
    wake(context, &concerned);
    Ok(rules.iter().map(|rule| shown(rule, context.account(), &tags)).collect())
}

/// Those of the groups whose rules are more than EC2's quota lets them be. A rule that names a prefix list counts as many times as
/// the list may have entries (Amazon VPC User Guide, "Reference prefix lists in your AWS resources").
pub(crate) fn over_quota(rules: &[Rule], lists: &[PrefixList]) -> BTreeSet<SecurityGroupId> {
    let weight = |rule: &Rule| {
        let list = rule.prefix_list.as_ref().and_then(|id| lists.iter().find(|list| list.id == *id));
        list.map_or(1, |list| usize::try_from(list.max_entries).unwrap_or(usize::MAX))
    };
    let mut counts: HashMap<(&SecurityGroupId, bool), usize> = HashMap::new();
    for rule in rules {
        let count = counts.entry((&rule.group_id, rule.egress)).or_default();
        *count = count.saturating_add(weight(rule));
    }
    counts.into_iter().filter(|(_, count)| *count > RULES_MOST).map(|((group, _), _)| group.clone()).collect()
}

/// `RevokeSecurityGroupIngress`.
pub(crate) async fn revoke_security_group_ingress(
    context: &Context,
    request: RevokeSecurityGroupIngressRequest,
) -> Result<RevokeSecurityGroupIngressResult, Refusal> {
    let asked = asked!(request);
    let of = Of { id: request.group_id, name: request.group_name, egress: false };
    let revoked = revoke(context, of, asked, &request.security_group_rule_ids).await?;
    Ok(RevokeSecurityGroupIngressResult {
        r#return: Some(true),
        revoked_security_group_rules: Some(revoked),
        ..RevokeSecurityGroupIngressResult::default()
    })
}

/// `RevokeSecurityGroupEgress`.
pub(crate) async fn revoke_security_group_egress(
    context: &Context,
    request: RevokeSecurityGroupEgressRequest,
) -> Result<RevokeSecurityGroupEgressResult, Refusal> {
    let asked = asked!(request);
    let of = Of { id: Some(request.group_id), name: None, egress: true };
    let revoked = revoke(context, of, asked, &request.security_group_rule_ids).await?;
    Ok(RevokeSecurityGroupEgressResult {
        r#return: Some(true),
        revoked_security_group_rules: Some(revoked),
        ..RevokeSecurityGroupEgressResult::default()
    })
}

async fn revoke(
    context: &Context,
    of: Of,
    asked: Asked,
    ids: &[String],
) -> Result<Vec<RevokedSecurityGroupRule>, Refusal> {
    let mut tx = context.cloud.db.begin().await?;
    let group = named(&mut tx, context, of.id.as_deref(), of.name.as_deref()).await?;
    let mut there = security_groups::rules_of_account(&mut tx, context.account()).await?;
    there.retain(|rule| rule.group_id == group.id && rule.egress == of.egress);
    let revoked = match ids {
        [] => {
            let own = security_groups::of_account(&mut tx, context.account()).await?;
            let lists = prefix_lists::of_account(&mut tx, context.account()).await?;
            let rules = asked.rules(Own { groups: &own, prefix_lists: &lists }, &group, of.egress)?;
            let found = |rule: &Rule| there.iter().find(|other| other.allows_same(rule)).cloned();
            rules.iter().map(|rule| found(rule).ok_or_else(|| no_such_rule(rule))).collect::<Result<Vec<_>, _>>()?
        }
        ids => ids.iter().map(|id| by_rule_id(&there, id).cloned()).collect::<Result<_, _>>()?,
    };
    for rule in &revoked {
        security_groups::delete_rule(&mut tx, &rule.id).await?;
    }
    // A member of a group that was named as peer has no place on nodes where nobody names it any more.
    let concerned = touch(&mut tx, std::slice::from_ref(&group.id), &BTreeSet::new()).await?;
    context.commit(tx).await?;
    wake(context, &concerned);
    Ok(revoked.into_iter().map(shown_revoked).collect())
}

fn no_such_rule(rule: &Rule) -> Refusal {
    let message = format!("The specified rule does not exist in this security group: {}", in_words(rule));
    Refusal::client("InvalidPermission.NotFound", message)
}

fn by_rule_id<'a>(there: &'a [Rule], id: &str) -> Result<&'a Rule, Refusal> {
    let id = rule_id(id)?;
    there.iter().find(|rule| rule.id == id).ok_or_else(|| no_such_id(&id))
}

fn rule_id(id: &str) -> Result<SecurityGroupRuleId, Refusal> {
    let malformed = lookup::malformed("InvalidSecurityGroupRuleId.Malformed", "security group rule id");
    SecurityGroupRuleId::parse(id).map_err(malformed)
}

fn no_such_id(id: &SecurityGroupRuleId) -> Refusal {
    let message = format!("The security group rule ID '{id}' does not exist");
    Refusal::client("InvalidSecurityGroupRuleId.NotFound", message)
}

/// `DescribeSecurityGroupRules`.
pub(crate) async fn describe_security_group_rules(
    context: &Context,
    request: DescribeSecurityGroupRulesRequest,
) -> Result<DescribeSecurityGroupRulesResult, Refusal> {
    let mut tx = context.cloud.db.begin().await?;
    super::groups(&mut tx, context).await?;
    let mut rules = security_groups::rules_of_account(&mut tx, context.account()).await?;
    let tags = tags::by_resource(&mut tx, context.account()).await?;
    tx.commit().await?;
    let wanted: Vec<_> = request.security_group_rule_ids.iter().map(|id| rule_id(id)).collect::<Result<_, _>>()?;
    if let Some(missing) = wanted.iter().find(|id| !rules.iter().any(|rule| rule.id == **id)) {
        return Err(no_such_id(missing));
    }
    rules.retain(|rule| wanted.is_empty() || wanted.contains(&rule.id));
    let shown = rules.iter().map(|rule| shown(rule, context.account(), &tags)).collect();
    let selected = filters::select(shown, &request.filters, RULES)?;
    let key = |rule: &SecurityGroupRule| rule.security_group_rule_id.clone().unwrap_or_default();
    let (rules, next_token) = pages::page(selected, key, request.max_results, request.next_token.as_deref())?;
    Ok(DescribeSecurityGroupRulesResult { security_group_rules: Some(rules), next_token })
}

fn shown(rule: &Rule, account: &str, tags: &HashMap<String, Vec<tags::Tag>>) -> SecurityGroupRule {
    SecurityGroupRule {
        security_group_rule_id: Some(rule.id.to_string()),
        group_id: Some(rule.group_id.to_string()),
        group_owner_id: Some(account.to_owned()),
        is_egress: Some(rule.egress),
        ip_protocol: Some(protocol_name(rule.protocol)),
        from_port: Some(rule.from_port),
        to_port: Some(rule.to_port),
        cidr_ipv4: rule.cidr_ipv4.clone(),
        cidr_ipv6: rule.cidr_ipv6.clone(),
        prefix_list_id: rule.prefix_list.as_ref().map(ToString::to_string),
        referenced_group_info: rule.peer_group.as_ref().map(|peer| ReferencedSecurityGroup {
            group_id: Some(peer.to_string()),
            user_id: Some(account.to_owned()),
            ..ReferencedSecurityGroup::default()
        }),
        description: rule.description.clone(),
        tags: tagging::answer(tags.get(rule.id.as_str())),
        ..SecurityGroupRule::default()
    }
}

fn shown_revoked(rule: Rule) -> RevokedSecurityGroupRule {
    RevokedSecurityGroupRule {
        security_group_rule_id: Some(rule.id.into()),
        group_id: Some(rule.group_id.into()),
        is_egress: Some(rule.egress),
        ip_protocol: Some(protocol_name(rule.protocol)),
        from_port: Some(rule.from_port),
        to_port: Some(rule.to_port),
        cidr_ipv4: rule.cidr_ipv4,
        cidr_ipv6: rule.cidr_ipv6,
        prefix_list_id: rule.prefix_list.map(Into::into),
        referenced_group_id: rule.peer_group.map(Into::into),
        description: rule.description,
    }
}
