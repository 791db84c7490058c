//! Numbers that stand for VPCs and interfaces where the kernel has no room for their ids.
//!
//! A VPC's number is four things at once: the mark of packets that are to be routed in it, the routing table that they are routed by, the
//! conntrack zone of its connections, and the mark of connections that were opened to one of its elastic IPs. Two VPCs of a node may have the
//! same networks; they never have the same number. It must stay while the VPC is on the node, or its connections would end, so it is kept
//! for as long as netd runs, and else found again where the kernel has it (see [`Network::number_vpcs`]).
//!
//! An interface's mark says whom a packet is judged for. It is forgotten with the packet, so nothing hangs on its staying the same.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::{InterfaceId, InvalidNetwork, LinkName, Network, SegmentId, VpcId};

/// A VPC's number on this node: 0x6000 to 0x6fff, a range that no other use of marks and tables is known for. Conntrack's zones have 16 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct VpcNumber(u16);

const FIRST: u16 = 0x6000;
/// VPCs that a node can have. The kernel looks at one rule (`ip rule`) after the other for the table of a packet, so many fewer are meant.
const MOST: u16 = 0x1000;

impl VpcNumber {
    /// The bits that all VPCs' numbers have alike, and what these are. No other zone or mark that netd gives has them.
    pub const PREFIX: (u32, u32) = (0xffff_f000, FIRST as u32);

    /// The number, if it is one that netd gives to VPCs.
    pub fn new(number: u32) -> Option<Self> {
        let number = u16::try_from(number).ok()?;
        (FIRST..FIRST + MOST).contains(&number).then_some(Self(number))
    }

    pub fn get(self) -> u32 {
        self.0.into()
    }

    /// The number that a VPC gets when nobody else has it.
    fn preferred(vpc: &VpcId) -> Self {
        Self(FIRST + (digest(&vpc.to_string()) % u32::from(MOST)) as u16)
    }

    /// The next one, and the first after the last.
    fn next(self) -> Self {
        Self(FIRST + (self.0 - FIRST + 1) % MOST)
    }
}

impl fmt::Display for VpcNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// What packets of an interface are marked with while its security groups and limits judge them. The highest bit is set, so that it is no
/// VPC's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct InterfaceMark(u32);

impl InterfaceMark {
    /// No interface.
    pub const NOBODY: Self = Self(u32::MAX);

    pub fn get(self) -> u32 {
        self.0
    }

    fn preferred(interface: &InterfaceId) -> Self {
        Self(digest(&interface.to_string()) | 1 << 31)
    }
}

impl Network {
    /// Gives each VPC its number: the one that it has in `before`, or else the one of its bridges in `in_kernel`, or else one that nobody has, nor
    /// a bridge of another VPC that is about to go. Parsing gave it one already, as if nothing were there.
    pub fn number_vpcs(&mut self, before: &BTreeMap<VpcId, VpcNumber>, in_kernel: &BTreeMap<LinkName, VpcNumber>) {
        let vpcs: BTreeSet<VpcId> = self.segments.values().map(|segment| segment.vpc.clone()).collect();
        let bridges_of = |vpc: &VpcId| -> BTreeSet<&LinkName> {
            self.segments.values().filter(|segment| segment.vpc == *vpc).map(|segment| &segment.bridge).collect()
        };
        let mut numbers: BTreeMap<VpcId, VpcNumber> = BTreeMap::new();
        let mut used: BTreeSet<VpcNumber> = BTreeSet::new();
        for vpc in &vpcs {
            let found = || bridges_of(vpc).into_iter().find_map(|bridge| in_kernel.get(bridge));
            let Some(number) = before.get(vpc).or_else(found) else { continue };
            if used.insert(*number) {
                numbers.insert(vpc.clone(), *number);
            }
        }
        for vpc in &vpcs {
            if numbers.contains_key(vpc) {
                continue;
            }
            let own = bridges_of(vpc);
            let foreign = in_kernel.iter().filter(|(bridge, _)| !own.contains(bridge)).map(|(_, number)| *number);
            let taken: BTreeSet<VpcNumber> = used.iter().copied().chain(foreign).collect();
            let mut number = VpcNumber::preferred(vpc);
            // There are more numbers than VPCs that go and come ([`Self::check_numbers`]).
            for _ in 0..MOST {
                if !taken.contains(&number) {
                    break;
                }
                number = number.next();
            }
            used.insert(number);
            numbers.insert(vpc.clone(), number);
        }
        self.vpcs = numbers;
    }

