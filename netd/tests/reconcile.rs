//! The kernel is made equal to what is desired, from wherever it is.

mod common;

use common::backend::run_on;
use common::{
    Backend, Lab, ask, backend, empty_network, guest, guest_at, network, private, public, run, segment, try_run,
};
use mallee_netd::api::{self, segment::Kind};

/// Everything in the node that netd could have made, without counters and times.
fn world() -> String {
    // In the order in which they were made, which does not matter.
    let mut tables: Vec<String> =
        run("nft list tables").lines().map(|table| run(&format!("nft list {table}"))).collect();
    tables.sort();
    let ruleset: String = tables
        .concat()
        .lines()
        // How many connections there are is the kernel's own note.
        .filter(|line| !line.contains(" . 0x"))
        .map(|line| {
            // Counters of elements differ from moment to moment.
            let number = |word: &str| word.chars().all(|c| c.is_ascii_digit());
            let words = line.split_whitespace().map(|word| if number(word) { "#" } else { word });
            words.collect::<Vec<_>>().join(" ") + "\n"
        })
        .collect();
    let all_links = run("ip -o link");
    let mut links: Vec<&str> = all_links.lines().filter_map(|line| line.split_whitespace().nth(1)).collect();
    links.sort_unstable();
    let links = links.join("\n") + "\n";
    let sorted = |command: &str| {
        let text = run(command);
        // Some lines begin with the link's index, which a link made anew has not kept.
        let without_index = |line: &str| match line.split_once(": ") {
            Some((index, rest)) if index.parse::<u32>().is_ok() => rest.trim().to_owned(),
            _ => line.trim().to_owned(),
        };
        // A bridge has its carrier a moment after its port is up.
        let text = text.replace(" linkdown", "");
        let mut lines: Vec<String> = text.lines().map(without_index).collect();
        lines.sort_unstable();
        lines.join("\n") + "\n"
    };
    // Tables of x_tables stay when they have been asked for once.
    let saved = run("iptables-legacy-save");
    let chains = saved.lines().filter(|line| line.starts_with("-A") || line.contains(" - ["));
    let chains: String = chains.map(|line| format!("{}\n", line.split(" [0").next().unwrap())).collect();
    [
        ruleset,
        chains,
        links,
        sorted("ip -o addr show scope global"),
        sorted("ip -4 rule"),
        sorted("ip -4 route show table all"),
        sorted("ip neigh show proxy"),
        sorted("ip neigh show nud permanent"),
        sorted("bridge fdb show state static"),
    ]
    .concat()
}

/// Fails with the lines that only one of the two has.
fn assert_same(found: &str, wanted: &str, when: &str) {
    let only_in = |a: &str, b: &str| -> Vec<String> {
        a.lines().filter(|line| !b.lines().any(|other| other == *line)).map(str::to_owned).collect()
    };
    let (more, missing) = (only_in(found, wanted), only_in(wanted, found));
    assert!(found == wanted, "{when}: too much {more:#?}, missing {missing:#?}");
}

fn applying_twice_changes_nothing_and_says_so() {
    let mut lab = Lab::new();
    let desired = network(1, 2, &[(1, 1)]);
    assert!(lab.netd.apply(&desired).changed);
    let reply = lab.netd.apply(&desired);
    assert!(!reply.changed, "{}", lab.netd.log());
    assert_eq!(reply.generation, 1);
    // With an instance running, and after netd was killed and started.
    let one = guest(1);
    ask(&lab.outside_socket(), public(1), "warm up");
    lab.netd.kill();
    lab.netd.start();
    assert!(!lab.netd.apply(&desired).changed, "{}", lab.netd.log());
    // And when its VMM ends and starts again.
    drop(one);
    assert!(!lab.netd.apply(&desired).changed, "{}", lab.netd.log());
    let _again = guest(1);
    assert!(ask(&lab.outside_socket(), public(1), "again").starts_with("i-1 "));
    assert!(!lab.netd.apply(&desired).changed, "{}", lab.netd.log());
}

