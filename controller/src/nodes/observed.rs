//! What a node observed, written back as instance states.
//!
//! The rules are in [`decide`], which is told what is wanted and what is seen and knows nothing of the
//! database. A report made from a generation older than the one that carried what is wanted now says
//! nothing about the instance: that is what makes a late report harmless.

use mallee_agent::api::{InstancePhase, ObservedInstance, ObservedNode};

use super::bump;
use crate::Cloud;
use crate::error::Result;
use crate::state::Tx;

/// Why an instance is in its state: EC2's `StateReason`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Reason {
    code: &'static str,
    message: String,
}

/// What a report does to an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Change {
    Nothing,
    Running,
    /// Off, disk kept. `asked`: it was asked for by a call, so nothing new is wanted of the node.
    Stopped { asked: bool, reason: Option<Reason> },
    /// To be taken down by the node.
    ShuttingDown(Reason),
    Terminated,
}

/// An instance as the database has it.
#[derive(sqlx::FromRow)]
struct Row {
    id: String,
    state: String,
    ran: bool,
    generation: i64,
    shutdown_behavior: String,
    leased: bool,
    trace: String,
}

fn decide(row: &Row, seen: Option<&ObservedInstance>) -> Change {
    let Some(seen) = seen else {
        // Only what was to go may be absent; anything else the node has not come to yet.
        return if row.state == "shutting-down" { Change::Terminated } else { Change::Nothing };
    };
    let failed = || Reason { code: failure_code(&seen.reason), message: seen.reason.clone() };
    match (row.state.as_str(), seen.phase()) {
        ("pending", InstancePhase::Running) => Change::Running,
        // What never ran has nothing worth keeping; what ran before keeps its disk (EC2 User Guide,
        // "Instance state changes").
        ("pending", InstancePhase::Failed) if !row.ran => Change::ShuttingDown(failed()),
        ("pending" | "running", InstancePhase::Failed) => Change::Stopped { asked: false, reason: Some(failed()) },
        ("pending" | "running", InstancePhase::Stopped) => {
            let reason = Reason {
                code: "Client.InstanceInitiatedShutdown",
                message: "Client.InstanceInitiatedShutdown: Instance initiated shutdown".to_owned(),
            };
            match row.shutdown_behavior.as_str() {
                "terminate" => Change::ShuttingDown(reason),
                _ => Change::Stopped { asked: false, reason: Some(reason) },
            }
        }
        ("stopping", InstancePhase::Stopped | InstancePhase::Failed) => Change::Stopped { asked: true, reason: None },
        _ => Change::Nothing,
    }
}

/// The node says in words why it failed; whose fault it is shows in whether the image was the cause.
fn failure_code(reason: &str) -> &'static str {
    let reason = reason.to_lowercase();
    let image = ["kernel", "initrd", "image", "digest", "sha-256"].iter().any(|word| reason.contains(word));
    if image { "Client.InvalidImage" } else { "Server.InternalError" }
}

/// Writes a report down; wakes the node when it changes what is wanted of it.
pub(super) async fn note(cloud: &Cloud, node: &str, report: ObservedNode) -> Result<()> {
    if !report.network_error.is_empty() {
        tracing::error!(node, error = report.network_error, "the node's network could not be applied");
    }
    let generation = report.generation.cast_signed();
    // Most reports change nothing: those are seen without taking the writer's place.
    let rows = rows(cloud.db.pool(), node, generation).await?;
    if rows.iter().all(|row| settled(row, find(&report, &row.id))) {
        return Ok(());
    }
    let mut tx = cloud.db.begin().await?;
    let rows = self::rows(&mut *tx, node, generation).await?;
    let mut wanted_changed = false;
    for row in &rows {
        let seen = find(&report, &row.id);
        if seen.is_some_and(|seen| seen.leased) && !row.leased {
            sqlx::query("UPDATE instances SET leased = 1 WHERE id = ?").bind(&row.id).execute(&mut *tx).await?;
        }
        wanted_changed |= carry_out(&mut tx, node, row, decide(row, seen)).await?;
    }
    tx.commit().await?;
    for row in rows.iter().filter(|row| decide(row, find(&report, &row.id)) == Change::Running) {
        let now = crate::clock::unix_ns();
        cloud.traces.record(crate::traces::Span::here(&row.trace, "instance is running", now, &row.id));
    }
    if wanted_changed {
        cloud.nodes.wake(node);
    }
    Ok(())
}

fn find<'a>(report: &'a ObservedNode, id: &str) -> Option<&'a ObservedInstance> {
    report.instances.iter().find(|instance| instance.id == id)
}

fn settled(row: &Row, seen: Option<&ObservedInstance>) -> bool {
    decide(row, seen) == Change::Nothing && (row.leased || seen.is_none_or(|seen| !seen.leased))
}

async fn rows<'e>(db: impl sqlx::SqliteExecutor<'e>, node: &str, generation: i64) -> Result<Vec<Row>> {
    Ok(sqlx::query_as(
        "SELECT id, state, ran, generation, shutdown_behavior, leased, trace FROM instances \
         WHERE node = ? AND state <> 'terminated' AND generation <= ?",
    )
    .bind(node)
    .bind(generation)
    .fetch_all(db)
    .await?)
}

