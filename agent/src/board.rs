//! What is observed, instance by instance: written by the instances' tasks, read by the session.
//!
//! A task replaces its own row and nothing else; the session always sends the whole board. The board
//! names the generation of desired state that it was made from, and the controller believes it: when
//! the generation is set, no row may say "stopped" or "failed" of a life that is over.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;

use crate::api::{InstancePhase, ObservedInstance, ObservedNode};
use crate::ids::InstanceId;

/// The rows, and a number that grows when one differs from before.
#[derive(Debug)]
pub struct Board {
    rows: Mutex<Rows>,
    version: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Rows {
    generation: u64,
    network_generation: u64,
    network_error: String,
    instances: BTreeMap<InstanceId, ObservedInstance>,
}

impl Default for Board {
    fn default() -> Self {
        Self { rows: Mutex::default(), version: watch::Sender::new(0) }
    }
}

impl Board {
    /// Wakes whenever something on the board changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    pub fn set_generation(&self, generation: u64) {
        self.edit(|rows| replace(&mut rows.generation, generation));
    }

    /// The generation of the newest network that was applied (0: none yet), and why a newer one is not.
    pub fn set_network(&self, generation: u64, error: String) {
        self.edit(|rows| replace(&mut rows.network_generation, generation) | replace(&mut rows.network_error, error));
    }

    pub fn put(&self, id: &InstanceId, row: ObservedInstance) {
        self.put_unless(id, row, || false);
    }

    /// Writes the row unless `is_stale`, which is asked while nobody else can write.
    pub fn put_unless(&self, id: &InstanceId, row: ObservedInstance, is_stale: impl FnOnce() -> bool) {
        self.edit(|rows| match rows.instances.get(id) {
            Some(old) if *old == row => false,
            _ if is_stale() => false,
            _ => {
                rows.instances.insert(id.clone(), row);
                true
            }
        });
    }

    /// A start is wanted of an instance that is stopped or failed: it says so from now on, before its
    /// task has come round to it.
    pub fn begin_anew(&self, id: &InstanceId) {
        self.edit(|rows| match rows.instances.get_mut(id) {
            Some(row) if matches!(row.phase(), InstancePhase::Stopped | InstancePhase::Failed) => {
                row.set_phase(InstancePhase::Preparing);
                row.reason.clear();
                true
            }
            _ => false,
        });
    }

    /// The instance is gone, with all that was of it.
    pub fn remove(&self, id: &InstanceId) {
        self.edit(|rows| rows.instances.remove(id).is_some());
    }

    /// Removes the rows that nobody answers for any more.
    pub fn retain(&self, keep: impl Fn(&InstanceId) -> bool) {
        self.edit(|rows| {
            let before = rows.instances.len();
            rows.instances.retain(|id, _| keep(id));
            rows.instances.len() != before
        });
    }

    pub fn whole(&self) -> ObservedNode {
        let rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        ObservedNode {
            generation: rows.generation,
            instances: rows.instances.values().cloned().collect(),
            network_error: rows.network_error.clone(),
            network_generation: rows.network_generation,
        }
    }

    fn edit(&self, change: impl FnOnce(&mut Rows) -> bool) {
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        if change(&mut rows) {
            self.version.send_modify(|version| *version += 1);
        }
    }
}

fn replace<T: PartialEq>(place: &mut T, value: T) -> bool {
    let differs = *place != value;
    *place = value;
    differs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_difference_wakes_the_session() {
        let board = Board::default();
        let mut changes = board.changes();
        let id: InstanceId = "i-00000001".parse().unwrap();
        let row = ObservedInstance { id: id.to_string(), ..Default::default() };
        board.put(&id, row.clone());
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        board.put(&id, row);
        board.set_generation(0);
        assert!(!changes.has_changed().unwrap());
        board.put_unless(&id, ObservedInstance { vmm_pid: 1, ..Default::default() }, || true);
        assert!(!changes.has_changed().unwrap(), "a stale row is not written");
        board.remove(&id);
        assert!(changes.has_changed().unwrap());
        assert!(board.whole().instances.is_empty());
    }

    #[test]
    fn a_start_takes_back_what_was_said_of_the_last_life() {
        let board = Board::default();
        let id: InstanceId = "i-00000001".parse().unwrap();
        let phase_after = |phase: InstancePhase| {
            board.put(&id, ObservedInstance { phase: phase as i32, reason: "why".into(), ..Default::default() });
            board.begin_anew(&id);
            board.whole().instances[0].phase()
        };
        assert_eq!(phase_after(InstancePhase::Stopped), InstancePhase::Preparing);
        assert_eq!(phase_after(InstancePhase::Failed), InstancePhase::Preparing);
        assert_eq!(phase_after(InstancePhase::Running), InstancePhase::Running);
    }
}
