//! A change of elastic IPs alone: which of them stand for something else from now on.
//!
//! It is judged by the same rules as a whole network, against the network that it changes, and what it costs to judge does not depend on how long it would take to
//! hand that network over.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use super::parse::{field, parse_elastic_ip, unique};
use super::{ElasticIp, InvalidNetwork, Network, UplinkAddresses};
use crate::api;

/// Elastic IPs as they were and as they will be: an address that is in both moves, one that is in `before` alone is released.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ElasticChange {
    pub before: Vec<ElasticIp>,
    pub after: Vec<ElasticIp>,
}

impl ElasticChange {
    pub fn is_empty(&self) -> bool {
        self.before.is_empty() && self.after.is_empty()
    }

    /// As a caller would hand it over.
    pub fn message(&self, base: u64, generation: u64) -> api::ElasticIpChange {
        let associate = self.after.iter().map(ElasticIp::message).collect();
        let is_moved = |public| self.after.iter().any(|after| after.public == public);
        let gone = self.before.iter().map(|before| before.public).filter(|public| !is_moved(*public));
        api::ElasticIpChange { base, generation, associate, release: gone.map(|public| public.to_string()).collect() }
    }

    /// The addresses that stand for something else after it.
    pub fn addresses(&self) -> BTreeSet<Ipv4Addr> {
        self.before.iter().chain(&self.after).map(|elastic| elastic.public).collect()
    }
}

impl ElasticIp {
    /// As a caller would hand it over.
    pub fn message(&self) -> api::ElasticIp {
        api::ElasticIp {
            public_ip: self.public.to_string(),
            private_ip: self.private.to_string(),
            segment: self.segment.to_string(),
        }
    }
}

/// The elastic IPs of a message, each judged alone.
pub fn parse_elastic_ips(messages: &[api::ElasticIp]) -> Result<BTreeMap<Ipv4Addr, ElasticIp>, InvalidNetwork> {
    unique(messages, "elastic IP", |elastic| parse_elastic_ip(elastic).map(|elastic| (elastic.public, elastic)))
}

impl Network {
    /// What the message changes in this network, or why it cannot be. An address to be released that is not here is released.
    pub fn elastic_change(
        &self,
        message: &api::ElasticIpChange,
        uplink: &UplinkAddresses,
    ) -> Result<ElasticChange, InvalidNetwork> {
        let after = parse_elastic_ips(&message.associate)?;
        let mut wanted: BTreeMap<Ipv4Addr, Option<ElasticIp>> =
            after.into_iter().map(|(public, elastic)| (public, Some(elastic))).collect();
        for text in &message.release {
            let public = field(&format!("elastic IP {text}"), "release", text)?;
            if wanted.insert(public, None).is_some() {
                return Err(InvalidNetwork::new(format!("elastic IP {public}"), "is given twice"));
            }
        }
        self.change_to(wanted, uplink)
    }

    /// The difference to the elastic IPs of another network that is the same in everything else.
    pub fn elastic_difference(
        &self,
        all: &BTreeMap<Ipv4Addr, ElasticIp>,
        uplink: &UplinkAddresses,
    ) -> Result<ElasticChange, InvalidNetwork> {
        let gone = self.elastic_ips.keys().filter(|public| !all.contains_key(public)).map(|public| (*public, None));
        let new = all.iter().filter(|(public, elastic)| self.elastic_ips.get(public) != Some(elastic));
        self.change_to(gone.chain(new.map(|(public, elastic)| (*public, Some(elastic.clone())))).collect(), uplink)
    }

    /// `wanted` is what each address that is spoken of shall stand for.
    fn change_to(
        &self,
        wanted: BTreeMap<Ipv4Addr, Option<ElasticIp>>,
        uplink: &UplinkAddresses,
    ) -> Result<ElasticChange, InvalidNetwork> {
        let mut change = ElasticChange::default();
        for (public, elastic) in wanted {
            let had = self.elastic_ips.get(&public);
            if had != elastic.as_ref() {
                change.before.extend(had.cloned());
                change.after.extend(elastic);
            }
        }
        for elastic in &change.after {
            self.check_elastic_ip(elastic, uplink, |segment, private| self.is_held(segment, private))?;
        }
        self.check_private_halves(&change)?;
        Ok(change)
    }

