//! How the items of a desired network must fit together.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::net::Ipv4Addr;

use super::parse::is_host_of;
use super::{ElasticIp, Interface, InvalidNetwork, Network, Segment, SegmentId, UplinkAddresses, Wire};
use crate::api::METADATA_ADDRESS;

/// Largest and smallest segment, as prefix lengths. EC2 has /16 to /28; a lab may want more.
const PREFIX_LENGTHS: std::ops::RangeInclusive<u8> = 8..=29;

pub(super) type Result = std::result::Result<(), InvalidNetwork>;

impl Network {
    pub(super) fn check(&self, uplink: &UplinkAddresses) -> Result {
        for segment in self.segments.values() {
            check_segment(segment, uplink)?;
        }
        for interface in self.interfaces.values() {
            self.check_interface(interface)?;
        }
        let places = |one| Interface::addresses(one).map(move |ip| (&one.segment, ip));
        let held: BTreeSet<(&SegmentId, Ipv4Addr)> = self.interfaces.values().flat_map(places).collect();
        self.check_groups()?;
        for elastic in self.elastic_ips.values() {
            self.check_elastic_ip(elastic, uplink, |segment, private| held.contains(&(segment, private)))?;
        }
        for remote in self.remotes.values() {
            self.check_remote(remote)?;
        }
        self.check_numbers()?;
        self.check_overlaps()?;
        self.check_used_once()
    }

    fn check_interface(&self, interface: &Interface) -> Result {
        let item = format!("interface {}", interface.id);
        let Some(segment) = self.segments.get(&interface.segment) else {
            return Err(unknown_segment(item, &interface.segment));
        };
        for ip in interface.addresses() {
            if !is_host_of(&segment.network, ip) || ip == segment.gateway {
                let Segment { id, network, gateway, .. } = segment;
                let problem = format!("address {ip} cannot be an instance's on {id} ({network}, gateway {gateway})");
                return Err(InvalidNetwork::new(item, problem));
            }
            if Some(ip) == segment.resolver_address() {
                let problem = format!("address {ip} is the resolver's of {} (the network's plus two)", segment.id);
                return Err(InvalidNetwork::new(item, problem));
            }
        }
        if interface.mac == segment.gateway_mac {
            let problem = format!("MAC {} is the gateway's of {}", interface.mac, segment.id);
            return Err(InvalidNetwork::new(item, problem));
        }
        Ok(())
    }

    /// `is_held` tells whether an interface has the private address.
    pub(super) fn check_elastic_ip(
        &self,
        elastic: &ElasticIp,
        uplink: &UplinkAddresses,
        is_held: impl Fn(&SegmentId, Ipv4Addr) -> bool,
    ) -> Result {
        let item = format!("elastic IP {}", elastic.public);
        if !self.segments.contains_key(&elastic.segment) {
            return Err(unknown_segment(item, &elastic.segment));
        }
        if !self.in_pool(elastic.public) {
            let pools: Vec<String> = self.public_pools.iter().map(ToString::to_string).collect();
            let problem = format!("is in none of the public pools ({})", pools.join(", "));
            return Err(InvalidNetwork::new(item, problem));
        }
        if uplink.addresses.iter().any(|own| own.addr() == elastic.public) {
            let problem = format!("is this node's own address on {}", uplink.name);
            return Err(InvalidNetwork::new(item, problem));
        }
        if uplink
            .addresses
            .iter()
            .any(|own| own.contains(&elastic.public) && !is_host_of(own, elastic.public) && own.prefix_len() < 31)
        {
            let problem = format!("is an end of the public network on {}", uplink.name);
            return Err(InvalidNetwork::new(item, problem));
        }
        if !is_held(&elastic.segment, elastic.private) {
            let problem = format!(
                "stands for {}, which no interface on {} has; give the interface too, or leave the elastic IP out",
                elastic.private, elastic.segment
            );
            return Err(InvalidNetwork::new(item, problem));
        }
        Ok(())
    }

    /// Networks of segments may not overlap within a VPC, which has one routing table. VPCs know nothing of one another; of the public side
    /// they all do, so that pools overlap nobody's.
    fn check_overlaps(&self) -> Result {
        let segments: Vec<&Segment> = self.segments.values().collect();
        for (index, a) in segments.iter().enumerate() {
            let in_its_way = |b: &&&Segment| a.vpc == b.vpc && overlap(&a.network, &b.network);
            if let Some(b) = segments[index + 1..].iter().find(in_its_way) {
                return Err(InvalidNetwork::new(
                    format!("segment {}", b.id),
                    format!("{} overlaps {} of {} in {}", b.network, a.network, a.id, a.vpc),
                ));
            }
            if let Some(pool) = self.public_pools.iter().find(|pool| overlap(&a.network, pool)) {
                return Err(InvalidNetwork::new(
                    format!("public pool {pool}"),
                    format!("overlaps {} of segment {}", a.network, a.id),
                ));
            }
        }
        Ok(())
    }

