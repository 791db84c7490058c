//! What a node observed, written back as instance states.
//!
//! The rules are [`lifecycle::observe`]'s. A report made from a generation older than the one that
//! carried what is now wanted of an instance says nothing about it: that is what makes a late report
//! harmless.

use std::collections::BTreeSet;

use mallee_agent::api::{InstancePhase, ObservedInstance, ObservedNode};

use super::segments;
use crate::Cloud;
use crate::error::Result;
use crate::state::instances::{self, Instance};
use crate::state::lifecycle::{self, Change, InstanceState, Observation};
use crate::state::{Tx, addresses, nodes, security_groups};

/// Writes a report down; wakes the node when it changes what is wanted of it.
pub(super) async fn note(cloud: &Cloud, node: &str, report: ObservedNode) -> Result<()> {
    if !report.network_error.is_empty() {
        tracing::error!(node, error = report.network_error, "the node's network could not be applied");
    }
    // Most reports change nothing: those are seen without taking the writer's place.
    let mut snapshot = cloud.db.snapshot().await?;
    let here = instances::on_node(&mut snapshot, node).await?;
    drop(snapshot);
    if here.iter().all(|one| news(one, &report).is_none()) {
        return Ok(());
    }
    let mut tx = cloud.db.begin().await?;
    let mut woken = BTreeSet::new();
    let mut began = Vec::new();
    for one in instances::on_node(&mut tx, node).await? {
        let Some(news) = news(&one, &report) else { continue };
        if news.leased {
            instances::set_leased(&mut tx, &one.id).await?;
        }
        if let Some(change) = news.change {
            woken.extend(carry_out(&mut tx, cloud, &one, &change).await?);
            began.extend((change.to == InstanceState::Running).then_some(one));
        }
    }
    tx.commit().await?;
    for one in began {
        let now = crate::clock::unix_ns();
        cloud.traces.record(crate::traces::Span::here(&one.trace, "instance is running", now, one.id.as_str()));
    }
    woken.iter().for_each(|node| cloud.nodes.wake(node));
    Ok(())
}

/// What a report says that the database does not know yet.
struct News {
    change: Option<Change>,
    leased: bool,
}

fn news(one: &Instance, report: &ObservedNode) -> Option<News> {
    if report.generation.cast_signed() < one.generation {
        return None;
    }
    let seen = report.instances.iter().find(|seen| seen.id == one.id.as_str());
    let change = lifecycle::observe(one.life(), observation(seen)?);
    let leased = !one.leased && seen.is_some_and(|seen| seen.leased);
    (change.is_some() || leased).then_some(News { change, leased })
}

/// `None`: the node's words mean nothing to us.
fn observation(seen: Option<&ObservedInstance>) -> Option<Observation> {
    let Some(seen) = seen else { return Some(Observation::Absent) };
    Some(match seen.phase() {
        InstancePhase::Preparing => Observation::Preparing,
        InstancePhase::Running => Observation::Running,
        InstancePhase::Stopping => Observation::Stopping,
        InstancePhase::Stopped => Observation::Stopped(seen.reason.clone()),
        InstancePhase::Failed => Observation::Failed(seen.reason.clone()),
        InstancePhase::Unspecified => return None,
    })
}

/// Returns the nodes of which something new is wanted.
async fn carry_out(tx: &mut Tx, cloud: &Cloud, one: &Instance, change: &Change) -> Result<BTreeSet<String>> {
    let rewanted = change.to.wanted() != one.state.wanted();
    let generation = if rewanted { nodes::touch(tx, &one.node).await? } else { one.generation };
    instances::apply(tx, &one.id, change, generation).await?;
    let mut woken: BTreeSet<String> = rewanted.then(|| one.node.clone()).into_iter().collect();
    if change.to == InstanceState::ShuttingDown {
        let_go(tx, cloud, one, &mut woken).await?;
    }
    Ok(woken)
}

/// An instance that ends gives back its elastic IPs, is nobody's neighbour any more, and who gets its address next is no member of its groups. Adds
/// to `woken` the nodes of which something new is wanted by that.
pub(super) async fn let_go(tx: &mut Tx, cloud: &Cloud, one: &Instance, woken: &mut BTreeSet<String>) -> Result<()> {
    addresses::release_instance(tx, &one.id).await?;
    woken.extend(segments::touch_others(tx, cloud, &[&one.node]).await?);
    let mut concerned = security_groups::nodes_concerned(tx, &one.security_groups).await?;
    concerned.retain(|node| !woken.contains(node));
    for node in &concerned {
        nodes::touch(tx, node).await?;
    }
    woken.extend(concerned);
    Ok(())
}
