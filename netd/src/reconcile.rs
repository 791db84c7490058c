//! Making the kernel's network equal to the desired one.
//!
//! Every way in — a call, the start, the timer that mends what somebody broke — ends in
//! [`Reconciler::converge`], which reads the kernel, plans, and performs. It can be cut off anywhere
//! and run again. The order keeps every moment safe:
//!
//! 1. what is gone is closed (taps first), segments are made;
//! 2. the backend's rules: from here on, they are the new ones for every packet; new taps are made meanwhile, and are down, so that nothing passes them yet;
//! 3. flows that contradict the new maps end;
//! 4. the uplink answers for new addresses, new taps go up, trunk ports open;
//! 5. new addresses are announced, DHCP and DNS learn of their clients.
//!
//! To read all of the kernel's network takes longer than to change it. So what was read is kept for as long as the kernel tells of no other change than netd's own
//! (`links/known.rs`, the backend), and a call that changes nothing, or only elastic IPs (`elastic.rs`), costs little more than to compare it
//! with the network that there is. [`Reconciler::mend`] reads everything now and then in any case.

mod elastic;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::{Mutex, broadcast, mpsc};

use crate::announce::Announcer;
use crate::api::NodeNetwork;
use crate::backend::{self, Backend};
use crate::bridging::Bridging;
use crate::conntrack::Conntrack;
use crate::desired::{
    ElasticChange, ElasticIp, InterfaceId, InvalidNetwork, LinkName, Network, Surroundings, VpcId, VpcNumber,
    parse_elastic_ips,
};
use crate::dhcp::{Given, Servers};
use crate::error::{Error, Result};
use crate::links::{Ground, Known, Links, NodeLinks, Observed, Plan, Site, Step, Uplink, check_names, plan};
use crate::off_thread::off_thread;
use crate::store::Store;
use crate::{api, dns, sysctl};

/// Events that a slow watcher may lag behind before it loses some.
const EVENTS_KEPT: usize = 1024;

/// A lease that was given, and when.
#[derive(Debug, Clone)]
pub struct LeaseEvent {
    pub at: SystemTime,
    pub given: Given,
}

/// The network that is in force, or that netd works towards.
struct Current {
    /// As it was handed over, but for the elastic IPs, which are in `network` alone.
    rest: NodeNetwork,
    network: Arc<Network>,
    /// A network that differs in more than elastic IPs that were changed alone has another.
    version: u64,
}

impl Current {
    /// As it would be handed over.
    fn message(&self) -> NodeNetwork {
        let elastic_ips = self.network.elastic_ips.values().map(ElasticIp::message).collect();
        NodeNetwork { elastic_ips, ..self.rest.clone() }
    }

    fn change(&mut self, change: &ElasticChange, generation: u64) {
        self.rest.generation = generation;
        let network = Arc::make_mut(&mut self.network);
        network.generation = generation;
        network.change_elastic_ips(change);
    }
}

struct State {
    current: Option<Current>,
    /// What the current network was last judged by; none until then.
    site: Option<Site>,
    known: Known,
    dhcp: Servers,
    dns: dns::Servers,
    /// The version of the network that DHCP and DNS last heard of.
    told: Option<u64>,
    /// What stands for each VPC in the kernel, as it was last.
    vpcs: BTreeMap<VpcId, VpcNumber>,
    /// False until the network was once made whole since netd started: after a crash it cannot be
    /// told from the maps which flows were still to be ended.
    flows_checked: bool,
    /// No rules of another backend's are left.
    alone: bool,
    /// False while the disk may have another network than the current one, or a journal that nothing may be added to: then the whole is saved, and no
    /// caller told that its network is in force before.
    stored: bool,
}

