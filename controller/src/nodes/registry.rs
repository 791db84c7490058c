//! The list of nodes: added by the operator, each with its zone; seen with what they said last.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::{Facts, NodeSummary};
use crate::Cloud;
use crate::error::{Error, Result};
use crate::state::{Database, Tx};

/// Size of a zone's default subnet, as EC2's (VPC User Guide, "Default VPC components").
const SUBNET_PREFIX: u8 = 20;

/// Adds a node, and its zone with a default subnet when it is the zone's first. A node that is there
/// already, in the same zone, stays as it is; in another zone it is refused.
pub async fn add(db: &Database, name: &str, zone: &str) -> Result<()> {
    let mut tx = db.begin().await?;
    let known: Option<String> =
        sqlx::query_scalar("SELECT zone FROM nodes WHERE name = ?").bind(name).fetch_optional(&mut *tx).await?;
    if let Some(known) = known {
        if known == zone {
            return Ok(());
        }
        return Err(Error::Node(format!("node {name} is in zone {known}: add it under another name for zone {zone}")));
    }
    ensure_subnet(&mut tx, zone).await?;
    sqlx::query("INSERT INTO nodes (name, zone, added_ns) VALUES (?, ?, ?)")
        .bind(name)
        .bind(zone)
        .bind(crate::clock::now())
        .execute(&mut *tx)
        .await?;
    Ok(tx.commit().await?)
}

async fn ensure_subnet(tx: &mut Tx, zone: &str) -> Result<()> {
    let there: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM subnets WHERE zone = ?)")
        .bind(zone)
        .fetch_one(&mut **tx)
        .await?;
    if there {
        return Ok(());
    }
    let (vpc, cidr): (String, String) = sqlx::query_as("SELECT id, cidr FROM vpcs").fetch_one(&mut **tx).await?;
    let network: Ipv4Net = cidr.parse().map_err(|_| Error::Corrupt(format!("VPC {vpc} has the network {cidr:?}")))?;
    let taken: Vec<String> = sqlx::query_scalar("SELECT cidr FROM subnets").fetch_all(&mut **tx).await?;
    let free = network
        .subnets(SUBNET_PREFIX)
        .into_iter()
        .flatten()
        .find(|subnet| !taken.contains(&subnet.to_string()))
        .ok_or_else(|| Error::Node(format!("VPC {vpc} ({cidr}) has no /{SUBNET_PREFIX} left for zone {zone}")))?;
    sqlx::query("INSERT INTO subnets (id, vpc_id, zone, cidr) VALUES (?, ?, ?, ?)")
        .bind(crate::ids::SubnetId::generate().to_string())
        .bind(vpc)
        .bind(zone)
        .bind(free.to_string())
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// The gateway of a subnet: its network address plus one (VPC User Guide, "Subnet sizing").
pub fn gateway(subnet: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(subnet.network()) + 1)
}

/// Every node, by name.
pub async fn list(cloud: &Cloud) -> Result<Vec<NodeSummary>> {
    #[derive(sqlx::FromRow)]
    struct Row {
        name: String,
        zone: String,
        facts: Option<String>,
        last_seen_ns: Option<i64>,
        instances: i64,
    }
    let rows: Vec<Row> = sqlx::query_as(
        "SELECT name, zone, facts, last_seen_ns, \
         (SELECT count(*) FROM instances WHERE node = name AND state <> 'terminated') AS instances \
         FROM nodes ORDER BY name",
    )
    .fetch_all(cloud.db.pool())
    .await?;
    let links = cloud.nodes.links();
    Ok(rows
        .into_iter()
        .map(|row| {
            let facts: Option<Facts> = row.facts.as_deref().and_then(|json| serde_json::from_str(json).ok());
            let link = links.get(&row.name);
            NodeSummary {
                connected: link.is_some(),
                kvm: facts.as_ref().map_or("unknown", |f| f.kvm.as_str()).to_owned(),
                kvm_detail: facts.as_ref().map_or_else(String::new, |f| f.kvm_detail.clone()),
                cpus: facts.as_ref().map_or(0, |f| f.cpus),
                memory_mib: facts.as_ref().map_or(0, |f| f.memory_mib),
                uplink_address: facts.as_ref().map_or_else(String::new, |f| f.uplink_address.clone()),
                version: facts.map_or_else(String::new, |f| f.version),
                instances: u32::try_from(row.instances).unwrap_or(u32::MAX),
                last_seen_unix_ns: link.map_or(row.last_seen_ns.unwrap_or(0), |link| link.heard_ns),
                name: row.name,
                zone: row.zone,
            }
        })
        .collect())
}
