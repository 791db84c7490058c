//! From the messages of `network.proto` to the types of this module, one item at a time.
//!
//! Here each item is judged alone; how items fit together is judged in `check.rs`.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::Ipv4Addr;
use std::str::FromStr;

use ipnet::Ipv4Net;

use super::trunk::{parse_kind, parse_remote};
use super::{
    ElasticIp, Interface, InterfaceMark, InvalidNetwork, LinkName, Network, Segment, Surroundings, groups,
    parse_elastic_ips,
};
use crate::api;

/// Smallest datagram that every IPv4 host must take (RFC 791, section 3.1).
const MIN_MTU: u32 = 576;
/// EC2's jumbo frames are 9001 bytes; switches call 9216 the limit.
const MAX_MTU: u32 = 9216;
/// As many queue pairs as a virtio-net device of ours has at most.
const MAX_QUEUE_PAIRS: u32 = 16;

type Result<T> = std::result::Result<T, InvalidNetwork>;

impl Network {
    /// Parses and checks the whole network, or names the first item that cannot be.
    pub fn parse(message: &api::NodeNetwork, around: &Surroundings) -> Result<Self> {
        let prefix_lists = unique(&message.prefix_lists, "prefix list", groups::parse_prefix_list)?;
        let mut network = Self {
            generation: message.generation,
            segments: unique(&message.segments, "segment", |segment| {
                parse_segment(segment, around).map(|segment| (segment.id.clone(), segment))
            })?,
            interfaces: unique(&message.interfaces, "interface", |interface| {
                parse_interface(interface).map(|interface| (interface.id.clone(), interface))
            })?,
            elastic_ips: parse_elastic_ips(&message.elastic_ips)?,
            public_pools: message
                .public_pools
                .iter()
                .map(|pool| parse_network(&format!("public pool {pool}"), pool))
                .collect::<Result<_>>()?,
            security_groups: unique(&message.security_groups, "security group", |group| {
                groups::parse_group(group, &prefix_lists).map(|group| (group.id.clone(), group))
            })?,
            remotes: unique(&message.remotes, "remote interface", |remote| {
                parse_remote(remote).map(|remote| (remote.id.clone(), remote))
            })?,
            vpcs: BTreeMap::new(),
            node_addresses: around.uplink.addresses.iter().map(Ipv4Net::addr).collect(),
        };
        network.check(&around.uplink)?;
        network.number_vpcs(&BTreeMap::new(), &BTreeMap::new());
        network.mark_interfaces();
        Ok(network)
    }
}

/// Parses each message; two that have the same key are an error.
pub(super) fn unique<M, K: Ord + Display + Clone, V>(
    messages: &[M],
    what: &str,
    parse: impl Fn(&M) -> Result<(K, V)>,
) -> Result<BTreeMap<K, V>> {
    let mut parsed = BTreeMap::new();
    for message in messages {
        let (key, value) = parse(message)?;
        if parsed.insert(key.clone(), value).is_some() {
            return Err(InvalidNetwork::new(format!("{what} {key}"), "is given twice"));
        }
    }
    Ok(parsed)
}

fn parse_segment(message: &api::Segment, around: &Surroundings) -> Result<Segment> {
    let item = format!("segment {}", message.id);
    let carried = parse_kind(message, around)?;
    let largest_mtu = carried.largest_mtu.min(MAX_MTU);
    Ok(Segment {
        id: field(&item, "id", &message.id)?,
        vpc: field(&item, "vpc", &message.vpc)?,
        network: parse_network(&item, &message.cidr)?,
        gateway: field(&item, "gateway", &message.gateway)?,
        gateway_mac: field(&item, "gateway_mac", &message.gateway_mac)?,
        mtu: match message.mtu {
            0 => carried.default_mtu,
            mtu if (MIN_MTU..=largest_mtu).contains(&mtu) => mtu,
            mtu => {
                return Err(InvalidNetwork::new(item, format!("mtu {mtu} is outside of {MIN_MTU} to {largest_mtu}")));
            }
        },
        dns_servers: fields(&item, "dns_servers", &message.dns_servers)?,
        ntp_servers: fields(&item, "ntp_servers", &message.ntp_servers)?,
        vpc_networks: message.vpc_cidrs.iter().map(|cidr| parse_network(&item, cidr)).collect::<Result<_>>()?,
        domain: parse_domain(&item, "domain", &message.domain)?,
        bridge: link_name(&item, &api::bridge_name(&message.id))?,
        trunk: carried.trunk,
    })
}

