//! Names as an instance asks for them: its VPC's, others', and those that it may not know.

mod common;

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::mpsc;
use std::time::Duration;

use common::{Guest, Lab, OUTSIDE, PATIENCE, guest, network, private, segment};
use hickory_proto::op::{Message, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, PTR};
use hickory_proto::rr::{Name, RData, Record, RecordType};

/// Behind the gateway, as in EC2.
const RESOLVER: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 2);
const RESOLVER_EVERYWHERE: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 253);
const ZONE: &str = "mallee-1.compute.internal.";

fn question(id: u16, name: &str, kind: RecordType) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.id = id;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message.to_vec().unwrap()
}

/// Asks, again after a while as resolvers do, and takes the answer to this question.
fn ask(guest: &Guest, server: Ipv4Addr, name: &str, kind: RecordType) -> Message {
    let id = 4711;
    for _ in 0..4 {
        guest.send_udp(server, 53, &question(id, name, kind));
        while let Some(datagram) = guest.receive_udp_within(PATIENCE / 4) {
            if datagram.from_port == 53 {
                assert_eq!(datagram.from, server, "the answer must come from where it was asked");
                let answer = Message::from_vec(&datagram.payload).unwrap();
                assert_eq!(answer.metadata.id, id);
                return answer;
            }
        }
    }
    panic!("no answer from {server} about {name}");
}

fn address(answer: &Message) -> Option<Ipv4Addr> {
    answer.answers.iter().find_map(|record| match record.data {
        RData::A(A(address)) => Some(address),
        _ => None,
    })
}

/// A name server outside: knows one address for all names. Says what it was asked and from where.
fn name_server(lab: &Lab) -> mpsc::Receiver<(Name, SocketAddr)> {
    let (asked, questions) = mpsc::channel();
    let socket = lab.outside.within(|| UdpSocket::bind((OUTSIDE, 53)).unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let query = Message::from_vec(&buffer[..length]).unwrap();
            let name = query.queries[0].name.clone();
            let mut answer = Message::response(query.metadata.id, OpCode::Query);
            answer.add_query(query.queries[0].clone());
            answer.add_answer(Record::from_rdata(name.clone(), 5, RData::A(A::new(192, 0, 2, 80))));
            // What another, guessing, would send: it must not be believed.
            let mut forged = answer.clone();
            forged.metadata.id = query.metadata.id.wrapping_add(1);
            forged.answers[0].data = RData::A(A::new(6, 6, 6, 6));
            socket.send_to(&forged.to_vec().unwrap(), from).unwrap();
            socket.send_to(&answer.to_vec().unwrap(), from).unwrap();
            if asked.send((name, from)).is_err() {
                return;
            }
        }
    });
    questions
}

fn private_names_lead_to_addresses_and_back() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 2, &[]));
    let one = guest(1);
    for server in [RESOLVER, RESOLVER_EVERYWHERE] {
        let answer = ask(&one, server, &format!("ip-172-31-0-5.{ZONE}"), RecordType::A);
        assert_eq!(address(&answer), Some(private(2)));
        assert!(answer.metadata.authoritative);
    }
    let answer = ask(&one, RESOLVER, "5.0.31.172.in-addr.arpa.", RecordType::PTR);
    let expected = Name::from_ascii(format!("ip-172-31-0-5.{ZONE}")).unwrap();
    assert_eq!(answer.answers[0].data, RData::PTR(PTR(expected)));
    let answer = ask(&one, RESOLVER, &format!("nobody.{ZONE}"), RecordType::A);
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
}

fn another_vpcs_names_are_not_known() {
    let lab = Lab::new();
    let mut desired = network(1, 1, &[]);
    desired.segments.push(segment("subnet-2", "vpc-2", "10.9.0.0/24", "10.9.0.1"));
    lab.netd.apply(&desired);
    let answer = ask(&guest(1), RESOLVER, &format!("ip-10-9-0-4.{ZONE}"), RecordType::A);
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
}

fn a_name_of_the_vpc_on_another_node_is_known() {
    let lab = Lab::new();
    let mut desired = network(1, 1, &[]);
    desired.segments[0].vpc_cidrs = vec!["172.31.0.0/16".into()];
    lab.netd.apply(&desired);
    let answer = ask(&guest(1), RESOLVER, &format!("ip-172-31-200-9.{ZONE}"), RecordType::A);
    assert_eq!(address(&answer), Some(Ipv4Addr::new(172, 31, 200, 9)));
}

