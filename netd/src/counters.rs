//! What is told of each interface, elastic IP and trunk port by `Show`.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::api::{ElasticIpState, InterfaceState, Limited, NodeNetwork, SecurityGroupRuleState, ShowReply, TrunkState};
use crate::backend::{Bound, Counter, Counters};
use crate::desired::{ElasticIp, GroupRule, Interface, InterfaceId, Network, SecurityGroup, Segment, Trunk};
use crate::links::Observed;

pub fn show(
    applied: NodeNetwork,
    network: &Network,
    observed: &Observed,
    counters: &Counters,
    leases: &BTreeMap<InterfaceId, SystemTime>,
) -> ShowReply {
    ShowReply {
        applied: Some(applied),
        interfaces: network
            .interfaces
            .values()
            .map(|interface| interface_state(interface, observed, counters, leases))
            .collect(),
        elastic_ips: network.elastic_ips.values().map(|elastic| elastic_ip_state(elastic, counters)).collect(),
        security_group_rules: network.security_groups.values().flat_map(|group| rule_states(group, counters)).collect(),
        trunks: network.trunks().map(|(segment, trunk)| trunk_state(segment, trunk, observed, counters)).collect(),
    }
}

/// What the node receives on a tap is what the instance sent, so the two directions change places.
fn interface_state(
    interface: &Interface,
    observed: &Observed,
    counters: &Counters,
    leases: &BTreeMap<InterfaceId, SystemTime>,
) -> InterfaceState {
    let link = observed.links.get(&interface.tap);
    let traffic = link.map(|link| link.traffic).unwrap_or_default();
    InterfaceState {
        id: interface.id.to_string(),
        tap: interface.tap.to_string(),
        carrier: link.is_some_and(|link| link.carrier),
        rx_bytes: traffic.tx_bytes,
        tx_bytes: traffic.rx_bytes,
        rx_packets: traffic.tx_packets,
        tx_packets: traffic.rx_packets,
        spoofed_packets: counters.spoofed.get(&interface.tap).map_or(0, |counter| counter.packets),
        leased_unix_ns: leases.get(&interface.id).map_or(0, |at| unix_ns(*at)),
        denied_in_packets: counters.denied_in.get(&interface.mark.get()).map_or(0, |counter| counter.packets),
        denied_out_packets: counters.denied_out.get(&interface.mark.get()).map_or(0, |counter| counter.packets),
        foreign_packets: counters.foreign.get(&interface.tap).map_or(0, |counter| counter.packets),
        limited: Some(limited(interface, counters)),
    }
}

fn limited(interface: &Interface, counters: &Counters) -> Limited {
    let packets = |counter: Option<&Counter>| counter.map_or(0, |counter| counter.packets);
    let frames = |bound| packets(counters.limited_frames.get(&(bound, interface.tap.clone())));
    let connections = |bound| packets(counters.limited_connections.get(&(bound, interface.mark.get())));
    Limited {
        arp_packets: frames(Bound::Arp),
        dhcp_packets: frames(Bound::Dhcp),
        gateway_packets: frames(Bound::Gateway),
        broadcast_packets: frames(Bound::Broadcast),
        fragments: frames(Bound::Fragments),
        opened_too_fast: connections(Bound::OpenedTooFast),
        opened_too_many: connections(Bound::OpenedTooMany),
        taken_too_fast: connections(Bound::TakenTooFast),
        taken_too_many: connections(Bound::TakenTooMany),
    }
}

fn elastic_ip_state(elastic: &ElasticIp, counters: &Counters) -> ElasticIpState {
    let inbound = counters.elastic_in.get(&elastic.public).copied().unwrap_or_default();
    let outbound = counters.elastic_out.get(&elastic.public).copied().unwrap_or_default();
    ElasticIpState {
        public_ip: elastic.public.to_string(),
        private_ip: elastic.private.to_string(),
        in_packets: inbound.packets,
        in_bytes: inbound.bytes,
        out_packets: outbound.packets,
        out_bytes: outbound.bytes,
    }
}

fn trunk_state(segment: &Segment, trunk: &Trunk, observed: &Observed, counters: &Counters) -> TrunkState {
    let link = observed.links.get(&trunk.port);
    let traffic = link.map(|link| link.traffic).unwrap_or_default();
    TrunkState {
        segment: segment.id.to_string(),
        link: trunk.port.to_string(),
        carrier: link.is_some_and(|link| link.carrier),
        rx_bytes: traffic.rx_bytes,
        tx_bytes: traffic.tx_bytes,
        rx_packets: traffic.rx_packets,
        tx_packets: traffic.tx_packets,
        strange_packets: counters.spoofed.get(&trunk.port).map_or(0, |counter| counter.packets),
    }
}

fn rule_states(group: &SecurityGroup, counters: &Counters) -> Vec<SecurityGroupRuleState> {
    let state = |rule: &GroupRule| {
        let key = (group.id.to_string(), rule.id.to_string());
        let counter = counters.group_rules.get(&key).copied().unwrap_or_default();
        SecurityGroupRuleState {
            security_group: group.id.to_string(),
            rule: rule.id.to_string(),
            packets: counter.packets,
            bytes: counter.bytes,
        }
    };
    group.rules.iter().map(state).collect()
}

/// Nanoseconds since 1970; 0 for a clock set before that.
pub fn unix_ns(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).ok().and_then(|since| u64::try_from(since.as_nanos()).ok()).unwrap_or_default()
}