fn parse_interface(message: &api::Interface) -> Result<Interface> {
    let item = format!("interface {}", message.id);
    if message.queue_pairs > MAX_QUEUE_PAIRS {
        let problem = format!("queue_pairs {} is above {MAX_QUEUE_PAIRS}", message.queue_pairs);
        return Err(InvalidNetwork::new(item, problem));
    }
    if message.owner_uid == u32::MAX {
        // The kernel reads this one as "nobody in particular": everybody could open the tap.
        return Err(InvalidNetwork::new(item, "owner_uid 4294967295 is no user id"));
    }
    Ok(Interface {
        id: field(&item, "id", &message.id)?,
        segment: field(&item, "segment", &message.segment)?,
        mac: field(&item, "mac", &message.mac)?,
        ipv4: field(&item, "ipv4", &message.ipv4)?,
        secondary: fields(&item, "secondary_ipv4", &message.secondary_ipv4)?,
        hostname: parse_domain(&item, "hostname", &message.hostname)?,
        owner_uid: message.owner_uid,
        queue_pairs: message.queue_pairs.max(1),
        instance: message.instance.clone(),
        source_check: !message.source_dest_check_off,
        groups: fields(&item, "security_groups", &message.security_groups)?,
        tap: link_name(&item, &api::tap_name(&message.id))?,
        mark: InterfaceMark::NOBODY,
    })
}

pub(super) fn parse_elastic_ip(message: &api::ElasticIp) -> Result<ElasticIp> {
    let item = format!("elastic IP {}", message.public_ip);
    Ok(ElasticIp {
        public: field(&item, "public_ip", &message.public_ip)?,
        private: field(&item, "private_ip", &message.private_ip)?,
        segment: field(&item, "segment", &message.segment)?,
    })
}

/// Parses one member of an item; the error names both.
pub(super) fn field<T: FromStr<Err: Display>>(item: &str, name: &str, text: &str) -> Result<T> {
    text.parse().map_err(|error| InvalidNetwork::new(item, format!("{name} `{text}`: {error}")))
}

pub(super) fn fields<T: FromStr<Err: Display>>(item: &str, name: &str, texts: &[String]) -> Result<Vec<T>> {
    texts.iter().map(|text| field(item, name, text)).collect()
}

pub(super) fn link_name(item: &str, name: &str) -> Result<LinkName> {
    name.parse().map_err(|error: String| InvalidNetwork::new(item, error))
}

pub(super) fn parse_network(item: &str, text: &str) -> Result<Ipv4Net> {
    let network: Ipv4Net = field(item, "cidr", text)?;
    if network.trunc() != network {
        return Err(InvalidNetwork::new(
            item,
            format!("`{text}` has host bits set; did you mean {}?", network.trunc()),
        ));
    }
    Ok(network)
}

/// A DNS name: labels of letters, digits and dashes (RFC 1123, section 2.1). Empty is none.
fn parse_domain(item: &str, name: &str, text: &str) -> Result<Option<String>> {
    if text.is_empty() {
        return Ok(None);
    }
    let label_is_good = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if text.len() > 253 || !text.split('.').all(label_is_good) {
        return Err(InvalidNetwork::new(
            item,
            format!("{name} `{text}` is no DNS name (RFC 1123: letters, digits and dashes)"),
        ));
    }
    Ok(Some(text.to_owned()))
}

/// True when an instance may hold `address` on `network`: neither of the network's own two ends.
pub(super) fn is_host_of(network: &Ipv4Net, address: Ipv4Addr) -> bool {
    network.contains(&address) && address != network.network() && address != network.broadcast()
}
