//! Security groups and their rules, and which instances are in them.
//!
//! A VPC's default group is made with the VPC, an account's in the default VPC when somebody first looks at it or launches into it, with EC2's own
//! rules: its members may reach one another, and everything may leave.

use std::collections::BTreeSet;

use sqlx::SqliteConnection;

use crate::error::Result;
use crate::ids::{PrefixListId, SecurityGroupId, SecurityGroupRuleId, VpcId};

/// One row of `security_groups`.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct SecurityGroup {
    pub id: SecurityGroupId,
    pub account_id: String,
    pub vpc_id: VpcId,
    pub name: String,
    pub description: String,
}

/// One row of `security_group_rules`.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct Rule {
    pub id: SecurityGroupRuleId,
    pub group_id: SecurityGroupId,
    pub egress: bool,
    /// IANA's number; -1 for all traffic.
    pub protocol: i32,
    /// Ports, or ICMP's type and code; -1 for any, or where they mean nothing.
    pub from_port: i32,
    pub to_port: i32,
    /// Exactly one of these four is there.
    pub cidr_ipv4: Option<String>,
    pub cidr_ipv6: Option<String>,
    pub peer_group: Option<SecurityGroupId>,
    pub prefix_list: Option<PrefixListId>,
    pub description: Option<String>,
}

/// An instance's membership, wherever it runs: its group and one of its private addresses.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct Member {
    pub group_id: SecurityGroupId,
    pub private_ip: String,
}

pub const DEFAULT_NAME: &str = "default";
pub const ALL_TRAFFIC: i32 = -1;
pub const ANY: i32 = -1;
const EVERYWHERE: &str = "0.0.0.0/0";

impl Rule {
    /// All traffic one way; whose it may be is still to be said.
    fn all_traffic(group: &SecurityGroupId, egress: bool) -> Rule {
        Rule {
            id: SecurityGroupRuleId::random(),
            group_id: group.clone(),
            egress,
            protocol: ALL_TRAFFIC,
            from_port: ANY,
            to_port: ANY,
            cidr_ipv4: None,
            cidr_ipv6: None,
            peer_group: None,
            prefix_list: None,
            description: None,
        }
    }

    /// The rule that every new group begins with: everything may leave.
    pub fn egress_to_everywhere(group: &SecurityGroupId) -> Rule {
        Rule { cidr_ipv4: Some(EVERYWHERE.to_owned()), ..Rule::all_traffic(group, true) }
    }

    /// Whether it allows the same, whatever it is called and described as.
    pub fn allows_same(&self, other: &Rule) -> bool {
        (&self.group_id, self.egress, self.protocol, self.from_port, self.to_port)
            == (&other.group_id, other.egress, other.protocol, other.from_port, other.to_port)
            && (&self.cidr_ipv4, &self.cidr_ipv6, &self.peer_group, &self.prefix_list)
                == (&other.cidr_ipv4, &other.cidr_ipv6, &other.peer_group, &other.prefix_list)
    }
}

/// The account's groups. An account that was never seen has none yet: see [`ensure_default`].
pub async fn of_account(connection: &mut SqliteConnection, account: &str) -> Result<Vec<SecurityGroup>> {
    Ok(sqlx::query_as("SELECT * FROM security_groups WHERE account_id = ? ORDER BY name, id")
        .bind(account)
        .fetch_all(connection)
        .await?)
}

/// All groups of the cloud.
pub async fn all(connection: &mut SqliteConnection) -> Result<Vec<SecurityGroup>> {
    Ok(sqlx::query_as("SELECT * FROM security_groups ORDER BY id").fetch_all(connection).await?)
}

/// The account's default group in a VPC; made when it is first asked for.
pub async fn ensure_default(connection: &mut SqliteConnection, account: &str, vpc: &VpcId) -> Result<SecurityGroup> {
    let found = sqlx::query_as("SELECT * FROM security_groups WHERE account_id = ? AND vpc_id = ? AND name = ?")
        .bind(account)
        .bind(vpc)
        .bind(DEFAULT_NAME)
        .fetch_optional(&mut *connection)
        .await?;
    if let Some(group) = found {
        return Ok(group);
    }
    let group = SecurityGroup {
        id: SecurityGroupId::random(),
        account_id: account.to_owned(),
        vpc_id: vpc.clone(),
        name: DEFAULT_NAME.to_owned(),
        description: "default VPC security group".to_owned(),
    };
    insert(connection, &group).await?;
    let among_members = Rule { peer_group: Some(group.id.clone()), ..Rule::all_traffic(&group.id, false) };
    insert_rule(connection, &among_members).await?;
    insert_rule(connection, &Rule::egress_to_everywhere(&group.id)).await?;
    Ok(group)
}

pub async fn insert(connection: &mut SqliteConnection, group: &SecurityGroup) -> Result<()> {
    sqlx::query("INSERT INTO security_groups (id, account_id, vpc_id, name, description) VALUES (?, ?, ?, ?, ?)")
        .bind(&group.id)
        .bind(&group.account_id)
        .bind(&group.vpc_id)
        .bind(&group.name)
        .bind(&group.description)
        .execute(connection)
        .await?;
    Ok(())
}

/// Deletes a group that nothing depends on, with its rules.
pub async fn delete(connection: &mut SqliteConnection, id: &SecurityGroupId) -> Result<()> {
    sqlx::query("DELETE FROM tags WHERE resource_id IN (SELECT id FROM security_group_rules WHERE group_id = ?)")
        .bind(id)
        .execute(&mut *connection)
        .await?;
    sqlx::query("DELETE FROM security_group_rules WHERE group_id = ?").bind(id).execute(&mut *connection).await?;
    sqlx::query("DELETE FROM security_groups WHERE id = ?").bind(id).execute(connection).await?;
    Ok(())
}

