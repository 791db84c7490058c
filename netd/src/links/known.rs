//! What netd knows of links, for as long as the kernel tells of nothing else.

use super::monitor::Monitor;
use super::{Links, Observed, Plan, Step};
use crate::error::Result;

/// What was read last, and the ear for what has changed since.
#[derive(Default)]
pub struct Known {
    monitor: Option<Monitor>,
    observed: Option<Observed>,
}

impl Known {
    /// What the kernel has: what was read before, where nothing speaks against it, and else read now. Proxy neighbours, of which
    /// the kernel does not tell, are read in any case.
    pub async fn observe(&mut self, links: &Links) -> Result<Observed> {
        let monitor = match &mut self.monitor {
            Some(monitor) => monitor,
            none => none.insert(Monitor::open()?),
        };
        // What fails from here on leaves nothing known.
        let mut observed = match self.observed.take().filter(|known| monitor.still(known)) {
            Some(known) => known,
            None => {
                monitor.skip();
                links.observe_all_but_proxies().await?
            }
        };
        links.observe_proxies(&mut observed).await?;
        Ok(observed)
    }

    /// `observed` is what there is, and nothing was changed since it was read.
    pub fn keep(&mut self, observed: Observed) {
        self.observed = Some(observed);
    }

    /// Host routes are about to become what these steps make of them.
    pub fn expect(&mut self, plan: &Plan) {
        let Some(observed) = &mut self.observed else { return };
        for step in plan.steps() {
            match step {
                Step::SetRoute { ip, bridge, source } => drop(observed.routes.insert(*ip, (bridge.clone(), *source))),
                Step::RemoveRoute { ip, .. } => drop(observed.routes.remove(ip)),
                _ => {}
            }
        }
    }

    /// Takes note of what the kernel has told of.
    pub fn hear(&mut self) {
        if let Some(monitor) = &mut self.monitor {
            self.observed = self.observed.take().filter(|known| monitor.still(known));
        }
    }

    /// From now on nothing is known.
    pub fn forget(&mut self) {
        self.observed = None;
    }
}
