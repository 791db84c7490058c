//! Limits: what one instance may use of the node's that others need too. What the bounds are is in [`Limits`].
//!
//! What an instance sends passes these chains after anti-spoofing, so that a limit is used up only by what is its own. A set has an element for
//! each interface, and each element measures: a lookup finds an interface only when it is beyond its bound, and counts what it finds. So a
//! packet costs the same with one instance as with thousands.
//!
//! * **By frame**, on the bridge, before anything is made of it: ARP, DHCP, the gateway's services, broadcasts, fragments. Fragments are limited here
//!   because they are put together before any rule for IPv4 sees them, in memory that all of the node's share.
//! * **By connection**, when the groups have allowed it and before the kernel takes it into its table: how many come at once, and how many there are.
//!   Those that the interface opens and those that are opened to it are counted apart, or strangers could use up what an instance may open.
//!
//! What may not happen here: a packet of an established connection being refused.

use super::groups::{ALLOWED_IN, ALLOWED_OUT};
use super::{DHCP_SERVER, GATEWAYS_OF, chain, counting, set};
use crate::backend::Bound;
use crate::desired::Interface;
use crate::limits::{Limits, Lists};
use crate::nft::contents::{Contents, number};
use crate::nft::layout::{Chain, Limit, Set, Type};
use crate::nft::rule::Field::{InputName, Ipv4Destination, Mark};
use crate::nft::rule::Rule;

// --- sets of the table `bridge`: taps that send more than they may, and what of theirs was dropped ---

pub const ARP_FLOOD: Set = counting("arp_flood", 60, &[Type::LinkName]);
pub const DHCP_FLOOD: Set = counting("dhcp_flood", 61, &[Type::LinkName]);
pub const GATEWAY_FLOOD: Set = counting("gateway_flood", 62, &[Type::LinkName]);
pub const BROADCAST_FLOOD: Set = counting("broadcast_flood", 63, &[Type::LinkName]);
pub const FRAGMENT_FLOOD: Set = counting("fragment_flood", 64, &[Type::LinkName]);
/// The same by bytes.
pub const FRAGMENT_BYTES: Set = counting("fragment_bytes", 65, &[Type::LinkName]);

/// The sets above, with what they count.
pub const BY_TAP: [(Bound, &Set); 6] = [
    (Bound::Arp, &ARP_FLOOD),
    (Bound::Dhcp, &DHCP_FLOOD),
    (Bound::Gateway, &GATEWAY_FLOOD),
    (Bound::Broadcast, &BROADCAST_FLOOD),
    (Bound::Fragments, &FRAGMENT_FLOOD),
    (Bound::Fragments, &FRAGMENT_BYTES),
];

// --- sets of both tables: interfaces, by what their packets are marked with ---

/// One direction of connections, as the interface sees it.
pub struct Way {
    /// Interfaces that have more new ones than they may, and how many of those were dropped.
    pub rate: Set,
    /// Interface and list to the connections that there are. The kernel adds elements, and removes those that hold none any more.
    pub lists: Set,
    /// How many were dropped because there were too many.
    pub refused: Set,
}

pub const OPENED: Way = Way {
    rate: counting("opening_flood", 66, &[Type::Number]),
    lists: set("opened", 67, &[Type::Number, Type::Number]),
    refused: counting("opening_refused", 68, &[Type::Number]),
};
pub const TAKEN: Way = Way {
    rate: counting("taking_flood", 69, &[Type::Number]),
    lists: set("taken", 70, &[Type::Number, Type::Number]),
    refused: counting("taking_refused", 71, &[Type::Number]),
};

/// Sets of both that interfaces are in from the start.
pub const BY_INTERFACE: [(Bound, &Set); 4] = [
    (Bound::OpenedTooFast, &OPENED.rate),
    (Bound::OpenedTooMany, &OPENED.refused),
    (Bound::TakenTooFast, &TAKEN.rate),
    (Bound::TakenTooMany, &TAKEN.refused),
];

pub fn bridge_sets(limits: &Limits) -> Vec<Set> {
    let packets = |set, per_second| Set { limit: Some(Limit::Packets { per_second }), ..set };
    vec![
        packets(ARP_FLOOD, limits.arp_rate),
        packets(DHCP_FLOOD, limits.dhcp_rate),
        packets(GATEWAY_FLOOD, limits.gateway_rate),
        packets(BROADCAST_FLOOD, limits.broadcast_rate),
        packets(FRAGMENT_FLOOD, limits.fragment_rate),
        Set { limit: Some(Limit::Bytes { per_second: limits.fragment_bytes() }), ..FRAGMENT_BYTES },
    ]
}

