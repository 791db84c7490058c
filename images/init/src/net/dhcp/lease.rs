//! What a DHCP server granted.

use std::fmt;
use std::net::Ipv4Addr;
use std::time::Duration;

/// An IPv4 network: an address and a prefix length of 0 to 32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: Ipv4Addr,
    prefix: u8,
}

impl Network {
    /// `None` if the prefix is longer than an address. Host bits are cleared.
    pub fn new(address: Ipv4Addr, prefix: u8) -> Option<Self> {
        (prefix <= 32).then(|| Network { address: address & mask(prefix), prefix })
    }

    pub fn network(&self) -> Ipv4Addr {
        self.address
    }

    pub fn netmask(&self) -> Ipv4Addr {
        mask(self.prefix)
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// One route of a lease; without a gateway its destination is on the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    pub destination: Network,
    pub gateway: Option<Ipv4Addr>,
}

impl Route {
    pub fn default_by(gateway: Ipv4Addr) -> Self {
        let everything = Network { address: Ipv4Addr::UNSPECIFIED, prefix: 0 };
        Route { destination: everything, gateway: Some(gateway) }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.gateway {
            Some(gateway) => write!(f, "{} via {gateway}", self.destination),
            None => write!(f, "{} on the link", self.destination),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    pub address: Ipv4Addr,
    /// Length of the subnet's prefix, 0 to 32.
    pub prefix: u8,
    pub server: Ipv4Addr,
    /// In the order in which they are to be added.
    pub routes: Vec<Route>,
    pub dns: Vec<Ipv4Addr>,
    pub domain: Option<String>,
    pub mtu: Option<u16>,
    /// From the time of the request. `renew < rebind < expire`.
    pub renew: Duration,
    pub rebind: Duration,
    pub expire: Duration,
}

impl Lease {
    pub fn netmask(&self) -> Ipv4Addr {
        mask(self.prefix)
    }

    /// Whether the interface would look the same with `other`.
    pub fn same_configuration(&self, other: &Lease) -> bool {
        (self.address, self.prefix, self.mtu) == (other.address, other.prefix, other.mtu)
            && self.routes == other.routes
            && self.dns == other.dns
            && self.domain == other.domain
    }
}

impl fmt::Display for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)?;
        for route in &self.routes {
            write!(f, ", {route}")?;
        }
        if let Some(mtu) = self.mtu {
            write!(f, ", MTU {mtu}")?;
        }
        Ok(())
    }
}

fn mask(prefix: u8) -> Ipv4Addr {
    let bits = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
    Ipv4Addr::from(bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks() {
        assert_eq!(mask(0), Ipv4Addr::UNSPECIFIED);
        assert_eq!(mask(20), Ipv4Addr::new(255, 255, 240, 0));
        assert_eq!(mask(32), Ipv4Addr::BROADCAST);
    }

    #[test]
    fn host_bits_are_cleared() {
        let network = Network::new(Ipv4Addr::new(10, 1, 2, 3), 8).unwrap();
        assert_eq!(network.to_string(), "10.0.0.0/8");
        assert_eq!(Network::new(Ipv4Addr::LOCALHOST, 33), None);
    }
}
