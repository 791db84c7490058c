//! Asking a node for an instance's console: a question down the stream, its answer up the same stream.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mallee_agent::api;
use tokio::sync::oneshot;

use super::Nodes;
use crate::Cloud;

/// A node that is alive reads a file of at most 64 KiB in far less.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConsoleError {
    #[error("node {0} is not connected: its consoles can be read when it is back")]
    NotConnected(String),
    #[error("node {0} did not answer in time: try again")]
    TimedOut(String),
}

pub(super) async fn ask(
    cloud: &Cloud,
    node: &str,
    instance: &str,
    max_bytes: u32,
) -> Result<api::ConsoleReply, ConsoleError> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    let (answer, answered) = oneshot::channel();
    let out = {
        let mut links = cloud.nodes.links();
        let link = links.get_mut(node).ok_or_else(|| ConsoleError::NotConnected(node.to_owned()))?;
        link.consoles.insert(id, answer);
        link.out.clone()
    };
    let request = api::ConsoleRequest { id, instance: instance.to_owned(), max_bytes };
    let message =
        api::ToAgent { sent_unix_ns: crate::clock::unix_ns(), message: Some(api::to_agent::Message::Console(request)) };
    let exchange = async {
        out.send(message).await.map_err(|_| ConsoleError::NotConnected(node.to_owned()))?;
        answered.await.map_err(|_| ConsoleError::NotConnected(node.to_owned()))
    };
    let result = tokio::time::timeout(PATIENCE, exchange).await;
    if result.is_err() {
        cloud.nodes.forget_question(node, id);
    }
    result.unwrap_or_else(|_| Err(ConsoleError::TimedOut(node.to_owned())))
}

impl Nodes {
    /// Hands an answer to whoever asked; an answer that nobody waits for any more is dropped.
    pub(super) fn answered(&self, node: &str, reply: api::ConsoleReply) {
        let asker = self.links().get_mut(node).and_then(|link| link.consoles.remove(&reply.id));
        if let Some(asker) = asker {
            let _ = asker.send(reply);
        }
    }

    fn forget_question(&self, node: &str, id: u64) {
        if let Some(link) = self.links().get_mut(node) {
            link.consoles.remove(&id);
        }
    }
}