fn a_network_that_shrinks_leaves_nothing_behind() {
    let lab = Lab::new();
    let before = world();
    lab.netd.apply(&network(1, 3, &[(1, 1), (2, 2)]));
    let one = network(2, 1, &[(1, 1)]);
    lab.netd.apply(&one);
    let shrunk = world();
    for gone in ["tpeni2", "tpeni3", "198.51.100.131", "172.31.0.5"] {
        assert!(!shrunk.contains(gone), "{gone} is left:\n{shrunk}");
    }
    let mut nothing = empty_network();
    (nothing.generation, nothing.segments) = (3, vec![]);
    lab.netd.apply(&nothing);
    let emptied = world();
    assert!(!emptied.contains("brsubnet1") && !emptied.contains("172.31."), "{emptied}");
    run(concat!(env!("CARGO_BIN_EXE_mallee-netd"), " clean"));
    assert_same(&world(), &before, "after clean");
}

fn clean_removes_everything_of_netds_and_nothing_else() {
    let lab = Lab::new();
    run("ip link add other type bridge");
    run("ip tuntap add dev othertap mode tap");
    run("ip route add 203.0.113.0/24 via 198.51.100.1");
    run("nft add table ip others");
    run("iptables-legacy -t mangle -N others");
    run("iptables-legacy -t mangle -A FORWARD -i other -j others");
    run("iptables-legacy -P FORWARD ACCEPT");
    let before = world();
    lab.netd.apply(&network(1, 2, &[(1, 1)]));
    run(concat!(env!("CARGO_BIN_EXE_mallee-netd"), " clean"));
    assert_same(&world(), &before, "after clean");
    run(concat!(env!("CARGO_BIN_EXE_mallee-netd"), " clean"));
}

fn what_others_break_is_mended() {
    let lab = Lab::new();
    let desired = network(1, 2, &[(1, 1)]);
    lab.netd.apply(&desired);
    let _one = guest(1);
    let socket = lab.outside_socket();
    ask(&socket, public(1), "before");
    let whole = world();
    let to_rules: &[&str] = match backend() {
        Backend::Nftables => &[
            "nft flush ruleset",
            "nft delete table bridge mallee",
            "nft flush chain ip mallee forward",
            "nft add rule ip mallee to_instance drop",
            "nft flush map bridge mallee bindings",
            "nft delete element ip mallee eip_in { 198.51.100.130 }",
        ],
        Backend::Iptables => &[
            "iptables-legacy -t mangle -F",
            "iptables-legacy -t raw -F PREROUTING",
            "iptables-legacy -t mangle -F mallee-way",
            "iptables-legacy -t mangle -A mallee-to-brsubnet1 -j DROP",
            "iptables-legacy -t raw -D mallee-from-brsubnet1 1",
            "iptables-legacy -t nat -F mallee-eips",
            "iptables-legacy -t nat -N mallee-another",
            "ip rule del priority 10901",
            "bridge link set dev tpeni1 isolated off",
            "bridge link set dev tpeni1 locked off",
            "sysctl -qw net.ipv4.conf.brsubnet1.proxy_arp_pvlan=0",
        ],
    };
    let to_links = [
        "ip link del tpeni2",
        "ip link set tpeni1 nomaster",
        "ip addr del 172.31.0.1/32 dev brsubnet1",
        "ip addr add 10.1.1.1/24 dev brsubnet1",
        "ip route del 198.51.100.130",
        "ip rule del priority 10900",
        "ip route flush proto 109 table all",
        "ip route add local 172.31.0.1 dev brsubnet1 table local",
        "ip neigh del proxy 198.51.100.130 dev pub0",
        "ip neigh del 172.31.0.4 dev brsubnet1",
        "bridge fdb del 02:00:00:00:01:01 dev tpeni1 master",
        "ip link set brsubnet1 address 02:00:00:00:00:99",
        "ip link set brsubnet1 down",
        "ip link del brsubnet1",
        "sysctl -qw net.ipv4.ip_forward=0",
    ];
    for damage in to_rules.iter().chain(&to_links).copied() {
        run(damage);
        let reply = lab.netd.apply(&desired);
        assert!(reply.changed, "`{damage}` went unseen");
        assert_same(&world(), &whole, &format!("after `{damage}`"));
        common::eventually("the port to forward again", || {
            run("bridge link show dev tpeni1").contains("state forwarding").then_some(())
        });
        let answer = ask(&socket, public(1), damage);
        assert!(answer.starts_with("i-1 "), "after `{damage}`");
        assert!(!lab.netd.apply(&desired).changed, "after `{damage}`");
    }
}

