//! A small network for unit tests: two instances on one segment, the first with an elastic IP.

use crate::api::{self, segment::Kind};
use crate::desired::{Network, UplinkAddresses};

pub fn message() -> api::NodeNetwork {
    let interface = |id: &str, mac: &str, ipv4: &str| api::Interface {
        id: id.into(),
        segment: "subnet-1".into(),
        mac: mac.into(),
        ipv4: ipv4.into(),
        hostname: format!("ip-{}", ipv4.replace('.', "-")),
        instance: id.replace("eni", "i"),
        ..Default::default()
    };
    api::NodeNetwork {
        generation: 1,
        segments: vec![api::Segment {
            id: "subnet-1".into(),
            cidr: "172.31.0.0/20".into(),
            gateway: "172.31.0.1".into(),
            gateway_mac: "02:00:00:00:00:01".into(),
            kind: Some(Kind::Local(api::LocalSegment {})),
            vpc: "vpc-1".into(),
            dns_servers: vec!["172.31.0.2".into()],
            domain: "mallee-1.compute.internal".into(),
            ..Default::default()
        }],
        interfaces: vec![
            interface("eni-1", "02:00:00:00:01:01", "172.31.0.4"),
            interface("eni-2", "02:00:00:00:01:02", "172.31.0.5"),
        ],
        elastic_ips: vec![api::ElasticIp {
            public_ip: "198.51.100.130".into(),
            private_ip: "172.31.0.4".into(),
            segment: "subnet-1".into(),
        }],
        public_pools: vec!["198.51.100.128/25".into()],
    }
}

pub fn uplink() -> UplinkAddresses {
    UplinkAddresses { name: "pub0".into(), addresses: vec!["198.51.100.2/24".parse().unwrap()] }
}

pub fn network() -> Network {
    Network::parse(&message(), &uplink()).unwrap()
}
