//! Conntrack: ending the flows that a change has made wrong, and no others.
//!
//! NAT decides on the first packet of a flow and conntrack remembers. So a changed map alone leaves
//! live flows on the instance that an elastic IP stood for before. What is wrong is decided from the
//! flow and the network as it now is, not from what was changed: a netd that was killed between the
//! transaction and this step finds the same flows wrong when it comes back.
//!
//! Addresses mean nothing without their VPC. Which one a flow was opened from is told by the zone of its first packet's addresses, and which one it was opened
//! to by way of an elastic IP is told by the lower half of its mark (`nft/rules/vpcs.rs`; the upper half is the backend's own).
//!
//! A flow may be in a *flow table*, netd's (`nft/rules/fast_path.rs`) or one of the host's own. It takes no packet more of a flow that has ended here, but kernels before
//! 6.4 refuse to end such a flow, and pass over it where they end flows by pattern. What they do take is a new time for it: with none left, the next look at it ends it.

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::LazyLock;

use crate::desired::{ElasticChange, ElasticIp, Network, VpcNumber};
use crate::error::{Error, Result};
use crate::netfilter::{NESTED, NetfilterSocket, attribute, put};

// `include/uapi/linux/netfilter/nfnetlink_conntrack.h`
const NEW: u16 = 0;
const GET: u16 = 1;
const DELETE: u16 = 2;
const GET_STATISTICS: u16 = 5;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const TIMEOUT: u16 = 7;
const MARK: u16 = 8;
const ID: u16 = 12;
/// Of a flow both of whose tuples are in one zone; else each tuple has its own.
const ZONE: u16 = 18;
const FILTER: u16 = 25;
const FILTER_ORIGINAL: u16 = 1;
const FILTER_REPLY: u16 = 2;
/// `CTA_FILTER_F_CTA_IP_SRC` and `…_DST`, which are in no header (`net/netfilter/nf_conntrack_netlink.c`).
const BY_SOURCE: u32 = 1 << 0;
const BY_DESTINATION: u32 = 1 << 1;
const TUPLE_IP: u16 = 1;
const TUPLE_ZONE: u16 = 3;
const IP_V4_SOURCE: u16 = 1;
const IP_V4_DESTINATION: u16 = 2;

/// Where a kernel that has flow tables tells a time of theirs (`Documentation/networking/nf_conntrack-sysctl.rst`).
const FLOW_TABLES: &str = "/proc/sys/net/netfilter/nf_flowtable_udp_timeout";
/// The first kernel that ends flows that are in a flow table.
const ENDS_ALL: (u32, u32) = (6, 4);
/// The kernel gives a flow in a flow table a new day now and then, which may be in between.
const EXPIRY_ATTEMPTS: usize = 8;

/// A flow's addresses: as its first packet had them, and as its answers have them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Flow {
    source: Ipv4Addr,
    destination: Ipv4Addr,
    reply_source: Ipv4Addr,
    reply_destination: Ipv4Addr,
    /// The zone that the first packet's addresses are in.
    zone: u16,
    mark: u32,
}

/// A private address and the VPC that it is in.
pub type Place = (VpcNumber, Ipv4Addr);

/// What a public address stands for; none where it stands for nothing.
pub type Standing = Option<Place>;

impl Flow {
    /// The VPC that it was opened from.
    fn from(&self) -> Option<VpcNumber> {
        VpcNumber::new(self.zone.into())
    }

    /// The VPC that it was opened to by way of an elastic IP.
    fn to(&self) -> Option<VpcNumber> {
        VpcNumber::new(self.mark & 0xffff)
    }

    /// True when it is translated otherwise than a new flow would be. `standing` says what an elastic IP stands for, and nothing of an address that is none.
    fn contradicts(&self, standing: impl Fn(Ipv4Addr) -> Option<Standing>) -> bool {
        self.is_inbound_stale(standing(self.destination)) || self.is_outbound_stale(standing(self.reply_destination))
    }

