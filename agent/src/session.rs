//! The conversation with the controller.
//!
//! One stream: facts first, then the whole board whenever it changes and every ten seconds,
//! measurements as they come; back come desired states and questions for consoles. It ends when
//! either side does, and is begun again for ever; whole states are sent each time, so that nothing
//! depends on what was said before.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::api::from_agent::Message as Said;
use crate::api::to_agent::Message as Heard;
use crate::api::{ConsoleReply, ConsoleRequest, DesiredNode, FromAgent, NodeFacts, Spans};
use crate::clock::unix_ns;
use crate::console;
use crate::credentials::chain;
use crate::ids::InstanceId;
use crate::instance::Services;
use crate::instance::folder::Folder;

/// The board is sent at least this often (`node.proto`).
const HEARTBEAT: Duration = Duration::from_secs(10);

/// Between two tries to reach the controller: doubles from the first to the second.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The longest console that is read for one question, bytes.
const CONSOLE_LIMIT: u32 = 1 << 20;

pub struct Session {
    pub channel: Channel,
    pub services: Arc<Services>,
    pub facts: watch::Receiver<Option<NodeFacts>>,
    pub desired: watch::Sender<Option<DesiredNode>>,
}

impl Session {
    /// Talks to the controller for ever.
    pub async fn run(self) {
        let mut pause = FIRST_PAUSE;
        loop {
            match self.attend().await {
                Ok(heard_something) => {
                    tracing::warn!("the controller ended the conversation; beginning again");
                    if heard_something {
                        pause = FIRST_PAUSE;
                    }
                }
                Err(status) => {
                    tracing::warn!(error = chain(&status), retry_in = ?pause, "the controller cannot be reached")
                }
            }
            self.services.spans.send_doubtful_again();
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// One conversation. True when the controller said something in it.
    async fn attend(&self) -> Result<bool, tonic::Status> {
        let mut facts = self.facts.clone();
        let first = facts.wait_for(Option::is_some).await.map(|facts| facts.clone());
        let Ok(Some(first)) = first else { return Ok(false) };
        facts.mark_unchanged();

        let (say, said) = mpsc::channel(16);
        // The channel holds it until the stream is open.
        let _ = say.send(message(Said::Facts(first))).await;
        let mut client = crate::api::client(self.channel.clone());
        let mut heard = client.attend(ReceiverStream::new(said)).await?.into_inner();
        tracing::info!("talking to the controller");

        let mut board = self.services.board.changes();
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        let mut heard_something = false;
        loop {
            let next = tokio::select! {
                message = heard.message() => match message {
                    Ok(Some(message)) => {
                        heard_something = true;
                        self.hear(message.message, &say);
                        continue;
                    }
                    Ok(None) => return Ok(heard_something),
                    Err(status) if heard_something => {
                        tracing::warn!(error = chain(&status), "the conversation broke");
                        return Ok(true);
                    }
                    Err(status) => return Err(status),
                },
                Ok(()) = board.changed() => { board.mark_unchanged(); self.observed() }
                _ = heartbeat.tick() => self.observed(),
                Ok(()) = facts.changed() => match facts.borrow_and_update().clone() {
                    Some(facts) => Said::Facts(facts),
                    None => continue,
                },
                spans = self.services.spans.next() => Said::Spans(Spans { spans }),
            };
            if say.send(message(next)).await.is_err() {
                // The other half tells why.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }

    fn observed(&self) -> Said {
        Said::Observed(self.services.board.whole())
    }

    fn hear(&self, heard: Option<Heard>, say: &mpsc::Sender<FromAgent>) {
        match heard {
            Some(Heard::Desired(desired)) => {
                tracing::debug!(generation = desired.generation, instances = desired.instances.len(), "desired state");
                self.desired.send_replace(Some(desired));
            }
            Some(Heard::Console(request)) => {
                let (instances, say) = (self.services.instances.clone(), say.clone());
                tokio::spawn(async move {
                    let reply = tokio::task::spawn_blocking(move || read_console(instances, request)).await;
                    if let Ok(reply) = reply {
                        let _ = say.send(message(Said::Console(reply))).await;
                    }
                });
            }
            None => tracing::warn!("the controller said something that this agent does not know"),
        }
    }
}

fn message(said: Said) -> FromAgent {
    FromAgent { sent_unix_ns: unix_ns(), message: Some(said) }
}

fn read_console(instances: PathBuf, request: ConsoleRequest) -> ConsoleReply {
    let read = |id: &str| -> Result<console::Tail, String> {
        let id: InstanceId = id.parse().map_err(|error: crate::ids::BadName| error.to_string())?;
        let path = Folder::of(&instances, &id).console();
        console::tail(&path, request.max_bytes.min(CONSOLE_LIMIT) as usize)
            .map_err(|error| format!("no console of {id} on this node: {error}"))
    };
    match read(&request.instance) {
        Ok(tail) => ConsoleReply {
            id: request.id,
            output: tail.output,
            error: String::new(),
            written_unix_ns: tail.written_unix_ns,
        },
        Err(error) => ConsoleReply { id: request.id, error, ..Default::default() },
    }
}