    /// What may be used by one item only: names of links, MACs and addresses, private halves of
    /// elastic IPs.
    fn check_used_once(&self) -> Result {
        let segment_item = |segment: &Segment| format!("segment {}", segment.id);
        let interface_item = |interface: &Interface| format!("interface {}", interface.id);
        let segments = || self.segments.values();
        let interfaces = || self.interfaces.values();
        used_once(segments().map(|s| (&s.bridge, segment_item(s))), "the bridge name")?;
        used_once(interfaces().map(|i| (&i.tap, interface_item(i))), "the tap name")?;
        let remotes = || self.remotes.values().map(|remote| (remote, format!("remote interface {}", remote.id)));
        let macs = remotes().map(|(remote, item)| (remote.mac, item));
        used_once(interfaces().map(|i| (i.mac, interface_item(i))).chain(macs), "the MAC")?;
        let on = |segment: &SegmentId, address: Ipv4Addr| format!("{address} on {segment}");
        let there = remotes()
            .flat_map(|(remote, item)| remote.addresses().map(move |ip| (on(&remote.segment, ip), item.clone())));
        let here = interfaces().flat_map(|i| i.addresses().map(move |ip| (on(&i.segment, ip), interface_item(i))));
        used_once(here.chain(there), "the address")?;
        let ports = self.trunks().map(|(segment, trunk)| (&trunk.port, segment_item(segment)));
        used_once(ports, "the trunk port name")?;
        let wires = self.trunks().map(|(segment, trunk)| match trunk.wire {
            Wire::Vlan { vid } => (format!("VID {vid}"), segment_item(segment)),
            Wire::Vxlan { vni, .. } => (format!("VNI {vni}"), segment_item(segment)),
        });
        used_once(wires, "the wire")?;
        used_once(
            self.elastic_ips.values().map(|e| (on(&e.segment, e.private), format!("elastic IP {}", e.public))),
            "the private address",
        )
    }
}

fn check_segment(segment: &Segment, uplink: &UplinkAddresses) -> Result {
    let item = format!("segment {}", segment.id);
    if !PREFIX_LENGTHS.contains(&segment.network.prefix_len()) {
        let problem =
            format!("{} is not between /{} and /{}", segment.network, PREFIX_LENGTHS.start(), PREFIX_LENGTHS.end());
        return Err(InvalidNetwork::new(item, problem));
    }
    let first = segment.network.network();
    if first.is_loopback() || first.is_multicast() || segment.network.contains(&METADATA_ADDRESS) {
        let problem = format!("{} cannot be a subnet of instances", segment.network);
        return Err(InvalidNetwork::new(item, problem));
    }
    if !is_host_of(&segment.network, segment.gateway) {
        let problem = format!("gateway {} is not an address of {}", segment.gateway, segment.network);
        return Err(InvalidNetwork::new(item, problem));
    }
    if let Some(own) = uplink.addresses.iter().find(|own| overlap(own, &segment.network)) {
        let problem = format!("{} overlaps {} on this node's uplink {}", segment.network, own, uplink.name);
        return Err(InvalidNetwork::new(item, problem));
    }
    Ok(())
}

fn unknown_segment(item: String, segment: &impl Display) -> InvalidNetwork {
    InvalidNetwork::new(item, format!("its segment {segment} is not in this network"))
}

fn overlap(a: &ipnet::Ipv4Net, b: &ipnet::Ipv4Net) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}

