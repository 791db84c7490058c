//! What an instance is told of itself, as the tree of folders and values that EC2 shows.
//!
//! Names and values: EC2 User Guide, "Instance metadata categories". A folder reads as the list of
//! its names, one a line, folders among them with a slash at their end.

use std::collections::BTreeMap;

use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::Entry;
use crate::api::{Ipv4Association, Metadata, PublicKey};

/// Versions that are served; all show the same tree.
pub const VERSIONS: [&str; 5] = ["2009-04-04", "2016-09-02", "2018-09-24", "2021-03-23", "latest"];

/// What lies at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// `text/plain`.
    Text(String),
    /// `application/octet-stream`.
    Bytes(Vec<u8>),
    Missing,
}

/// Looks up a path, which begins with a slash.
pub fn look_up(entry: &Entry, path: &str) -> Found {
    let mut names = path.split('/').filter(|name| !name.is_empty());
    let Some(version) = names.next() else { return Found::Text(VERSIONS.join("\n")) };
    if !VERSIONS.contains(&version) {
        return Found::Missing;
    }
    let rest: Vec<&str> = names.collect();
    match rest.as_slice() {
        [] => Found::Text("dynamic\nmeta-data\nuser-data".to_owned()),
        ["user-data"] if entry.metadata.user_data.is_empty() => Found::Missing,
        ["user-data"] => Found::Bytes(entry.metadata.user_data.clone()),
        ["meta-data", rest @ ..] => meta_data(entry).look_up(rest),
        ["dynamic", rest @ ..] => dynamic(entry).look_up(rest),
        _ => Found::Missing,
    }
}

/// A folder or a value.
enum Node {
    Value(String),
    Folder(BTreeMap<String, Node>),
    /// `public-keys/`: its names read `0=name`, and are asked for as `0`.
    Keys(Vec<PublicKey>),
}

impl Node {
    fn look_up(&self, path: &[&str]) -> Found {
        match (self, path) {
            (Self::Value(value), []) => Found::Text(value.clone()),
            (Self::Folder(nodes), []) => Found::Text(listing(nodes)),
            (Self::Folder(nodes), [name, rest @ ..]) => {
                nodes.get(*name).map_or(Found::Missing, |node| node.look_up(rest))
            }
            (Self::Keys(keys), rest) => look_up_key(keys, rest),
            (Self::Value(_), _) => Found::Missing,
        }
    }
}