fn the_network_comes_back_before_the_controller_does() {
    let mut lab = Lab::new();
    lab.netd.apply(&network(1, 1, &[(1, 1)]));
    lab.netd.kill();
    // As after a reboot: the kernel has nothing of it.
    run(concat!(env!("CARGO_BIN_EXE_mallee-netd"), " clean"));
    assert!(!try_run("ip link show brsubnet1").status.success());
    lab.netd.start();
    common::eventually("the tap", || try_run("ip link show tpeni1").status.success().then_some(()));
    common::eventually("the elastic IP", || run("ip neigh show proxy").contains("198.51.100.130").then_some(()));
    let _one = guest(1);
    assert!(ask(&lab.outside_socket(), public(1), "back").starts_with("i-1 "));
}

fn a_kill_at_any_moment_leads_to_the_same_place() {
    let mut lab = Lab::new();
    let networks = [network(1, 3, &[(1, 1), (2, 2)]), network(1, 2, &[(1, 2)])];
    // What each leads to when nothing is in the way.
    let worlds = networks.clone().map(|desired| {
        lab.netd.apply(&desired);
        world()
    });
    let mut generation = 1;
    for round in 0..24_u64 {
        let index = round as usize % 2;
        let mut desired = networks[index].clone();
        generation += 1;
        desired.generation = generation;
        let pid = lab.netd.pid();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(std::time::Duration::from_micros(round * 700));
                nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
            });
            // The call may be through before the kill.
            let _ = lab.netd.try_apply(&desired);
        });
        lab.netd.kill();
        lab.netd.start();
        lab.netd.apply(&desired);
        assert_same(&world(), &worlds[index], &format!("round {round}"));
    }
}

fn a_refused_network_leaves_the_running_one() {
    let lab = Lab::new();
    lab.netd.apply(&network(5, 2, &[(1, 1)]));
    let _one = guest(1);
    let whole = world();
    let mut twice = network(6, 2, &[(1, 1)]);
    twice.interfaces[1].ipv4 = private(1).to_string();
    let status = lab.netd.try_apply(&twice).unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    assert!(status.message().contains("eni-2"), "{status}");
    let status = lab.netd.try_apply(&network(4, 1, &[])).unwrap_err();
    assert_eq!(status.code(), tonic::Code::FailedPrecondition);
    assert!(status.message().contains("older backup"), "{status}");
    assert_same(&world(), &whole, "after the refusals");
    assert!(ask(&lab.outside_socket(), public(1), "still").starts_with("i-1 "));
    // The same generation may come again, and a refused one left no trace.
    assert!(!lab.netd.apply(&network(5, 2, &[(1, 1)])).changed);
}

fn a_link_of_somebody_elses_is_not_taken() {
    let lab = Lab::new();
    run("ip tuntap add dev tpeni1 mode tap");
    let status = lab.netd.try_apply(&network(1, 1, &[])).unwrap_err();
    assert_eq!(status.code(), tonic::Code::FailedPrecondition);
    assert!(status.message().contains("tpeni1"), "{status}");
    assert!(!run("ip link show tpeni1").contains("brsubnet1"));
}

fn a_network_that_is_refused_for_its_links_is_not_kept() {
    let mut lab = Lab::new();
    lab.netd.apply(&network(1, 1, &[(1, 1)]));
    let whole = world();
    run("ip tuntap add dev tpeni2 mode tap");
    lab.netd.try_apply(&network(2, 2, &[(1, 1)])).unwrap_err();
    run("ip link del tpeni2");
    assert_eq!(lab.netd.show().applied.unwrap().generation, 1);
    lab.netd.kill();
    run(concat!(env!("CARGO_BIN_EXE_mallee-netd"), " clean"));
    lab.netd.start();
    common::eventually("the network as it was", || (world() == whole).then_some(()));
}