/// The rules of the account's groups, by group and id.
pub async fn rules_of_account(connection: &mut SqliteConnection, account: &str) -> Result<Vec<Rule>> {
    Ok(sqlx::query_as(
        "SELECT * FROM security_group_rules \
         WHERE group_id IN (SELECT id FROM security_groups WHERE account_id = ?) ORDER BY group_id, id",
    )
    .bind(account)
    .fetch_all(connection)
    .await?)
}

/// The rules of the cloud's groups.
pub async fn all_rules(connection: &mut SqliteConnection) -> Result<Vec<Rule>> {
    Ok(sqlx::query_as("SELECT * FROM security_group_rules ORDER BY group_id, id").fetch_all(connection).await?)
}

/// The groups with a rule that names the prefix list.
pub async fn naming(connection: &mut SqliteConnection, list: &PrefixListId) -> Result<Vec<SecurityGroupId>> {
    Ok(sqlx::query_scalar("SELECT DISTINCT group_id FROM security_group_rules WHERE prefix_list = ? ORDER BY group_id")
        .bind(list)
        .fetch_all(connection)
        .await?)
}

pub async fn insert_rule(connection: &mut SqliteConnection, rule: &Rule) -> Result<()> {
    sqlx::query(
        "INSERT INTO security_group_rules \
         (id, group_id, egress, protocol, from_port, to_port, cidr_ipv4, cidr_ipv6, peer_group, prefix_list, description) \
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(&rule.id)
    .bind(&rule.group_id)
    .bind(rule.egress)
    .bind(rule.protocol)
    .bind(rule.from_port)
    .bind(rule.to_port)
    .bind(&rule.cidr_ipv4)
    .bind(&rule.cidr_ipv6)
    .bind(&rule.peer_group)
    .bind(&rule.prefix_list)
    .bind(&rule.description)
    .execute(connection)
    .await?;
    Ok(())
}

pub async fn delete_rule(connection: &mut SqliteConnection, id: &SecurityGroupRuleId) -> Result<()> {
    sqlx::query("DELETE FROM tags WHERE resource_id = ?").bind(id).execute(&mut *connection).await?;
    sqlx::query("DELETE FROM security_group_rules WHERE id = ?").bind(id).execute(connection).await?;
    Ok(())
}

/// Who is in which group, of all instances that have an address and keep it.
pub async fn members(connection: &mut SqliteConnection) -> Result<Vec<Member>> {
    Ok(sqlx::query_as(
        "SELECT membership.value AS group_id, private_ip \
         FROM instances, json_each(instances.security_groups) AS membership \
         WHERE state NOT IN ('shutting-down', 'terminated') \
         UNION ALL SELECT membership.value, secondary.value \
         FROM instances, json_each(instances.security_groups) AS membership, \
         json_each(instances.secondary_ips) AS secondary \
         WHERE state NOT IN ('shutting-down', 'terminated')",
    )
    .fetch_all(connection)
    .await?)
}

/// Whether an instance is in the group that is not terminated.
pub async fn is_used(connection: &mut SqliteConnection, id: &SecurityGroupId) -> Result<bool> {
    let found: Option<i64> = sqlx::query_scalar(
        "SELECT 1 FROM instances, json_each(instances.security_groups) AS membership \
         WHERE membership.value = ? AND state <> 'terminated' LIMIT 1",
    )
    .bind(id)
    .fetch_optional(connection)
    .await?;
    Ok(found.is_some())
}

/// The nodes that have instances in one of the groups, or in a group with a rule that names one of them: those whose desired state
/// changes with these groups' rules and members.
pub async fn nodes_concerned(
    connection: &mut SqliteConnection,
    groups: &[SecurityGroupId],
) -> Result<BTreeSet<String>> {
    let mut nodes = BTreeSet::new();
    for group in groups {
        let names: Vec<String> = sqlx::query_scalar(
            "SELECT DISTINCT node FROM instances, json_each(instances.security_groups) AS membership \
             WHERE state NOT IN ('shutting-down', 'terminated') AND (membership.value = ?1 OR membership.value IN \
             (SELECT group_id FROM security_group_rules WHERE peer_group = ?1))",
        )
        .bind(group)
        .fetch_all(&mut *connection)
        .await?;
        nodes.extend(names);
    }
    Ok(nodes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Database, network};

    #[tokio::test]
    async fn a_default_group_is_made_once_and_lets_in_its_own_members() {
        let folder = tempfile::tempdir().unwrap();
        let db = Database::open(folder.path()).await.unwrap();
        network::ensure_default_vpc(&db, "172.31.0.0/16".parse().unwrap()).await.unwrap();
        let mut tx = db.begin().await.unwrap();
        let vpc = network::default_vpc(&mut tx).await.unwrap().id;
        let group = ensure_default(&mut tx, "1", &vpc).await.unwrap();
        assert_eq!(ensure_default(&mut tx, "1", &vpc).await.unwrap().id, group.id);
        let rules = rules_of_account(&mut tx, "1").await.unwrap();
        let ingress: Vec<&Rule> = rules.iter().filter(|rule| !rule.egress).collect();
        assert_eq!(ingress.len(), 1);
        assert_eq!(ingress[0].peer_group.as_ref(), Some(&group.id));
        let egress: Vec<&Rule> = rules.iter().filter(|rule| rule.egress).collect();
        assert_eq!(egress[0].cidr_ipv4.as_deref(), Some("0.0.0.0/0"));
        assert!(insert_rule(&mut tx, &Rule::egress_to_everywhere(&group.id)).await.is_err(), "a rule is there once");
    }
}
