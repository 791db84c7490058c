//! The gRPC service on the Unix socket.
//!
//! The socket is made with mode 0600: whoever may open it may give this node any network, so it is
//! for the agent alone, which runs as the same user.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use tokio::net::UnixListener;
use tokio_stream::wrappers::{BroadcastStream, UnixListenerStream};
use tonic::{Request, Response, Status};

use crate::api::network_server::{Network, NetworkServer};
use crate::api::{
    ApplyReply, ApplyRequest, CapabilitiesReply, CapabilitiesRequest, ElasticIpChange, LeaseGiven, NetworkEvent,
    ShowReply, ShowRequest, WatchRequest, network_event,
};
use crate::error::{Error, Result};
use crate::links::Links;
use crate::off_thread::off_thread;
use crate::reconcile::{LeaseEvent, Outcome, Reconciler};
use crate::{
    capabilities,
    counters::{self, unix_ns},
};

pub struct Service {
    reconciler: Arc<Reconciler>,
}

impl Service {
    pub fn new(reconciler: Arc<Reconciler>) -> Self {
        Self { reconciler }
    }

    /// Serves on `socket` until `end` resolves.
    pub async fn serve(self, socket: &Path, end: impl Future<Output = ()>) -> Result<()> {
        let listener = listen(socket)?;
        tracing::info!(socket = %socket.display(), "listening");
        tonic::transport::Server::builder()
            .add_service(NetworkServer::new(self))
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), end)
            .await
            .map_err(|error| Error::Internal(format!("serving on {}: {error}", socket.display())))
    }
}

/// Listens on `socket`. One that a netd left behind is replaced; one that a netd serves is not.
fn listen(socket: &Path) -> Result<UnixListener> {
    let doing = || format!("listening on {}", socket.display());
    if let Some(folder) = socket.parent() {
        fs::create_dir_all(folder).map_err(Error::io(format!("making {}", folder.display())))?;
    }
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        return Err(Error::Internal(format!(
            "{} is served by another netd; stop it or give --socket another path",
            socket.display()
        )));
    }
    match fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(doing())(error)),
        _ => {}
    }
    // Made under another name and opened to nobody else before it appears under its own.
    let hidden = socket.with_extension("new");
    let _ = fs::remove_file(&hidden);
    let listener = UnixListener::bind(&hidden).map_err(Error::io(doing()))?;
    fs::set_permissions(&hidden, fs::Permissions::from_mode(0o600)).map_err(Error::io(doing()))?;
    fs::rename(&hidden, socket).map_err(Error::io(doing()))?;
    Ok(listener)
}

type Reply<T> = std::result::Result<Response<T>, Status>;

#[tonic::async_trait]
impl Network for Service {
    async fn apply(&self, request: Request<ApplyRequest>) -> Reply<ApplyReply> {
        let desired = request
            .into_inner()
            .desired
            .ok_or_else(|| Status::invalid_argument("the request has no `desired` network"))?;
        let reconciler = self.reconciler.clone();
        let (generation, what) = (desired.generation, "the whole network");
        answer(what, generation, async move { reconciler.apply(desired).await }).await
    }

    async fn change_elastic_ips(&self, request: Request<ElasticIpChange>) -> Reply<ApplyReply> {
        let change = request.into_inner();
        let reconciler = self.reconciler.clone();
        let (generation, what) = (change.generation, "elastic IPs");
        answer(what, generation, async move { reconciler.change_elastic_ips(change).await }).await
    }

    async fn show(&self, _request: Request<ShowRequest>) -> Reply<ShowReply> {
        let Some((message, network)) = self.reconciler.current().await else {
            return Ok(Response::new(ShowReply::default()));
        };
        let observed = Links::connect()?.observe().await?;
        let backend = self.reconciler.backend().clone();
        let counted = off_thread(move || backend.counters()).await?;
        let leases = self.reconciler.lease_times();
        Ok(Response::new(counters::show(message, &network, &observed, &counted, &leases)))
    }

    async fn capabilities(&self, _request: Request<CapabilitiesRequest>) -> Reply<CapabilitiesReply> {
        let site = Links::connect()?.site(self.reconciler.node_links()).await?;
        let around = &site.around;
        let backend = self.reconciler.backend().clone();
        let mut capabilities: HashMap<String, String> =
            off_thread(move || Ok(capabilities::detect(backend.as_ref()))).await?;
        capabilities.extend(capabilities::of_trunks(around));
        Ok(Response::new(CapabilitiesReply {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uplink: around.uplink.name.clone(),
            uplink_address: around.uplink.addresses.first().map_or_else(String::new, ToString::to_string),
            capabilities,
            backend: self.reconciler.backend().name().to_owned(),
            trunk: around.trunk.as_ref().map_or_else(|_| String::new(), |trunk| trunk.name.to_string()),
            underlay_address: around
                .underlay
                .as_ref()
                .map_or_else(|_| String::new(), |underlay| underlay.address.to_string()),
        }))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = std::result::Result<NetworkEvent, Status>> + Send>>;

    async fn watch(&self, _request: Request<WatchRequest>) -> Reply<Self::WatchStream> {
        let events = BroadcastStream::new(self.reconciler.watch()).map(|event| match event {
            Ok(event) => Ok(network_event(event)),
            Err(lagged) => Err(Status::data_loss(format!("{lagged}; read `show` and watch again"))),
        });
        Ok(Response::new(Box::pin(events)))
    }
}

/// What a caller is told of a network that is being applied, or of a change; `what` is for the log.
async fn answer(
    what: &'static str,
    generation: u64,
    work: impl Future<Output = Result<Outcome>> + Send + 'static,
) -> Reply<ApplyReply> {
    // On a task of its own: a caller that hangs up does not stop the work half way.
    let outcome = tokio::spawn(work).await.map_err(|error| Status::internal(format!("applying failed: {error}")))?;
    match outcome {
        Ok(outcome) => {
            if outcome.changed {
                tracing::info!(what, generation, took = ?outcome.took, "applied");
            }
            Ok(Response::new(ApplyReply {
                generation: outcome.generation,
                changed: outcome.changed,
                took_us: u64::try_from(outcome.took.as_micros()).unwrap_or(u64::MAX),
            }))
        }
        Err(error) => {
            tracing::warn!(what, generation, %error, "applying failed");
            Err(error.into())
        }
    }
}

fn network_event(event: LeaseEvent) -> NetworkEvent {
    NetworkEvent {
        unix_ns: unix_ns(event.at),
        event: Some(network_event::Event::LeaseGiven(LeaseGiven {
            interface: event.given.interface.to_string(),
            instance: event.given.instance,
            ipv4: event.given.ipv4.to_string(),
        })),
    }
}
