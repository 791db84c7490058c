//! Between the desired network and netd: hands it over, again and again.
//!
//! The controller's network is completed with what only the node knows (which user may open which
//! tap), handed to netd, and handed over again when it changes, when netd comes back after it was
//! away, and now and then without a reason: to netd that is a comparison and nothing else. One that it says cannot be is handed over again
//! after longer and longer, since what it lacks may come to the node.
//!
//! Where a network differs from the one before in elastic IPs alone, netd is told what differs ([`change`]), for the generation that it has by its own
//! last answer. Whatever else it answers than that it has made the change, it is handed the whole at once: a change is a shorter way to say
//! the same, and nothing depends on whether it was heard.

mod change;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mallee_netd::api::network_client::NetworkClient;
use mallee_netd::api::network_event::Event as NetdEvent;
use mallee_netd::api::{ApplyReply, ApplyRequest, NodeNetwork, ShowRequest, WatchRequest};
use tokio::sync::watch;
use tonic::transport::Channel;

use crate::clock::unix_ns;
use crate::credentials::chain;
use crate::news::{self, News};
use crate::wait::Wait;

const REPEAT: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(300);

/// Longer than netd takes for thousands of interfaces. One that hangs is said to hang, and asked again:
/// to it, a network that is handed over twice is one.
const APPLY_TIMEOUT: Duration = Duration::from_secs(60);

/// The network that the node is to have.
#[derive(Debug, Clone, Default)]
pub struct Desired {
    /// Grows with each change of `network`. A generation does not tell all of them apart: owners of taps
    /// are the node's own.
    pub number: u64,
    /// None before anything was heard of it.
    pub network: Option<NodeNetwork>,
}

impl Desired {
    /// Takes `network` in; whether it is another one.
    pub fn replace(&mut self, network: NodeNetwork) -> bool {
        let differs = self.network.as_ref() != Some(&network);
        if differs {
            self.number += 1;
            self.network = Some(network);
        }
        differs
    }
}

/// What is applied, and what is wrong.
#[derive(Debug, Clone, Default)]
pub struct Status {
    pub applied: Option<Arc<Applied>>,
    /// Why the newest network is not applied; empty when it is.
    pub error: String,
}

/// A network that the kernel has.
#[derive(Debug)]
pub struct Applied {
    /// Of the [`Desired`] that it was.
    pub number: u64,
    pub network: NodeNetwork,
    /// When it was handed to netd, and when netd had answered; nanoseconds since 1970.
    pub asked_unix_ns: u64,
    pub done_unix_ns: u64,
    /// netd's own measure, microseconds.
    pub took_us: u64,
}

