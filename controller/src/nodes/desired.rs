//! The whole of what should be on a node, computed from the database in one snapshot.
//!
//! An instance is in it from the transaction that launched it to the one that began to end it
//! (`shutting-down`): what is not in it any more is taken down by the node. Its power follows its
//! state. The network holds the interfaces of exactly these instances, and the elastic IPs
//! associated with them.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use mallee_agent::api;
use mallee_netd::api as net;

use super::registry::gateway;
use crate::Cloud;
use crate::error::{Error, Result};
use crate::state::Tx;

/// A node's desired state, and what of it is news.
pub(super) struct Desired {
    pub state: api::DesiredNode,
    /// (trace, instance) of launches that this generation brings.
    pub fresh: Vec<(String, String)>,
}

#[derive(sqlx::FromRow)]
struct NodeRow {
    generation: i64,
    zone: String,
    subnet_id: String,
    subnet_cidr: String,
    vpc_id: String,
    vpc_cidr: String,
}

#[derive(sqlx::FromRow)]
struct InstanceRow {
    id: String,
    account_id: String,
    reservation_id: String,
    launch_index: i64,
    image_id: String,
    instance_type: String,
    vcpus: i64,
    memory_mib: i64,
    root_bytes: i64,
    key_name: Option<String>,
    public_key: Option<String>,
    user_data: Option<Vec<u8>>,
    private_ip: String,
    interface_id: String,
    mac: String,
    state: String,
    reboots: i64,
    generation: i64,
    trace: String,
    kernel_sha256: String,
    kernel_size: i64,
    initrd_sha256: Option<String>,
    initrd_size: Option<i64>,
    root_sha256: Option<String>,
    root_size: Option<i64>,
    cmdline: String,
    runs_on_software_kvm: bool,
    public_ip: Option<String>,
    group_names: Option<String>,
}

const INSTANCES: &str = "\
    SELECT i.*, m.kernel_sha256, m.kernel_size, m.initrd_sha256, m.initrd_size, m.root_sha256, m.root_size, \
           m.cmdline, m.runs_on_software_kvm, a.public_ip, \
           (SELECT json_group_array(g.name) FROM security_groups g, json_each(i.security_groups) e \
             WHERE g.id = e.value) AS group_names \
    FROM instances i JOIN images m ON m.id = i.image_id LEFT JOIN addresses a ON a.instance_id = i.id \
    WHERE i.node = ? AND i.state NOT IN ('shutting-down', 'terminated') ORDER BY i.id";

/// Reads and computes it.
pub(super) async fn of_node(cloud: &Cloud, name: &str) -> Result<Desired> {
    let mut tx = cloud.db.snapshot().await?;
    let node: NodeRow = sqlx::query_as(
        "SELECT n.generation, n.zone, s.id AS subnet_id, s.cidr AS subnet_cidr, v.id AS vpc_id, v.cidr AS vpc_cidr \
         FROM nodes n JOIN subnets s ON s.zone = n.zone JOIN vpcs v ON v.id = s.vpc_id WHERE n.name = ?",
    )
    .bind(name)
    .fetch_one(&mut *tx)
    .await?;
    let rows = instances(&mut tx, name).await?;
    drop(tx);

    let fresh = rows
        .iter()
        .filter(|row| row.state == "pending" && row.generation == node.generation)
        .map(|row| (row.trace.clone(), row.id.clone()))
        .collect();
    let network = network(cloud, &node, &rows)?;
    let instances = rows.into_iter().map(|row| instance(cloud, &node, row)).collect();
    let state = api::DesiredNode {
        generation: node.generation.cast_unsigned(),
        instances,
        network: Some(network),
        region: cloud.region.clone(),
    };
    Ok(Desired { state, fresh })
}

async fn instances(tx: &mut Tx, node: &str) -> Result<Vec<InstanceRow>> {
    Ok(sqlx::query_as(INSTANCES).bind(node).fetch_all(&mut **tx).await?)
}

