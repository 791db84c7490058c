//! The whole of what should be on a node, computed from the database in one snapshot.
//!
//! An instance is in it from the transaction that launched it to the one that began to end it
//! (`shutting-down`): what is not in it any more is taken down by the node. Its power follows its
//! state. The network holds the interfaces of exactly these instances, and the elastic IPs
//! associated with them.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::Ipv4Addr;

use mallee_agent::api;
use mallee_netd::api as net;

use super::segments::{self, Reach};
use crate::Cloud;
use crate::error::{Error, Result};
use crate::ids::{InstanceId, PrefixListId, SecurityGroupId, SubnetId, VpcId};
use crate::state::addresses::Address;
use crate::state::images::{Image, Part};
use crate::state::instances::Instance;
use crate::state::lifecycle::{InstanceState, Wanted};
use crate::state::network::{Subnet, Vpc};
use crate::state::nodes::Node;
use crate::state::security_groups::{self, Rule};
use crate::state::{Tx, addresses, images, instances, network, nodes, prefix_lists, vpcs};

/// A node's desired state, and what of it is news.
pub(super) struct Desired {
    pub state: api::DesiredNode,
    /// (trace, instance) of launches that this generation brings.
    pub fresh: Vec<(String, String)>,
}

/// What an instance's description is made of, beside its own row.
struct Surroundings<'a> {
    cloud: &'a Cloud,
    vpcs: HashMap<VpcId, Vpc>,
    /// Those that the node has, its zone's default one first.
    subnets: Vec<Subnet>,
    images: HashMap<crate::ids::ImageId, Image>,
    public_ips: HashMap<InstanceId, Vec<Address>>,
    /// Names.
    groups: HashMap<SecurityGroupId, String>,
    rules: Vec<Rule>,
    /// Networks. Those of IPv6 are left out: they reach no instance.
    prefix_lists: HashMap<PrefixListId, Vec<String>>,
    /// Private addresses, wherever the instances are.
    members: HashMap<SecurityGroupId, Vec<String>>,
    reach: Reach,
}

/// Reads and computes it.
pub(super) async fn of_node(cloud: &Cloud, name: &str) -> Result<Desired> {
    segments::ensure_numbers(cloud).await?;
    let mut tx = cloud.db.snapshot().await?;
    let node = nodes::find(&mut tx, name).await?.ok_or_else(|| Error::Node(format!("there is no node {name}")))?;
    let mut here = instances::on_node(&mut tx, name).await?;
    here.retain(|instance| instance.state.wanted() != Wanted::Gone);
    let (reach, subnets) = places(&mut tx, cloud, &node, &here).await?;
    let around = Surroundings {
        cloud,
        vpcs: vpcs::all(&mut tx).await?.into_iter().map(|vpc| (vpc.id.clone(), vpc)).collect(),
        subnets,
        images: images::on_node(&mut tx, name).await?,
        public_ips: addresses::on_node(&mut tx, name).await?,
        groups: security_groups::all(&mut tx).await?.into_iter().map(|group| (group.id, group.name)).collect(),
        rules: security_groups::all_rules(&mut tx).await?,
        prefix_lists: prefix_lists::all_ipv4(&mut tx).await?,
        members: members(security_groups::members(&mut tx).await?),
        reach,
    };
    drop(tx);

    let fresh = here
        .iter()
        .filter(|one| one.state == InstanceState::Pending && one.generation == node.generation)
        .map(|one| (one.trace.clone(), one.id.to_string()))
        .collect();
    let generation = node.generation.cast_unsigned();
    let state = api::DesiredNode {
        generation,
        instances: here.iter().map(|one| around.instance(one)).collect::<Result<_>>()?,
        network: Some(around.network(generation, &here)?),
        region: cloud.region.clone(),
    };
    Ok(Desired { state, fresh })
}

/// What the node is told of others, and the subnets that it has: its zone's default one, and of the VPCs of that and of its instances those with
/// instances that it knows of. A zone's default subnet without instances is left out where no number is left for it.
async fn places(tx: &mut Tx, cloud: &Cloud, node: &Node, here: &[Instance]) -> Result<(Reach, Vec<Subnet>)> {
    let home = network::ensure_zone(tx, &node.zone).await?;
    let all = network::subnets(tx).await?;
    let own: HashSet<&SubnetId> = here.iter().map(|one| &one.subnet_id).chain([&home.id]).collect();
    let vpcs: HashSet<&VpcId> =
        all.iter().filter(|subnet| own.contains(&subnet.id)).map(|subnet| &subnet.vpc_id).collect();
    let of_vpcs: HashSet<&SubnetId> =
        all.iter().filter(|subnet| vpcs.contains(&subnet.vpc_id)).map(|subnet| &subnet.id).collect();
    let reach = Reach::read(tx, cloud, node, &of_vpcs).await?;
    if let Some(one) = here.iter().find(|one| reach.lacks_number(&one.subnet_id)) {
        return Err(segments::no_number_left(cloud, &one.subnet_id));
    }
    let reached: HashSet<&str> = reach.remotes.iter().map(|remote| remote.segment.as_str()).collect();
    let has = |subnet: &&Subnet| {
        (own.contains(&subnet.id) && !reach.lacks_number(&subnet.id)) || reached.contains(subnet.id.as_str())
    };
    let mut subnets: Vec<Subnet> = all.iter().filter(has).cloned().collect();
    subnets.sort_by_key(|subnet| subnet.id != home.id);
    Ok((reach, subnets))
}

