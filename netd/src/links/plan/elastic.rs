//! The steps for elastic IPs alone, where nothing else changes.

use super::{Plan, Step};
use crate::desired::{ElasticChange, Network};

/// The steps that make what `change` tells so; `network` is as it is after it. Where an address stays on its segment there are none: the
/// maps alone say which instance it is.
pub fn plan_elastic_ips(network: &Network, change: &ElasticChange, uplink_index: u32) -> Plan {
    let mut plan = Plan::default();
    for gone in change.before.iter().filter(|before| !network.elastic_ips.contains_key(&before.public)) {
        plan.before_rules.push(Step::RemoveProxy { index: uplink_index, ip: gone.public });
        let bridge = network.bridge_of(&gone.segment).clone();
        plan.before_rules.push(Step::RemoveRoute { ip: gone.public, bridge });
    }
    let source = network.node_addresses.first().copied();
    for elastic in &change.after {
        let before = change.before.iter().find(|before| before.public == elastic.public);
        if before.is_none_or(|before| before.segment != elastic.segment) {
            let bridge = network.bridge_of(&elastic.segment).clone();
            plan.after_rules.push(Step::SetRoute { ip: elastic.public, bridge, source });
        }
        if before.is_none() {
            plan.after_rules.push(Step::AddProxy { index: uplink_index, ip: elastic.public });
        }
    }
    plan
}
