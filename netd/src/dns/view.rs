//! What the instances of one VPC may know of names.
//!
//! Private names follow from addresses, as in EC2: `ip-10-0-0-5` in the subnet's domain is 10.0.0.5 whether or not an instance has
//! that address, and whichever node it is on. So every node knows all names of a VPC from its networks alone, and a launch
//! anywhere changes nothing here. A host name that does not follow from the address is known on the instance's own node.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use hickory_proto::rr::Name;
use ipnet::Ipv4Net;

use crate::api::METADATA_ADDRESS;
use crate::desired::{InterfaceId, Network, Segment};

/// Name of the metadata service within a subnet's domain, as in EC2.
const METADATA_HOST: &str = "instance-data";

/// The names of a VPC, as one of its segments sees them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    pub segment: String,
    /// The domains of the VPC's subnets. All names in them are answered for here.
    pub zones: BTreeSet<Name>,
    /// The VPC's networks, each with the domain of the names in it.
    networks: Vec<(Ipv4Net, Name)>,
    /// Host names that do not follow from the address.
    hosts: BTreeMap<Name, Ipv4Addr>,
    /// Whose the addresses of the segment are.
    askers: BTreeMap<Ipv4Addr, InterfaceId>,
}

impl View {
    pub fn of(network: &Network, segment: &Segment) -> Self {
        let askers = network.interfaces_of(&segment.id).flat_map(|interface| {
            interface.addresses().map(|address| (address, interface.id.clone())).collect::<Vec<_>>()
        });
        let mut view = Self {
            segment: segment.id.to_string(),
            zones: BTreeSet::new(),
            networks: Vec::new(),
            hosts: BTreeMap::new(),
            askers: askers.collect(),
        };
        for other in network.segments.values().filter(|other| other.vpc == segment.vpc) {
            let Some(domain) = zone_of(other) else { continue };
            view.zones.insert(domain.clone());
            view.networks.push((other.network, domain.clone()));
            view.networks.extend(other.vpc_networks.iter().map(|network| (*network, domain.clone())));
            for interface in network.interfaces_of(&other.id) {
                let host = interface.hostname.as_deref().and_then(|host| own_name(host, &domain));
                view.hosts.extend(host.map(|name| (name, interface.ipv4)));
            }
            if let Some(name) = in_zone(METADATA_HOST, &domain) {
                view.hosts.insert(name, METADATA_ADDRESS);
            }
        }
        // The smallest network that an address is in names it.
        view.networks.sort_by_key(|(network, _)| std::cmp::Reverse(network.prefix_len()));
        view
    }

    /// The interface that asks from an address; none for an address that is no interface's of the segment.
    pub fn asker(&self, address: IpAddr) -> Option<InterfaceId> {
        match address {
            IpAddr::V4(address) => self.askers.get(&address).cloned(),
            IpAddr::V6(_) => None,
        }
    }

    /// Whether all of a network is the VPC's.
    pub fn holds(&self, network: &Ipv4Net) -> bool {
        self.networks.iter().any(|(own, _)| own.contains(network))
    }

    /// The zone of ours that `name` is in.
    pub fn zone(&self, name: &Name) -> Option<&Name> {
        self.zones.iter().find(|zone| zone.zone_of(name))
    }

    /// The address of a name in one of the zones.
    pub fn address_of(&self, name: &Name) -> Option<Ipv4Addr> {
        let name = name.to_lowercase();
        if let Some(address) = self.hosts.get(&name) {
            return Some(*address);
        }
        let address = address_in(std::str::from_utf8(name.iter().next()?).ok()?)?;
        (self.name_of(address).as_ref() == Some(&name)).then_some(address)
    }

    /// The name that follows from an address of the VPC.
    pub fn name_of(&self, address: Ipv4Addr) -> Option<Name> {
        let (_, domain) = self.networks.iter().find(|(network, _)| network.contains(&address))?;
        let [a, b, c, d] = address.octets();
        in_zone(&format!("ip-{a}-{b}-{c}-{d}"), domain)
    }
}

fn zone_of(segment: &Segment) -> Option<Name> {
    let mut name = Name::from_str(segment.domain.as_deref()?).ok()?.to_lowercase();
    name.set_fqdn(true);
    Some(name)
}

fn in_zone(host: &str, zone: &Name) -> Option<Name> {
    let host = Name::from_ascii(host).ok()?.to_lowercase();
    host.append_domain(zone).ok()
}

/// A host name, whole or not, as a name in the zone; none where it says an address, which only the holder's own name may.
fn own_name(host: &str, zone: &Name) -> Option<Name> {
    if address_in(host.split('.').next()?).is_some() {
        return None;
    }
    let mut whole = Name::from_ascii(host).ok()?.to_lowercase();
    whole.set_fqdn(true);
    match zone.zone_of(&whole) && whole != *zone {
        true => Some(whole),
        false => in_zone(host, zone),
    }
}

/// The address in a label such as `ip-10-0-0-5`, which is written in one way only.
fn address_in(label: &str) -> Option<Ipv4Addr> {
    let dotted = label.strip_prefix("ip-")?.replace('-', ".");
    dotted.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::testing;
    use proptest::prelude::*;

    fn view() -> View {
        let network = testing::network();
        View::of(&network, network.segments.values().next().unwrap())
    }

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    #[test]
    fn names_follow_from_addresses_of_the_vpc_only() {
        let view = view();
        let zone = view.zones.iter().next().unwrap().to_string();
        let of = |host: &str| view.address_of(&name(&format!("{host}.{zone}")));
        assert_eq!(of("ip-172-31-0-77"), Some(Ipv4Addr::new(172, 31, 0, 77)));
        assert_eq!(of("IP-172-31-0-77"), Some(Ipv4Addr::new(172, 31, 0, 77)));
        assert_eq!(of("instance-data"), Some(METADATA_ADDRESS));
        for stranger in ["ip-10-9-9-9", "ip-172-31-0", "ip-172-31-0-077", "ip-172-31-0-4.x", "nobody"] {
            assert_eq!(of(stranger), None, "{stranger}");
        }
    }

    #[test]
    fn all_addresses_of_an_interface_are_one_asker() {
        let mut network = testing::network();
        let (id, interface) = network.interfaces.iter_mut().next().unwrap();
        let (id, first, second) = (id.clone(), interface.ipv4, Ipv4Addr::new(172, 31, 0, 9));
        interface.secondary = vec![second];
        let view = View::of(&network, network.segments.values().next().unwrap());
        assert_eq!([first, second].map(|address| view.asker(address.into())), [Some(id.clone()), Some(id)]);
        assert_eq!(view.asker(Ipv4Addr::new(172, 31, 0, 200).into()), None);
    }

    #[test]
    fn a_host_name_of_its_own_is_known() {
        let mut network = testing::network();
        network.interfaces.values_mut().next().unwrap().hostname = Some("build-1".into());
        let view = View::of(&network, network.segments.values().next().unwrap());
        let zone = view.zones.iter().next().unwrap();
        assert_eq!(view.address_of(&name(&format!("build-1.{zone}"))), Some(Ipv4Addr::new(172, 31, 0, 4)));
    }

    proptest! {
        #[test]
        fn an_address_of_the_vpc_and_its_name_lead_to_each_other(host in 0u32..4096) {
            let view = view();
            let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 31, 0, 0)) + host);
            let name = view.name_of(address).unwrap();
            prop_assert_eq!(view.address_of(&name), Some(address));
        }
    }
}