/// True when something new is wanted of the node.
async fn carry_out(tx: &mut Tx, node: &str, row: &Row, change: Change) -> Result<bool> {
    match change {
        Change::Nothing => Ok(false),
        Change::Running => {
            set_state(tx, row, "running", None, "").await?;
            sqlx::query("UPDATE instances SET ran = 1 WHERE id = ?").bind(&row.id).execute(&mut **tx).await?;
            Ok(false)
        }
        Change::Stopped { asked: true, .. } => {
            // The call that asked for it has said why.
            sqlx::query("UPDATE instances SET state = 'stopped', changed_ns = ? WHERE id = ?")
                .bind(crate::clock::now())
                .bind(&row.id)
                .execute(&mut **tx)
                .await?;
            Ok(false)
        }
        Change::Stopped { asked: false, reason } => {
            set_state(tx, row, "stopped", reason.as_ref(), "Server initiated stop").await?;
            rewant(tx, node, row).await?;
            Ok(true)
        }
        Change::ShuttingDown(reason) => {
            set_state(tx, row, "shutting-down", Some(&reason), "Server initiated termination").await?;
            sqlx::query("UPDATE addresses SET association_id = NULL, instance_id = NULL WHERE instance_id = ?")
                .bind(&row.id)
                .execute(&mut **tx)
                .await?;
            rewant(tx, node, row).await?;
            Ok(true)
        }
        Change::Terminated => {
            sqlx::query("UPDATE instances SET state = 'terminated', changed_ns = ? WHERE id = ?")
                .bind(crate::clock::now())
                .bind(&row.id)
                .execute(&mut **tx)
                .await?;
            Ok(false)
        }
    }
}

/// What is wanted of the instance is new with the node's next generation.
async fn rewant(tx: &mut Tx, node: &str, row: &Row) -> Result<()> {
    let generation = bump(tx, node).await?;
    sqlx::query("UPDATE instances SET generation = ? WHERE id = ?")
        .bind(generation)
        .bind(&row.id)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

async fn set_state(tx: &mut Tx, row: &Row, state: &str, reason: Option<&Reason>, transition: &str) -> Result<()> {
    sqlx::query(
        "UPDATE instances SET state = ?, state_code = ?, state_message = ?, transition = ?, changed_ns = ? WHERE id = ?",
    )
    .bind(state)
    .bind(reason.map(|reason| reason.code))
    .bind(reason.map(|reason| reason.message.as_str()))
    .bind(transition)
    .bind(crate::clock::now())
    .bind(&row.id)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(state: &str, ran: bool, behavior: &str) -> Row {
        Row {
            id: "i-1".to_owned(),
            state: state.to_owned(),
            ran,
            generation: 1,
            shutdown_behavior: behavior.to_owned(),
            leased: false,
            trace: String::new(),
        }
    }

    fn seen(phase: InstancePhase, reason: &str) -> ObservedInstance {
        ObservedInstance { id: "i-1".to_owned(), phase: phase.into(), reason: reason.to_owned(), ..Default::default() }
    }

    #[test]
    fn absence_ends_only_what_was_to_end() {
        assert_eq!(decide(&row("shutting-down", true, "stop"), None), Change::Terminated);
        for state in ["pending", "running", "stopping", "stopped"] {
            assert_eq!(decide(&row(state, true, "stop"), None), Change::Nothing, "{state}");
        }
    }

    #[test]
    fn a_first_launch_that_fails_ends_and_a_later_one_stops() {
        let failed = seen(InstancePhase::Failed, "the kernel is truncated");
        let Change::ShuttingDown(reason) = decide(&row("pending", false, "stop"), Some(&failed)) else { panic!() };
        assert_eq!(reason.code, "Client.InvalidImage");
        let later = decide(&row("pending", true, "stop"), Some(&failed));
        assert!(matches!(later, Change::Stopped { asked: false, .. }));
    }

    #[test]
    fn a_guest_that_powers_off_follows_its_shutdown_behavior() {
        let off = seen(InstancePhase::Stopped, "");
        assert!(matches!(decide(&row("running", true, "stop"), Some(&off)), Change::Stopped { asked: false, .. }));
        assert!(matches!(decide(&row("running", true, "terminate"), Some(&off)), Change::ShuttingDown(_)));
        assert!(matches!(decide(&row("stopping", true, "terminate"), Some(&off)), Change::Stopped { asked: true, .. }));
    }

    #[test]
    fn nothing_brings_back_what_is_to_go() {
        for phase in [InstancePhase::Running, InstancePhase::Stopped, InstancePhase::Failed, InstancePhase::Preparing] {
            assert_eq!(decide(&row("shutting-down", true, "stop"), Some(&seen(phase, ""))), Change::Nothing);
            assert_eq!(decide(&row("stopped", true, "stop"), Some(&seen(phase, ""))), Change::Nothing);
        }
    }
}