    /// A flow to a public address must go to the instance that it now stands for.
    fn is_inbound_stale(&self, standing: Option<Standing>) -> bool {
        match standing {
            Some(Some((vpc, private))) => (self.to(), self.reply_source) != (Some(vpc), private),
            Some(None) => self.reply_source != self.destination,
            None => false,
        }
    }

    /// A flow that leaves as a public address must be of the instance that now has it.
    fn is_outbound_stale(&self, standing: Option<Standing>) -> bool {
        let translated = self.reply_destination != self.source;
        let own = self.from().map(|vpc| (vpc, self.source));
        translated && standing.is_some_and(|place| place.is_none() || place != own)
    }
}

/// What a network says of flows, in the form in which it is asked for each of them.
struct Judge<'a> {
    network: &'a Network,
    /// Private addresses that an instance has now, and had before.
    instances: BTreeSet<Place>,
    vpcs: BTreeSet<VpcNumber>,
}

impl<'a> Judge<'a> {
    fn new(network: &'a Network, new_holders: &BTreeSet<Place>) -> Self {
        let instances = network.private_addresses().difference(new_holders).copied().collect();
        Self { network, instances, vpcs: network.vpcs.values().copied().collect() }
    }

    /// True when the flow contradicts the network: it is translated otherwise than a new flow would
    /// be, or belongs to an instance or a VPC that is gone.
    fn is_stale(&self, flow: &Flow) -> bool {
        let (from, to) = (flow.from(), flow.to());
        // Within a VPC nothing marks it.
        let asked = to.or(from.filter(|_| flow.reply_source == flow.destination));
        flow.contradicts(|address| self.standing(address))
            || [from, to].into_iter().flatten().any(|vpc| !self.vpcs.contains(&vpc))
            || from.is_some_and(|vpc| self.is_of_nobody(vpc, flow.source))
            || asked.is_some_and(|vpc| self.is_of_nobody(vpc, flow.reply_source))
    }

    fn standing(&self, address: Ipv4Addr) -> Option<Standing> {
        match self.network.elastic_ips.get(&address) {
            Some(elastic) => Some(Some(self.network.place_of(elastic))),
            // A pool may be a network that the node itself is in.
            None if self.network.node_addresses.contains(&address) => None,
            None => self.network.in_pool(address).then_some(None),
        }
    }

    /// An address of a VPC's segment that no instance has now, or that another has than before.
    fn is_of_nobody(&self, vpc: VpcNumber, address: Ipv4Addr) -> bool {
        !self.instances.contains(&(vpc, address))
            && self.network.segments.values().any(|segment| {
                self.network.vpc_number(&segment.id) == vpc
                    && segment.network.contains(&address)
                    && segment.gateway_addresses().all(|own| own != address)
                    && address != segment.network.network()
                    && address != segment.network.broadcast()
            })
    }
}

/// Ends flows by one socket, which stays open for as long as it works: to close one that has to do with netfilter, the kernel waits until what a transaction before
/// removed is gone for every packet.
#[derive(Default)]
pub struct Conntrack {
    socket: Option<NetfilterSocket>,
}

impl Conntrack {
    /// Ends every flow that contradicts `network`, and those with one of the addresses that somebody else holds now, whose groups have not judged
    /// them; returns how many.
    pub fn end_stale_flows(&mut self, network: &Network, new_holders: &BTreeSet<Place>) -> Result<usize> {
        let judge = Judge::new(network, new_holders);
        let mut socket = self.socket.take().map_or_else(open, Ok)?;
        let stale = list(&mut socket, &[], |flow| judge.is_stale(flow))?;
        let ended = end(&mut socket, stale)?;
        self.socket = Some(socket);
        Ok(ended)
    }

    /// Ends the flows that the change made wrong; `network` is as it is after it.
    pub fn end_moved_flows(&mut self, network: &Network, change: &ElasticChange) -> Result<()> {
        let mut socket = self.socket.take().map_or_else(open, Ok)?;
        end_moved_flows(&mut socket, network, change)?;
        self.socket = Some(socket);
        Ok(())
    }
}