/// What a table has beside the chains where it knows connections.
pub fn connection_sets(limits: &Limits) -> Vec<Set> {
    let sets_of = |way: Way, per_second, lists: Lists| {
        let list = Limit::Connections { most: lists.length };
        [
            Set { limit: Some(Limit::Packets { per_second }), ..way.rate },
            Set { limit: Some(list), ..way.lists },
            way.refused,
        ]
    };
    let rate = limits.connection_rate;
    let opened = sets_of(OPENED, rate, limits.opened());
    let taken = sets_of(TAKEN, rate.saturating_mul(2), limits.taken());
    [opened, taken].into_iter().flatten().collect()
}

/// What of the kernel the sets and rules here need, by the name of its option, each with what asks for it alone.
pub fn needed() -> [(&'static str, Vec<Set>, Rule); 3] {
    let flood = Set { limit: Some(Limit::Packets { per_second: 1 }), ..OPENED.rate };
    let lists = || Set { limit: Some(Limit::Connections { most: 1 }), ..OPENED.lists };
    let of_list = Rule::new("probe").beyond_in_list(Mark, 2, &OPENED.lists).drop();
    [
        ("CONFIG_NFT_LIMIT", vec![flood], Rule::new("probe").drop()),
        ("CONFIG_NFT_CONNLIMIT", vec![lists()], Rule::new("probe").drop()),
        ("CONFIG_NFT_HASH", vec![lists()], of_list),
    ]
}

/// Where a frame goes on, by its kind, that anti-spoofing lets pass.
pub const LIMIT_ARP: &str = "limit_arp";
pub const LIMIT_DHCP: &str = "limit_dhcp";
pub const LIMIT_IPV4: &str = "limit_ipv4";

/// Limits on frames. Whatever comes to one of these chains does not come back.
pub fn frames() -> [Chain; 4] {
    let too_much = |rule: Rule, flood| rule.found(&[InputName], flood).drop();
    [
        chain(
            LIMIT_ARP,
            None,
            vec![too_much(Rule::new("ARP beyond its rate"), &ARP_FLOOD), Rule::new("other ARP").accept()],
        ),
        chain(
            LIMIT_DHCP,
            None,
            vec![too_much(Rule::new("DHCP beyond its rate"), &DHCP_FLOOD), Rule::new("other DHCP").accept()],
        ),
        chain(
            "limit_fragments",
            None,
            vec![
                too_much(Rule::new("fragments beyond their rate"), &FRAGMENT_FLOOD),
                too_much(Rule::new("fragments beyond their rate in bytes"), &FRAGMENT_BYTES),
            ],
        ),
        chain(
            LIMIT_IPV4,
            None,
            vec![
                Rule::new("a part of a packet").fragment().jump("limit_fragments"),
                Rule::new("DHCP").udp_to(DHCP_SERVER).goto(LIMIT_DHCP),
                too_much(Rule::new("broadcasts beyond their rate").for_a_group(), &BROADCAST_FLOOD),
                too_much(
                    Rule::new("packets to the gateway's services beyond their rate")
                        .found(&[InputName, Ipv4Destination], &GATEWAYS_OF),
                    &GATEWAY_FLOOD,
                ),
                Rule::new("the rest").accept(),
            ],
        ),
    ]
}

/// Limits on connections, and the chains for what groups have allowed; from these, a packet goes `on`. Only one that the kernel has no entry for yet is looked
/// at: one that goes one way without an answer is "new" for ever.
pub fn connections(limits: &Limits, on: [fn(Rule) -> Rule; 2]) -> [Chain; 4] {
    let [opened, taken] = ways(limits);
    let [on_out, on_in] = on;
    let first = |purpose, limits| Rule::new(purpose).first_of_connection().jump(limits);
    [
        opened,
        taken,
        chain(ALLOWED_OUT, None, vec![first("opened by an instance", "limit_opened"), on_out(Rule::new("on its way"))]),
        chain(ALLOWED_IN, None, vec![first("to an instance", "limit_taken"), on_in(Rule::new("on its way"))]),
    ]
}

fn ways(limits: &Limits) -> [Chain; 2] {
    let chain_of = |name, way: Way, lists: Lists| {
        let rules = vec![
            Rule::new("more new connections at once than it may have").found(&[Mark], &way.rate).drop(),
            Rule::new("more connections than it may have")
                .beyond_in_list(Mark, lists.count, &way.lists)
                .found(&[Mark], &way.refused)
                .drop(),
        ];
        chain(name, None, rules)
    };
    [chain_of("limit_opened", OPENED, limits.opened()), chain_of("limit_taken", TAKEN, limits.taken())]
}

impl Contents {
    pub(in crate::nft) fn add_limits_of(&mut self, interface: &Interface) {
        for (_, set) in BY_TAP {
            self.put_bridge(set, interface.tap.padded().to_vec());
        }
        for (_, set) in BY_INTERFACE {
            self.put_both(set, number(interface.mark.get()), Vec::new());
        }
    }
}
