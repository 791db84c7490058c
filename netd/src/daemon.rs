//! The daemon: takes up the stored network, then serves, and mends what others break.

use std::sync::Arc;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use crate::backend;
use crate::cli::Daemon;
use crate::dns::Upstreams;
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::links::{Kernel, Links, NodeLinks};
use crate::off_thread::off_thread;
use crate::reconcile::Reconciler;
use crate::service::Service;
use crate::store::Store;

/// Runs until SIGTERM or SIGINT. The network stays as it is when netd ends: instances go on.
///
/// # Errors
/// What keeps it from starting; and the end of a part that runs as long as netd, since a netd that mends nothing looks like one that does.
pub async fn run(options: Daemon, limits: Limits) -> Result<()> {
    raise_descriptor_limit();
    let store = Store::open(&options.state)?;
    let upstreams = match options.dns_upstreams.is_empty() {
        true => Upstreams::File(options.resolv_conf),
        false => Upstreams::Fixed(options.dns_upstreams),
    };
    let (kind, fast_path) = (options.backend, options.fast_path);
    let (uplink, limits) = (options.uplink.clone(), limits.settled());
    let backend = off_thread(move || backend::choose(kind, fast_path, uplink, limits)).await?;
    tracing::info!(backend = backend.name(), "judging and translating packets");
    let kernel = Kernel::probe(&Links::connect()?, backend.bridging()).await?;
    for missing in [&kernel.vlan, &kernel.vxlan].into_iter().filter_map(|outcome| outcome.as_ref().err()) {
        tracing::info!(missing, "not every kind of segment can be on this node");
    }
    match kernel.bridging.problem() {
        "" => tracing::info!(bridging = ?kernel.bridging, "neighbours are judged by security groups"),
        problem => tracing::error!(problem, "this node's network is not whole"),
    }
    let node_links = NodeLinks { uplink: options.uplink, trunk: options.trunk, underlay: options.underlay, kernel };
    let (reconciler, given) = Reconciler::new(node_links, backend, store, upstreams);
    let reconciler = Arc::new(reconciler);
    let mut parts = JoinSet::new();
    let recorder = reconciler.clone();
    parts.spawn(async move { recorder.record_leases(given).await });
    reconciler.restore().await?;
    parts.spawn(mend_forever(reconciler.clone(), options.mend_every));
    let end = end_signal()?;
    let outcome = tokio::select! {
        served = Service::new(reconciler).serve(&options.socket, end) => served,
        ended = end_of_a_part(&mut parts) => Err(ended),
    };
    // A socket that nobody serves would make callers wait instead of connecting anew.
    let _ = std::fs::remove_file(&options.socket);
    outcome
}

/// Waits for the first of `parts` to end, which none does of itself; why it did.
async fn end_of_a_part(parts: &mut JoinSet<()>) -> Error {
    let problem = match parts.join_next().await {
        Some(Err(error)) => error.to_string(),
        Some(Ok(())) | None => "what it serves is gone".to_owned(),
    };
    Error::Internal(format!("a part of netd ended: {problem}"))
}

/// Each question that is asked on for an instance holds a descriptor, and so does each socket of a segment; the usual soft limit is for programs that call `select`.
fn raise_descriptor_limit() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// Of so many comparisons one reads everything, also what the kernel should have told of.
const THOROUGH_EVERY: u32 = 6;

/// Compares the kernel with the desired network, at once and then again and again. The first round
/// is what brings a node's network back before its controller is there.
async fn mend_forever(reconciler: Arc<Reconciler>, every: Duration) {
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for round in (0..THOROUGH_EVERY).cycle() {
        ticks.tick().await;
        match reconciler.mend(round == 0).await {
            Ok(true) => tracing::info!("the kernel's network was not as desired; it is now"),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "the network could not be mended; trying again"),
        }
    }
}

fn end_signal() -> Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::io("handling SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::io("handling SIGINT"))?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("ending; the network stays");
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_part_that_panics_ends_netd_with_an_error() {
        let mut parts = JoinSet::new();
        parts.spawn(std::future::pending());
        parts.spawn(async { panic!("as a test wants it") });
        let error = end_of_a_part(&mut parts).await.to_string();
        assert!(error.contains("panicked") && error.contains("as a test wants it"), "{error}");
    }
}