/// The kernel ends them by itself where it can: it needs to be told which addresses a flow has that is wrong now, and passes over the empty places of its table,
/// which a list of all flows does not.
fn end_moved_flows(socket: &mut NetfilterSocket, network: &Network, change: &ElasticChange) -> Result<()> {
    for moved in change.addresses() {
        let place = |elastic: &ElasticIp| (elastic.public == moved).then(|| network.place_of(elastic));
        let (before, after) = (change.before.iter().find_map(place), change.after.iter().find_map(place));
        // What a flow has of a VPC beside the address is not asked for, so that flows of both places would look the same.
        let is_ambiguous = before.zip(after).is_some_and(|((_, before), (_, after))| before == after);
        let ended = !is_ambiguous && patterns(moved, before).iter().all(|pattern| end_by(socket, pattern).is_ok());
        if !ended {
            return end_listed_flows(socket, network, change);
        }
    }
    Ok(())
}

/// Whether the kernel ends no flow by pattern that is in a flow table. It does not say so.
static PASSES_OVER_FLOW_TABLES: LazyLock<bool> = LazyLock::new(|| {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Path::new(FLOW_TABLES).exists() && version(&release).is_none_or(|version| version < ENDS_ALL)
});

/// The first two numbers of a kernel's release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// For a kernel that cannot end by pattern, which says so.
fn end_listed_flows(socket: &mut NetfilterSocket, network: &Network, change: &ElasticChange) -> Result<()> {
    let moved = change.addresses();
    let standing = |address| {
        let place = || network.elastic_ips.get(&address).map(|elastic| network.place_of(elastic));
        moved.contains(&address).then(place)
    };
    let stale = list(socket, &[], |flow: &Flow| flow.contradicts(standing))?;
    end(socket, stale)?;
    Ok(())
}

/// Some addresses of a flow.
struct Pattern {
    source: Option<Ipv4Addr>,
    destination: Option<Ipv4Addr>,
    reply_source: Option<Ipv4Addr>,
    reply_destination: Option<Ipv4Addr>,
}

/// Flows to an elastic IP, and flows that leave as it, as those are that were begun when it stood for `before`.
fn patterns(public: Ipv4Addr, before: Standing) -> Vec<Pattern> {
    let private = before.map(|(_, private)| private);
    let inbound = Pattern {
        source: None,
        destination: Some(public),
        reply_source: Some(private.unwrap_or(public)),
        reply_destination: None,
    };
    let outbound = |private| Pattern {
        source: Some(private),
        destination: None,
        reply_source: None,
        reply_destination: Some(public),
    };
    std::iter::once(inbound).chain(private.map(outbound)).collect()
}

impl Pattern {
    /// As the kernel is told.
    fn attributes(&self) -> Vec<u8> {
        let mut attributes = Vec::new();
        let mut filter = Vec::new();
        for (tuple, flags, source, destination) in [
            (TUPLE_ORIGINAL, FILTER_ORIGINAL, self.source, self.destination),
            (TUPLE_REPLY, FILTER_REPLY, self.reply_source, self.reply_destination),
        ] {
            let mut addresses = Vec::new();
            put(&mut addresses, IP_V4_SOURCE, &source.unwrap_or(Ipv4Addr::UNSPECIFIED).octets());
            put(&mut addresses, IP_V4_DESTINATION, &destination.unwrap_or(Ipv4Addr::UNSPECIFIED).octets());
            put(&mut attributes, tuple | NESTED, &nested(TUPLE_IP, &addresses));
            let asked =
                if source.is_some() { BY_SOURCE } else { 0 } | if destination.is_some() { BY_DESTINATION } else { 0 };
            put(&mut filter, flags, &asked.to_ne_bytes());
        }
        put(&mut attributes, FILTER | NESTED, &filter);
        attributes
    }
}

/// Has the kernel end every flow that the pattern fits.
fn end_by(socket: &mut NetfilterSocket, pattern: &Pattern) -> Result<()> {
    let attributes = pattern.attributes();
    socket
        .request(message(DELETE), libc::AF_INET as u8, 0, &attributes)
        .map_err(Error::netfilter("ending flows by pattern"))?;
    if *PASSES_OVER_FLOW_TABLES {
        let left = list(socket, &attributes, |_| true)?;
        end(socket, left)?;
    }
    Ok(())
}