fn listing(nodes: &BTreeMap<String, Node>) -> String {
    let line = |(name, node): (&String, &Node)| match node {
        Node::Value(_) => name.clone(),
        Node::Folder(_) | Node::Keys(_) => format!("{name}/"),
    };
    nodes.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn look_up_key(keys: &[PublicKey], path: &[&str]) -> Found {
    let key = |index: &str| {
        // EC2 takes `0` and the whole name from the listing.
        let (index, name) = index.split_once('=').map_or((index, None), |(index, name)| (index, Some(name)));
        let key = keys.get(index.parse::<usize>().ok()?)?;
        name.is_none_or(|name| name == key.name).then_some(key)
    };
    match path {
        [] => Found::Text(
            keys.iter().enumerate().map(|(n, key)| format!("{n}={}", key.name)).collect::<Vec<_>>().join("\n"),
        ),
        [index] if key(index).is_some() => Found::Text("openssh-key".to_owned()),
        [index, "openssh-key"] => {
            key(index).map_or(Found::Missing, |key| Found::Text(format!("{}\n", key.openssh.trim_end())))
        }
        _ => Found::Missing,
    }
}

/// Builds a folder; names without a value are left out.
fn folder<const N: usize>(nodes: [(&str, Option<Node>); N]) -> Node {
    Node::Folder(nodes.into_iter().filter_map(|(name, node)| Some((name.to_owned(), node?))).collect())
}

/// A value; none when it is empty.
fn value(text: impl Into<String>) -> Option<Node> {
    let text = text.into();
    (!text.is_empty()).then_some(Node::Value(text))
}

fn meta_data(entry: &Entry) -> Node {
    let m = &entry.metadata;
    folder([
        ("ami-id", value(&m.ami_id)),
        ("ami-launch-index", value(m.launch_index.to_string())),
        ("ami-manifest-path", value("(unknown)")),
        ("block-device-mapping", Some(folder([("ami", value("/dev/vda")), ("root", value("/dev/vda"))]))),
        ("hostname", value(&m.hostname)),
        ("instance-action", value("none")),
        ("instance-id", value(entry.instance.as_str())),
        ("instance-life-cycle", value("on-demand")),
        ("instance-type", value(&m.instance_type)),
        ("local-hostname", value(&m.hostname)),
        ("local-ipv4", value(&m.local_ipv4)),
        ("mac", value(&m.mac)),
        ("network", Some(folder([("interfaces", Some(folder([("macs", Some(macs(entry)))])))]))),
        ("placement", Some(folder([("availability-zone", value(&m.zone)), ("region", value(&entry.region))]))),
        ("profile", value("default-hvm")),
        ("public-ipv4", value(&m.public_ipv4)),
        ("public-keys", (!m.public_keys.is_empty()).then(|| Node::Keys(m.public_keys.clone()))),
        ("reservation-id", value(&m.reservation_id)),
        ("security-groups", value(m.security_groups.join("\n"))),
        ("services", Some(folder([("domain", value(services_domain(m))), ("partition", value("aws"))]))),
    ])
}

/// The domain that service names of this cloud end with. Not Amazon's: an SDK in a guest that makes
/// its endpoints from this must not send the lab's requests there.
fn services_domain(m: &Metadata) -> String {
    m.hostname.split_once('.').map(|(_, domain)| domain.to_owned()).unwrap_or_else(|| "internal".to_owned())
}

fn macs(entry: &Entry) -> Node {
    if entry.metadata.mac.is_empty() {
        return folder([]);
    }
    folder([(entry.metadata.mac.as_str(), Some(interface(entry)))])
}

fn interface(entry: &Entry) -> Node {
    let m = &entry.metadata;
    folder([
        ("device-number", value("0")),
        ("interface-id", value(&entry.interface)),
        ("local-hostname", value(&m.hostname)),
        ("ipv4-associations", associations(m)),
        ("local-ipv4s", value(lines(std::iter::once(&m.local_ipv4).chain(&m.secondary_ipv4)))),
        ("mac", value(&m.mac)),
        ("owner-id", value(&m.account_id)),
        ("public-ipv4s", value(lines(m.ipv4_associations.iter().map(|found| &found.public_ip)))),
        ("security-groups", value(m.security_groups.join("\n"))),
        ("subnet-id", value(&m.subnet_id)),
        ("subnet-ipv4-cidr-block", value(&m.subnet_cidr)),
        ("vpc-id", value(&m.vpc_id)),
        ("vpc-ipv4-cidr-block", value(&m.vpc_cidr)),
        ("vpc-ipv4-cidr-blocks", value(&m.vpc_cidr)),
    ])
}

fn lines<'a>(texts: impl Iterator<Item = &'a String>) -> String {
    texts.map(String::as_str).collect::<Vec<_>>().join("\n")
}

/// Under each public address the private one that it stands for.
fn associations(m: &Metadata) -> Option<Node> {
    let entry = |found: &Ipv4Association| Some((found.public_ip.clone(), value(&found.private_ip)?));
    let folder: BTreeMap<_, _> = m.ipv4_associations.iter().filter_map(entry).collect();
    (!folder.is_empty()).then_some(Node::Folder(folder))
}

fn dynamic(entry: &Entry) -> Node {
    folder([("instance-identity", Some(folder([("document", value(identity_document(entry)))])))])
}