pub struct Reconciler {
    node_links: NodeLinks,
    backend: Arc<dyn Backend>,
    store: Store,
    announcer: Announcer,
    conntrack: Arc<std::sync::Mutex<Conntrack>>,
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
            site: None,
            known: Known::default(),
            dhcp: Servers::new(sender),
            dns: dns::Servers::new(upstreams),
            told: None,
            vpcs: BTreeMap::new(),
            flows_checked: false,
            alone: false,
            stored: false,
        };
        let reconciler = Self {
            node_links,
            backend,
            store,
            announcer: Announcer::default(),
            conntrack: Arc::default(),
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
        let generation = message.generation;
        if let Some(current) = &state.current {
            self.check_generation(generation, current.rest.generation)?;
        }
        let changed = match state.same_but_for_elastic_ips(message, &site) {
            Ok(elastic_ips) => {
                let changed = self.take_elastic_ips(&mut state, &site, generation, &elastic_ips).await?;
                self.converge(&mut state, &links, &site).await? || changed
            }
            Err(message) => {
                let observed = state.known.observe(&links).await?;
                if let Err(error) = self.take_whole(&mut state, *message, &site, &observed) {
                    state.known.keep(observed);
                    return Err(error);
                }
                self.converge_from(observed, &mut state, &links, &site).await?
            }
        };
        Ok(Outcome { generation, changed, took: start.elapsed() })
    }

    fn check_generation(&self, given: u64, applied: u64) -> Result<()> {
        if given < applied {
            return Err(Error::OlderGeneration { given, applied, state: self.store.path() });
        }
        Ok(())
    }

    /// Takes up a network that differs from the current one at most in its elastic IPs. Returns whether the kernel was changed.
    async fn take_elastic_ips(
        &self,
        state: &mut State,
        site: &Site,
        generation: u64,
        messages: &[api::ElasticIp],
    ) -> Result<bool> {
        let wanted = parse_elastic_ips(messages)?;
        let Some(current) = &mut state.current else { return Ok(false) };
        let change = current.network.elastic_difference(&wanted, &site.around.uplink)?;
        let base = current.rest.generation;
        if base == generation && change.is_empty() && state.stored {
            return Ok(false);
        }
        let save_whole = match std::mem::replace(&mut state.stored, false) && generation > base {
            true => {
                let appended = self.store.append(&change.message(base, generation))?;
                off_thread(move || appended.settle()).await?
            }
            false => true,
        };
        if save_whole {
            self.store.save(&NodeNetwork { generation, elastic_ips: messages.to_vec(), ..current.rest.clone() })?;
        }
        state.stored = true;
        current.change(&change, generation);
        if change.is_empty() {
            return Ok(false);
        }
        match self.change_kernel(state, site, &change).await {
            Ok(()) => Ok(true),
            Err(error) => {
                tracing::warn!(%error, "the kernel's network was not as desired; mending it");
                self.forget(state);
                Ok(false)
            }
        }
    }

    /// What is refused must leave the network as it is, so that all that can be known before is asked before it is stored.
    fn take_whole(&self, state: &mut State, mut message: NodeNetwork, site: &Site, observed: &Observed) -> Result<()> {
        let network = self.parse(&message, &site.around)?;
        check_names(&network, observed)?;
        state.stored = false;
        self.store.save(&message)?;
        state.stored = true;
        message.elastic_ips.clear();
        state.set(message, network, Some(site.clone()));
        Ok(())
    }

    /// A network that can be on this node. The backend may be another than the one that it was stored with.
    fn parse(&self, message: &NodeNetwork, around: &Surroundings) -> Result<Network, InvalidNetwork> {
        let network = Network::parse(message, around)?;
        self.backend.check(&network)?;
        Ok(network)
    }

    /// Takes up the stored network, if there is one. Called once, before the first call is served.
    pub async fn restore(&self) -> Result<()> {
        self.take_up(&mut *self.state.lock().await).await
    }

    /// What the network stands on may not be there yet: then it is taken up later (see [`Self::mend`]).
    async fn take_up(&self, state: &mut State) -> Result<()> {
        let Some(mut message) = self.store.load()? else { return Ok(()) };
        let around = match Links::connect()?.site(&self.node_links).await {
            Ok(site) => site.around,
            Err(Error::NoUplink(_)) => Default::default(),
            Err(error) => return Err(error),
        };
        match self.parse(&message, &around) {
            Ok(network) => {
                message.elastic_ips.clear();
                state.set(message, network, None);
            }
            Err(error) => tracing::error!(%error, "the stored network cannot be now; waiting for what it needs"),
        }
        Ok(())
    }

    /// Makes the kernel equal to the desired network again, whatever happened to it. What the kernel did not tell of is found by a `thorough` look
    /// alone.
    pub async fn mend(&self, thorough: bool) -> Result<bool> {
        let mut state = self.state.lock().await;
        if state.current.is_none() {
            self.take_up(&mut state).await?;
        }
        let Some(current) = &state.current else { return Ok(false) };
        let links = Links::connect()?;
        let site = links.site(&self.node_links).await?;
        // The node's own addresses may be others than when the network was handed over.
        if state.site.as_ref() != Some(&site) {
            match self.parse(&current.message(), &site.around) {
                Ok(network) => {
                    let rest = current.rest.clone();
                    state.set(rest, network, Some(site.clone()));
                }
                Err(error) => tracing::warn!(%error, "the network could no longer be handed over as it is"),
            }
        }
        if thorough {
            self.forget(&mut state);
        }
        self.converge(&mut state, &links, &site).await
    }

    /// From now on nothing is known of the kernel: everything is read again.
    fn forget(&self, state: &mut State) {
        state.known.forget();
        state.told = None;
        self.backend.forget();
    }

    async fn converge(&self, state: &mut State, links: &Links, site: &Site) -> Result<bool> {
        let observed = state.known.observe(links).await?;
        self.converge_from(observed, state, links, site).await
    }

    /// The same where `observed` is what there is.
    async fn converge_from(&self, observed: Observed, state: &mut State, links: &Links, site: &Site) -> Result<bool> {
        let Some((network, version)) = state.numbered(&observed) else { return Ok(false) };
        let network = &network;
        let plan = plan(network, &observed, site.ground)?;
        self.announcer.hold(network.elastic_ips.keys().copied().collect());

        links.perform(&plan.before_rules).await?;
        let (rules_changed, made) = tokio::join!(self.apply_rules(network, version), links.perform(&plan.beside_rules));
        let rules_changed = rules_changed?;
        if rules_changed || !state.flows_checked {
            state.flows_checked = false;
            let new_holders = plan.new_holders(&observed).filter_map(|(bridge, ip)| network.place_on(bridge, ip));
            self.end_stale_flows(network, new_holders.collect()).await?;
            state.flows_checked = true;
        }
        let settings_changed =
            sysctl::apply(network, self.uplink_name(), site.ground.bridging, self.backend.has_fast_path())?;
        let opened = links.perform(&plan.after_rules).await;
        if !state.alone {
            self.remove_other_backends().await?;
            state.alone = true;
        }
        self.announce(&plan, &site.uplink);

        if state.told != Some(version) || !plan.is_empty() {
            let indexes = bridge_indexes(links, network, &observed, &plan).await?;
            state.tell(network, version, &indexes)?;
            self.forget_leases(network);
        }
        if plan.is_empty() {
            state.known.keep(observed);
        }
        // A link that could not be made keeps its own instance from the network, and no other.
        made.and(opened)?;
        Ok(rules_changed || settings_changed || !plan.is_empty())
    }

    async fn apply_rules(&self, network: &Arc<Network>, version: u64) -> Result<bool> {
        let (network, backend) = (network.clone(), self.backend.clone());
        off_thread(move || backend.apply(&network, version)).await
    }

    async fn end_stale_flows(
        &self,
        network: &Arc<Network>,
        new_holders: BTreeSet<(VpcNumber, Ipv4Addr)>,
    ) -> Result<()> {
        let network = network.clone();
        let ended = self.with_conntrack(move |conntrack| conntrack.end_stale_flows(&network, &new_holders)).await?;
        if ended > 0 {
            tracing::info!(ended, "ended flows that the network no longer allows as they were");
        }
        Ok(())
    }

    /// Rules that a netd of another backend left go when ports are as this backend needs them. What connections are marked with is a backend's own, so none goes on.
    async fn remove_other_backends(&self) -> Result<()> {
        let kept = self.backend.clone();
        if off_thread(move || backend::remove_all_but(Some(kept.as_ref()))).await? {
            tracing::info!("removed the rules of another backend");
            self.end_stale_flows(&Arc::default(), BTreeSet::new()).await?;
        }
        Ok(())
    }

    async fn with_conntrack<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut Conntrack) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let conntrack = self.conntrack.clone();
        // It opens another socket where a call has failed.
        off_thread(move || call(&mut conntrack.lock().unwrap_or_else(PoisonError::into_inner))).await
    }

    /// Announces the addresses that this node did not answer for before.
    fn announce(&self, plan: &Plan, uplink: &Uplink) {
        let new: Vec<Ipv4Addr> = plan
            .after_rules
            .iter()
            .filter_map(|step| match step {
                Step::AddProxy { ip, .. } => Some(*ip),
                _ => None,
            })
            .collect();
        if let Some(mac) = uplink.mac {
            self.announcer.announce(uplink.index, mac, new);
        }
    }

    fn forget_leases(&self, network: &Network) {
        self.leases().retain(|interface, _| network.interfaces.contains_key(interface));
    }

    fn leases(&self) -> std::sync::MutexGuard<'_, BTreeMap<InterfaceId, SystemTime>> {
        // A map of times is whole whatever happened to the thread that last held it.
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
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
    pub async fn current(&self) -> Option<(NodeNetwork, Arc<Network>)> {
        let state = self.state.lock().await;
        state.current.as_ref().map(|current| (current.message(), current.network.clone()))
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

/// The link index of each segment's bridge, after the plan was performed.
async fn bridge_indexes(
    links: &Links,
    network: &Network,
    observed: &Observed,
    plan: &Plan,
) -> Result<BTreeMap<LinkName, u32>> {
    let mut indexes = BTreeMap::new();
    for bridge in network.segments.values().map(|segment| &segment.bridge) {
        // Links that were made have an index only now.
        let index = match observed.links.get(bridge).filter(|_| plan.is_empty()) {
            Some(link) => Some(link.index),
            None => links.index_of(bridge).await?,
        };
        indexes.extend(index.map(|index| (bridge.clone(), index)));
    }
    Ok(indexes)
}

impl State {
    /// The elastic IPs of a network that is the current one in everything else; any other network comes back whole.
    fn same_but_for_elastic_ips(
        &self,
        mut message: NodeNetwork,
        site: &Site,
    ) -> std::result::Result<Vec<api::ElasticIp>, Box<NodeNetwork>> {
        let Some(current) = self.current.as_ref().filter(|_| self.site.as_ref() == Some(site)) else {
            return Err(Box::new(message));
        };
        let elastic_ips = std::mem::take(&mut message.elastic_ips);
        let generation = std::mem::replace(&mut message.generation, current.rest.generation);
        if message == current.rest {
            return Ok(elastic_ips);
        }
        (message.elastic_ips, message.generation) = (elastic_ips, generation);
        Err(Box::new(message))
    }

    fn set(&mut self, rest: NodeNetwork, network: Network, site: Option<Site>) {
        let version = self.current.as_ref().map_or(0, |current| current.version + 1);
        self.current = Some(Current { rest, network: Arc::new(network), version });
        self.site = site;
    }

    /// The current network with the numbers that its VPCs have in the kernel, and its version.
    fn numbered(&mut self, observed: &Observed) -> Option<(Arc<Network>, u64)> {
        let current = self.current.as_mut()?;
        let network = Arc::make_mut(&mut current.network);
        network.number_vpcs(&self.vpcs, &observed.routing.numbers());
        self.vpcs = network.vpcs.clone();
        Some((current.network.clone(), current.version))
    }

    /// Tells DHCP and DNS of their clients. `indexes` are those of the bridges.
    fn tell(&mut self, network: &Network, version: u64, indexes: &BTreeMap<LinkName, u32>) -> Result<()> {
        self.told = None;
        self.dhcp.apply(network, |bridge| indexes.get(bridge).copied())?;
        match self.dns.apply(network, |bridge| indexes.get(bridge).copied()) {
            Ok(()) => self.told = Some(version),
            // Instances run without names too; the next round tries again.
            Err(error) => tracing::warn!(%error, "instances cannot ask for names"),
        }
        Ok(())
    }
}

/// Removes everything that netd owns in this network namespace. Returns whether there was anything.
pub async fn clean(links: &Links) -> Result<bool> {
    let observed = links.observe().await?;
    let nothing = Network::default();
    // No link has index 0, so that every proxy entry is another link's and goes.
    let plan = plan(&nothing, &observed, Ground { uplink: 0, trunk: None, bridging: Bridging::Apart })?;
    links.perform(&plan.before_rules).await?;
    let had_tables = off_thread(|| backend::remove_all_but(None)).await?;
    Ok(had_tables || !plan.is_empty())
}