fn nested(kind: u16, inner: &[u8]) -> Vec<u8> {
    let mut outer = Vec::new();
    put(&mut outer, kind | NESTED, inner);
    outer
}

fn open() -> Result<NetfilterSocket> {
    NetfilterSocket::open().map_err(Error::netfilter("opening a netfilter socket"))
}

/// The flows that are stale, of all or of those that a pattern fits, with what names each.
fn list(
    socket: &mut NetfilterSocket,
    pattern: &[u8],
    is_stale: impl Fn(&Flow) -> bool,
) -> Result<Vec<(Flow, Vec<u8>)>> {
    let stale = socket.dump(message(GET), libc::AF_INET as u8, pattern, |entry| {
        Ok(match read_flow(entry)? {
            Some(flow) if is_stale(&flow) => Some((flow, identity(entry)?)),
            _ => None,
        })
    });
    stale.map_err(Error::netfilter("listing conntrack entries"))
}

fn end(socket: &mut NetfilterSocket, stale: Vec<(Flow, Vec<u8>)>) -> Result<usize> {
    for (flow, identity) in &stale {
        match end_one(socket, identity) {
            Ok(()) => tracing::debug!(?flow, "ended a flow"),
            // It ended by itself, or another took its place.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(Error::netfilter(format!("ending the flow {flow:?}"))(error)),
        }
    }
    Ok(stale.len())
}

fn end_one(socket: &mut NetfilterSocket, identity: &[u8]) -> io::Result<()> {
    let mut no_time = identity.to_vec();
    put(&mut no_time, TIMEOUT, &0_u32.to_be_bytes());
    let mut outcome = socket.request(message(DELETE), libc::AF_INET as u8, 0, identity);
    for _ in 0..EXPIRY_ATTEMPTS {
        if !outcome.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY)) {
            break;
        }
        socket.request(message(NEW), libc::AF_INET as u8, 0, &no_time)?;
        // What looks for it finds that its time is over, and ends it.
        outcome = socket.request(message(DELETE), libc::AF_INET as u8, 0, identity);
    }
    outcome
}

/// Asks the kernel whether conntrack is there; an error says what is missing. It is asked for a number and not for its flows, of which there may be very many.
pub fn probe() -> Result<()> {
    let mut socket = NetfilterSocket::open().map_err(Error::netfilter("opening a netfilter socket"))?;
    socket
        .ask(message(GET_STATISTICS), libc::AF_INET as u8, |_| Ok(()))
        .map_err(Error::netfilter("asking for conntrack"))
}

fn message(kind: u16) -> u16 {
    (libc::NFNL_SUBSYS_CTNETLINK << 8) as u16 | kind
}

fn read_flow(entry: &[u8]) -> io::Result<Option<Flow>> {
    let addresses = |tuple| -> io::Result<Option<(Ipv4Addr, Ipv4Addr)>> {
        let ip = attribute(attribute(entry, tuple)?.unwrap_or_default(), TUPLE_IP)?.unwrap_or_default();
        let address = |kind| -> io::Result<Option<Ipv4Addr>> {
            let bytes = attribute(ip, kind)?.and_then(|value| <[u8; 4]>::try_from(value).ok());
            Ok(bytes.map(Ipv4Addr::from))
        };
        Ok(address(IP_V4_SOURCE)?.zip(address(IP_V4_DESTINATION)?))
    };
    let zone_of = |zone: Option<&[u8]>| zone.and_then(|value| Some(u16::from_be_bytes(value.try_into().ok()?)));
    let original = attribute(entry, TUPLE_ORIGINAL)?.unwrap_or_default();
    let zone = zone_of(attribute(entry, ZONE)?).or(zone_of(attribute(original, TUPLE_ZONE)?)).unwrap_or_default();
    let mark = attribute(entry, MARK)?.and_then(|value| value.try_into().ok()).map(u32::from_be_bytes);
    Ok(addresses(TUPLE_ORIGINAL)?.zip(addresses(TUPLE_REPLY)?).map(
        |((source, destination), (reply_source, reply_destination))| Flow {
            source,
            destination,
            reply_source,
            reply_destination,
            zone,
            mark: mark.unwrap_or_default(),
        },
    ))
}

