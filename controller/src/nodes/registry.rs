//! The list of nodes: added by the operator, each with its zone; seen with what they said last.

use std::collections::HashMap;

use super::{NodeSummary, segments};
use crate::Cloud;
use crate::error::Result;
use crate::state::nodes;

/// Adds a node; its zone and the zone's subnet are there from now on, with the number that the subnet needs.
pub async fn add(cloud: &Cloud, name: &str, zone: &str) -> Result<()> {
    let mut tx = cloud.db.begin().await?;
    let home = nodes::add(&mut tx, name, zone).await?;
    segments::give_number(&mut tx, cloud, &home.id).await?;
    Ok(tx.commit().await?)
}

/// Every node, by name.
pub async fn list(cloud: &Cloud) -> Result<Vec<NodeSummary>> {
    let mut tx = cloud.db.snapshot().await?;
    let all = nodes::all(&mut tx).await?;
    let counts: Vec<(String, u32)> =
        sqlx::query_as("SELECT node, count(*) FROM instances WHERE state <> 'terminated' GROUP BY node")
            .fetch_all(&mut *tx)
            .await?;
    let counts: HashMap<String, u32> = counts.into_iter().collect();
    let links = cloud.nodes.links();
    let summary = |node: nodes::Node| {
        let link = links.get(&node.name);
        let facts = node.facts.as_ref();
        NodeSummary {
            connected: link.is_some(),
            kvm: facts.map_or("unknown", |facts| facts.kvm.as_str()).to_owned(),
            kvm_detail: facts.map(|facts| facts.kvm_detail.clone()).unwrap_or_default(),
            cpus: facts.map_or(0, |facts| facts.cpus),
            memory_mib: facts.map_or(0, |facts| facts.memory_mib),
            uplink_address: facts.map(|facts| facts.uplink_address.clone()).unwrap_or_default(),
            version: facts.map(|facts| facts.version.clone()).unwrap_or_default(),
            instances: counts.get(&node.name).copied().unwrap_or(0),
            last_seen_unix_ns: link.map_or(node.last_seen_ns.unwrap_or(0), |link| link.heard_ns),
            name: node.name,
            zone: node.zone,
        }
    };
    Ok(all.into_iter().map(summary).collect())
}