    /// A private address has one public one.
    fn check_private_halves(&self, change: &ElasticChange) -> Result<(), InvalidNetwork> {
        if change.after.is_empty() {
            return Ok(());
        }
        let moved = change.addresses();
        let mut taken: BTreeMap<_, _> = BTreeMap::new();
        let wanted: BTreeSet<Ipv4Addr> = change.after.iter().map(|elastic| elastic.private).collect();
        let stay = self.elastic_ips.values().filter(|e| wanted.contains(&e.private) && !moved.contains(&e.public));
        for elastic in stay.chain(&change.after) {
            if let Some(first) = taken.insert((elastic.private, &elastic.segment), elastic.public) {
                let problem = format!("stands for {}, which {first} stands for already", elastic.private);
                return Err(InvalidNetwork::new(format!("elastic IP {}", elastic.public), problem));
            }
        }
        Ok(())
    }

    /// Makes the change, which was made for this network.
    pub fn change_elastic_ips(&mut self, change: &ElasticChange) {
        for gone in &change.before {
            self.elastic_ips.remove(&gone.public);
        }
        self.elastic_ips.extend(change.after.iter().map(|elastic| (elastic.public, elastic.clone())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::testing;
    use proptest::prelude::*;

    /// Three instances, of which some have elastic IPs: to each public number the instance's.
    fn message(elastic_ips: &BTreeMap<u8, u8>) -> api::NodeNetwork {
        let mut message = testing::message();
        let template = message.interfaces[0].clone();
        message.interfaces = (1..=3)
            .map(|n| api::Interface {
                id: format!("eni-{n}"),
                mac: format!("02:00:00:00:01:{n:02x}"),
                ipv4: format!("172.31.0.{}", 3 + n),
                ..template.clone()
            })
            .collect();
        message.elastic_ips = elastic_ips.iter().map(|(public, n)| elastic(*public, *n)).collect();
        message
    }

    fn elastic(public: u8, n: u8) -> api::ElasticIp {
        api::ElasticIp {
            public_ip: format!("198.51.100.{}", 130 + public),
            private_ip: format!("172.31.0.{}", 3 + n),
            segment: "subnet-1".into(),
        }
    }

    fn parse(elastic_ips: &BTreeMap<u8, u8>) -> Result<Network, InvalidNetwork> {
        Network::parse(&message(elastic_ips), &testing::surroundings())
    }

    proptest! {
        /// A change is taken where the network that it leads to would be, and leads there.
        #[test]
        fn a_change_is_judged_as_the_network_that_it_leads_to(
            from in proptest::collection::btree_map(0_u8..5, 1_u8..4, 0..4),
            associate in proptest::collection::btree_map(0_u8..5, 1_u8..5, 0..3),
            release in proptest::collection::btree_set(0_u8..5, 0..3),
        ) {
            let Ok(mut network) = parse(&from) else { return Ok(()) };
            let release: BTreeSet<u8> = release.into_iter().filter(|n| !associate.contains_key(n)).collect();
            let mut to = from.clone();
            to.retain(|public, _| !release.contains(public));
            to.extend(associate.clone());
            let uplink = testing::surroundings().uplink;
            let asked = api::ElasticIpChange {
                associate: associate.iter().map(|(public, n)| elastic(*public, *n)).collect(),
                release: release.iter().map(|public| format!("198.51.100.{}", 130 + public)).collect(),
                ..Default::default()
            };
            let change = network.elastic_change(&asked, &uplink);
            match parse(&to) {
                Ok(wanted) => {
                    let change = change.unwrap();
                    prop_assert_eq!(&network.elastic_difference(&wanted.elastic_ips, &uplink).unwrap(), &change);
                    network.change_elastic_ips(&change);
                    prop_assert_eq!(network, wanted);
                }
                Err(_) => prop_assert!(change.is_err()),
            }
        }
    }
}
