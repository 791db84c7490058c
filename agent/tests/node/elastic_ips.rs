//! Elastic IPs on their way to netd: as what changed, and as the whole network where netd has another than the agent knows of.

use mallee_agent::api::DesiredInstance;
use mallee_netd::api::{ApplyRequest, ElasticIp, ShowRequest};

use crate::support::machine::{Machine, SEGMENT, interface, on_a_machine};

const CHANGE: &str = "elastic IPs";
const WHOLE: &str = "the whole network";

/// Two interfaces that elastic IPs may stand for. No VMM has their taps.
async fn two_interfaces(machine: &Machine) {
    machine.controller.want(|desired| {
        let network = desired.network.as_mut().unwrap();
        network.public_pools = vec!["198.51.100.128/25".into()];
        network.interfaces = [1, 2].map(|n| interface(n, &instance(n))).to_vec();
    });
    applied(machine).await;
}

fn instance(n: u8) -> DesiredInstance {
    DesiredInstance {
        id: format!("i-000000000000000{n:02x}"),
        interface: format!("eni-000000000000000{n:02x}"),
        ..Default::default()
    }
}

/// Wants these public addresses to stand for these interfaces, and no others for any.
fn want(machine: &Machine, elastic_ips: &[(u8, u8)]) {
    machine.controller.want(|desired| desired.network.as_mut().unwrap().elastic_ips = messages(elastic_ips));
}

fn messages(elastic_ips: &[(u8, u8)]) -> Vec<ElasticIp> {
    let message = |(public, n): &(u8, u8)| ElasticIp {
        public_ip: format!("198.51.100.{}", 128 + public),
        private_ip: format!("172.31.0.{}", 4 + n),
        segment: SEGMENT.into(),
    };
    elastic_ips.iter().map(message).collect()
}

/// Waits until the node says that it has the network that is wanted.
async fn applied(machine: &Machine) {
    let wanted = machine.controller.desired.borrow().generation;
    machine.until_true("the network", || machine.controller.observed.borrow().network_generation == wanted).await;
}

async fn assert_has(machine: &Machine, elastic_ips: &[(u8, u8)]) {
    applied(machine).await;
    let mut netd = mallee_netd::api::client(&machine.path("netd.sock"));
    let shown = netd.show(ShowRequest {}).await.unwrap().into_inner().applied.unwrap();
    assert_eq!(shown.elastic_ips, messages(elastic_ips));
}

/// What netd was asked for and changed something by, in order, by its own log.
fn asked(machine: &Machine) -> Vec<&'static str> {
    let log = std::fs::read_to_string(machine.path("netd.log")).unwrap();
    let of = |line: &str| [CHANGE, WHOLE].into_iter().find(|what| line.contains(&format!("applied what=\"{what}\"")));
    log.lines().filter_map(of).collect()
}

#[test]
fn where_only_elastic_ips_differ_netd_is_told_what_differs() {
    on_a_machine(async |machine| {
        two_interfaces(machine).await;
        let before = asked(machine).len();
        for elastic_ips in [&[(1, 1)][..], &[(1, 2), (2, 1)], &[(1, 1), (2, 2)], &[(2, 2)]] {
            want(machine, elastic_ips);
            assert_has(machine, elastic_ips).await;
        }
        assert_eq!(asked(machine)[before..], [CHANGE; 4]);
        machine.controller.want(|desired| {
            let network = desired.network.as_mut().unwrap();
            network.interfaces.pop();
            network.elastic_ips = messages(&[(1, 1)]);
        });
        assert_has(machine, &[(1, 1)]).await;
        assert_eq!(asked(machine)[before..], [CHANGE, CHANGE, CHANGE, CHANGE, WHOLE]);
    });
}

#[test]
fn a_netd_that_has_another_network_is_handed_the_whole() {
    on_a_machine(async |machine| {
        two_interfaces(machine).await;
        want(machine, &[(1, 1)]);
        assert_has(machine, &[(1, 1)]).await;
        // Somebody else has handed over another, unknown to the agent.
        let mut netd = mallee_netd::api::client(&machine.path("netd.sock"));
        let mut other = netd.show(ShowRequest {}).await.unwrap().into_inner().applied.unwrap();
        other.generation += 1;
        other.elastic_ips = messages(&[(7, 2)]);
        netd.apply(ApplyRequest { desired: Some(other) }).await.unwrap();
        want(machine, &[(1, 2)]);
        assert_has(machine, &[(1, 2)]).await;
        assert_eq!(asked(machine).last(), Some(&WHOLE));
        want(machine, &[(1, 1)]);
        assert_has(machine, &[(1, 1)]).await;
        assert_eq!(asked(machine).last(), Some(&CHANGE), "the short way again");
    });
}

#[test]
fn a_change_that_a_killed_netd_did_not_hear_is_made() {
    on_a_machine(async |machine| {
        two_interfaces(machine).await;
        for forgets in [false, true] {
            want(machine, &[(1, 1)]);
            assert_has(machine, &[(1, 1)]).await;
            machine.kill_netd();
            want(machine, &[(1, 2)]);
            machine
                .until_true("word of netd's absence", || !machine.controller.observed.borrow().network_error.is_empty())
                .await;
            if forgets {
                std::fs::remove_dir_all(machine.path("netd")).unwrap();
            }
            machine.start_netd();
            assert_has(machine, &[(1, 2)]).await;
        }
    });
}
