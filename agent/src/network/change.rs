//! From one network to the next when only elastic IPs differ.
//!
//! An elastic IP that is associated, moved or taken away is by far the most frequent change of a network that somebody waits for, and netd makes it without
//! looking at the rest. What differs is found here by comparing two whole networks: the desired state stays what is true, and nobody has to say
//! what it was that changed. No difference is ever kept or passed on to a later network.

use std::collections::BTreeMap;

use mallee_netd::api::{ElasticIp, ElasticIpChange, NodeNetwork};

/// What makes `old` into `new`; `None` where more than elastic IPs differs, or where `new` is no later generation.
pub fn of_elastic_ips(old: &NodeNetwork, new: &NodeNetwork) -> Option<ElasticIpChange> {
    if new.generation <= old.generation || !is_same_otherwise(old, new) {
        return None;
    }
    let (before, after) = (by_address(old)?, by_address(new)?);
    let is_news = |(public, elastic): &(&&str, &&ElasticIp)| before.get(*public) != Some(*elastic);
    Some(ElasticIpChange {
        base: old.generation,
        generation: new.generation,
        associate: after.iter().filter(is_news).map(|(_, elastic)| (*elastic).clone()).collect(),
        release: before
            .keys()
            .filter(|public| !after.contains_key(*public))
            .map(|public| (*public).to_owned())
            .collect(),
    })
}

/// Names every field, so that one that is added has to be thought of here.
fn is_same_otherwise(old: &NodeNetwork, new: &NodeNetwork) -> bool {
    let NodeNetwork {
        generation: _,
        elastic_ips: _,
        segments,
        interfaces,
        public_pools,
        security_groups,
        prefix_lists,
        remotes,
    } = old;
    (segments, interfaces, public_pools) == (&new.segments, &new.interfaces, &new.public_pools)
        && (security_groups, prefix_lists, remotes) == (&new.security_groups, &new.prefix_lists, &new.remotes)
}

/// `None` where an address is there twice: to refuse that is for netd, by its own words.
fn by_address(network: &NodeNetwork) -> Option<BTreeMap<&str, &ElasticIp>> {
    let all: BTreeMap<&str, &ElasticIp> =
        network.elastic_ips.iter().map(|elastic| (elastic.public_ip.as_str(), elastic)).collect();
    (all.len() == network.elastic_ips.len()).then_some(all)
}

#[cfg(test)]
mod tests {
    use mallee_netd::api::{Interface, PrefixList, RemoteInterface, SecurityGroup, Segment};
    use proptest::prelude::*;

    use super::*;

    fn elastic(public: u8, private: u8) -> ElasticIp {
        ElasticIp {
            public_ip: format!("198.51.100.{public}"),
            private_ip: format!("10.0.0.{private}"),
            segment: format!("subnet-{}", private % 2),
        }
    }

    fn network(generation: u64, elastic_ips: &BTreeMap<u8, u8>) -> NodeNetwork {
        NodeNetwork {
            generation,
            segments: vec![Segment { id: "subnet-0".into(), ..Default::default() }],
            elastic_ips: elastic_ips.iter().map(|(public, private)| elastic(*public, *private)).collect(),
            ..Default::default()
        }
    }

    /// What a change means (`network.proto`).
    fn made(mut network: NodeNetwork, change: &ElasticIpChange) -> NodeNetwork {
        assert_eq!(network.generation, change.base);
        let mut all: BTreeMap<String, ElasticIp> =
            network.elastic_ips.into_iter().map(|elastic| (elastic.public_ip.clone(), elastic)).collect();
        for public in &change.release {
            all.remove(public).expect("only what stood for something is released");
        }
        for elastic in &change.associate {
            let before = all.insert(elastic.public_ip.clone(), elastic.clone());
            assert_ne!(before.as_ref(), Some(elastic), "only what differs is said");
        }
        network.generation = change.generation;
        network.elastic_ips = all.into_values().collect();
        network
    }

    fn sorted(mut network: NodeNetwork) -> NodeNetwork {
        network.elastic_ips.sort_by(|a, b| a.public_ip.cmp(&b.public_ip));
        network
    }

    fn some_elastic_ips() -> impl Strategy<Value = BTreeMap<u8, u8>> {
        proptest::collection::btree_map(0_u8..8, 0_u8..4, 0..8)
    }

    proptest! {
        #[test]
        fn the_change_makes_the_old_network_into_the_new(
            before in some_elastic_ips(),
            after in some_elastic_ips(),
            generations in (1_u64..1000, 1_u64..1000),
            turned in any::<bool>(),
        ) {
            let old = network(generations.0, &before);
            let mut new = network(generations.0 + generations.1, &after);
            if turned {
                new.elastic_ips.reverse();
            }
            let change = of_elastic_ips(&old, &new).expect("only elastic IPs differ");
            prop_assert_eq!(made(old, &change), sorted(new));
        }
    }

    #[test]
    fn where_anything_else_differs_there_is_no_change() {
        let old = network(1, &BTreeMap::from([(1, 1)]));
        let new = network(2, &BTreeMap::from([(1, 2)]));
        assert!(of_elastic_ips(&old, &new).is_some());
        let others: [fn(&mut NodeNetwork); 9] = [
            |new| new.generation = 1,
            |new| new.generation = 0,
            |new| new.segments.clear(),
            |new| new.interfaces.push(Interface { owner_uid: 7, ..Default::default() }),
            |new| new.public_pools.push("198.51.100.0/24".into()),
            |new| new.security_groups.push(SecurityGroup::default()),
            |new| new.prefix_lists.push(PrefixList::default()),
            |new| new.remotes.push(RemoteInterface::default()),
            |new| new.elastic_ips.push(elastic(1, 3)),
        ];
        for (n, differ) in others.into_iter().enumerate() {
            let mut new = new.clone();
            differ(&mut new);
            assert_eq!(of_elastic_ips(&old, &new), None, "the difference of number {n}");
        }
    }
}
