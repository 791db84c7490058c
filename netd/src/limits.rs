//! How much one instance may take of what all instances of a node share.
//!
//! An instance's own processor, memory and link are its VMM's business. Beside them it uses things of the node's that others need too: the
//! gateway's answers, its neighbours' attention, the table of connections, the memory in which fragments wait for one another. Each has a bound for
//! each interface, far above what software that means well uses, and what is beyond it is dropped and counted by its kind. The kernel does
//! that (`nft/rules/limits.rs`); here are the numbers, which `mallee-netd` takes as flags.
//!
//! Rates are token buckets: after a pause of two seconds, twice the rate may come at once.

use clap::Args;

/// The largest table of connections that the kernel keeps, for all network namespaces together.
const CONNECTIONS_MAX: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
/// One part in so many of that table is what an interface may fill with connections that it opens.
const SHARE: u32 = 8;
/// What a kernel is taken to have that does not say (`Documentation/networking/nf_conntrack-sysctl.rst`: at least this with 1 GiB of memory).
const CONNECTIONS_MAX_ASSUMED: u32 = 65_536;

/// An interface's connections are counted in lists of about this length ([`Lists`]).
const LIST: u32 = 128;
const MOST_LISTS: u32 = 256;

/// Bounds for each interface. Rates are per second.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct Limits {
    /// ARP packets a second of one interface. Each question goes to all of its segment, on all nodes.
    #[arg(long, default_value_t = 100, value_name = "PACKETS", value_parser = at_least_one())]
    pub arp_rate: u32,
    /// DHCP messages a second of one interface. A client sends two for a lease.
    #[arg(long, default_value_t = 10, value_name = "PACKETS", value_parser = at_least_one())]
    pub dhcp_rate: u32,
    /// Packets a second of one interface to its gateway's services: names, metadata, ping. EC2 has the same bound for the same ("Amazon VPC
    /// User Guide", DNS quotas: 1024 packets a second for each network interface).
    #[arg(long, default_value_t = 1024, value_name = "PACKETS", value_parser = at_least_one())]
    pub gateway_rate: u32,
    /// Other broadcast and multicast frames a second of one interface. They reach no neighbour, but the node's bridge.
    #[arg(long, default_value_t = 100, value_name = "FRAMES", value_parser = at_least_one())]
    pub broadcast_rate: u32,
    /// IPv4 fragments a second of one interface, and as many times 1500 bytes.
    #[arg(long, default_value_t = 256, value_name = "PACKETS", value_parser = at_least_one())]
    pub fragment_rate: u32,
    /// Connections a second that one interface may open, and half of those that may be opened to it: no neighbour alone uses these up.
    #[arg(long, default_value_t = 5000, value_name = "CONNECTIONS", value_parser = at_least_one())]
    pub connection_rate: u32,
    /// Connections that one interface has opened and that are tracked at one time, and half of those that were opened to it. Without the
    /// flag, an eighth of the kernel's table (net.netfilter.nf_conntrack_max).
    #[arg(long, value_name = "CONNECTIONS", value_parser = at_least_one())]
    connections: Option<u32>,
}

fn at_least_one() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=1_000_000_000)
}

impl Default for Limits {
    /// What holds without a flag.
    fn default() -> Self {
        Self {
            arp_rate: 100,
            dhcp_rate: 10,
            gateway_rate: 1024,
            broadcast_rate: 100,
            fragment_rate: 256,
            connection_rate: 5000,
            connections: None,
        }
    }
}

impl Limits {
    /// Takes the bound on connections from the kernel's table, where no flag says it. The kernel is asked once, so that the bound is the same for
    /// as long as netd runs.
    pub fn settled(mut self) -> Self {
        let of_kernel = || std::fs::read_to_string(CONNECTIONS_MAX).ok()?.trim().parse().ok();
        self.connections.get_or_insert_with(|| of_kernel().unwrap_or(CONNECTIONS_MAX_ASSUMED) / SHARE);
        self
    }

    /// Connections that one interface has opened.
    pub fn opened(&self) -> Lists {
        Lists::of(self.connections.unwrap_or(CONNECTIONS_MAX_ASSUMED / SHARE))
    }

    /// Connections that were opened to one interface.
    pub fn taken(&self) -> Lists {
        Lists::of(self.connections.unwrap_or(CONNECTIONS_MAX_ASSUMED / SHARE).saturating_mul(2))
    }

    /// Bytes of fragments a second of one interface.
    pub fn fragment_bytes(&self) -> u32 {
        self.fragment_rate.saturating_mul(1500)
    }
}

/// In how many lists an interface's connections are counted, and how long each may be.
///
/// The kernel keeps a list of what it counts and walks the whole of it for a new connection (`net/netfilter/nf_conncount.c`), at 0.2 µs an entry:
/// with 32,768 in one list, that is 7 ms with the processor held. So an interface has many short lists, and a connection's addresses and ports
/// choose one by chance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lists {
    pub count: u32,
    /// Chance fills lists unevenly, so each may be longer than its share by three standard deviations: an interface is refused nothing before
    /// it has about as many connections as it may have, and never has a third more (a quarter, by the default).
    pub length: u32,
}

impl Lists {
    fn of(connections: u32) -> Self {
        let count = (connections / LIST).clamp(1, MOST_LISTS);
        let share = connections.div_ceil(count);
        Self { count, length: if count == 1 { share } else { share + 3 * share.isqrt() } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;
    use proptest::prelude::*;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        limits: Limits,
    }

    #[test]
    fn what_holds_without_a_flag_is_the_default() {
        assert_eq!(Cli::parse_from(["netd"]).limits, Limits::default());
        let given = Cli::parse_from(["netd", "--connections", "200"]).limits.settled();
        assert_eq!(given.opened(), Lists { count: 1, length: 200 });
        assert_eq!(given.taken(), Lists { count: 3, length: 134 + 3 * 11 });
        assert!(Cli::try_parse_from(["netd", "--arp-rate", "0"]).is_err());
    }

    proptest! {
        #[test]
        fn the_lists_hold_what_they_are_to_hold_and_not_much_more(connections in 1..=4_000_000_u32) {
            let lists = Lists::of(connections);
            let held = u64::from(lists.count) * u64::from(lists.length);
            prop_assert!(held >= connections.into());
            prop_assert!(held <= u64::from(connections) * 4 / 3 + 4 * u64::from(lists.count));
        }
    }
}