/// EC2 User Guide, "Instance identity documents"; what EC2 has and this cloud has not is null.
fn identity_document(entry: &Entry) -> String {
    let m = &entry.metadata;
    let pending =
        OffsetDateTime::from_unix_timestamp(entry.created_unix_s as i64).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let document = json!({
        "accountId": m.account_id,
        "architecture": "x86_64",
        "availabilityZone": m.zone,
        "billingProducts": null,
        "devpayProductCodes": null,
        "marketplaceProductCodes": null,
        "imageId": m.ami_id,
        "instanceId": entry.instance.as_str(),
        "instanceType": m.instance_type,
        "kernelId": null,
        "pendingTime": pending.format(&Rfc3339).unwrap_or_default(),
        "privateIp": m.local_ipv4,
        "ramdiskId": null,
        "region": entry.region,
        "version": "2017-09-30",
    });
    serde_json::to_string_pretty(&document).unwrap_or_default()
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use proptest::prelude::*;

    pub fn entry() -> Entry {
        Entry {
            instance: "i-0123456789abcdef0".parse().unwrap(),
            region: "mallee-1".into(),
            interface: "eni-1".into(),
            created_unix_s: 0,
            metadata: Metadata {
                ami_id: "ami-1".into(),
                instance_type: "t3.nano".into(),
                hostname: "ip-172-31-0-4.mallee-1.compute.internal".into(),
                local_ipv4: "172.31.0.4".into(),
                mac: "02:00:00:00:00:04".into(),
                zone: "mallee-1a".into(),
                account_id: "000000000001".into(),
                public_keys: vec![PublicKey { name: "my key".into(), openssh: "ssh-ed25519 AAAA me\n".into() }],
                subnet_id: "subnet-1".into(),
                vpc_cidr: "172.31.0.0/16".into(),
                ..Default::default()
            },
        }
    }

    fn text(path: &str) -> String {
        match look_up(&entry(), path) {
            Found::Text(text) => text,
            other => panic!("{path}: {other:?}"),
        }
    }

    #[test]
    fn values_and_listings_read_as_ec2_writes_them() {
        assert_eq!(text("/latest/meta-data/instance-id"), "i-0123456789abcdef0");
        assert_eq!(text("/2009-04-04/meta-data/placement/"), "availability-zone\nregion");
        assert_eq!(text("/latest/meta-data/placement/region"), "mallee-1");
        assert_eq!(text("/latest/meta-data/network/interfaces/macs"), "02:00:00:00:00:04/");
        assert_eq!(text("/latest/meta-data/network/interfaces/macs/02:00:00:00:00:04/subnet-id"), "subnet-1");
        assert!(text("/latest/meta-data/").lines().any(|line| line == "public-keys/"));
        assert_eq!(text("/latest"), "dynamic\nmeta-data\nuser-data");
        assert_eq!(text("/").lines().last(), Some("latest"));
    }

    #[test]
    fn every_address_of_the_interface_is_told() {
        let mut many = entry();
        many.metadata.secondary_ipv4 = vec!["172.31.0.9".into()];
        let association =
            |public: &str, private: &str| Ipv4Association { public_ip: public.into(), private_ip: private.into() };
        many.metadata.ipv4_associations =
            vec![association("198.51.100.130", "172.31.0.9"), association("198.51.100.131", "172.31.0.4")];
        let at = |path: &str| {
            let path = format!("/latest/meta-data/network/interfaces/macs/02:00:00:00:00:04/{path}");
            match look_up(&many, &path) {
                Found::Text(text) => text,
                other => panic!("{path}: {other:?}"),
            }
        };
        assert_eq!(at("local-ipv4s"), "172.31.0.4\n172.31.0.9");
        assert_eq!(at("public-ipv4s"), "198.51.100.130\n198.51.100.131");
        assert_eq!(at("ipv4-associations/"), "198.51.100.130\n198.51.100.131");
        assert_eq!(at("ipv4-associations/198.51.100.130"), "172.31.0.9");
    }

    #[test]
    fn keys_are_listed_with_their_names_and_read_by_number() {
        assert_eq!(text("/latest/meta-data/public-keys/"), "0=my key");
        assert_eq!(text("/latest/meta-data/public-keys/0/"), "openssh-key");
        assert_eq!(text("/latest/meta-data/public-keys/0/openssh-key"), "ssh-ed25519 AAAA me\n");
        assert_eq!(look_up(&entry(), "/latest/meta-data/public-keys/1"), Found::Missing);
    }

    #[test]
    fn what_is_not_there_is_missing_from_listing_and_path_alike() {
        assert_eq!(look_up(&entry(), "/latest/meta-data/public-ipv4"), Found::Missing);
        assert!(!text("/latest/meta-data/").contains("public-ipv4"));
        assert_eq!(look_up(&entry(), "/latest/user-data"), Found::Missing);
        assert_eq!(look_up(&entry(), "/1999-01-01/meta-data/"), Found::Missing);
        let mut with_data = entry();
        with_data.metadata.user_data = vec![0xff, 0];
        assert_eq!(look_up(&with_data, "/latest/user-data"), Found::Bytes(vec![0xff, 0]));
    }

    #[test]
    fn the_identity_document_is_json() {
        let document: serde_json::Value =
            serde_json::from_str(&text("/latest/dynamic/instance-identity/document")).unwrap();
        assert_eq!(document["instanceId"], "i-0123456789abcdef0");
        assert_eq!(document["pendingTime"], "1970-01-01T00:00:00Z");
    }

    /// cloud-init reads the tree by following its listings: every name in one can be read.
    #[test]
    fn every_listed_name_can_be_read() {
        fn walk(path: &str) -> usize {
            let names = text(path);
            let mut seen = 0;
            for name in names.lines() {
                let name = name.split_once('=').map_or(name.to_owned(), |(number, _)| format!("{number}/"));
                let below = format!("{path}{name}");
                seen += if below.ends_with('/') { walk(&below) } else { usize::from(!text(&below).is_empty()) };
            }
            seen
        }
        assert!(walk("/latest/meta-data/") > 20);
    }

    proptest! {
        #[test]
        fn no_path_panics(path in "(/[a-z0-9=.:-]{0,12}|/latest|/meta-data|/public-keys|/%2e%2e|/\\PC{0,5}){0,8}") {
            let _ = look_up(&entry(), &path);
        }
    }
}
