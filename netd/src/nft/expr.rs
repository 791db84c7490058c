//! The nf_tables expressions that netd's rules use.
//!
//! `nftnl` has safe expressions for the commonest uses, all on its first register. Maps, keys that
//! are concatenated over several registers, and NAT by register need more, so the few expressions
//! used here are encoded straight through `nftnl-sys`. This is the only file of `nft/` that knows
//! attribute numbers of expressions.

use std::ffi::CString;
use std::net::Ipv4Addr;
use std::ptr::NonNull;

use nftnl::expr::Expression;
use nftnl::nftnl_sys as sys;

use super::layout::{Limit, Name};

// `include/uapi/linux/netfilter/nf_tables.h`
const CONNLIMIT_INVERTED: u32 = 1;
const HASH_JENKINS: u32 = 0;

/// `NF_NAT_RANGE_PROTO_SPECIFIED` (`include/uapi/linux/netfilter/nf_nat.h`).
const NAT_PORTS_GIVEN: u32 = 1 << 1;

/// One of the sixteen 4-byte registers. A value longer than 4 bytes lies in several, one after the
/// other, each part padded to 4 bytes: that is how a concatenated key is put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Register(pub u8);

impl Register {
    fn raw(self) -> u32 {
        libc::NFT_REG32_00 as u32 + u32::from(self.0)
    }
}

/// Where a payload is counted from.
#[derive(Debug, Clone, Copy, Hash)]
pub enum Header {
    Link,
    Network,
    Transport,
}

/// Something that the kernel knows of a packet beside its bytes.
#[derive(Debug, Clone, Copy, Hash)]
pub enum Meta {
    InputName,
    OutputName,
    /// Group of the link that the packet came by, in the host's byte order.
    InputGroup,
    OutputGroup,
    Layer4Protocol,
    Mark,
    /// Whom the frame is for, in the host's byte order.
    ForWhom,
}

impl Meta {
    fn number(self) -> u32 {
        let number = match self {
            Self::InputName => libc::NFT_META_IIFNAME,
            Self::OutputName => libc::NFT_META_OIFNAME,
            Self::InputGroup => libc::NFT_META_IIFGROUP,
            Self::OutputGroup => libc::NFT_META_OIFGROUP,
            Self::Layer4Protocol => libc::NFT_META_L4PROTO,
            Self::Mark => libc::NFT_META_MARK,
            Self::ForWhom => libc::NFT_META_PKTTYPE,
        };
        number as u32
    }
}

/// Something that conntrack knows of a packet's connection.
#[derive(Debug, Clone, Copy, Hash)]
pub enum Conntrack {
    State,
    Status,
    /// One byte ([`Direction`]).
    Direction,
    Mark,
    /// The zone that the first packet's addresses are in, or that their answers' are; 0 is nobody's.
    Zone(Direction),
    /// Of the first packet, before anything was translated; of ICMP, what takes a port's place.
    SourcePort,
    DestinationPort,
}

impl Conntrack {
    fn number(self) -> u32 {
        let number = match self {
            Self::State => libc::NFT_CT_STATE,
            Self::Status => libc::NFT_CT_STATUS,
            Self::Direction => libc::NFT_CT_DIRECTION,
            Self::Mark => libc::NFT_CT_MARK,
            Self::Zone(_) => libc::NFT_CT_ZONE,
            Self::SourcePort => libc::NFT_CT_PROTO_SRC,
            Self::DestinationPort => libc::NFT_CT_PROTO_DST,
        };
        number as u32
    }

    /// Which direction is asked for, of what each has its own.
    fn direction(self) -> Option<Direction> {
        match self {
            Self::Zone(direction) => Some(direction),
            Self::SourcePort | Self::DestinationPort => Some(Direction::Original),
            Self::State | Self::Status | Self::Direction | Self::Mark => None,
        }
    }
}