fn a_running_instance_keeps_its_tap_when_others_come_and_go() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 1, &[(1, 1)]));
    let _one = guest(1);
    let socket = lab.outside_socket();
    let tap = run("ip -o link show tpeni1");
    for generation in 2..8 {
        lab.netd.apply(&network(generation, 1 + (generation % 3) as u8, &[(1, 1)]));
        ask(&socket, public(1), &generation.to_string());
    }
    let number = |line: &str| line.split(':').next().unwrap().to_owned();
    assert_eq!(number(&run("ip -o link show tpeni1")), number(&tap));
}

fn segments_of_a_vpc_are_routed_and_those_of_others_are_not() {
    let lab = Lab::new();
    let mut desired = network(1, 3, &[(3, 3)]);
    desired.segments.push(segment("subnet-2", "vpc-1", "172.31.16.0/20", "172.31.16.1"));
    desired.segments.push(segment("subnet-3", "vpc-2", "10.0.0.0/16", "10.0.0.1"));
    let elsewhere = [("subnet-2", "172.31.16.4"), ("subnet-3", "10.0.0.4")];
    for (interface, (segment, ipv4)) in desired.interfaces[1..].iter_mut().zip(elsewhere) {
        (interface.segment, interface.ipv4) = (segment.into(), ipv4.into());
    }
    desired.elastic_ips[0].private_ip = "10.0.0.4".into();
    desired.elastic_ips[0].segment = "subnet-3".into();
    lab.netd.apply(&desired);
    let at = |n: u8, ip: &str| guest_at(n, ip.parse().unwrap());
    let (one, two, three) = (guest(1), at(2, "172.31.16.4"), at(3, "10.0.0.4"));
    one.send_udp("10.0.0.4".parse().unwrap(), 9, b"closed");
    one.send_udp("172.31.16.4".parse().unwrap(), 9, b"open");
    let datagram = two.receive_udp();
    assert_eq!((datagram.from, &datagram.payload[..]), (private(1), &b"open"[..]));
    // By elastic IP the other VPC is reached, as from outside.
    one.send_udp(public(3), 9, b"public");
    assert_eq!(three.receive_udp().payload, b"public");
    // The metadata address is on every segment.
    three.ping("10.0.0.1".parse().unwrap(), 1);
}

fn capabilities_name_what_is_missing() {
    let lab = Lab::new();
    let reply = lab.netd.capabilities();
    assert_eq!((reply.uplink.as_str(), reply.uplink_address.as_str()), ("pub0", "198.51.100.2/24"));
    for there in ["local", "security-groups", "conntrack"] {
        assert_eq!(reply.capabilities[there], "", "{there}");
    }
    assert_eq!(reply.backend, backend().name());
    assert_eq!(reply.capabilities["nftables"].is_empty(), backend() == Backend::Nftables);
    if backend() == Backend::Iptables {
        for missing in ["vlan", "vxlan", "source-check-off", "limits", "fragments", "trace"] {
            assert!(reply.capabilities[missing].contains("nftables"), "{missing}: {}", reply.capabilities[missing]);
        }
        return;
    }
    assert_eq!(reply.capabilities["limits"], "");
    assert!(reply.capabilities["vlan"].contains("--trunk"));
}

fn others_policies_that_drop_are_told_and_left_alone() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 1, &[(1, 1)]));
    let check = || {
        let told = run(concat!(env!("CARGO_BIN_EXE_mallee-netd"), " check"));
        serde_json::from_str::<mallee_netd::api::Check>(&told).unwrap().drop_policies
    };
    assert!(check().is_empty());
    run("nft add table inet theirs");
    run("nft add chain inet theirs wall { type filter hook forward priority 0 ; policy drop ; }");
    run("nft add chain inet theirs open { type filter hook input priority 0 ; policy accept ; }");
    run("nft add chain inet theirs no_base");
    let told: Vec<String> = check().iter().map(ToString::to_string).collect();
    assert_eq!(told, ["table inet theirs, chain wall (hook forward)"]);
    run("iptables-legacy -P FORWARD DROP");
    assert_eq!(check()[1].to_string(), "table ip filter (iptables), chain FORWARD (hook forward)");
    assert!(!lab.netd.apply(&network(2, 1, &[(1, 1)])).changed, "{}", lab.netd.log());
    assert_eq!(check().len(), 2);
}

