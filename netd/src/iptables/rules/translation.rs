//! The table `nat`: elastic IPs, and the node's address for those that have none. Only first packets of connections pass it.

use super::{Rule, TRANSLATED, Table, elastic_ips_of, for_pools, mark, of_vpc, opened_from};
use crate::backend::PORTS_OF_INSTANCES;
use crate::desired::{ElasticIp, LinkName, Network, VpcNumber};

/// So that a program on the node itself reaches an elastic IP too, its packets are translated as those from outside are.
const HOOKS: [(&str, &str); 3] = [("PREROUTING", "dnat"), ("OUTPUT", "dnat"), ("POSTROUTING", "snat")];

pub fn table(uplink: &LinkName, network: &Network) -> Table {
    let mut table = Table::new("nat", &HOOKS);
    table.put("dnat", for_pools(network, "to an elastic IP").map(|rule| rule.call("eips")));
    table.put("eips", []);
    for elastic in network.elastic_ips.values() {
        put_elastic(&mut table, elastic, network.vpc_number(&elastic.segment));
    }
    for (vpc, number) in &network.vpcs {
        let rule = Rule::new(vpc.to_string()).on(opened_from(*number));
        table.put("snat", [rule.go(&of_vpc("snat", *number))]);
        put_vpc(&mut table, uplink, network, *number);
    }
    table
}

/// Packet and connection are marked with the VPC of the place that the address stands for.
fn put_elastic(table: &mut Table, elastic: &ElasticIp, vpc: VpcNumber) {
    let chain = format!("eip-{:08x}", u32::from(elastic.public));
    table.put("eips", [Rule::new("elastic IP").on(format!("-d {}", elastic.public)).go(&chain)]);
    table.put(
        &chain,
        [
            Rule::new("opened to its VPC").then(format!("CONNMARK --set-xmark {:#x}/0xffff", vpc.get())),
            Rule::new("routed in its VPC").then(mark(vpc.get())),
            Rule::new("elastic IP to its instance").then(format!("DNAT --to-destination {}", elastic.private)),
        ],
    );
}

/// An instance appears outside as its elastic IP, or as the node when it has none. The same holds for a packet that turns round on this node.
fn put_vpc(table: &mut Table, uplink: &LinkName, network: &Network, vpc: VpcNumber) {
    let (chain, elastic) = (of_vpc("snat", vpc), of_vpc("own", vpc));
    let out = format!("-o {uplink}");
    let ports = format!("MASQUERADE --to-ports {}-{}", PORTS_OF_INSTANCES.start(), PORTS_OF_INSTANCES.end());
    let as_node = |protocol: &str| Rule::new("out as the node").on(&out).on(protocol).then(&*ports);
    table.put(
        &chain,
        [
            Rule::new("out as its elastic IP").on(&out).call(&elastic),
            as_node("-p tcp"),
            as_node("-p udp"),
            // What has no ports.
            Rule::new("out as the node").on(&out).then("MASQUERADE"),
            Rule::new("hairpin as its elastic IP").on(TRANSLATED).call(&elastic),
        ],
    );
    let node = network.node_addresses.first();
    table.put(
        &chain,
        node.map(|node| Rule::new("hairpin as the node").on(TRANSLATED).then(format!("SNAT --to-source {node}"))),
    );
    table.put(&elastic, []);
    for found in elastic_ips_of(network, vpc) {
        let to = format!("SNAT --to-source {}", found.public);
        table.put(&elastic, [Rule::new("its elastic IP").on(format!("-s {}", found.private)).then(to)]);
    }
}