/// Keeps the kernel's network equal to the newest of `desired`.
pub async fn keep(
    socket: PathBuf,
    mut desired: watch::Receiver<Desired>,
    mut back: watch::Receiver<u64>,
    status: watch::Sender<Status>,
) {
    let mut netd = Netd { client: mallee_netd::api::client(&socket), has: None };
    let mut refused = Wait::new(RETRY, REPEAT);
    loop {
        let now = desired.borrow_and_update().clone();
        let pause = match now.network {
            None => REPEAT,
            Some(network) => pause_after(netd.apply(now.number, network, &status).await, &mut refused),
        };
        tokio::select! {
            changed = desired.changed() => {
                if changed.is_err() { return }
                refused.reset();
            }
            _ = back.changed() => refused.reset(),
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// How long to wait before the network is handed over again.
fn pause_after(outcome: Result<(), tonic::Code>, refused: &mut Wait) -> Duration {
    match outcome {
        Ok(()) => {
            refused.reset();
            REPEAT
        }
        Err(tonic::Code::InvalidArgument) => refused.grow(),
        Err(_) => RETRY,
    }
}

/// netd, as far as it is known.
struct Netd {
    client: NetworkClient<Channel>,
    /// The network that it has, if that was its last answer. After any other its network is whatever it may be.
    has: Option<Arc<Applied>>,
}

impl Netd {
    /// Makes netd's network this one.
    async fn apply(
        &mut self,
        number: u64,
        network: NodeNetwork,
        status: &watch::Sender<Status>,
    ) -> Result<(), tonic::Code> {
        let asked_unix_ns = unix_ns();
        match self.hand_over(&network).await {
            Ok(reply) => {
                let applied = Arc::new(Applied {
                    number,
                    network,
                    asked_unix_ns,
                    done_unix_ns: unix_ns(),
                    took_us: reply.took_us,
                });
                self.has = Some(applied.clone());
                status.send_if_modified(|status| {
                    let is_news =
                        status.applied.as_ref().is_none_or(|old| old.number != number) || !status.error.is_empty();
                    if is_news {
                        *status = Status { applied: Some(applied), error: String::new() };
                    }
                    is_news
                });
                Ok(())
            }
            Err(refusal) => {
                let error = in_words(&refusal);
                tracing::warn!(code = ?refusal.code(), error, "netd did not apply the network");
                status.send_if_modified(|status| std::mem::replace(&mut status.error, error.clone()) != error);
                Err(refusal.code())
            }
        }
    }

    /// Says what changed where that is enough; else, and where netd does not take it, the whole.
    async fn hand_over(&mut self, network: &NodeNetwork) -> Result<ApplyReply, tonic::Status> {
        let change = self.has.take().and_then(|has| change::of_elastic_ips(&has.network, network));
        if let Some(change) = change {
            match bounded(self.client.change_elastic_ips(change)).await {
                Ok(reply) => return Ok(reply),
                Err(refusal) => {
                    let error = in_words(&refusal);
                    tracing::info!(code = ?refusal.code(), error, "netd did not change elastic IPs; handing over the whole network");
                }
            }
        }
        bounded(self.client.apply(ApplyRequest { desired: Some(network.clone()) })).await
    }
}

async fn bounded(
    asking: impl Future<Output = Result<tonic::Response<ApplyReply>, tonic::Status>>,
) -> Result<ApplyReply, tonic::Status> {
    let answer = tokio::time::timeout(APPLY_TIMEOUT, asking).await.unwrap_or_else(|_| {
        Err(tonic::Status::deadline_exceeded(format!("netd did not apply the network within {APPLY_TIMEOUT:?}")))
    });
    answer.map(tonic::Response::into_inner)
}

fn in_words(refusal: &tonic::Status) -> String {
    if refusal.message().is_empty() { chain(refusal) } else { refusal.message().to_owned() }
}

/// Follows netd's events; tells `back` each time netd is (again) there.
pub async fn follow(socket: PathBuf, back: watch::Sender<u64>, news: news::Sender) {
    let mut client = mallee_netd::api::client(&socket);
    loop {
        if let Err(error) = listen(&mut client, &back, &news).await {
            tracing::debug!(error = chain(&error), "netd's events ended");
        }
        if news.is_closed() {
            return;
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn listen(
    client: &mut NetworkClient<Channel>,
    back: &watch::Sender<u64>,
    news: &news::Sender,
) -> Result<(), tonic::Status> {
    let mut events = client.watch(WatchRequest {}).await?.into_inner();
    back.send_modify(|times| *times += 1);
    tell_earlier_leases(client, news).await?;
    while let Some(event) = events.message().await? {
        if let Some(NetdEvent::LeaseGiven(lease)) = event.event {
            tell(news, &lease.instance, event.unix_ns).await;
        }
    }
    Ok(())
}

/// Leases that were given while nobody listened.
async fn tell_earlier_leases(client: &mut NetworkClient<Channel>, news: &news::Sender) -> Result<(), tonic::Status> {
    let shown = client.show(ShowRequest {}).await?.into_inner();
    let interfaces = shown.applied.map(|network| network.interfaces).unwrap_or_default();
    for state in shown.interfaces.iter().filter(|state| state.leased_unix_ns > 0) {
        if let Some(interface) = interfaces.iter().find(|interface| interface.id == state.id) {
            tell(news, &interface.instance, state.leased_unix_ns).await;
        }
    }
    Ok(())
}

async fn tell(news: &news::Sender, instance: &str, unix_ns: u64) {
    if let Ok(id) = instance.parse() {
        let _ = news.send((id, News::Leased { unix_ns })).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_that_cannot_be_is_handed_over_less_and_less_often() {
        let mut refused = Wait::new(RETRY, REPEAT);
        let mut pause = |outcome| pause_after(outcome, &mut refused);
        let pauses: Vec<_> = (0..9).map(|_| pause(Err(tonic::Code::InvalidArgument))).collect();
        assert_eq!(pauses[..3], [RETRY, RETRY * 2, RETRY * 4]);
        assert_eq!(pauses[7..], [REPEAT, REPEAT]);
        // A netd that is away may be back at any time.
        assert_eq!(pause(Err(tonic::Code::Unavailable)), RETRY);
        assert_eq!(pause(Ok(())), REPEAT);
        assert_eq!(pause(Err(tonic::Code::InvalidArgument)), RETRY);
    }
}
