//! DHCP, ARP and ping as an instance sees them when it boots.

mod common;

use common::{GATEWAY, GATEWAY_MAC, Guest, Lab, METADATA, guest, network, private};
use dhcproto::v4::{DhcpOption, MessageType, OptionCode};
use mallee_netd::api::network_event::Event;

fn an_instance_gets_its_lease_with_all_that_it_needs() {
    let lab = Lab::new();
    let mut desired = network(1, 2, &[]);
    desired.segments[0].mtu = 1400;
    lab.netd.apply(&desired);
    let one = guest(1);
    for broadcast in [false, true] {
        let ack = one.dhcp(broadcast);
        assert_eq!(ack.yiaddr(), private(1));
        let option = |code| ack.opts().get(code).cloned().unwrap();
        assert_eq!(option(OptionCode::Router), DhcpOption::Router(vec![GATEWAY]));
        assert_eq!(option(OptionCode::InterfaceMtu), DhcpOption::InterfaceMtu(1400));
        assert_eq!(option(OptionCode::SubnetMask), DhcpOption::SubnetMask([255, 255, 240, 0].into()));
        assert_eq!(option(OptionCode::Hostname), DhcpOption::Hostname("ip-172-31-0-4".into()));
        let domain = DhcpOption::DomainName("mallee-1.compute.internal".into());
        assert_eq!(option(OptionCode::DomainName), domain);
    }
    let show = lab.netd.show();
    assert!(show.interfaces[0].leased_unix_ns > 0);
    assert_eq!(show.interfaces[1].leased_unix_ns, 0);
}

fn a_lease_is_told_to_those_who_watch() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 1, &[]));
    let event = lab.netd.first_event(|| drop(guest(1).dhcp(false)));
    let Some(Event::LeaseGiven(lease)) = event.event else { panic!("{event:?}") };
    assert_eq!((lease.interface.as_str(), lease.instance.as_str()), ("eni-1", "i-1"));
    assert_eq!(lease.ipv4, private(1).to_string());
    assert!(event.unix_ns > 0);
}

fn a_wrong_address_is_refused() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 1, &[]));
    let wrong = vec![DhcpOption::RequestedIpAddress(private(9))];
    guest(1).dhcp_exchange(MessageType::Request, wrong, false, MessageType::Nak);
}

fn an_interface_that_comes_later_gets_its_lease_from_the_same_server() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 1, &[]));
    guest(1).dhcp(false);
    lab.netd.apply(&network(2, 2, &[]));
    assert_eq!(guest(2).dhcp(false).yiaddr(), private(2));
}

fn malformed_messages_do_not_stop_the_server() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 1, &[]));
    let one = guest(1);
    let good = one.dhcp_frame([2, 0, 0, 0, 1, 1], MessageType::Discover, vec![], false, 3);
    // The DHCP message begins behind Ethernet, IPv4 and UDP headers; its third byte is `hlen`.
    let mut long_address = good.clone();
    long_address[42 + 2] = 255;
    one.send(&long_address);
    for length in [43, 60, 200, good.len() - 1] {
        // Datagrams that say of themselves that they are whole.
        let udp_length = (length - 34) as u16;
        let ip_length = (length - 14) as u16;
        let mut cut = good[..length].to_vec();
        cut[16..18].copy_from_slice(&ip_length.to_be_bytes());
        cut[24..26].copy_from_slice(&[0, 0]);
        cut[38..40].copy_from_slice(&udp_length.to_be_bytes());
        cut[40..42].copy_from_slice(&[0, 0]);
        let checksum =
            etherparse::Ipv4HeaderSlice::from_slice(&cut[14..34]).unwrap().to_header().calc_header_checksum();
        cut[24..26].copy_from_slice(&checksum.to_be_bytes());
        one.send(&cut);
    }
    assert_eq!(one.dhcp(false).yiaddr(), private(1));
}

fn the_gateway_and_the_metadata_address_are_on_the_segment() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 1, &[]));
    let one = guest(1);
    assert_eq!(one.resolve(GATEWAY), GATEWAY_MAC);
    assert_eq!(one.resolve(METADATA), GATEWAY_MAC);
    one.ping(GATEWAY, 1);
    one.ping(METADATA, 2);
}

fn the_metadata_service_is_reached_from_the_instances_own_address() {
    use std::io::Read;
    let lab = Lab::new();
    lab.netd.apply(&network(1, 1, &[]));
    let service = common::metadata_service("brsubnet1");
    let one: Guest = guest(1);
    // The first packet of a connection is enough to see that it gets there and who it is from.
    let syn = {
        let builder = etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 1, 1], GATEWAY_MAC)
            .ipv4(private(1).octets(), METADATA.octets(), 64)
            .tcp(50_000, 80, 1000, 65_535)
            .syn();
        let mut frame = Vec::new();
        builder.write(&mut frame, &[]).unwrap();
        frame
    };
    one.send(&syn);
    let sequence = one.await_frame("the service's SYN-ACK", |frame| {
        let from_service = frame.get(26..30) == Some(&METADATA.octets()) && frame.get(47) == Some(&0x12);
        from_service.then(|| u32::from_be_bytes(frame[38..42].try_into().unwrap()))
    });
    let builder = etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 1, 1], GATEWAY_MAC)
        .ipv4(private(1).octets(), METADATA.octets(), 64)
        .tcp(50_000, 80, 1001, 65_535)
        .ack(sequence + 1);
    let mut frame = Vec::new();
    builder.write(&mut frame, b"GET").unwrap();
    one.send(&frame);
    let (mut connection, from) = service.accept().unwrap();
    assert_eq!(from.ip(), std::net::IpAddr::V4(private(1)));
    let mut asked = [0; 3];
    connection.read_exact(&mut asked).unwrap();
    assert_eq!(&asked, b"GET");
}

on_each_backend! {
    an_instance_gets_its_lease_with_all_that_it_needs,
    a_lease_is_told_to_those_who_watch,
    a_wrong_address_is_refused,
    an_interface_that_comes_later_gets_its_lease_from_the_same_server,
    malformed_messages_do_not_stop_the_server,
    the_gateway_and_the_metadata_address_are_on_the_segment,
    the_metadata_service_is_reached_from_the_instances_own_address,
}