/// Which way a packet of a connection goes (`include/uapi/linux/netfilter/nf_conntrack_tuple_common.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// As its first packet.
    Original = 0,
    Reply = 1,
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, Hash)]
pub enum Verdict {
    Accept,
    Drop,
    /// On in another chain, and back behind this rule at its end.
    Jump(&'static str),
    /// On in another chain, and at its end to where this chain was jumped to from.
    Goto(&'static str),
}

/// Where a lookup in a map puts the value that it finds.
#[derive(Debug, Clone, Copy, Hash)]
pub enum Found {
    /// Nowhere: it is a set.
    Nothing,
    In(Register),
    /// The value is what becomes of the packet.
    Verdict,
}

/// Which address a NAT rule changes.
#[derive(Debug, Clone, Copy, Hash)]
pub enum Nat {
    Source,
    Destination,
}

#[derive(Debug, Clone, Hash)]
pub enum Expr {
    Meta {
        key: Meta,
        to: Register,
    },
    /// Marks the packet with the number in the register.
    SetMark {
        from: Register,
    },
    /// Marks the packet's connection.
    SetConnectionMark {
        from: Register,
    },
    /// Puts the packet's connection into the zone in the register's lower half: with the addresses that it has in one direction, or
    /// with all. Only before conntrack has seen the packet.
    SetZone {
        direction: Option<Direction>,
        from: Register,
    },
    /// Has the kernel tell which rules the packet passes from here on, if the register holds one.
    SetTrace {
        from: Register,
    },
    Immediate {
        value: Vec<u8>,
        to: Register,
    },
    Payload {
        header: Header,
        offset: u32,
        length: u32,
        to: Register,
    },
    /// Writes the register's bytes into the packet. Only for what no checksum is over.
    SetPayload {
        header: Header,
        offset: u32,
        length: u32,
        from: Register,
    },
    Conntrack {
        key: Conntrack,
        to: Register,
    },
    Compare {
        from: Register,
        equal: bool,
        value: Vec<u8>,
    },
    /// Goes on when the value is between these two, the larger byte first.
    Range {
        from: Register,
        low: Vec<u8>,
        high: Vec<u8>,
    },
    /// Keeps the bits of `mask`.
    Mask {
        from: Register,
        mask: Vec<u8>,
        to: Register,
    },
    /// Goes on when the key is in the set (or, inverted, when it is not).
    Lookup {
        set: Name,
        set_id: u32,
        from: Register,
        found: Found,
        inverted: bool,
    },
    /// Puts a digest of the bytes into a register, which is below `modulus`. The kernel draws the seed.
    Digest {
        from: Register,
        length: u32,
        modulus: u32,
        to: Register,
    },
    /// Adds the key to the set, if it is not there, and lets its element measure: goes on when the packet is beyond the limit.
    Update {
        set: Name,
        set_id: u32,
        from: Register,
    },
    Counter,
    Nat {
        kind: Nat,
        address: Register,
    },
    /// As the address of the link that it leaves by, from a port of a range: two registers, each with one in the network's byte order.
    Masquerade {
        from: Register,
        to: Register,
    },
    /// Puts the packet's connection into the flow table, or ends the rule where it cannot be there.
    IntoFlowtable {
        name: &'static str,
    },
    Verdict(Verdict),
}

impl Expr {
    pub fn compare_address(from: Register, address: Ipv4Addr) -> Self {
        Self::Compare { from, equal: true, value: address.octets().to_vec() }
    }
}

impl Expression for Expr {
    fn to_expr(&self, _rule: &nftnl::Rule) -> NonNull<sys::nftnl_expr> {
        match self {
            Self::Meta { key, to } => {
                let mut expr = Raw::new("meta");
                expr.u32(sys::NFTNL_EXPR_META_KEY, key.number());
                expr.u32(sys::NFTNL_EXPR_META_DREG, to.raw());
                expr.done()
            }
            Self::SetMark { from } => {
                let mut expr = Raw::new("meta");
                expr.u32(sys::NFTNL_EXPR_META_KEY, Meta::Mark.number());
                expr.u32(sys::NFTNL_EXPR_META_SREG, from.raw());
                expr.done()
            }
            Self::SetConnectionMark { from } => {
                let mut expr = Raw::new("ct");
                expr.u32(sys::NFTNL_EXPR_CT_KEY, libc::NFT_CT_MARK as u32);
                expr.u32(sys::NFTNL_EXPR_CT_SREG, from.raw());
                expr.done()
            }
            Self::SetZone { direction, from } => {
                let mut expr = Raw::new("ct");
                expr.u32(sys::NFTNL_EXPR_CT_KEY, libc::NFT_CT_ZONE as u32);
                if let Some(direction) = direction {
                    expr.u8(sys::NFTNL_EXPR_CT_DIR, *direction as u8);
                }
                expr.u32(sys::NFTNL_EXPR_CT_SREG, from.raw());
                expr.done()
            }
            Self::SetTrace { from } => {
                let mut expr = Raw::new("meta");
                expr.u32(sys::NFTNL_EXPR_META_KEY, libc::NFT_META_NFTRACE as u32);
                expr.u32(sys::NFTNL_EXPR_META_SREG, from.raw());
                expr.done()
            }
            Self::Immediate { value, to } => {
                let mut expr = Raw::new("immediate");
                expr.u32(sys::NFTNL_EXPR_IMM_DREG, to.raw());
                expr.bytes(sys::NFTNL_EXPR_IMM_DATA, value);
                expr.done()
            }
            Self::Payload { header, offset, length, to } => {
                let mut expr = Raw::payload(*header, *offset, *length);
                expr.u32(sys::NFTNL_EXPR_PAYLOAD_DREG, to.raw());
                expr.done()
            }
            Self::SetPayload { header, offset, length, from } => {
                let mut expr = Raw::payload(*header, *offset, *length);
                expr.u32(sys::NFTNL_EXPR_PAYLOAD_SREG, from.raw());
                expr.done()
            }
            Self::Conntrack { key, to } => {
                let mut expr = Raw::new("ct");
                expr.u32(sys::NFTNL_EXPR_CT_KEY, key.number());
                expr.u32(sys::NFTNL_EXPR_CT_DREG, to.raw());
                if let Some(direction) = key.direction() {
                    expr.u8(sys::NFTNL_EXPR_CT_DIR, direction as u8);
                }
                expr.done()
            }
            Self::Compare { from, equal, value } => {
                let mut expr = Raw::new("cmp");
                let operation = if *equal { libc::NFT_CMP_EQ } else { libc::NFT_CMP_NEQ };
                expr.u32(sys::NFTNL_EXPR_CMP_SREG, from.raw());
                expr.u32(sys::NFTNL_EXPR_CMP_OP, operation as u32);
                expr.bytes(sys::NFTNL_EXPR_CMP_DATA, value);
                expr.done()
            }
            Self::Range { from, low, high } => {
                let mut expr = Raw::new("range");
                expr.u32(sys::NFTNL_EXPR_RANGE_SREG, from.raw());
                expr.u32(sys::NFTNL_EXPR_RANGE_OP, libc::NFT_RANGE_EQ as u32);
                expr.bytes(sys::NFTNL_EXPR_RANGE_FROM_DATA, low);
                expr.bytes(sys::NFTNL_EXPR_RANGE_TO_DATA, high);
                expr.done()
            }
            Self::Mask { from, mask, to } => {
                let mut expr = Raw::new("bitwise");
                expr.u32(sys::NFTNL_EXPR_BITWISE_SREG, from.raw());
                expr.u32(sys::NFTNL_EXPR_BITWISE_DREG, to.raw());
                expr.u32(sys::NFTNL_EXPR_BITWISE_LEN, mask.len() as u32);
                expr.bytes(sys::NFTNL_EXPR_BITWISE_MASK, mask);
                expr.bytes(sys::NFTNL_EXPR_BITWISE_XOR, &vec![0; mask.len()]);
                expr.done()
            }
            Self::Lookup { set, set_id, from, found, inverted } => {
                let mut expr = Raw::new("lookup");
                expr.u32(sys::NFTNL_EXPR_LOOKUP_SREG, from.raw());
                match found {
                    Found::Nothing => {}
                    Found::In(to) => expr.u32(sys::NFTNL_EXPR_LOOKUP_DREG, to.raw()),
                    Found::Verdict => expr.u32(sys::NFTNL_EXPR_LOOKUP_DREG, libc::NFT_REG_VERDICT as u32),
                }
                expr.text(sys::NFTNL_EXPR_LOOKUP_SET, set);
                expr.u32(sys::NFTNL_EXPR_LOOKUP_SET_ID, *set_id);
                if *inverted {
                    expr.u32(sys::NFTNL_EXPR_LOOKUP_FLAGS, libc::NFT_LOOKUP_F_INV as u32);
                }
                expr.done()
            }
            Self::Digest { from, length, modulus, to } => {
                let mut expr = Raw::new("hash");
                expr.u32(sys::NFTNL_EXPR_HASH_TYPE, HASH_JENKINS);
                expr.u32(sys::NFTNL_EXPR_HASH_SREG, from.raw());
                expr.u32(sys::NFTNL_EXPR_HASH_LEN, *length);
                expr.u32(sys::NFTNL_EXPR_HASH_MODULUS, *modulus);
                expr.u32(sys::NFTNL_EXPR_HASH_DREG, to.raw());
                expr.done()
            }
            Self::Update { set, set_id, from } => {
                let mut expr = Raw::new("dynset");
                expr.u32(sys::NFTNL_EXPR_DYNSET_OP, libc::NFT_DYNSET_OP_UPDATE as u32);
                expr.u32(sys::NFTNL_EXPR_DYNSET_SREG_KEY, from.raw());
                expr.text(sys::NFTNL_EXPR_DYNSET_SET_NAME, set);
                expr.u32(sys::NFTNL_EXPR_DYNSET_SET_ID, *set_id);
                expr.done()
            }
            Self::Nat { kind, address } => {
                let mut expr = Raw::new("nat");
                let kind = match kind {
                    Nat::Source => libc::NFT_NAT_SNAT,
                    Nat::Destination => libc::NFT_NAT_DNAT,
                };
                expr.u32(sys::NFTNL_EXPR_NAT_TYPE, kind as u32);
                expr.u32(sys::NFTNL_EXPR_NAT_FAMILY, libc::NFPROTO_IPV4 as u32);
                expr.u32(sys::NFTNL_EXPR_NAT_REG_ADDR_MIN, address.raw());
                expr.done()
            }
            Self::Counter => counter(),
            Self::Masquerade { from, to } => {
                let mut expr = Raw::new("masq");
                expr.u32(sys::NFTNL_EXPR_MASQ_FLAGS, NAT_PORTS_GIVEN);
                expr.u32(sys::NFTNL_EXPR_MASQ_REG_PROTO_MIN, from.raw());
                expr.u32(sys::NFTNL_EXPR_MASQ_REG_PROTO_MAX, to.raw());
                expr.done()
            }
            Self::IntoFlowtable { name } => {
                let mut expr = Raw::new("flow_offload");
                expr.text(sys::NFTNL_EXPR_FLOW_TABLE_NAME, name);
                expr.done()
            }
            Self::Verdict(verdict) => {
                let mut expr = Raw::new("immediate");
                let code = match verdict {
                    Verdict::Accept => libc::NF_ACCEPT,
                    Verdict::Drop => libc::NF_DROP,
                    Verdict::Jump(_) => libc::NFT_JUMP,
                    Verdict::Goto(_) => libc::NFT_GOTO,
                };
                expr.u32(sys::NFTNL_EXPR_IMM_DREG, libc::NFT_REG_VERDICT as u32);
                if let Verdict::Jump(chain) | Verdict::Goto(chain) = verdict {
                    expr.text(sys::NFTNL_EXPR_IMM_CHAIN, chain);
                }
                expr.u32(sys::NFTNL_EXPR_IMM_VERDICT, code as u32);
                expr.done()
            }
        }
    }
}

/// The expression that counts, in a rule or in each element of a set.
pub fn counter() -> NonNull<sys::nftnl_expr> {
    Raw::new("counter").done()
}

/// The expression by which each element of a set measures. Goes on beyond the limit.
pub fn limit(limit: Limit) -> NonNull<sys::nftnl_expr> {
    let (per_second, kind) = match limit {
        Limit::Packets { per_second } => (per_second, libc::NFT_LIMIT_PKTS),
        Limit::Bytes { per_second } => (per_second, libc::NFT_LIMIT_PKT_BYTES),
        Limit::Connections { most } => {
            let mut expr = Raw::new("connlimit");
            expr.u32(sys::NFTNL_EXPR_CONNLIMIT_COUNT, most);
            expr.u32(sys::NFTNL_EXPR_CONNLIMIT_FLAGS, CONNLIMIT_INVERTED);
            return expr.done();
        }
    };
    // A bucket of bytes holds those of one second beside its burst, one of packets only its burst.
    let burst = if kind == libc::NFT_LIMIT_PKTS { per_second.saturating_mul(2) } else { per_second };
    let mut expr = Raw::new("limit");
    expr.u64(sys::NFTNL_EXPR_LIMIT_RATE, per_second.into());
    expr.u64(sys::NFTNL_EXPR_LIMIT_UNIT, 1);
    expr.u32(sys::NFTNL_EXPR_LIMIT_BURST, burst);
    expr.u32(sys::NFTNL_EXPR_LIMIT_TYPE, kind as u32);
    expr.u32(sys::NFTNL_EXPR_LIMIT_FLAGS, libc::NFT_LIMIT_F_INV as u32);
    expr.done()
}

/// A libnftnl expression that is being filled in.
struct Raw(NonNull<sys::nftnl_expr>);

impl Raw {
    fn new(name: &'static str) -> Self {
        let name = c_string(name);
        // SAFETY: `name` is NUL-terminated and lives through the call, which copies it.
        let expr = unsafe { sys::nftnl_expr_alloc(name.as_ptr()) };
        Self(NonNull::new(expr).unwrap_or_else(|| out_of_memory()))
    }

    fn payload(header: Header, offset: u32, length: u32) -> Self {
        let mut expr = Self::new("payload");
        let base = match header {
            Header::Link => libc::NFT_PAYLOAD_LL_HEADER,
            Header::Network => libc::NFT_PAYLOAD_NETWORK_HEADER,
            Header::Transport => libc::NFT_PAYLOAD_TRANSPORT_HEADER,
        };
        expr.u32(sys::NFTNL_EXPR_PAYLOAD_BASE, base as u32);
        expr.u32(sys::NFTNL_EXPR_PAYLOAD_OFFSET, offset);
        expr.u32(sys::NFTNL_EXPR_PAYLOAD_LEN, length);
        expr
    }

    fn u8(&mut self, attribute: u32, value: u8) {
        // SAFETY: the expression is live and owned here; attributes are those of its kind.
        unsafe { sys::nftnl_expr_set_u8(self.0.as_ptr(), attribute as u16, value) };
    }

    fn u64(&mut self, attribute: u32, value: u64) {
        // SAFETY: as above.
        unsafe { sys::nftnl_expr_set_u64(self.0.as_ptr(), attribute as u16, value) };
    }

    fn u32(&mut self, attribute: u32, value: u32) {
        // SAFETY: the expression is live and owned here; attributes are those of its kind.
        unsafe { sys::nftnl_expr_set_u32(self.0.as_ptr(), attribute as u16, value) };
    }

    fn bytes(&mut self, attribute: u32, value: &[u8]) {
        // SAFETY: as above; libnftnl copies `value.len()` bytes, of which its data registers hold
        // 64, more than any value that the vocabulary of `rule.rs` can make.
        unsafe {
            sys::nftnl_expr_set(self.0.as_ptr(), attribute as u16, value.as_ptr().cast(), value.len() as u32);
        }
    }

    fn text(&mut self, attribute: u32, value: &str) {
        let value = c_string(value);
        // SAFETY: as above; the string is NUL-terminated and copied.
        unsafe { sys::nftnl_expr_set_str(self.0.as_ptr(), attribute as u16, value.as_ptr()) };
    }

    /// Hands the expression to whoever adds it to a rule or set, which then owns it.
    fn done(self) -> NonNull<sys::nftnl_expr> {
        self.0
    }
}

/// A C string from a name that is a constant of this program, or made of an id, which has no NUL.
pub fn c_string(name: &str) -> CString {
    CString::new(name).unwrap_or_default()
}

/// libnftnl allocates a few hundred bytes at a time; where that fails there is nothing to be done,
/// as Rust's own allocator has it.
pub fn out_of_memory() -> ! {
    std::alloc::handle_alloc_error(std::alloc::Layout::new::<[u8; 256]>())
}