/// Fails on the second item that uses a value, naming the first.
fn used_once<K: Ord + Display>(uses: impl Iterator<Item = (K, String)>, what: &str) -> Result {
    let mut users = BTreeMap::new();
    for (value, item) in uses {
        if let Some(first) = users.get(&value) {
            return Err(InvalidNetwork::new(item, format!("{what} {value} is already that of {first}")));
        }
        users.insert(value, item);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::api;
    use crate::desired::Network;
    use crate::desired::testing::{self, surroundings};
    use proptest::prelude::*;

    /// One instance, with an elastic IP.
    fn good() -> api::NodeNetwork {
        let mut message = testing::message();
        message.interfaces.truncate(1);
        message
    }

    fn interface(id: &str, mac: &str, ipv4: &str) -> api::Interface {
        api::Interface {
            id: id.into(),
            segment: "subnet-1".into(),
            mac: mac.into(),
            ipv4: ipv4.into(),
            ..Default::default()
        }
    }

    fn refusal(change: impl FnOnce(&mut api::NodeNetwork)) -> String {
        let mut message = good();
        change(&mut message);
        Network::parse(&message, &surroundings()).expect_err("it should be refused").to_string()
    }

    #[test]
    fn the_resolvers_address_is_no_instances() {
        let message = refusal(|n| n.interfaces[0].ipv4 = "172.31.0.2".into());
        assert!(message.starts_with("interface eni-1") && message.contains("resolver"), "{message}");
    }

    #[test]
    fn a_good_network_is_taken() {
        let network = Network::parse(&good(), &surroundings()).unwrap();
        assert_eq!(network.segments.values().next().unwrap().mtu, 1500);
        assert_eq!(network.interfaces.values().next().unwrap().tap.as_str(), "tpeni1");
    }

    #[test]
    fn each_refusal_names_its_item() {
        let cases: [(&str, String); 22] = [
            ("segment subnet-1", refusal(|n| n.segments[0].cidr = "172.31.0.5/20".into())),
            ("segment subnet-1", refusal(|n| n.segments[0].gateway = "10.0.0.1".into())),
            ("segment subnet-1", refusal(|n| n.segments[0].mtu = 100)),
            ("segment subnet-1", refusal(|n| n.segments[0].cidr = "198.51.100.0/24".into())),
            ("segment subnet-1", refusal(|n| n.segments[0].kind = None)),
            ("segment subnet-1", refusal(|n| n.segments.push(n.segments[0].clone()))),
            (
                "segment subnet-2",
                refusal(|n| {
                    let mut second = n.segments[0].clone();
                    second.id = "subnet-2".into();
                    n.segments.push(second);
                }),
            ),
            ("interface eni-1", refusal(|n| n.interfaces[0].ipv4 = "172.31.0.1".into())),
            ("interface eni-1", refusal(|n| n.interfaces[0].ipv4 = "172.31.15.255".into())),
            ("interface eni-1", refusal(|n| n.interfaces[0].segment = "subnet-9".into())),
            ("interface eni-1", refusal(|n| n.interfaces[0].hostname = "-x".into())),
            (
                "interface eni-2",
                refusal(|n| {
                    n.interfaces.push(interface("eni-2", "02:00:00:00:01:01", "172.31.0.5"));
                }),
            ),
            (
                "interface eni-2",
                refusal(|n| {
                    n.interfaces.push(interface("eni-2", "02:00:00:00:01:02", "172.31.0.4"));
                }),
            ),
            ("interface eni-1", refusal(|n| n.interfaces[0].secondary_ipv4 = vec!["172.31.16.4".into()])),
            ("interface eni-1", refusal(|n| n.interfaces[0].secondary_ipv4 = vec!["172.31.0.1".into()])),
            ("interface eni-1", refusal(|n| n.interfaces[0].secondary_ipv4 = vec!["172.31.0.2".into()])),
            ("interface eni-1", refusal(|n| n.interfaces[0].secondary_ipv4 = vec!["172.31.0.4".into()])),
            ("interface eni-1", refusal(|n| n.interfaces[0].secondary_ipv4 = vec!["x".into()])),
            (
                "interface eni-2",
                refusal(|n| {
                    n.interfaces[0].secondary_ipv4 = vec!["172.31.0.9".into()];
                    n.interfaces.push(interface("eni-2", "02:00:00:00:01:02", "172.31.0.9"));
                }),
            ),
            ("elastic IP 203.0.113.1", refusal(|n| n.elastic_ips[0].public_ip = "203.0.113.1".into())),
            ("elastic IP 198.51.100.130", refusal(|n| n.elastic_ips[0].private_ip = "172.31.0.9".into())),
            ("elastic IP 198.51.100.255", refusal(|n| n.elastic_ips[0].public_ip = "198.51.100.255".into())),
        ];
        for (item, message) in cases {
            assert!(message.starts_with(item), "`{message}` does not name {item}");
        }
    }

    #[test]
    fn ids_whose_links_would_share_a_name_are_refused() {
        let message = refusal(|n| {
            n.interfaces.push(interface("eni-a0000000000001", "02:00:00:00:01:02", "172.31.0.5"));
            n.interfaces.push(interface("eni-b0000000000001", "02:00:00:00:01:03", "172.31.0.6"));
        });
        assert!(message.contains("tap name"), "{message}");
    }

    proptest! {
        /// Whatever text arrives, parsing ends, and what it takes keeps its promises.
        #[test]
        fn nothing_bad_gets_through(
            cidr in "(172\\.31\\.[0-9]{1,3}\\.0/[0-9]{1,2}|.{0,12})",
            ipv4 in "172\\.31\\.[0-9]{1,3}\\.[0-9]{1,3}",
            public in "198\\.51\\.100\\.[0-9]{1,3}",
        ) {
            let mut message = good();
            message.segments[0].cidr = cidr;
            message.interfaces[0].ipv4 = ipv4.clone();
            message.elastic_ips[0].private_ip = ipv4;
            message.elastic_ips[0].public_ip = public;
            if let Ok(network) = Network::parse(&message, &surroundings()) {
                let segment = network.segments.values().next().unwrap();
                let interface = network.interfaces.values().next().unwrap();
                let elastic = network.elastic_ips.values().next().unwrap();
                prop_assert!(segment.network.contains(&interface.ipv4));
                prop_assert_ne!(interface.ipv4, segment.gateway);
                prop_assert_ne!(interface.ipv4, segment.network.broadcast());
                prop_assert!(network.in_pool(elastic.public));
            }
        }
    }
}