    /// Gives each interface its mark.
    pub(super) fn mark_interfaces(&mut self) {
        let mut used = BTreeSet::from([InterfaceMark::NOBODY]);
        for interface in self.interfaces.values_mut() {
            let mut mark = InterfaceMark::preferred(&interface.id);
            while !used.insert(mark) {
                mark = InterfaceMark(mark.0.wrapping_add(1) | 1 << 31);
            }
            interface.mark = mark;
        }
    }

    pub(super) fn check_numbers(&self) -> Result<(), InvalidNetwork> {
        let vpcs: BTreeSet<&VpcId> = self.segments.values().map(|segment| &segment.vpc).collect();
        // Half of the numbers, so that as many others may be going at the same time.
        let most = usize::from(MOST / 2);
        match vpcs.iter().nth(most) {
            Some(vpc) => {
                Err(InvalidNetwork::new(vpc, format!("is one more than the {most} VPCs that a node can have")))
            }
            None => Ok(()),
        }
    }

    /// The number of a segment's VPC. Parsing made sure that both are there.
    pub fn vpc_number(&self, segment: &SegmentId) -> VpcNumber {
        self.vpcs[&self.segments[segment].vpc]
    }
}

/// FNV-1a, 32 bits.
fn digest(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash: u32, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::testing;
    use proptest::prelude::*;

    /// A network with a segment in each of these VPCs, not yet numbered by what was before.
    fn network(vpcs: &[u8]) -> Network {
        let mut network = testing::network();
        let first = network.segments.values().next().unwrap().clone();
        network.segments = vpcs
            .iter()
            .map(|n| {
                let mut segment = first.clone();
                segment.id = format!("subnet-{n}").parse().unwrap();
                segment.bridge = format!("brsubnet{n}").parse().unwrap();
                segment.vpc = format!("vpc-{n}").parse().unwrap();
                (segment.id.clone(), segment)
            })
            .collect();
        network
    }

    fn in_kernel(network: &Network) -> BTreeMap<LinkName, VpcNumber> {
        network.segments.values().map(|segment| (segment.bridge.clone(), network.vpc_number(&segment.id))).collect()
    }

    #[test]
    fn a_number_is_not_given_on_while_its_bridge_is_there() {
        let mut old = network(&[1]);
        old.number_vpcs(&BTreeMap::new(), &BTreeMap::new());
        let mut kernel = in_kernel(&old);
        // The same number as another VPC would get, which the going one still has.
        let taken = VpcNumber::preferred(&"vpc-2".parse().unwrap());
        kernel.insert("brsubnet1".parse().unwrap(), taken);
        let mut new = network(&[2]);
        new.number_vpcs(&BTreeMap::new(), &kernel);
        assert_ne!(new.vpc_number(&"subnet-2".parse().unwrap()), taken);
    }

    proptest! {
        #[test]
        fn numbers_differ_and_stay(
            before in proptest::collection::btree_set(0_u8..40, 0..20),
            after in proptest::collection::btree_set(0_u8..40, 0..20),
            remembered: bool,
        ) {
            let of = |vpcs: &BTreeSet<u8>| network(&vpcs.iter().copied().collect::<Vec<_>>());
            let mut old = of(&before);
            old.number_vpcs(&BTreeMap::new(), &BTreeMap::new());
            let memory = if remembered { old.vpcs.clone() } else { BTreeMap::new() };
            let mut new = of(&after);
            new.number_vpcs(&memory, &in_kernel(&old));
            let different: BTreeSet<VpcNumber> = new.vpcs.values().copied().collect();
            prop_assert_eq!(different.len(), after.len());
            for (vpc, number) in &new.vpcs {
                prop_assert!(VpcNumber::new(number.get()).is_some());
                match old.vpcs.get(vpc) {
                    Some(had) => prop_assert_eq!(had, number),
                    None => prop_assert!(!old.vpcs.values().any(|other| other == number)),
                }
            }
        }
    }
}
