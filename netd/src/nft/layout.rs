//! A table as data: its sets and maps, its chains, their rules.
//!
//! Most of a table is the same on every node. Some of it *grows* with the network: a chain for each security group and VPC, those for trunks, and a set of
//! each group's members. Growth is told by its name, so that what is left of a group that is gone is known for what it is.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};

use nftnl::{ChainType, Hook, Priority, ProtoFamily};

use super::rule::Rule;
use crate::digest::{self, Fnv1a};

/// What sets and chains are called.
pub type Name = Cow<'static, str>;

/// What the names of chains and sets that grow with the network begin with.
const GROWN: [&str; 6] = ["inbound_", "outbound_", "members_", "within_", "inside_", "trunk_"];

/// Whether a chain or set of this name grows with the network.
pub fn is_grown(name: &str) -> bool {
    GROWN.iter().any(|prefix| name.starts_with(prefix))
}

/// Whether the order of the rules in a chain that grows means something. In a group's it does not: each of its rules allows something, and none forbids.
pub fn is_ordered(name: &str) -> bool {
    !["inbound_", "outbound_"].iter().any(|prefix| name.starts_with(prefix))
}

/// The elements of a set or map: key to value (empty in a set), as they lie in registers. The value in a verdict map is the name of the
/// chain that is jumped to; in a set whose elements are named, their name.
pub type Elements = BTreeMap<Vec<u8>, Vec<u8>>;

pub static NO_ELEMENTS: Elements = Elements::new();

/// The types that keys and values have, with the numbers that the `nft` program gives them, so that
/// it prints them as what they are (nftables, `include/datatype.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Type {
    Ipv4,
    Ether,
    LinkName,
    /// In the host's byte order.
    Number,
    /// One byte.
    Protocol,
    /// Two bytes, the larger first.
    Port,
    /// Only as a value: the number of a VPC, and an address in it.
    Place,
    /// Only as a value: a jump to a chain.
    Verdict,
}

impl Type {
    const fn number(self) -> u32 {
        match self {
            Self::Ipv4 => 7,
            Self::Ether => 9,
            Self::Protocol => 12,
            Self::Port => 13,
            // Printed as a mark is.
            Self::Number => 19,
            Self::LinkName => 41,
            Self::Place => Self::Number.number() << 6 | Self::Ipv4.number(),
            Self::Verdict => libc::NFT_DATA_VERDICT,
        }
    }

    /// Bytes in registers: padded to four, as every part of a concatenation is.
    const fn length(self) -> u32 {
        match self {
            Self::Ipv4 | Self::Number | Self::Protocol | Self::Port => 4,
            Self::Ether | Self::Place => 8,
            Self::LinkName | Self::Verdict => 16,
        }
    }
}

/// A named set, or a map when it has a value.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Set {
    pub name: Name,
    /// Ties rules to a set made in the same transaction, where the kernel does not find it by its name.
    pub id: u32,
    pub key: &'static [Type],
    pub value: Option<Type>,
    /// Each element counts the packets that it matched.
    pub counting: bool,
    /// Each element says in a comment what it is.
    pub named: bool,
    /// Each element matches only what is beyond this, and counts that alone.
    pub limit: Option<Limit>,
}

/// What each element of a set measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Limit {
    /// After a pause, those of two seconds may come at once.
    Packets {
        per_second: u32,
    },
    Bytes {
        per_second: u32,
    },
    /// As many as are tracked. The kernel makes the elements, when a rule asks for it, and removes them.
    Connections {
        most: u32,
    },
}

impl Set {
    /// What the set holds is the kernel's own affair.
    pub fn is_of_kernel(&self) -> bool {
        matches!(self.limit, Some(Limit::Connections { .. }))
    }

    /// The type number of the key: six bits a part, the first highest (`TYPE_BITS`).
    pub fn key_type(&self) -> u32 {
        self.key.iter().fold(0, |number, part| number << 6 | part.number())
    }

    /// Bytes of the key. A lone Ethernet address is 6 bytes long; in a concatenation it is padded.
    pub fn key_length(&self) -> u32 {
        match self.key {
            [Type::Ether] => 6,
            parts => parts.iter().map(|part| part.length()).sum(),
        }
    }

    /// Tells the `nft` program in which byte order it finds keys and values, without which it cannot
    /// print a name (nftables, `NFTNL_UDATA_SET_KEYBYTEORDER`, `…DATABYTEORDER`): type, length and
    /// a 32-bit number, of which 1 is the host's order and 2 the network's.
    pub fn userdata(&self) -> Vec<u8> {
        let order = |part: Option<&Type>| match part {
            Some(Type::LinkName | Type::Number) => 1_u32,
            // Of several parts there is no one order.
            Some(Type::Place) => 0,
            _ => 2,
        };
        let key = if self.key.len() == 1 { order(self.key.first()) } else { 0 };
        let mut userdata = [&[0, 4][..], &key.to_ne_bytes()].concat();
        if let Some(value) = &self.value {
            userdata.extend([&[1, 4][..], &order(Some(value)).to_ne_bytes()].concat());
        }
        userdata
    }

    /// The value's type number and its bytes; a lone value is not padded.
    pub fn value_type(&self) -> Option<(u32, u32)> {
        self.value.map(|value| (value.number(), if value == Type::Ether { 6 } else { value.length() }))
    }
}

/// Where a base chain hooks in.
#[derive(Debug, Clone)]
pub struct Base {
    pub kind: ChainType,
    pub hook: Hook,
    pub priority: Priority,
    /// In the family of devices, which of them.
    pub device: Option<String>,
}

/// What brings packets of the connections that it knows on their way as soon as one of its devices hands them up.
#[derive(Debug, Clone)]
pub struct Flowtable {
    pub name: &'static str,
    /// They are there already.
    pub devices: BTreeSet<String>,
}

impl Flowtable {
    /// Among what looks at a packet that a device hands up.
    pub const PRIORITY: i32 = 0;
}

#[derive(Debug, Clone)]
pub struct Chain {
    pub name: Name,
    /// None for a chain that others jump to.
    pub base: Option<Base>,
    pub rules: Vec<Rule>,
}

#[derive(Debug, Clone)]
pub struct Table {
    pub family: ProtoFamily,
    pub name: &'static str,
    pub sets: Vec<Set>,
    /// In an order in which a chain comes before those that jump to it.
    pub chains: Vec<Chain>,
    pub flowtable: Option<Flowtable>,
}

impl Table {
    /// netd's table of the family, by name alone.
    pub fn empty(family: ProtoFamily) -> Self {
        Self { family, name: super::TABLE, sets: Vec::new(), chains: Vec::new(), flowtable: None }
    }

    /// The comment of a rule in the kernel: what it is for, and a digest of what it does, so that a
    /// rule of another version of netd, or for another uplink, is told from this one.
    pub fn comment(&self, chain: &Chain, rule: &Rule) -> String {
        let mut subject = Fnv1a::default();
        chain.name.hash(&mut subject);
        rule.exprs.hash(&mut subject);
        if let Some(base) = &chain.base {
            // The library's own types cannot be hashed.
            format!("{base:?}").hash(&mut subject);
        }
        if !is_grown(&chain.name) {
            // Stands for the sets' layout too, for which the kernel has no place to note it.
            self.sets.iter().filter(|set| !is_grown(&set.name)).for_each(|set| set.hash(&mut subject));
        }
        format!("{} [{:08x}]", rule.purpose, digest::folded(subject.finish()))
    }
}
