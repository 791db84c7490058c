//! One agent's open stream: two tasks, one for each direction.
//!
//! The sending task sleeps until the node is woken, computes the node's desired state and sends it;
//! several wakes while it computes become one. The receiving task takes what the agent says, in
//! order. Either one's end ends the other, and the node is away until its agent dials again. Both end too when the stream's [`Link`] is taken
//! away: by a new stream of the same node, by new credentials, by the node's removal. What was being written down is written to its end.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mallee_agent::api;
use mallee_agent::api::from_agent::Message;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use super::clock_offset::ClockOffset;
use super::{Facts, Link, desired, observed, segments};
use crate::Cloud;
use crate::error::Result;
use crate::state::nodes;
use crate::traces::Span;

/// Messages on their way to the agent. A desired state is whole: more than one waiting is of no use.
const QUEUE: usize = 8;
/// When the database cannot be read, it is tried again after this.
const RETRY: Duration = Duration::from_secs(1);

/// Takes the stream on; what is to be sent comes out of the receiver.
pub(super) fn begin(cloud: Cloud, node: String, incoming: Streaming<api::FromAgent>) -> mpsc::Receiver<api::ToAgent> {
    static SESSIONS: AtomicU64 = AtomicU64::new(1);
    let session = SESSIONS.fetch_add(1, Ordering::Relaxed);
    let (out, outgoing) = mpsc::channel(QUEUE);
    let end = CancellationToken::new();
    let wake = Arc::new(Notify::new());
    wake.notify_one();
    let link = Link {
        session,
        wake: wake.clone(),
        out: out.clone(),
        consoles: HashMap::new(),
        heard_ns: crate::clock::now(),
        network: watch::Sender::new(0),
        _open: end.clone().drop_guard(),
    };
    cloud.nodes.links().insert(node.clone(), link);
    tracing::info!(node, "node attends");
    tokio::spawn(async move {
        let attending = Attending { cloud: &cloud, node: &node, session };
        let sending = async {
            end.run_until_cancelled(send(&cloud, &node, &wake, &out)).await;
            end.cancel();
        };
        let receiving = async {
            receive(&cloud, &node, incoming, &end).await;
            end.cancel();
        };
        tokio::join!(sending, receiving);
        drop(attending);
        if let Err(error) = note_seen(&cloud, &node).await {
            tracing::error!(node, %error, "when the node was last seen could not be written down");
        }
    });
    outgoing
}

/// A node is not taken for connected once this is gone, also when a task of its stream panicked.
struct Attending<'a> {
    cloud: &'a Cloud,
    node: &'a str,
    session: u64,
}

impl Drop for Attending<'_> {
    fn drop(&mut self) {
        if self.cloud.nodes.leave(self.node, self.session) {
            tracing::warn!(node = self.node, "node is away");
        }
    }
}

async fn send(cloud: &Cloud, node: &str, wake: &Notify, out: &mpsc::Sender<api::ToAgent>) {
    loop {
        wake.notified().await;
        let begun = crate::clock::unix_ns();
        let desired = match desired::of_node(cloud, node).await {
            Ok(desired) => desired,
            Err(error) => {
                tracing::error!(node, %error, "the node's desired state cannot be computed");
                tokio::time::sleep(RETRY).await;
                wake.notify_one();
                continue;
            }
        };
        let fresh = desired.fresh;
        let message = api::ToAgent {
            sent_unix_ns: crate::clock::unix_ns(),
            message: Some(api::to_agent::Message::Desired(desired.state)),
        };
        if out.send(message).await.is_err() {
            return;
        }
        for (trace, instance) in fresh {
            cloud.traces.record(Span::here(&trace, "desired state to node", begun, &instance));
        }
    }
}

async fn receive(cloud: &Cloud, node: &str, mut incoming: Streaming<api::FromAgent>, end: &CancellationToken) {
    let mut clock = ClockOffset::default();
    while let Some(heard) = end.run_until_cancelled(incoming.message()).await {
        match heard {
            Ok(Some(said)) => {
                clock.note(said.sent_unix_ns, crate::clock::unix_ns());
                if let Some(link) = cloud.nodes.links().get_mut(node) {
                    link.heard_ns = crate::clock::now();
                }
                let Some(message) = said.message else { continue };
                if let Err(error) = hear(cloud, node, &clock, message).await {
                    // What was observed is said again within seconds; a node is not cut off for it.
                    tracing::error!(node, %error, "what the node said could not be written down");
                }
            }
            Ok(None) => return,
            Err(status) => {
                tracing::info!(node, %status, "the node's stream broke");
                return;
            }
        }
    }
}

async fn hear(cloud: &Cloud, node: &str, clock: &ClockOffset, message: Message) -> Result<()> {
    match message {
        Message::Facts(facts) => note_facts(cloud, node, facts.into()).await,
        Message::Observed(state) => {
            if let Some(link) = cloud.nodes.links().get(node) {
                link.network.send_replace(state.network_generation);
            }
            observed::note(cloud, node, state).await
        }
        Message::Spans(spans) => {
            for span in spans.spans {
                cloud.traces.record(on_our_clock(clock, span));
            }
            Ok(())
        }
        Message::Console(reply) => {
            cloud.nodes.answered(node, reply);
            Ok(())
        }
    }
}

async fn note_seen(cloud: &Cloud, node: &str) -> Result<()> {
    let mut tx = cloud.db.begin().await?;
    nodes::seen(&mut tx, node).await?;
    Ok(tx.commit().await?)
}

/// What the node can carry, and where its tunnels end, is news to all nodes, and to itself.
async fn note_facts(cloud: &Cloud, node: &str, facts: Facts) -> Result<()> {
    let mut tx = cloud.db.begin().await?;
    let known = nodes::find(&mut tx, node).await?.and_then(|node| node.facts);
    let reach = |facts: &Facts| (cloud.config.segments.missing_on(facts).is_none(), facts.underlay_address.clone());
    let mut woken = Vec::new();
    if cloud.config.segments.span_nodes() && known.as_ref().map(reach) != Some(reach(&facts)) {
        woken = segments::touch_others(&mut tx, cloud, &[node]).await?;
        nodes::touch(&mut tx, node).await?;
        woken.push(node.to_owned());
    }
    nodes::set_facts(&mut tx, node, &facts).await?;
    tx.commit().await?;
    woken.iter().for_each(|node| cloud.nodes.wake(node));
    Ok(())
}

fn on_our_clock(clock: &ClockOffset, span: api::Span) -> Span {
    Span {
        trace: span.trace,
        id: span.id,
        part: span.part,
        name: span.name,
        start_unix_ns: clock.ours(span.start_unix_ns),
        end_unix_ns: clock.ours(span.end_unix_ns.max(span.start_unix_ns)),
        instance: span.instance,
        attributes: span.attributes.into_iter().collect(),
    }
}
