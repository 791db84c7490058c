//! Changing elastic IPs alone.
//!
//! What this costs does not depend on how large the network is: nothing is read of the kernel, the maps get the few elements that differ in one transaction, and routes
//! and proxy neighbours are set as they are to be, whatever they were. Where the kernel refuses, it is not as it should be; then everything is
//! read and mended, as by [`Reconciler::apply`].

use std::sync::Arc;
use std::time::Instant;

use super::{Outcome, Reconciler, State};
use crate::api::ElasticIpChange;
use crate::desired::{ElasticChange, Network};
use crate::error::{Error, Result};
use crate::links::{Links, Site, plan_elastic_ips};
use crate::off_thread::off_thread;

impl Reconciler {
    /// Makes the change, if it is for the network that is in force.
    pub async fn change_elastic_ips(&self, message: ElasticIpChange) -> Result<Outcome> {
        let start = Instant::now();
        let state = &mut *self.state.lock().await;
        let (base, generation) = (message.base, message.generation);
        let applied = state.current.as_ref().map_or(0, |current| current.rest.generation);
        let site = state.site.clone().filter(|_| base == applied && generation > base);
        let Some((current, site)) = state.current.as_mut().zip(site) else {
            return Err(Error::OtherBase { base, given: generation, applied });
        };
        let change = current.network.elastic_change(&message, &site.around.uplink)?;
        let appended = match std::mem::replace(&mut state.stored, false) {
            true => Some(self.store.append(&message)?),
            false => None,
        };
        // The kernel forgets everything with the crash that the disk must outlast, so neither waits for the other.
        let settled = appended.map(|appended| tokio::spawn(off_thread(move || appended.settle())));
        current.change(&change, generation);
        if !change.is_empty() {
            self.make(state, &site, &change).await?;
        }
        let save_whole = match settled {
            Some(settled) => {
                settled.await.map_err(|error| Error::Internal(format!("writing the journal failed: {error}")))??
            }
            None => true,
        };
        if let Some(current) = state.current.as_ref().filter(|_| save_whole) {
            self.store.save(&current.message())?;
        }
        state.stored = true;
        Ok(Outcome { generation, changed: !change.is_empty(), took: start.elapsed() })
    }

    /// Makes the kernel follow a change that was made to the network.
    async fn make(&self, state: &mut State, site: &Site, change: &ElasticChange) -> Result<()> {
        if let Err(error) = self.change_kernel(state, site, change).await {
            tracing::warn!(%error, "the kernel's network was not as desired; mending it");
            let links = Links::connect()?;
            let site = links.site(&self.node_links).await?;
            self.forget(state);
            self.converge(state, &links, &site).await?;
        }
        Ok(())
    }

    /// The steps of the change, in the order of [`Reconciler::converge`]. An error leaves it to that to go on.
    pub(super) async fn change_kernel(&self, state: &mut State, site: &Site, change: &ElasticChange) -> Result<()> {
        let Some(current) = &state.current else { return Ok(()) };
        let network = current.network.clone();
        let plan = plan_elastic_ips(&network, change, site.uplink.index);
        self.announcer.change(
            change.before.iter().map(|elastic| elastic.public),
            change.after.iter().map(|elastic| elastic.public),
        );
        // What the kernel tells of these steps is no news.
        state.known.expect(&plan);
        let links = if plan.is_empty() { None } else { Some(Links::connect()?) };
        if let Some(links) = &links {
            links.perform(&plan.before_rules).await?;
        }
        let (backend, version) = (self.backend.clone(), current.version);
        let (after, changed) = (network.clone(), change.clone());
        off_thread(move || backend.change_elastic_ips(&after, &changed, version)).await?;
        self.end_flows(state, &network, change).await?;
        if let Some(links) = &links {
            links.perform(&plan.after_rules).await?;
            self.announce(&plan, &site.uplink);
            state.known.hear();
        }
        Ok(())
    }

    /// Ends the flows that the change made wrong. Unless it is done, all flows are looked at next time.
    async fn end_flows(&self, state: &mut State, network: &Arc<Network>, change: &ElasticChange) -> Result<()> {
        let checked = std::mem::replace(&mut state.flows_checked, false);
        let (network, change) = (network.clone(), change.clone());
        self.with_conntrack(move |conntrack| conntrack.end_moved_flows(&network, &change)).await?;
        state.flows_checked = checked;
        Ok(())
    }
}