/// By iptables, whoever comes before netd's chains could let pass what these are to judge.
#[test]
fn netds_chains_come_first_and_others_rules_survive() {
    run_on(Backend::Iptables, || {
        let lab = Lab::new();
        let desired = network(1, 1, &[(1, 1)]);
        run("iptables-legacy -t mangle -A PREROUTING -p 50 -j ACCEPT");
        lab.netd.apply(&desired);
        let listed = || run("iptables-legacy -t mangle -S PREROUTING");
        let as_made = listed();
        assert!(as_made.lines().nth(1).unwrap().contains("mallee-in") && as_made.contains("esp"), "{as_made}");
        run("iptables-legacy -t mangle -I PREROUTING -p 51 -j ACCEPT");
        run("iptables-legacy -t mangle -A PREROUTING -j mallee-in");
        assert!(lab.netd.apply(&desired).changed);
        let mended = listed();
        assert!(mended.lines().nth(1).unwrap().contains("mallee-in") && mended.contains("ah"), "{mended}");
        assert_eq!(mended.matches("mallee-in").count(), 1);
        assert!(!lab.netd.apply(&desired).changed);
    });
}

#[test]
fn by_iptables_a_segment_that_reaches_other_nodes_is_refused() {
    run_on(Backend::Iptables, || {
        let lab = Lab::with(&["--trunk", "pub0"]);
        let mut desired = network(1, 1, &[]);
        for kind in [
            Kind::Vlan(api::VlanSegment { vid: 7 }),
            Kind::Vxlan(api::VxlanSegment { vni: 7, peers: vec!["198.51.100.3".into()] }),
        ] {
            desired.segments[0].kind = Some(kind);
            let status = lab.netd.try_apply(&desired).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            assert!(status.message().contains("segment subnet-1") && status.message().contains("iptables"), "{status}");
        }
    });
}

#[test]
fn another_backend_leaves_nothing_of_the_one_before() {
    let mut lab = Lab::new();
    let desired = network(1, 1, &[(1, 1)]);
    let _one = {
        lab.netd.apply(&desired);
        guest(1)
    };
    let ask_it = |lab: &Lab, what| assert!(ask(&lab.outside_socket(), public(1), what).starts_with("i-1 "));
    ask_it(&lab, "by nftables");
    let (tables, chains) = ("nft list ruleset", "iptables-legacy-save");
    for (backend, none, some) in [(Backend::Iptables, tables, chains), (Backend::Nftables, chains, tables)] {
        lab.netd.kill();
        lab.netd.backend = backend;
        lab.netd.start();
        lab.netd.apply(&desired);
        assert!(!run(none).contains("mallee") && run(some).contains("mallee"), "{backend:?}");
        ask_it(&lab, backend.name());
        assert!(!lab.netd.apply(&desired).changed, "{}", lab.netd.log());
    }
}

on_each_backend! {
    applying_twice_changes_nothing_and_says_so,
    a_network_that_shrinks_leaves_nothing_behind,
    clean_removes_everything_of_netds_and_nothing_else,
    what_others_break_is_mended,
    the_network_comes_back_before_the_controller_does,
    a_kill_at_any_moment_leads_to_the_same_place,
    a_refused_network_leaves_the_running_one,
    a_link_of_somebody_elses_is_not_taken,
    a_network_that_is_refused_for_its_links_is_not_kept,
    a_running_instance_keeps_its_tap_when_others_come_and_go,
    segments_of_a_vpc_are_routed_and_those_of_others_are_not,
    capabilities_name_what_is_missing,
    others_policies_that_drop_are_told_and_left_alone,
}