/// The attributes that name this entry and no later one with the same addresses and ports.
fn identity(entry: &[u8]) -> io::Result<Vec<u8>> {
    let mut identity = Vec::new();
    for (kind, flags) in [(TUPLE_ORIGINAL, NESTED), (ZONE, 0), (ID, 0)] {
        if let Some(value) = attribute(entry, kind)? {
            put(&mut identity, kind | flags, value);
        }
    }
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::testing;
    use proptest::prelude::*;

    fn ip(text: &str) -> Ipv4Addr {
        text.parse().unwrap()
    }

    /// A flow from a VPC to one, by way of an elastic IP: "" is the public side, or none.
    fn flow(from: &str, to: &str, addresses: [&str; 4]) -> impl Fn(&Network) -> Flow {
        let [source, destination, reply_source, reply_destination] = addresses.map(ip);
        let (from, to) = (from.to_owned(), to.to_owned());
        move |network| {
            let number = |vpc: &String| vpc.parse().map_or(0, |vpc| network.vpcs[&vpc].get());
            let (zone, mark) = (number(&from) as u16, number(&to));
            Flow { source, destination, reply_source, reply_destination, zone, mark }
        }
    }

    /// 172.31.0.4 has 198.51.100.130; 172.31.0.5 has none; the pool is 198.51.100.128/25. In the other VPC 172.31.0.9 has
    /// 198.51.100.131, and that is all there is.
    fn stale(flow: impl Fn(&Network) -> Flow) -> bool {
        let network = network();
        Judge::new(&network, &BTreeSet::new()).is_stale(&flow(&network))
    }

    fn network() -> Network {
        let mut message = testing::message();
        let mut segment = message.segments[0].clone();
        (segment.id, segment.vpc) = ("subnet-2".into(), "vpc-2".into());
        message.segments.push(segment);
        let mut interface = message.interfaces[0].clone();
        (interface.id, interface.segment) = ("eni-9".into(), "subnet-2".into());
        (interface.mac, interface.ipv4) = ("02:00:00:00:01:09".into(), "172.31.0.9".into());
        message.interfaces.push(interface);
        let mut elastic = message.elastic_ips[0].clone();
        (elastic.public_ip, elastic.private_ip) = ("198.51.100.131".into(), "172.31.0.9".into());
        elastic.segment = "subnet-2".into();
        message.elastic_ips.push(elastic);
        Network::parse(&message, &testing::surroundings()).unwrap()
    }

    #[test]
    fn a_flow_as_a_new_one_would_be_stays() {
        for (from, to, addresses) in [
            ("", "vpc-1", ["203.0.113.1", "198.51.100.130", "172.31.0.4", "203.0.113.1"]),
            ("vpc-1", "", ["172.31.0.4", "203.0.113.1", "203.0.113.1", "198.51.100.130"]),
            ("vpc-1", "", ["172.31.0.5", "203.0.113.1", "203.0.113.1", "198.51.100.2"]),
            ("vpc-1", "", ["172.31.0.5", "172.31.0.4", "172.31.0.4", "172.31.0.5"]),
            // To the resolver.
            ("vpc-1", "", ["172.31.0.5", "172.31.0.2", "172.31.0.2", "172.31.0.5"]),
            // To the other VPC, and from a client outside who has an address as that VPC's segment has.
            ("vpc-1", "vpc-2", ["172.31.0.4", "198.51.100.131", "172.31.0.9", "198.51.100.130"]),
            ("", "vpc-2", ["172.31.0.77", "198.51.100.131", "172.31.0.9", "172.31.0.77"]),
        ] {
            assert!(!stale(flow(from, to, addresses)), "{addresses:?}");
        }
    }

    #[test]
    fn a_flow_of_an_address_with_a_new_holder_goes_and_no_other() {
        let network = network();
        let (vpc, held) = (network.vpcs[&"vpc-1".parse().unwrap()], ip("172.31.0.5"));
        let out = flow("vpc-1", "", ["172.31.0.5", "203.0.113.1", "203.0.113.1", "198.51.100.2"]);
        let within = flow("vpc-1", "", ["172.31.0.4", "172.31.0.5", "172.31.0.5", "172.31.0.4"]);
        let of_another = flow("vpc-1", "", ["172.31.0.4", "203.0.113.1", "203.0.113.1", "198.51.100.130"]);
        let moved = BTreeSet::from([(vpc, held)]);
        let judge = Judge::new(&network, &moved);
        assert!(judge.is_stale(&out(&network)) && judge.is_stale(&within(&network)));
        assert!(!judge.is_stale(&of_another(&network)));
    }

    #[test]
    fn a_pool_that_the_node_is_in_ends_nothing_that_left_as_the_node() {
        let mut network = network();
        network.public_pools = vec!["198.51.100.0/24".parse().unwrap()];
        let out = flow("vpc-1", "", ["172.31.0.5", "203.0.113.1", "203.0.113.1", "198.51.100.2"]);
        assert!(!Judge::new(&network, &BTreeSet::new()).is_stale(&out(&network)));
    }

    #[test]
    fn a_flow_through_an_address_that_moved_goes() {
        for (from, to, addresses) in [
            ("", "vpc-1", ["203.0.113.1", "198.51.100.130", "172.31.0.5", "203.0.113.1"]),
            ("vpc-1", "", ["172.31.0.5", "203.0.113.1", "203.0.113.1", "198.51.100.130"]),
            ("vpc-1", "", ["172.31.0.4", "203.0.113.1", "203.0.113.1", "198.51.100.131"]),
            // The address was on another node, and an instance here spoke to it there.
            ("vpc-1", "", ["172.31.0.5", "198.51.100.130", "198.51.100.130", "198.51.100.2"]),
            // The address was here and is no longer.
            ("", "vpc-1", ["203.0.113.1", "198.51.100.140", "172.31.0.4", "203.0.113.1"]),
            // It moved to an instance of another VPC with the same address.
            ("", "vpc-2", ["203.0.113.1", "198.51.100.130", "172.31.0.4", "203.0.113.1"]),
            ("vpc-2", "", ["172.31.0.4", "203.0.113.1", "203.0.113.1", "198.51.100.130"]),
        ] {
            assert!(stale(flow(from, to, addresses)), "{addresses:?}");
        }
    }

    #[test]
    fn a_flow_of_an_instance_or_a_vpc_that_is_gone_goes() {
        for (from, to, addresses) in [
            ("vpc-1", "", ["172.31.0.9", "203.0.113.1", "203.0.113.1", "198.51.100.2"]),
            ("vpc-1", "", ["172.31.0.1", "172.31.0.9", "172.31.0.9", "172.31.0.1"]),
            ("vpc-2", "", ["172.31.0.5", "203.0.113.1", "203.0.113.1", "198.51.100.2"]),
        ] {
            assert!(stale(flow(from, to, addresses)), "{addresses:?}");
        }
        let ends = flow("vpc-1", "", ["172.31.0.5", "203.0.113.1", "203.0.113.1", "198.51.100.2"]);
        let gone = |network: &Network| {
            let unused = (0x6000..).find(|number| network.vpcs.values().all(|vpc| vpc.get() != u32::from(*number)));
            Flow { zone: unused.unwrap(), ..ends(network) }
        };
        assert!(stale(gone));
    }

    proptest! {
        #[test]
        fn flows_of_other_networks_are_never_touched(a: [u8; 4], b: [u8; 4], zone in 0_u16..0x6000, mark in 0_u32..0x6000) {
            let network = network();
            let (a, b) = (Ipv4Addr::from(a), Ipv4Addr::from(b));
            prop_assume!(!network.in_pool(a) && !network.in_pool(b));
            let flow = Flow { source: a, destination: b, reply_source: b, reply_destination: a, zone, mark };
            prop_assert!(!Judge::new(&network, &BTreeSet::new()).is_stale(&flow));
        }

        #[test]
        fn reading_any_entry_ends(entry: Vec<u8>) {
            let _ = read_flow(&entry);
            let _ = identity(&entry);
        }
    }
}
