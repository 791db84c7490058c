//! The list of nodes: added by the operator, each with its zone and its credentials; seen with what they said last; removed.
//!
//! A node that gets new credentials or is removed is cut off in the same call: what was given out before it is worth nothing after it. That a
//! machine is lost is the operator's word, and the one case in which an instance is `terminated` though no node said that it is gone; if the machine
//! comes back all the same it is refused, and once it is added again it is told to have nothing.

use std::collections::{BTreeSet, HashMap};

use super::{NodeSummary, observed, segments};
use crate::Cloud;
use crate::error::{Error, Result};
use crate::ids::InstanceId;
use crate::state::{instances, lifecycle, nodes};

/// Adds a node; its zone and the zone's subnet are there from now on, with the number that the subnet needs.
pub async fn add(cloud: &Cloud, name: &str, zone: &str) -> Result<()> {
    let mut tx = cloud.db.begin().await?;
    let home = nodes::add(&mut tx, name, zone).await?;
    segments::give_number(&mut tx, cloud, &home.id).await?;
    Ok(tx.commit().await?)
}

/// Makes the certificate of this serial the node's only one; a stream that another one opened ends.
pub async fn give_credentials(cloud: &Cloud, name: &str, zone: &str, serial: &str) -> Result<()> {
    let mut tx = cloud.db.begin().await?;
    nodes::set_credentials(&mut tx, name, zone, serial).await?;
    tx.commit().await?;
    cloud.nodes.cut(name);
    Ok(())
}

/// Removes a node on which nothing is. A `lost` one's instances are terminated here and now, and returned: its machine is off and does not come back.
/// [`Error::Node`] when there is no such node, something is on it, or it is said to be lost and attends.
pub async fn remove(cloud: &Cloud, name: &str, lost: bool) -> Result<Vec<InstanceId>> {
    let mut tx = cloud.db.begin().await?;
    if nodes::find(&mut tx, name).await?.is_none() {
        return Err(Error::Node(format!("there is no node {name}: see `mallee node list`")));
    }
    let here = instances::on_node(&mut tx, name).await?;
    if !here.is_empty() && !lost {
        return Err(Error::Node(format!(
            "node {name} has {} instances: terminate them first, or, if the machine is off for good, say --lost",
            here.len()
        )));
    }
    if lost && cloud.nodes.connected(name) {
        return Err(Error::Node(format!(
            "node {name} is connected, so it is not lost: terminate its instances, and remove it without --lost"
        )));
    }
    let mut woken = BTreeSet::new();
    for one in &here {
        instances::apply(&mut tx, &one.id, &lifecycle::lose(one.state), one.generation).await?;
        observed::let_go(&mut tx, cloud, one, &mut woken).await?;
    }
    nodes::remove(&mut tx, name).await?;
    // The ends of its tunnels are news to the others, whether anything was on it or not.
    woken.extend(segments::touch_others(&mut tx, cloud, &[name]).await?);
    tx.commit().await?;
    cloud.nodes.cut(name);
    woken.iter().for_each(|node| cloud.nodes.wake(node));
    Ok(here.into_iter().map(|one| one.id).collect())
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
