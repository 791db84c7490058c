//! Small networks for unit tests.

use crate::api::{self, security_group_rule::Peer, segment::Kind};
use crate::desired::{Network, Surroundings, TrunkLink, Underlay, UplinkAddresses};

/// Two instances on one segment, the first with an elastic IP, both in a group that lets ssh in from everywhere and everything from its
/// own members.
pub fn message() -> api::NodeNetwork {
    let interface = |id: &str, mac: &str, ipv4: &str| api::Interface {
        id: id.into(),
        segment: "subnet-1".into(),
        mac: mac.into(),
        ipv4: ipv4.into(),
        hostname: format!("ip-{}", ipv4.replace('.', "-")),
        instance: id.replace("eni", "i"),
        security_groups: vec!["sg-1".into()],
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
        security_groups: vec![group()],
        ..Default::default()
    }
}

fn group() -> api::SecurityGroup {
    let rule = |id: &str, protocol, peer, egress| api::SecurityGroupRule {
        id: id.into(),
        protocol,
        from_port: 22,
        to_port: 22,
        peer: Some(peer),
        egress,
    };
    let everywhere = || Peer::Cidr("0.0.0.0/0".into());
    api::SecurityGroup {
        id: "sg-1".into(),
        rules: vec![
            rule("sgr-1", 6, everywhere(), false),
            rule("sgr-2", -1, Peer::SecurityGroup("sg-1".into()), false),
            rule("sgr-3", -1, everywhere(), true),
        ],
        members: vec!["172.31.0.4".into(), "172.31.0.5".into()],
    }
}

/// The same segment as VLAN 7, a second one as VXLAN 5001, and an instance of another node on each.
#[cfg(test)]
pub fn trunk_message() -> api::NodeNetwork {
    let mut message = message();
    message.segments[0].kind = Some(Kind::Vlan(api::VlanSegment { vid: 7 }));
    message.segments.push(api::Segment {
        id: "subnet-2".into(),
        cidr: "172.31.16.0/20".into(),
        gateway: "172.31.16.1".into(),
        kind: Some(Kind::Vxlan(api::VxlanSegment { vni: 5001, peers: vec!["10.9.0.2".into(), "10.9.0.3".into()] })),
        ..message.segments[0].clone()
    });
    let remote = |n: u8, segment: &str, ipv4: &str| api::RemoteInterface {
        id: format!("eni-9{n}"),
        segment: segment.into(),
        mac: format!("02:00:00:00:09:{n:02x}"),
        ipv4: ipv4.into(),
        node: "10.9.0.2".into(),
        ..Default::default()
    };
    message.remotes = vec![remote(1, "subnet-1", "172.31.0.200"), remote(2, "subnet-2", "172.31.16.200")];
    message
}

/// A node that can carry everything.
pub fn surroundings() -> Surroundings {
    Surroundings {
        uplink: UplinkAddresses { name: "pub0".into(), addresses: vec!["198.51.100.2/24".parse().unwrap()] },
        trunk: Ok(TrunkLink { name: "trunk0".parse().unwrap(), mtu: 1500 }),
        underlay: Ok(Underlay { address: "10.9.0.1".parse().unwrap(), mtu: 1500 }),
    }
}

pub fn network() -> Network {
    Network::parse(&message(), &surroundings()).unwrap()
}
