//! A server for each segment: what DHCP and DNS have in common.
//!
//! A server is a task that serves on a segment's bridge and looks at what it is told there each time that it answers. It
//! ends with its segment; when a bridge was made anew, so is its server, since a socket is bound to the link and not to the name.
//!
//! What may not happen here: a server outliving its segment, or the table of servers.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::desired::{LinkName, Network, Segment, SegmentId};
use crate::error::Result;

/// What a server is told of its segment, as it last was.
pub type Told<T> = watch::Receiver<Arc<T>>;

struct Server<T> {
    bridge_index: u32,
    told: watch::Sender<Arc<T>>,
    task: JoinHandle<()>,
}

impl<T> Drop for Server<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The servers of all segments. `T` is what a server is told.
pub struct PerSegment<T> {
    servers: BTreeMap<SegmentId, Server<T>>,
}

impl<T> Default for PerSegment<T> {
    fn default() -> Self {
        Self { servers: BTreeMap::new() }
    }
}

impl<T> PerSegment<T> {
    /// Makes the servers those of `network`, each told what `tell` says of its segment. `index_of` tells a bridge's link index; a
    /// segment whose bridge has none gets its server when it has. `start` makes a server that is not there yet.
    pub fn apply<S: Future<Output = ()> + Send + 'static>(
        &mut self,
        network: &Network,
        index_of: impl Fn(&LinkName) -> Option<u32>,
        tell: impl Fn(&Segment) -> T,
        start: impl Fn(&Segment, u32, Told<T>) -> Result<S>,
    ) -> Result<()> {
        self.servers.retain(|id, server| {
            let bridge = network.segments.get(id).map(|segment| &segment.bridge);
            bridge.and_then(&index_of) == Some(server.bridge_index) && !server.task.is_finished()
        });
        for segment in network.segments.values() {
            let news = Arc::new(tell(segment));
            if let Some(server) = self.servers.get(&segment.id) {
                server.told.send_replace(news);
            } else if let Some(bridge_index) = index_of(&segment.bridge) {
                let (told, receiver) = watch::channel(news);
                let task = tokio::spawn(start(segment, bridge_index, receiver)?);
                self.servers.insert(segment.id.clone(), Server { bridge_index, told, task });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::testing;
    use tokio::sync::mpsc;

    /// A server that tells its birth with the bridge's index, and what it is told from then on.
    fn born(
        births: &mpsc::UnboundedSender<(u32, u64)>,
        index: u32,
        mut told: Told<u64>,
    ) -> impl Future<Output = ()> + use<> {
        let births = births.clone();
        async move {
            loop {
                let now = **told.borrow_and_update();
                let _ = births.send((index, now));
                if told.changed().await.is_err() {
                    return;
                }
            }
        }
    }

    #[tokio::test]
    async fn a_server_is_kept_while_its_bridge_is_the_same_and_ends_with_it() {
        let (births, mut heard) = mpsc::unbounded_channel();
        let mut servers = PerSegment::default();
        let network = testing::network();
        let apply = |servers: &mut PerSegment<u64>, network: &Network, index: Option<u32>, news: u64| {
            let start = |_: &Segment, index, told| Ok(born(&births, index, told));
            servers.apply(network, |_| index, |_| news, start).unwrap();
        };
        apply(&mut servers, &network, None, 0);
        assert!(servers.servers.is_empty(), "there is no bridge yet");
        apply(&mut servers, &network, Some(7), 1);
        assert_eq!(heard.recv().await, Some((7, 1)));
        apply(&mut servers, &network, Some(7), 2);
        assert_eq!(heard.recv().await, Some((7, 2)));
        apply(&mut servers, &network, Some(8), 3);
        assert_eq!(heard.recv().await, Some((8, 3)), "another bridge has another server");
        apply(&mut servers, &Network::default(), None, 4);
        drop(births);
        assert_eq!(heard.recv().await, None, "every server has ended");
    }
}
