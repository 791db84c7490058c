//! DHCP messages as bytes: `smoltcp`'s wire module does the formats, this file says which fields and
//! options of them we send and what we make of those we get.

use std::net::Ipv4Addr;
use std::time::Duration;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress, IpProtocol, Ipv4Packet, Ipv4Repr, UdpPacket, UdpRepr,
};

use super::lease::{Lease, Network, Route};

pub const CLIENT_PORT: u16 = 68;
pub const SERVER_PORT: u16 = 67;

/// Option codes of RFC 2132 and RFC 3442.
mod option {
    pub const SUBNET_MASK: u8 = 1;
    pub const ROUTER: u8 = 3;
    pub const DNS: u8 = 6;
    pub const DOMAIN: u8 = 15;
    pub const MTU: u8 = 26;
    pub const CLASSLESS_ROUTES: u8 = 121;
}

/// RFC 3442 wants its option before the router's.
const REQUESTED: [u8; 6] =
    [option::CLASSLESS_ROUTES, option::SUBNET_MASK, option::ROUTER, option::DNS, option::DOMAIN, option::MTU];

/// A lease without an end; seconds of some years, so that sums of instants stay in range.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 86_400);
/// Less than the least MTU of IPv4 makes no sense (RFC 2132, 5.1).
const LEAST_MTU: u16 = 68;

/// What the client says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    Discover,
    /// Of an offer: names the address and the server.
    Select {
        address: Ipv4Addr,
        server: Ipv4Addr,
    },
    /// To lengthen a lease: the address is the sender's own.
    Extend {
        address: Ipv4Addr,
    },
}

/// What a server answered to us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Offer(Lease),
    Ack(Lease),
    Nak,
}

/// The payload of a datagram to port 67. `secs`: since the client began.
pub fn encode(request: Request, mac: [u8; 6], xid: u32, secs: u16) -> Vec<u8> {
    let mac = EthernetAddress(mac);
    let (message_type, client_ip, requested_ip, server) = match request {
        Request::Discover => (DhcpMessageType::Discover, Ipv4Addr::UNSPECIFIED, None, None),
        Request::Select { address, server } => {
            (DhcpMessageType::Request, Ipv4Addr::UNSPECIFIED, Some(address), Some(server))
        }
        Request::Extend { address } => (DhcpMessageType::Request, address, None, None),
    };
    let repr = DhcpRepr {
        message_type,
        transaction_id: xid,
        secs,
        client_hardware_address: mac,
        client_ip,
        your_ip: Ipv4Addr::UNSPECIFIED,
        server_ip: Ipv4Addr::UNSPECIFIED,
        router: None,
        subnet_mask: None,
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        // The answer is read below the IP layer, so it may come to the address that is not ours yet.
        broadcast: false,
        requested_ip,
        client_identifier: Some(mac),
        server_identifier: server,
        parameter_request_list: Some(&REQUESTED),
        dns_servers: None,
        max_size: Some(1432),
        lease_duration: None,
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
    };
    let mut bytes = vec![0; repr.buffer_len()];
    let mut packet = DhcpPacket::new_unchecked(&mut bytes[..]);
    // It fails only if the buffer is too small, and its length is the one that was asked for.
    debug_assert!(repr.emit(&mut packet).is_ok());
    let _ = repr.emit(&mut packet);
    bytes
}

/// The reply in `payload`, if it is one to this client in this transaction and makes sense.
pub fn decode(payload: &[u8], mac: [u8; 6], xid: u32) -> Option<Reply> {
    let packet = DhcpPacket::new_checked(payload).ok()?;
    let repr = DhcpRepr::parse(&packet).ok()?;
    if repr.transaction_id != xid || repr.client_hardware_address != EthernetAddress(mac) {
        return None;
    }
    match repr.message_type {
        DhcpMessageType::Offer => Some(Reply::Offer(lease(&packet, &repr)?)),
        DhcpMessageType::Ack => Some(Reply::Ack(lease(&packet, &repr)?)),
        DhcpMessageType::Nak => Some(Reply::Nak),
        _ => None,
    }
}

fn lease(packet: &DhcpPacket<&[u8]>, repr: &DhcpRepr<'_>) -> Option<Lease> {
    let find = |kind: u8| packet.options().find(|option| option.kind == kind).map(|o| o.data);
    let address = repr.your_ip;
    if address.is_unspecified() || address.is_multicast() || address.is_broadcast() {
        return None;
    }
    let (renew, rebind, expire) = times(repr);
    Some(Lease {
        address,
        prefix: prefix(repr.subnet_mask?)?,
        server: repr.server_identifier?,
        routes: routes(find(option::CLASSLESS_ROUTES), find(option::ROUTER)),
        dns: addresses(find(option::DNS).unwrap_or_default()),
        domain: find(option::DOMAIN).and_then(domain),
        mtu: find(option::MTU)
            .and_then(|data| Some(u16::from_be_bytes(data.try_into().ok()?)))
            .filter(|mtu| *mtu >= LEAST_MTU),
        renew,
        rebind,
        expire,
    })
}

