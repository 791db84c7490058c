//! Ending the flows of elastic IPs that have moved, after the move was answered for.
//!
//! To find them takes the kernel a look at its whole table of connections, which takes longer than the move. So they are looked for by a task of its own, all that
//! have moved since it looked last in one go. A netd that is killed before that finds them when it starts again, as it does those of any change.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::off_thread;
use crate::conntrack::{self, Standing};

#[derive(Clone, Default)]
pub struct MovedFlows {
    moves: Arc<Mutex<Moves>>,
}

#[derive(Default)]
struct Moves {
    /// What the addresses stand for whose flows have not been looked at since they moved.
    standing: BTreeMap<Ipv4Addr, Standing>,
    /// Those of them that nobody looks at yet.
    waiting: BTreeSet<Ipv4Addr>,
    /// There is a task that will look at them.
    attended: bool,
    failed: bool,
}

impl MovedFlows {
    /// Has the flows ended of addresses that now stand for this.
    pub fn end(&self, standing: BTreeMap<Ipv4Addr, Standing>) {
        let mut moves = self.moves();
        moves.waiting.extend(standing.keys());
        moves.standing.extend(standing);
        if !std::mem::replace(&mut moves.attended, true) {
            tokio::spawn(self.clone().attend());
        }
    }

    /// Whether flows could not be ended since this was asked last.
    pub fn failed(&self) -> bool {
        std::mem::take(&mut self.moves().failed)
    }

    async fn attend(self) {
        while let Some(addresses) = self.next() {
            let flows = self.clone();
            let ended = off_thread(move || {
                conntrack::end_moved_flows(&addresses, |address| flows.moves().standing.get(&address).copied())
            });
            match ended.await {
                Ok(0) => {}
                Ok(ended) => tracing::info!(ended, "ended flows of elastic IPs that have moved"),
                Err(error) => {
                    tracing::warn!(%error, "flows of elastic IPs that have moved go on until the network is looked at next");
                    self.moves().failed = true;
                }
            }
        }
    }

    /// The addresses to look at next; none ends the task.
    fn next(&self) -> Option<Vec<Ipv4Addr>> {
        let mut moves = self.moves();
        let addresses: Vec<Ipv4Addr> = std::mem::take(&mut moves.waiting).into_iter().collect();
        // Those that were looked at and have not moved again are done with.
        moves.standing.retain(|address, _| addresses.binary_search(address).is_ok());
        moves.attended = !addresses.is_empty();
        moves.attended.then_some(addresses)
    }

    fn moves(&self) -> MutexGuard<'_, Moves> {
        // Nothing that is done with it can fail half way.
        self.moves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
