//! Making the kernel's network equal to the desired one.
//!
//! Every way in — a call, the start, the timer that mends what somebody broke — ends in
//! [`Reconciler::converge`], which reads the kernel, plans, and performs. It can be cut off anywhere
//! and run again. The order keeps every moment safe:
//!
//! 1. what is gone is closed (taps first), segments are made;
//! 2. the backend's rules: from here on, they are the new ones for every packet;
//! 3. flows that contradict the new maps end;
//! 4. the uplink answers for new addresses, new taps and trunk ports open;
//! 5. new addresses are announced, DHCP and DNS learn of their clients.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{Mutex, MutexGuard, broadcast, mpsc};

use crate::announce::Announcer;
use crate::api::NodeNetwork;
use crate::backend::Backend;
use crate::bridging::Bridging;
use crate::desired::{InterfaceId, LinkName, Network, VpcId, VpcNumber};
use crate::dhcp::{Given, Servers};
use crate::error::{Error, Result};
use crate::links::{Ground, Links, NodeLinks, Observed, Plan, Site, Step, Uplink, plan};
use crate::store::Store;
use crate::{conntrack, dns, nft, sysctl};

/// Events that a slow watcher may lag behind before it loses some.
const EVENTS_KEPT: usize = 1024;

/// A lease that was given, and when.
#[derive(Debug, Clone)]
pub struct LeaseEvent {
    pub at: SystemTime,
    pub given: Given,
}

/// The network that is in force, or that netd works towards.
#[derive(Debug, Clone)]
struct Current {
    message: NodeNetwork,
    network: Network,
}

struct State {
    current: Option<Current>,
    dhcp: Servers,
    dns: dns::Servers,
    /// What stands for each VPC in the kernel, as it was last.
    vpcs: BTreeMap<VpcId, VpcNumber>,
    /// False until the network was once made whole since netd started: after a crash it cannot be
    /// told from the maps which flows were still to be ended.
    flows_checked: bool,
}

pub struct Reconciler {
    node_links: NodeLinks,
    backend: Arc<dyn Backend>,
    store: Store,
    announcer: Announcer,
    state: Mutex<State>,
    leases: std::sync::Mutex<BTreeMap<InterfaceId, SystemTime>>,
    events: broadcast::Sender<LeaseEvent>,
}

/// What an apply did.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    pub generation: u64,
    pub changed: bool,
    pub took: Duration,
}

impl Reconciler {
    /// `given` of the second value brings the leases; [`Self::record_leases`] must be run on it.
    pub fn new(
        node_links: NodeLinks,
        backend: Arc<dyn Backend>,
        store: Store,
        upstreams: dns::Upstreams,
    ) -> (Self, mpsc::UnboundedReceiver<Given>) {
        let (sender, given) = mpsc::unbounded_channel();
        let state = State {
            current: None,
            dhcp: Servers::new(sender),
            dns: dns::Servers::new(upstreams),
            vpcs: BTreeMap::new(),
            flows_checked: false,
        };
        let reconciler = Self {
            node_links,
            backend,
            store,
            announcer: Announcer::default(),
            state: Mutex::new(state),
            leases: std::sync::Mutex::default(),
            events: broadcast::channel(EVENTS_KEPT).0,
        };
        (reconciler, given)
    }

    /// Makes `message` the desired network, and the kernel equal to it.
    pub async fn apply(&self, message: NodeNetwork) -> Result<Outcome> {
        let start = std::time::Instant::now();
        let mut state = self.state.lock().await;
        let links = Links::connect()?;
        let site = links.site(&self.node_links).await?;
        let network = Network::parse(&message, &site.around)?;
        self.backend.check(&network)?;
        if let Some(current) = &state.current {
            self.check_generation(message.generation, current.message.generation)?;
        }
        if state.current.as_ref().map(|current| &current.message) != Some(&message) {
            self.store.save(&message)?;
            state.current = Some(Current { message, network: network.clone() });
        }
        let changed = self.converge(&mut state, &links, &network, &site).await?;
        Ok(Outcome { generation: network.generation, changed, took: start.elapsed() })
    }

    fn check_generation(&self, given: u64, applied: u64) -> Result<()> {
        if given < applied {
            return Err(Error::OlderGeneration { given, applied, state: self.store.path() });
        }
        Ok(())
    }

    /// Takes up the stored network, if there is one. Called once, before the first call is served.
    pub async fn restore(&self) -> Result<()> {
        self.take_up(&mut *self.state.lock().await).await
    }

    /// What the network stands on may not be there yet: then it is taken up later (see [`Self::mend`]).
    async fn take_up(&self, state: &mut State) -> Result<()> {
        let Some(message) = self.store.load()? else { return Ok(()) };
        let around = match Links::connect()?.site(&self.node_links).await {
            Ok(site) => site.around,
            Err(Error::NoUplink(_)) => Default::default(),
            Err(error) => return Err(error),
        };
        match Network::parse(&message, &around) {
            Ok(network) => state.current = Some(Current { message, network }),
            Err(error) => tracing::error!(%error, "the stored network cannot be now; waiting for what it needs"),
        }
        Ok(())
    }

