//! `mallee-netd trace`: what becomes of a packet, and by which rule.
//!
//! Nothing is computed. The network that a running netd has applied is made a second time, by the same code, in a network namespace of this
//! process's own ([`replica`]), with a tap in place of each of the node's interfaces. One packet is sent there ([`packet`]); the kernel says which rules
//! it passes ([`kernel`]), and whether and as what it comes out at another end is seen. So the answer is this kernel's, and no packet of the node's or of an
//! instance's is touched. That the node's own rules are those that were asked is made sure of by handing netd its network again, to which a network
//! that is in force is no change.
//!
//! What it cannot tell: what others' rules on the node do (`mallee doctor` names those), and what happens to packets of connections that there are, which
//! pass anyway.

mod kernel;
mod packet;
mod replica;

use std::path::Path;

use nix::sched::{CloneFlags, unshare};
use serde::Serialize;

use crate::api::{self, ApplyRequest, CapabilitiesReply, CapabilitiesRequest, NodeNetwork, ShowRequest};
use crate::cli::TraceOptions;
use crate::draw;
use crate::error::{Error, Result};
use packet::{Endpoints, Seen, Traffic};
use replica::Replica;

/// A rule that the packet passed, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    /// `bridge` or `ip`.
    pub family: &'static str,
    pub chain: String,
    /// What the rule is for, as it says itself.
    pub rule: String,
    /// `accept`, `drop`, `jump CHAIN`, `goto CHAIN`, or nothing where the next rule follows.
    pub verdict: String,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "outcome")]
pub enum Outcome {
    /// It came out.
    Arrived { at: String, seen: Seen },
    /// The node itself took it: a service of the gateway's.
    TakenByNode,
    /// By the last step.
    Dropped,
    /// No rule dropped it, and it came out nowhere.
    Lost,
}

#[derive(Debug, Serialize)]
struct Answer {
    from: String,
    to: String,
    sent: Seen,
    steps: Vec<Step>,
    #[serde(flatten)]
    outcome: Outcome,
    generation: u64,
    /// Whether the kernel's network was the desired one when this was asked. Where it was not, it is now.
    kernel_was_as_desired: bool,
}

/// What is known of the node.
struct Node {
    applied: NodeNetwork,
    capabilities: CapabilitiesReply,
    as_desired: bool,
}

/// Prints what becomes of the packet. Must be called from a process with one thread.
pub fn run(options: &TraceOptions) -> Result<()> {
    let traffic: Traffic = options.traffic.join(" ").parse().map_err(Error::Question)?;
    let node = runtime()?.block_on(ask(&options.socket))?;
    if let Some(why) = node.capabilities.capabilities.get("trace").filter(|why| !why.is_empty()) {
        return Err(Error::Question(why.clone()));
    }
    let ends = Endpoints::find(&node.applied, &options.from, &options.to).map_err(Error::Question)?;
    unshare(CloneFlags::CLONE_NEWNET)
        .map_err(|error| Error::io("making a network namespace of its own (needs CAP_SYS_ADMIN)")(error.into()))?;
    // Its threads are in the new namespace, as this one is.
    let answer = runtime()?.block_on(answer(node, ends, traffic))?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&answer).map_err(|error| Error::Internal(error.to_string()))?);
    } else {
        print!("{}", said(&answer));
    }
    Ok(())
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    let made = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    made.map_err(Error::io("starting tokio"))
}

async fn ask(socket: &Path) -> Result<Node> {
    let refused = |status: tonic::Status| draw::refused(socket, &status);
    let mut client = api::client(socket);
    let capabilities = client.capabilities(CapabilitiesRequest {}).await.map_err(refused)?.into_inner();
    let applied = client.show(ShowRequest {}).await.map_err(refused)?.into_inner().applied;
    let applied = applied.ok_or_else(|| Error::Question("netd has no network yet".into()))?;
    let again = ApplyRequest { desired: Some(applied.clone()) };
    let as_desired = !client.apply(again).await.map_err(refused)?.into_inner().changed;
    Ok(Node { applied, capabilities, as_desired })
}

async fn answer(node: Node, ends: Endpoints, traffic: Traffic) -> Result<Answer> {
    let replica = Replica::make(&node.applied, &node.capabilities, &ends).await?;
    let sent = replica.what_to_send(&ends, traffic)?;
    let mut listener = kernel::Listener::on(sent.seen.from, sent.seen.to)?;
    let arrival = replica.send_and_watch(&ends, &sent)?;
    let steps = listener.steps()?;
    let outcome = match arrival {
        Some((at, seen)) => Outcome::Arrived { at, seen },
        None if steps.last().is_some_and(|step| step.verdict == "drop") => Outcome::Dropped,
        None if steps.iter().any(|step| step.chain == "node_from_instance" && step.verdict == "accept") => {
            Outcome::TakenByNode
        }
        None => Outcome::Lost,
    };
    Ok(Answer {
        from: ends.from.name(),
        to: ends.to.name(),
        sent: sent.seen,
        steps,
        outcome,
        generation: node.applied.generation,
        kernel_was_as_desired: node.as_desired,
    })
}

/// The answer as a person reads it.
fn said(answer: &Answer) -> String {
    let mut text = format!("{} → {}: {}\n\n", answer.from, answer.to, answer.sent);
    let width = answer.steps.iter().map(|step| step.chain.len()).max().unwrap_or_default();
    for step in &answer.steps {
        let verdict = if step.verdict.is_empty() { String::new() } else { format!("  → {}", step.verdict) };
        text += &format!("  {:<6}  {:<width$}  {}{verdict}\n", step.family, step.chain, step.rule);
    }
    text += &match &answer.outcome {
        Outcome::Arrived { at, seen } if *seen == answer.sent => format!("\narrives at {at}, as it was sent\n"),
        Outcome::Arrived { at, seen } => format!("\narrives at {at}, translated: {seen}\n"),
        Outcome::TakenByNode => "\nis taken by the node itself, as a service of the gateway\n".to_owned(),
        Outcome::Dropped => "\nis dropped by the last of these rules\n".to_owned(),
        Outcome::Lost => "\nis dropped by no rule and comes out nowhere: nothing leads to that address\n".to_owned(),
    };
    let state = if answer.kernel_was_as_desired { "has" } else { "did not have, and has now," };
    text + &format!(
        "(asked of this kernel with the network of generation {}, which the node {state} in force)\n",
        answer.generation
    )
}