fn instance(cloud: &Cloud, node: &NodeRow, row: InstanceRow) -> api::DesiredInstance {
    let power = match row.state.as_str() {
        "pending" | "running" => api::Power::On,
        _ => api::Power::Off,
    };
    let blob = |sha256: Option<String>, size: Option<i64>| {
        sha256.map(|sha256| api::BlobRef { sha256, size: size.unwrap_or(0).cast_unsigned() })
    };
    let image = api::BootImage {
        image_id: row.image_id.clone(),
        kernel: blob(Some(row.kernel_sha256), Some(row.kernel_size)),
        initrd: blob(row.initrd_sha256, row.initrd_size),
        root: blob(row.root_sha256, row.root_size),
        cmdline: row.cmdline,
        runs_on_software_kvm: row.runs_on_software_kvm,
    };
    let metadata = api::Metadata {
        ami_id: row.image_id,
        instance_type: row.instance_type,
        hostname: format!("{}.{}", host_name(&row.private_ip), cloud.config.private_domain()),
        local_ipv4: row.private_ip,
        public_ipv4: row.public_ip.unwrap_or_default(),
        mac: row.mac,
        zone: node.zone.clone(),
        reservation_id: row.reservation_id,
        account_id: row.account_id,
        public_keys: row
            .public_key
            .map(|openssh| api::PublicKey { name: row.key_name.unwrap_or_default(), openssh })
            .into_iter()
            .collect(),
        user_data: row.user_data.unwrap_or_default(),
        security_groups: row.group_names.and_then(|json| serde_json::from_str(&json).ok()).unwrap_or_default(),
        launch_index: u32::try_from(row.launch_index).unwrap_or(0),
        subnet_id: node.subnet_id.clone(),
        vpc_id: node.vpc_id.clone(),
        subnet_cidr: node.subnet_cidr.clone(),
        vpc_cidr: node.vpc_cidr.clone(),
    };
    api::DesiredInstance {
        id: row.id,
        power: power.into(),
        reboots: row.reboots.cast_unsigned(),
        vcpus: u32::try_from(row.vcpus).unwrap_or(1),
        memory_mib: row.memory_mib.cast_unsigned(),
        image: Some(image),
        root_bytes: row.root_bytes.cast_unsigned(),
        interface: row.interface_id,
        metadata: Some(metadata),
        trace: row.trace,
    }
}

fn network(cloud: &Cloud, node: &NodeRow, rows: &[InstanceRow]) -> Result<net::NodeNetwork> {
    let cidr: Ipv4Net = node
        .subnet_cidr
        .parse()
        .map_err(|_| Error::Corrupt(format!("subnet {} has the network {:?}", node.subnet_id, node.subnet_cidr)))?;
    let gateway = gateway(cidr);
    let segment = net::Segment {
        id: node.subnet_id.clone(),
        cidr: node.subnet_cidr.clone(),
        gateway: gateway.to_string(),
        gateway_mac: gateway_mac(gateway),
        mtu: 0,
        dns_servers: cloud.config.dns_servers.iter().map(ToString::to_string).collect(),
        domain: cloud.config.private_domain(),
        vpc: node.vpc_id.clone(),
        kind: Some(net::segment::Kind::Local(net::LocalSegment {})),
    };
    let interfaces = rows.iter().map(|row| interface(node, row)).collect();
    let elastic_ips = rows
        .iter()
        .filter_map(|row| {
            Some(net::ElasticIp {
                public_ip: row.public_ip.clone()?,
                private_ip: row.private_ip.clone(),
                segment: node.subnet_id.clone(),
            })
        })
        .collect();
    Ok(net::NodeNetwork {
        generation: node.generation.cast_unsigned(),
        segments: vec![segment],
        interfaces,
        elastic_ips,
        public_pools: cloud.config.public_pools.iter().map(ToString::to_string).collect(),
    })
}

fn interface(node: &NodeRow, row: &InstanceRow) -> net::Interface {
    net::Interface {
        id: row.interface_id.clone(),
        segment: node.subnet_id.clone(),
        mac: row.mac.clone(),
        ipv4: row.private_ip.clone(),
        hostname: host_name(&row.private_ip),
        // The node gives each instance a user id of its own.
        owner_uid: 0,
        queue_pairs: 1,
        instance: row.id.clone(),
        source_dest_check_off: false,
    }
}

/// `ip-172-31-0-5` (EC2 User Guide, "EC2 instance hostnames").
pub fn host_name(private_ip: &str) -> String {
    format!("ip-{}", private_ip.replace('.', "-"))
}

/// The gateway's MAC is made from its address: the same on every node with no list to keep, and
/// locally administered (IEEE 802, the second bit of the first byte).
fn gateway_mac(gateway: Ipv4Addr) -> String {
    let [a, b, c, d] = gateway.octets();
    format!("02:6d:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_macs_follow_the_address() {
        assert_eq!(host_name("172.31.0.5"), "ip-172-31-0-5");
        assert_eq!(gateway_mac(Ipv4Addr::new(172, 31, 0, 1)), "02:6d:ac:1f:00:01");
    }
}