fn members(rows: Vec<security_groups::Member>) -> HashMap<SecurityGroupId, Vec<String>> {
    let mut members: HashMap<SecurityGroupId, Vec<String>> = HashMap::new();
    for row in rows {
        members.entry(row.group_id).or_default().push(row.private_ip);
    }
    members
}

impl Surroundings<'_> {
    fn subnet(&self, one: &Instance) -> Result<&Subnet> {
        let found = self.subnets.iter().find(|subnet| subnet.id == one.subnet_id);
        found.ok_or_else(|| Error::Corrupt(format!("instance {} is on {}, which is gone", one.id, one.subnet_id)))
    }

    fn vpc(&self, subnet: &Subnet) -> Result<&Vpc> {
        let found = self.vpcs.get(&subnet.vpc_id);
        found.ok_or_else(|| Error::Corrupt(format!("{} is in {}, which is gone", subnet.id, subnet.vpc_id)))
    }

    fn instance(&self, one: &Instance) -> Result<api::DesiredInstance> {
        let image = self
            .images
            .get(&one.image_id)
            .ok_or_else(|| Error::Corrupt(format!("instance {} boots from {}, which is gone", one.id, one.image_id)))?;
        let power = match one.state.wanted() {
            Wanted::On => api::Power::On,
            Wanted::Off | Wanted::Gone => api::Power::Off,
        };
        Ok(api::DesiredInstance {
            id: one.id.to_string(),
            power: power.into(),
            reboots: one.reboots.cast_unsigned(),
            vcpus: u32::try_from(one.vcpus).unwrap_or(1),
            memory_mib: one.memory_mib.cast_unsigned(),
            image: Some(boot_image(image)),
            root_bytes: one.root_bytes.cast_unsigned(),
            interface: one.interface_id.to_string(),
            metadata: Some(self.metadata(one)?),
            trace: one.trace.clone(),
        })
    }

    fn metadata(&self, one: &Instance) -> Result<api::Metadata> {
        let subnet = self.subnet(one)?;
        let key = one
            .public_key
            .clone()
            .map(|openssh| api::PublicKey { name: one.key_name.clone().unwrap_or_default(), openssh });
        let associations: Vec<api::Ipv4Association> = self
            .associations(one)
            .map(|(public_ip, private_ip)| api::Ipv4Association { public_ip, private_ip })
            .collect();
        let of_primary = |found: &&api::Ipv4Association| found.private_ip == one.private_ip.0.to_string();
        let public_ipv4 = associations.iter().find(of_primary).map(|found| found.public_ip.clone());
        Ok(api::Metadata {
            ami_id: one.image_id.to_string(),
            instance_type: one.instance_type.clone(),
            hostname: format!("{}.{}", one.short_name(), self.cloud.config.private_domain()),
            local_ipv4: one.private_ip.0.to_string(),
            public_ipv4: public_ipv4.unwrap_or_default(),
            secondary_ipv4: one.secondary_ips.iter().map(ToString::to_string).collect(),
            ipv4_associations: associations,
            mac: one.mac.clone(),
            zone: subnet.zone.clone(),
            reservation_id: one.reservation_id.to_string(),
            account_id: one.account_id.clone(),
            public_keys: key.into_iter().collect(),
            user_data: one.user_data.clone().unwrap_or_default(),
            security_groups: one.security_groups.iter().filter_map(|id| self.groups.get(id).cloned()).collect(),
            launch_index: u32::try_from(one.launch_index).unwrap_or(0),
            subnet_id: subnet.id.to_string(),
            vpc_id: subnet.vpc_id.to_string(),
            subnet_cidr: subnet.cidr()?.to_string(),
            vpc_cidr: self.vpc(subnet)?.cidr()?.to_string(),
        })
    }

    fn network(&self, generation: u64, here: &[Instance]) -> Result<net::NodeNetwork> {
        let config = &self.cloud.config;
        Ok(net::NodeNetwork {
            generation,
            segments: self.subnets.iter().map(|subnet| self.segment(subnet)).collect::<Result<_>>()?,
            interfaces: here.iter().map(|one| self.interface(one)).collect(),
            elastic_ips: here.iter().flat_map(|one| self.elastic_ips(one)).collect(),
            public_pools: config.public_pools.iter().map(ToString::to_string).collect(),
            remotes: self.reach.remotes.clone(),
            security_groups: self.security_groups(here),
            prefix_lists: self.prefix_lists(here),
        })
    }

    fn segment(&self, subnet: &Subnet) -> Result<net::Segment> {
        let gateway = subnet.gateway()?;
        let config = &self.cloud.config;
        Ok(net::Segment {
            id: subnet.id.to_string(),
            cidr: subnet.cidr()?.to_string(),
            gateway: gateway.to_string(),
            gateway_mac: gateway_mac(gateway),
            mtu: 0,
            dns_servers: config.dns_servers.iter().map(ToString::to_string).collect(),
            domain: config.private_domain(),
            vpc: subnet.vpc_id.to_string(),
            kind: Some(self.reach.kind(&subnet.id)),
            ntp_servers: config.ntp_servers.iter().map(ToString::to_string).collect(),
            vpc_cidrs: vec![self.vpc(subnet)?.cidr()?.to_string()],
            router_mac: self.reach.router_mac.clone(),
            peer_router_macs: self.reach.peer_router_macs.clone(),
        })
    }

    /// The groups that the instances are in with their rules, and those that these rules name with their members.
    fn security_groups(&self, here: &[Instance]) -> Vec<net::SecurityGroup> {
        let own: BTreeSet<&SecurityGroupId> = here.iter().flat_map(|one| &one.security_groups).collect();
        let of_own = || self.rules.iter().filter(|rule| own.contains(&rule.group_id));
        let peers: BTreeSet<&SecurityGroupId> = of_own().filter_map(|rule| rule.peer_group.as_ref()).collect();
        let group = |id: &SecurityGroupId| net::SecurityGroup {
            id: id.to_string(),
            rules: of_own().filter(|rule| rule.group_id == *id).filter_map(|rule| self.group_rule(rule)).collect(),
            members: if peers.contains(id) { self.members.get(id).cloned().unwrap_or_default() } else { Vec::new() },
        };
        own.union(&peers).map(|id| group(id)).collect()
    }

    /// Those that rules of the instances' groups name.
    fn prefix_lists(&self, here: &[Instance]) -> Vec<net::PrefixList> {
        let own: BTreeSet<&SecurityGroupId> = here.iter().flat_map(|one| &one.security_groups).collect();
        let of_own = self.rules.iter().filter(|rule| own.contains(&rule.group_id));
        let named: BTreeSet<&PrefixListId> = of_own.filter_map(|rule| rule.prefix_list.as_ref()).collect();
        let list = |id: &PrefixListId| {
            self.prefix_lists.get(id).map(|cidrs| net::PrefixList { id: id.to_string(), cidrs: cidrs.clone() })
        };
        named.into_iter().filter_map(list).collect()
    }

    /// `None` for a rule about IPv6, which reaches no instance.
    fn group_rule(&self, rule: &Rule) -> Option<net::SecurityGroupRule> {
        use net::security_group_rule::Peer;
        let cidr = || rule.cidr_ipv4.clone().map(Peer::Cidr);
        let group = || rule.peer_group.as_ref().map(|id| Peer::SecurityGroup(id.to_string()));
        let list = rule.prefix_list.as_ref().filter(|id| self.prefix_lists.contains_key(id));
        let list = || list.map(|id| Peer::PrefixList(id.to_string()));
        Some(net::SecurityGroupRule {
            id: rule.id.to_string(),
            egress: rule.egress,
            protocol: rule.protocol,
            from_port: rule.from_port,
            to_port: rule.to_port,
            peer: Some(cidr().or_else(group).or_else(list)?),
        })
    }

    fn interface(&self, one: &Instance) -> net::Interface {
        net::Interface {
            id: one.interface_id.to_string(),
            segment: one.subnet_id.to_string(),
            mac: one.mac.clone(),
            ipv4: one.private_ip.0.to_string(),
            secondary_ipv4: one.secondary_ips.iter().map(ToString::to_string).collect(),
            hostname: one.short_name(),
            // The node gives each instance a user id of its own.
            owner_uid: 0,
            queue_pairs: 1,
            instance: one.id.to_string(),
            source_dest_check_off: !one.source_dest_check,
            security_groups: one.security_groups.iter().map(ToString::to_string).collect(),
        }
    }

    /// Elastic IPs of an instance, each with the private address that it stands for.
    fn associations(&self, one: &Instance) -> impl Iterator<Item = (String, String)> {
        let held = self.public_ips.get(&one.id).into_iter().flatten();
        held.filter_map(|held| Some((held.public_ip.clone(), held.private_ip.clone()?)))
    }

    fn elastic_ips(&self, one: &Instance) -> impl Iterator<Item = net::ElasticIp> {
        let segment = one.subnet_id.to_string();
        self.associations(one).map(move |(public_ip, private_ip)| net::ElasticIp {
            public_ip,
            private_ip,
            segment: segment.clone(),
        })
    }
}

fn boot_image(image: &Image) -> api::BootImage {
    let blob = |part: Part| api::BlobRef { sha256: part.sha256, size: part.size.cast_unsigned() };
    api::BootImage {
        image_id: image.id.to_string(),
        kernel: Some(blob(image.kernel())),
        initrd: image.initrd().map(blob),
        root: image.root().map(blob),
        cmdline: image.cmdline.clone(),
        runs_on_software_kvm: image.runs_on_software_kvm,
    }
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
    fn the_gateways_mac_follows_its_address() {
        assert_eq!(gateway_mac(Ipv4Addr::new(172, 31, 0, 1)), "02:6d:ac:1f:00:01");
    }
}