fn others_names_are_asked_of_the_nodes_servers_and_forgeries_ignored() {
    let lab = Lab::new();
    let questions = name_server(&lab);
    lab.netd.apply(&network(1, 1, &[]));
    let one = guest(1);
    let answer = ask(&one, RESOLVER, "example.org.", RecordType::A);
    assert_eq!(address(&answer), Some(Ipv4Addr::new(192, 0, 2, 80)));
    let (name, first) = questions.recv_timeout(PATIENCE).unwrap();
    assert_eq!(name, Name::from_ascii("example.org.").unwrap());
    ask(&one, RESOLVER, "example.org.", RecordType::A);
    let (_, second) = questions.recv_timeout(PATIENCE).unwrap();
    assert_ne!(first.port(), second.port(), "each question has a port of its own");
    // Private addresses are nobody else's business.
    let answer = ask(&one, RESOLVER, "9.9.9.10.in-addr.arpa.", RecordType::PTR);
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    assert!(questions.recv_timeout(Duration::from_millis(100)).is_err());
}

fn with_nobody_to_ask_the_instance_is_told_so() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 1, &[]));
    let answer = ask(&guest(1), RESOLVER, "example.org.", RecordType::A);
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
}

fn malformed_questions_and_a_flood_leave_the_server_to_the_others() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 2, &[]));
    let (one, two) = (guest(1), guest(2));
    let good = question(1, "example.org.", RecordType::A);
    for length in 0..good.len() {
        one.send_udp(RESOLVER, 53, &good[..length]);
    }
    // A name that points to itself.
    let mut looped = good.clone();
    looped[12..14].copy_from_slice(&[0xc0, 12]);
    one.send_udp(RESOLVER, 53, &looped);
    // Nobody answers these, so each holds a place until its patience ends.
    for _ in 0..600 {
        one.send_udp(RESOLVER, 53, &good);
    }
    let answer = ask(&two, RESOLVER, &format!("ip-172-31-0-4.{ZONE}"), RecordType::A);
    assert_eq!(address(&answer), Some(private(1)));
    // Beyond one's share the answer is a refusal, at once.
    loop {
        let datagram = one.receive_udp();
        let answer = Message::from_vec(&datagram.payload).unwrap();
        if answer.metadata.response_code == ResponseCode::Refused {
            break;
        }
    }
    let questions = name_server(&lab);
    let answer = ask(&two, RESOLVER, "example.org.", RecordType::A);
    assert_eq!(address(&answer), Some(Ipv4Addr::new(192, 0, 2, 80)), "another instance's share is its own");
    drop(questions);
}

/// By nftables alone: iptables has no instances without source check.
#[test]
fn an_instance_that_asks_from_many_addresses_has_one_share() {
    let lab = Lab::new();
    let mut desired = network(1, 2, &[]);
    desired.interfaces[0].source_dest_check_off = true;
    lab.netd.apply(&desired);
    let (one, two) = (guest(1), guest(2));
    // Nobody answers these, so each that is asked on holds a place until its patience ends.
    for source in 100..120 {
        for id in 0..32 {
            one.send_udp_from(
                Ipv4Addr::new(172, 31, 0, source),
                RESOLVER,
                53,
                &question(id, "example.org.", RecordType::A),
            );
        }
    }
    let questions = name_server(&lab);
    let answer = ask(&two, RESOLVER, "example.net.", RecordType::A);
    assert_eq!(address(&answer), Some(Ipv4Addr::new(192, 0, 2, 80)), "{:?}", answer.metadata);
    drop(questions);
}

fn a_lease_names_the_resolver_unless_others_are_wanted_and_the_time_servers() {
    use dhcproto::v4::{DhcpOption, OptionCode};
    let lab = Lab::new();
    let mut desired = network(1, 1, &[]);
    desired.segments[0].dns_servers.clear();
    desired.segments[0].ntp_servers = vec!["192.0.2.123".into()];
    lab.netd.apply(&desired);
    let one = guest(1);
    let ack = one.dhcp(false);
    let option = |code| ack.opts().get(code).cloned().unwrap();
    assert_eq!(option(OptionCode::DomainNameServer), DhcpOption::DomainNameServer(vec![RESOLVER]));
    assert_eq!(option(OptionCode::NtpServers), DhcpOption::NtpServers(vec![Ipv4Addr::new(192, 0, 2, 123)]));
}

on_each_backend! {
    private_names_lead_to_addresses_and_back,
    another_vpcs_names_are_not_known,
    a_name_of_the_vpc_on_another_node_is_known,
    others_names_are_asked_of_the_nodes_servers_and_forgeries_ignored,
    with_nobody_to_ask_the_instance_is_told_so,
    malformed_questions_and_a_flood_leave_the_server_to_the_others,
    a_lease_names_the_resolver_unless_others_are_wanted_and_the_time_servers,
}