/// Renewal, rebinding and end, in this order whatever the server says. Defaults: RFC 2131, 4.4.5.
fn times(repr: &DhcpRepr<'_>) -> (Duration, Duration, Duration) {
    let seconds = |value: u32| match value {
        u32::MAX => FOREVER,
        value => Duration::from_secs(value.into()).min(FOREVER),
    };
    let expire = repr.lease_duration.map_or(FOREVER, seconds).max(Duration::from_secs(8));
    let rebind = repr.rebind_duration.map(seconds).filter(|rebind| *rebind < expire);
    let rebind = rebind.unwrap_or(expire * 7 / 8);
    let renew = repr.renew_duration.map(seconds).filter(|renew| *renew < rebind);
    (renew.unwrap_or(rebind * 4 / 7), rebind, expire)
}

/// `None` if the mask's ones are not all in front.
fn prefix(mask: Ipv4Addr) -> Option<u8> {
    let bits = mask.to_bits();
    let ones = bits.leading_ones();
    (bits.count_ones() == ones).then_some(u8::try_from(ones).ok()?)
}

/// If there are classless routes the router option counts for nothing (RFC 3442).
fn routes(classless: Option<&[u8]>, router: Option<&[u8]>) -> Vec<Route> {
    match classless.and_then(classless_routes) {
        Some(routes) => routes,
        None => addresses(router.unwrap_or_default())
            .first()
            .map(|gateway| Route::default_by(*gateway))
            .into_iter()
            .collect(),
    }
}

/// Prefix length, as many bytes of the destination as it needs, gateway. `None` if it is cut off.
fn classless_routes(mut data: &[u8]) -> Option<Vec<Route>> {
    let mut routes = Vec::new();
    while let Some((prefix, rest)) = data.split_first() {
        let significant = usize::from(prefix.div_ceil(8));
        let (destination, rest) = rest.split_at_checked(significant)?;
        let (gateway, rest) = rest.split_first_chunk::<4>()?;
        let mut octets = [0; 4];
        octets.get_mut(..significant)?.copy_from_slice(destination);
        let gateway = Ipv4Addr::from(*gateway);
        routes.push(Route {
            destination: Network::new(Ipv4Addr::from(octets), *prefix)?,
            gateway: (!gateway.is_unspecified()).then_some(gateway),
        });
        data = rest;
    }
    (!routes.is_empty()).then_some(routes)
}

fn addresses(data: &[u8]) -> Vec<Ipv4Addr> {
    let (whole, _) = data.as_chunks::<4>();
    whole.iter().map(|octets| Ipv4Addr::from(*octets)).collect()
}

/// It goes into a file that programs parse: only what a domain name may hold.
fn domain(data: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(data).ok()?.trim_end_matches('\0');
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'.' || byte == b'-';
    (!text.is_empty() && text.bytes().all(fine)).then(|| text.to_owned())
}

/// `payload` as an IPv4 datagram from an interface without an address to everybody.
pub fn broadcast_datagram(payload: &[u8]) -> Vec<u8> {
    let (from, to) = (Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST);
    let udp = UdpRepr { src_port: CLIENT_PORT, dst_port: SERVER_PORT };
    let ip = Ipv4Repr {
        src_addr: from,
        dst_addr: to,
        next_header: IpProtocol::Udp,
        payload_len: udp.header_len() + payload.len(),
        hop_limit: 64,
    };
    let checksums = ChecksumCapabilities::default();
    let mut bytes = vec![0; ip.buffer_len() + ip.payload_len];
    ip.emit(&mut Ipv4Packet::new_unchecked(&mut bytes[..]), &checksums);
    udp.emit(
        &mut UdpPacket::new_unchecked(&mut bytes[ip.buffer_len()..]),
        &from.into(),
        &to.into(),
        payload.len(),
        |buffer| buffer.copy_from_slice(payload),
        &checksums,
    );
    bytes
}

/// The payload, if `datagram` is IPv4 and UDP to the client's port.
///
/// The UDP checksum is not looked at: between a host and its guest it is often left to a network card
/// that the packet never passes.
pub fn client_payload(datagram: &[u8]) -> Option<&[u8]> {
    let ip = Ipv4Packet::new_checked(datagram).ok()?;
    if ip.next_header() != IpProtocol::Udp || ip.more_frags() || ip.frag_offset() != 0 {
        return None;
    }
    let udp = UdpPacket::new_checked(ip.payload()).ok()?;
    (udp.dst_port() == CLIENT_PORT).then(|| udp.payload())
}

#[cfg(test)]
pub mod tests {
    use proptest::prelude::*;
    use smoltcp::wire::DhcpOption;

    use super::*;

    pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    /// A server's message, for the tests of the state machine too.
    pub fn reply(kind: DhcpMessageType, xid: u32, seconds: u32, options: &[DhcpOption<'_>]) -> Vec<u8> {
        let repr = DhcpRepr {
            message_type: kind,
            transaction_id: xid,
            secs: 0,
            client_hardware_address: EthernetAddress(MAC),
            client_ip: Ipv4Addr::UNSPECIFIED,
            your_ip: Ipv4Addr::new(172, 31, 0, 4),
            server_ip: Ipv4Addr::UNSPECIFIED,
            router: Some(Ipv4Addr::new(172, 31, 0, 1)),
            subnet_mask: Some(Ipv4Addr::new(255, 255, 240, 0)),
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast: false,
            requested_ip: None,
            client_identifier: None,
            server_identifier: Some(Ipv4Addr::new(172, 31, 0, 1)),
            parameter_request_list: None,
            dns_servers: None,
            max_size: None,
            lease_duration: Some(seconds),
            renew_duration: None,
            rebind_duration: None,
            additional_options: options,
        };
        let mut bytes = vec![0; repr.buffer_len()];
        repr.emit(&mut DhcpPacket::new_unchecked(&mut bytes[..])).unwrap();
        bytes
    }

    fn acked(options: &[DhcpOption<'_>]) -> Lease {
        match decode(&reply(DhcpMessageType::Ack, 7, 3600, options), MAC, 7) {
            Some(Reply::Ack(lease)) => lease,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_lease_is_read() {
        let lease = acked(&[
            DhcpOption { kind: option::MTU, data: &[0x05, 0x78] },
            DhcpOption { kind: option::DNS, data: &[172, 31, 0, 2] },
            DhcpOption { kind: option::DOMAIN, data: b"mallee-1.internal" },
        ]);
        assert_eq!(lease.to_string(), "172.31.0.4/20, 0.0.0.0/0 via 172.31.0.1, MTU 1400");
        assert_eq!(lease.dns, [Ipv4Addr::new(172, 31, 0, 2)]);
        assert_eq!(lease.domain.as_deref(), Some("mallee-1.internal"));
        assert_eq!(lease.renew, Duration::from_secs(1800));
        assert_eq!(lease.rebind, Duration::from_secs(3150));
    }

    #[test]
    fn classless_routes_take_the_routers_place() {
        let data = [0, 172, 31, 0, 9, 16, 10, 1, 0, 0, 0, 0];
        let lease = acked(&[DhcpOption { kind: option::CLASSLESS_ROUTES, data: &data }]);
        let routes: Vec<String> = lease.routes.iter().map(Route::to_string).collect();
        assert_eq!(routes, ["0.0.0.0/0 via 172.31.0.9", "10.1.0.0/16 on the link"]);
    }

    #[test]
    fn a_cut_off_route_list_is_not_used() {
        let lease = acked(&[DhcpOption { kind: option::CLASSLESS_ROUTES, data: &[24, 10] }]);
        assert_eq!(lease.routes, [Route::default_by(Ipv4Addr::new(172, 31, 0, 1))]);
    }

    #[test]
    fn others_answers_are_not_ours() {
        let bytes = reply(DhcpMessageType::Offer, 7, 60, &[]);
        assert!(matches!(decode(&bytes, MAC, 7), Some(Reply::Offer(_))));
        assert_eq!(decode(&bytes, MAC, 8), None);
        assert_eq!(decode(&bytes, [2, 0, 0, 0, 0, 2], 7), None);
    }

    #[test]
    fn a_mask_with_holes_is_none() {
        assert_eq!(prefix(Ipv4Addr::new(255, 0, 255, 0)), None);
        assert_eq!(prefix(Ipv4Addr::UNSPECIFIED), Some(0));
        assert_eq!(prefix(Ipv4Addr::BROADCAST), Some(32));
    }

    #[test]
    fn a_datagram_carries_its_payload() {
        let mut bytes = broadcast_datagram(b"hello");
        assert_eq!(client_payload(&bytes), None, "it goes to the server's port");
        bytes[22..24].copy_from_slice(&CLIENT_PORT.to_be_bytes());
        assert_eq!(client_payload(&bytes), Some(&b"hello"[..]));
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = client_payload(&bytes);
            let _ = decode(&bytes, MAC, 0);
            let _ = classless_routes(&bytes);
        }

        #[test]
        fn a_damaged_reply_is_survived_and_its_lease_makes_sense(
            damage in proptest::collection::vec((0usize..300, any::<u8>()), 0..20),
            length in 0usize..400,
        ) {
            let mut bytes = reply(DhcpMessageType::Ack, 7, 3600, &[]);
            for (at, value) in damage {
                if let Some(byte) = bytes.get_mut(at) { *byte = value; }
            }
            bytes.truncate(length);
            if let Some(Reply::Ack(lease)) = decode(&bytes, MAC, 7) {
                prop_assert!(lease.renew < lease.rebind && lease.rebind < lease.expire);
                prop_assert!(lease.prefix <= 32);
            }
        }
    }
}
