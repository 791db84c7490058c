//! The networks that this machine reaches already.
//!
//! A public side of our own must not overlap any of them: its bridge has the network's first address,
//! which elsewhere is the gateway's, and would cut the machine off from what lies behind that.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::networks::overlap;

/// A route of this machine, other than through `own`, whose network overlaps the given one.
pub fn overlapping(network: Ipv4Net, own: &str) -> Option<(String, Ipv4Net)> {
    let table = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
    find_overlap(&table, network, own)
}

fn find_overlap(table: &str, network: Ipv4Net, own: &str) -> Option<(String, Ipv4Net)> {
    parse(table).into_iter().find(|(interface, route)| interface != own && overlap(route, &network))
}

/// Interface and network of each route but the default one (`/proc/net/route`: hexadecimal, in the
/// machine's byte order).
fn parse(table: &str) -> Vec<(String, Ipv4Net)> {
    let address = |text: &str| u32::from_str_radix(text, 16).ok().map(|n| Ipv4Addr::from(n.to_le_bytes()));
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let network = address(fields.get(1)?)?;
            let mask = address(fields.get(7)?)?;
            let network = Ipv4Net::with_netmask(network, mask).ok()?;
            (network.prefix_len() > 0).then(|| ((*fields[0]).to_owned(), network))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
                         eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                         eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
                         docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n";

    #[test]
    fn routes_are_read() {
        let expected = [("eth0", "192.0.2.0/24"), ("docker0", "172.17.0.0/16")];
        assert_eq!(parse(TABLE), expected.map(|(name, network)| (name.to_owned(), network.parse().unwrap())));
    }

    #[test]
    fn overlaps_are_found_either_way_round() {
        let interface = |network: &str, own| find_overlap(TABLE, network.parse().unwrap(), own).map(|(name, _)| name);
        // The machine's own network, with the gateway's address for the bridge.
        assert_eq!(interface("192.0.2.0/24", "mallee0").as_deref(), Some("eth0"));
        assert_eq!(interface("172.17.5.0/24", "mallee0").as_deref(), Some("docker0"));
        assert_eq!(interface("172.16.0.0/12", "mallee0").as_deref(), Some("docker0"));
        assert_eq!(interface("172.17.0.0/16", "docker0"), None);
        assert_eq!(interface("198.51.100.0/24", "mallee0"), None);
    }
}