    /// Makes the kernel equal to the desired network again, whatever happened to it.
    pub async fn mend(&self) -> Result<bool> {
        let mut state = self.state.lock().await;
        if state.current.is_none() {
            self.take_up(&mut state).await?;
        }
        let Some(current) = &mut state.current else { return Ok(false) };
        let links = Links::connect()?;
        let site = links.site(&self.node_links).await?;
        // The node's own addresses may be others than when the network was handed over.
        match Network::parse(&current.message, &site.around) {
            Ok(network) => current.network = network,
            Err(error) => tracing::warn!(%error, "the network could no longer be handed over as it is"),
        }
        let network = current.network.clone();
        self.converge(&mut state, &links, &network, &site).await
    }

    async fn converge(
        &self,
        state: &mut MutexGuard<'_, State>,
        links: &Links,
        network: &Network,
        site: &Site,
    ) -> Result<bool> {
        let observed = links.observe().await?;
        let mut network = network.clone();
        network.number_vpcs(&state.vpcs, &observed.routing.numbers());
        state.vpcs = network.vpcs.clone();
        let network = &network;
        let plan = plan(network, &observed, site.ground)?;
        self.announcer.hold(network.elastic_ips.keys().copied().collect());

        perform(links, &plan.before_rules).await?;
        let rules_changed = self.apply_rules(network).await?;
        if rules_changed || !state.flows_checked {
            self.end_stale_flows(network).await?;
            state.flows_checked = true;
        }
        let settings_changed = sysctl::apply(network, self.uplink_name())?;
        perform(links, &plan.after_rules).await?;
        self.announce(&plan, &site.uplink)?;

        // Links that were made have an index only now.
        let observed = if plan.is_empty() { observed } else { links.observe().await? };
        let index_of = indexes(observed);
        state.dhcp.apply(network, |bridge| index_of.get(bridge).copied())?;
        // Instances run without names too; the next round tries again.
        if let Err(error) = state.dns.apply(network, |bridge| index_of.get(bridge).copied()) {
            tracing::warn!(%error, "instances cannot ask for names");
        }
        self.forget_leases(network);
        Ok(rules_changed || settings_changed || !plan.is_empty())
    }

    async fn apply_rules(&self, network: &Network) -> Result<bool> {
        let (network, backend) = (network.clone(), self.backend.clone());
        off_thread(move || backend.apply(&network)).await
    }

    async fn end_stale_flows(&self, network: &Network) -> Result<()> {
        let network = network.clone();
        let ended = off_thread(move || conntrack::end_stale_flows(&network)).await?;
        if ended > 0 {
            tracing::info!(ended, "ended flows that the network no longer allows as they were");
        }
        Ok(())
    }

    /// Announces the addresses that this node did not answer for before.
    fn announce(&self, plan: &Plan, uplink: &Uplink) -> Result<()> {
        let new: Vec<Ipv4Addr> = plan
            .after_rules
            .iter()
            .filter_map(|step| match step {
                Step::AddProxy { ip, .. } => Some(*ip),
                _ => None,
            })
            .collect();
        match uplink.mac {
            Some(mac) => self.announcer.announce(uplink.index, mac, new),
            None => Ok(()),
        }
    }

    fn forget_leases(&self, network: &Network) {
        self.leases().retain(|interface, _| network.interfaces.contains_key(interface));
    }

    fn leases(&self) -> std::sync::MutexGuard<'_, BTreeMap<InterfaceId, SystemTime>> {
        // A map of times is whole whatever happened to the thread that last held it.
        self.leases.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Remembers leases and tells watchers of them, for as long as there are DHCP servers.
    pub async fn record_leases(&self, mut given: mpsc::UnboundedReceiver<Given>) {
        while let Some(given) = given.recv().await {
            let at = SystemTime::now();
            self.leases().insert(given.interface.clone(), at);
            // An error only says that nobody watches.
            let _ = self.events.send(LeaseEvent { at, given });
        }
    }

    /// Leases from now on.
    pub fn watch(&self) -> broadcast::Receiver<LeaseEvent> {
        self.events.subscribe()
    }

    /// When each interface last got its lease.
    pub fn lease_times(&self) -> BTreeMap<InterfaceId, SystemTime> {
        self.leases().clone()
    }

    /// The desired network with its parsed form.
    pub async fn current(&self) -> Option<(NodeNetwork, Network)> {
        let state = self.state.lock().await;
        state.current.clone().map(|current| (current.message, current.network))
    }

    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    pub fn node_links(&self) -> &NodeLinks {
        &self.node_links
    }

    fn uplink_name(&self) -> &LinkName {
        &self.node_links.uplink
    }
}

async fn perform(links: &Links, steps: &[Step]) -> Result<()> {
    for step in steps {
        links.perform(step).await?;
    }
    Ok(())
}

fn indexes(observed: Observed) -> BTreeMap<LinkName, u32> {
    observed.links.into_iter().map(|(name, link)| (name, link.index)).collect()
}

/// Removes everything that netd owns in this network namespace. Returns whether there was anything.
pub async fn clean(links: &Links) -> Result<bool> {
    let observed = links.observe().await?;
    let nothing = Network::default();
    // No link has index 0, so that every proxy entry is another link's and goes.
    let plan = plan(&nothing, &observed, Ground { uplink: 0, trunk: None, bridging: Bridging::Apart })?;
    perform(links, &plan.before_rules).await?;
    let had_tables = off_thread(nft::clean).await?;
    Ok(had_tables || !plan.is_empty())
}

/// Runs a call that blocks for a moment on a thread that may be blocked.
pub async fn off_thread<T: Send + 'static>(call: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(call).await {
        Ok(outcome) => outcome,
        Err(error) => Err(Error::Internal(format!("a netlink call panicked: {error}"))),
    }
}
