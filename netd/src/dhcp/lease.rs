//! What to answer to a DHCP message (RFC 2131, section 4.3).
//!
//! An address belongs to an interface for as long as the interface is there, so nothing is
//! remembered here: a lease is looked up, not made.

use std::net::Ipv4Addr;

use dhcproto::v4::{DhcpOption, DhcpOptions, Flags, HType, Message, MessageType, Opcode, OptionCode};
use ipnet::Ipv4Net;

use super::Leases;
use crate::api::METADATA_ADDRESS;
use crate::desired::{Interface, MacAddress, Segment};
use crate::dns;

/// Seconds. As EC2: long enough to be no load, short enough for a change of options to arrive.
const LEASE_SECONDS: u32 = 3600;

/// An answer, where it goes, and whose lease it gives.
#[derive(Debug)]
pub struct Answer<'a> {
    pub message: Message,
    pub to: Ipv4Addr,
    /// The interface, when the answer gives it its address (not when it only offers).
    pub gives: Option<&'a Interface>,
}

/// The answer to `request`, or none when none is due: from a stranger, to another server, through a
/// relay.
pub fn answer<'a>(request: &Message, leases: &'a Leases) -> Option<Answer<'a>> {
    let mac = client_mac(request)?;
    if request.opcode() != Opcode::BootRequest || !request.giaddr().is_unspecified() {
        return None;
    }
    let interface = leases.by_mac.get(&mac)?;
    let segment = &leases.segment;
    // An answer may go to that address, so it must not be another's.
    let is_own = request.ciaddr().is_unspecified() || interface.addresses().any(|own| own == request.ciaddr());
    match request.opts().msg_type()? {
        MessageType::Discover if is_own => Some(lease(request, segment, interface, MessageType::Offer)),
        MessageType::Request => answer_request(request, segment, interface, is_own),
        // The client has its address otherwise and asks for the rest.
        MessageType::Inform if is_own => Some(information(request, segment, interface)),
        MessageType::Decline => {
            tracing::warn!(interface = %interface.id, ipv4 = %interface.ipv4,
                "the instance found its address in use by another");
            None
        }
        _ => None,
    }
}

/// The MAC in `chaddr`. The length must be looked at first: it is the client's word.
fn client_mac(request: &Message) -> Option<MacAddress> {
    if request.htype() != HType::Eth || request.hlen() != 6 {
        return None;
    }
    MacAddress::new(request.chaddr().try_into().ok()?)
}

fn answer_request<'a>(
    request: &Message,
    segment: &Segment,
    interface: &'a Interface,
    is_own: bool,
) -> Option<Answer<'a>> {
    if let Some(DhcpOption::ServerIdentifier(server)) = request.opts().get(OptionCode::ServerIdentifier)
        && *server != segment.gateway
    {
        return None;
    }
    // Selecting and rebooting clients name the address in an option, renewing ones in `ciaddr`.
    let wanted = match request.opts().get(OptionCode::RequestedIpAddress) {
        Some(DhcpOption::RequestedIpAddress(ip)) => *ip,
        _ => request.ciaddr(),
    };
    if wanted == interface.ipv4 && is_own {
        Some(lease(request, segment, interface, MessageType::Ack))
    } else {
        Some(refusal(request, segment))
    }
}

fn lease<'a>(request: &Message, segment: &Segment, interface: &'a Interface, kind: MessageType) -> Answer<'a> {
    let mut message = reply(request, segment, kind);
    message.set_yiaddr(interface.ipv4);
    message.opts_mut().insert(DhcpOption::AddressLeaseTime(LEASE_SECONDS));
    add_configuration(request, message.opts_mut(), segment, interface);
    let gives = (kind == MessageType::Ack).then_some(interface);
    Answer { to: destination(request, interface.ipv4), message, gives }
}

fn information<'a>(request: &Message, segment: &Segment, interface: &'a Interface) -> Answer<'a> {
    let mut message = reply(request, segment, MessageType::Ack);
    add_configuration(request, message.opts_mut(), segment, interface);
    Answer { to: destination(request, interface.ipv4), message, gives: None }
}

fn refusal(request: &Message, segment: &Segment) -> Answer<'static> {
    let message = reply(request, segment, MessageType::Nak);
    // The client's address is not one that it may be reached at.
    Answer { message, to: Ipv4Addr::BROADCAST, gives: None }
}

fn reply(request: &Message, segment: &Segment, kind: MessageType) -> Message {
    let mut message = Message::default();
    message
        .set_opcode(Opcode::BootReply)
        .set_htype(HType::Eth)
        .set_xid(request.xid())
        .set_flags(request.flags())
        .set_ciaddr(request.ciaddr())
        .set_siaddr(Ipv4Addr::UNSPECIFIED)
        .set_chaddr(request.chaddr());
    match kind {
        MessageType::Nak => {
            message.set_ciaddr(Ipv4Addr::UNSPECIFIED).set_flags(Flags::default().set_broadcast());
        }
        MessageType::Offer => _ = message.set_ciaddr(Ipv4Addr::UNSPECIFIED),
        _ => {}
    }
    // RFC 6842, section 3: as it was sent.
    if let Some(identifier) = request.opts().get(OptionCode::ClientIdentifier) {
        message.opts_mut().insert(identifier.clone());
    }
    message.opts_mut().insert(DhcpOption::MessageType(kind));
    message.opts_mut().insert(DhcpOption::ServerIdentifier(segment.gateway));
    message
}

fn add_configuration(request: &Message, options: &mut DhcpOptions, segment: &Segment, interface: &Interface) {
    options.insert(DhcpOption::SubnetMask(segment.network.netmask()));
    options.insert(DhcpOption::Router(vec![segment.gateway]));
    options.insert(DhcpOption::BroadcastAddr(segment.network.broadcast()));
    // An MTU fits in 16 bits: parsing keeps it below 9217.
    options.insert(DhcpOption::InterfaceMtu(segment.mtu.try_into().unwrap_or(u16::MAX)));
    options.insert(DhcpOption::DomainNameServer(dns::told_servers(segment)));
    if !segment.ntp_servers.is_empty() {
        options.insert(DhcpOption::NtpServers(segment.ntp_servers.clone()));
    }
    if let Some(domain) = &segment.domain {
        options.insert(DhcpOption::DomainName(domain.clone()));
    }
    if let Some(hostname) = &interface.hostname {
        options.insert(DhcpOption::Hostname(hostname.clone()));
    }
    if asks_for(request, OptionCode::ClasslessStaticRoute) {
        // A client that heeds this option ignores the router option (RFC 3442), so the default
        // route is in it too.
        options.insert(DhcpOption::ClasslessStaticRoute(vec![
            (Ipv4Net::new_assert(METADATA_ADDRESS, 32), segment.gateway),
            (Ipv4Net::default(), segment.gateway),
        ]));
    }
}

fn asks_for(request: &Message, code: OptionCode) -> bool {
    matches!(
        request.opts().get(OptionCode::ParameterRequestList),
        Some(DhcpOption::ParameterRequestList(codes)) if codes.contains(&code)
    )
}

/// RFC 2131, section 4.1. To a client without an address yet the answer goes by its MAC, which the
/// bridge's permanent neighbour entry tells the kernel.
fn destination(request: &Message, ipv4: Ipv4Addr) -> Ipv4Addr {
    if !request.ciaddr().is_unspecified() {
        request.ciaddr()
    } else if request.flags().broadcast() {
        Ipv4Addr::BROADCAST
    } else {
        ipv4
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::testing;
    use crate::dhcp::decode::decode;
    use dhcproto::Encodable;
    use proptest::prelude::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
    const LEASED: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 4);

    fn leases() -> Leases {
        let network = testing::network();
        Leases {
            segment: network.segments.values().next().unwrap().clone(),
            by_mac: network.interfaces.values().map(|i| (i.mac, i.clone())).collect(),
        }
    }

    fn request(kind: MessageType, options: impl IntoIterator<Item = DhcpOption>) -> Message {
        let mut message = Message::default();
        message.set_opcode(Opcode::BootRequest).set_chaddr(&MAC).set_xid(77);
        message.opts_mut().insert(DhcpOption::MessageType(kind));
        for option in options {
            message.opts_mut().insert(option);
        }
        message
    }

    fn kind_of(answer: &Answer) -> MessageType {
        answer.message.opts().msg_type().unwrap()
    }

    #[test]
    fn a_known_mac_is_offered_its_address_and_given_it_when_it_asks() {
        let leases = leases();
        let offer = answer(&request(MessageType::Discover, []), &leases).unwrap();
        assert_eq!(kind_of(&offer), MessageType::Offer);
        assert_eq!((offer.message.yiaddr(), offer.message.xid()), (LEASED, 77));
        assert!(offer.gives.is_none());
        let options = [DhcpOption::RequestedIpAddress(LEASED), DhcpOption::ServerIdentifier(leases.segment.gateway)];
        let ack = answer(&request(MessageType::Request, options), &leases).unwrap();
        assert_eq!(kind_of(&ack), MessageType::Ack);
        assert_eq!(ack.gives.unwrap().id.to_string(), "eni-1");
        assert_eq!(ack.message.opts().get(OptionCode::Hostname), Some(&DhcpOption::Hostname("ip-172-31-0-4".into())));
    }

    #[test]
    fn a_wrong_address_is_refused_and_another_servers_client_left_alone() {
        let leases = leases();
        let other = DhcpOption::RequestedIpAddress(Ipv4Addr::new(172, 31, 0, 9));
        let nak = answer(&request(MessageType::Request, [other]), &leases).unwrap();
        assert_eq!((kind_of(&nak), nak.to), (MessageType::Nak, Ipv4Addr::BROADCAST));
        let foreign = DhcpOption::ServerIdentifier(Ipv4Addr::new(172, 31, 0, 200));
        assert!(answer(&request(MessageType::Request, [foreign]), &leases).is_none());
    }

    #[test]
    fn nothing_is_sent_to_an_address_that_is_not_the_clients() {
        let leases = leases();
        let neighbour = Ipv4Addr::new(172, 31, 0, 9);
        let with_ciaddr = |kind, address, options: &[DhcpOption]| {
            let mut request = request(kind, options.iter().cloned());
            request.set_ciaddr(address);
            request
        };
        for kind in [MessageType::Discover, MessageType::Inform] {
            assert!(answer(&with_ciaddr(kind, neighbour, &[]), &leases).is_none(), "{kind:?}");
        }
        for options in [&[][..], &[DhcpOption::RequestedIpAddress(LEASED)]] {
            let request = with_ciaddr(MessageType::Request, neighbour, options);
            let nak = answer(&request, &leases).unwrap();
            assert_eq!((kind_of(&nak), nak.to), (MessageType::Nak, Ipv4Addr::BROADCAST));
        }
        let renewed = with_ciaddr(MessageType::Request, LEASED, &[]);
        let ack = answer(&renewed, &leases).unwrap();
        assert_eq!((kind_of(&ack), ack.to, ack.message.ciaddr()), (MessageType::Ack, LEASED, LEASED));
        let discover = with_ciaddr(MessageType::Discover, LEASED, &[]);
        let offer = answer(&discover, &leases).unwrap();
        assert_eq!(offer.message.ciaddr(), Ipv4Addr::UNSPECIFIED);
    }

    #[test]
    fn a_clients_identifier_comes_back_as_it_was_sent() {
        let leases = leases();
        let identifier = DhcpOption::ClientIdentifier(vec![255, 0, 0, 0, 1, 9]);
        let wrong = DhcpOption::RequestedIpAddress(Ipv4Addr::new(172, 31, 0, 9));
        for (kind, options) in [
            (MessageType::Discover, vec![identifier.clone()]),
            (MessageType::Inform, vec![identifier.clone()]),
            (MessageType::Request, vec![identifier.clone(), wrong]),
        ] {
            let request = decode(&request(kind, options).to_vec().unwrap()).unwrap();
            let answer = answer(&request, &leases).unwrap();
            assert_eq!(answer.message.opts().get(OptionCode::ClientIdentifier), Some(&identifier), "{kind:?}");
        }
    }

    #[test]
    fn a_stranger_gets_no_answer() {
        let mut stranger = request(MessageType::Discover, []);
        stranger.set_chaddr(&[2, 9, 9, 9, 9, 9]);
        assert!(answer(&stranger, &leases()).is_none());
    }

    #[test]
    fn classless_routes_hold_the_default_route_too() {
        let asked = DhcpOption::ParameterRequestList(vec![OptionCode::ClasslessStaticRoute]);
        let leases = leases();
        let offer = answer(&request(MessageType::Discover, [asked]), &leases).unwrap();
        let Some(DhcpOption::ClasslessStaticRoute(routes)) = offer.message.opts().get(OptionCode::ClasslessStaticRoute)
        else {
            panic!("no routes");
        };
        assert!(routes.iter().any(|(network, _)| network.prefix_len() == 0));
    }

    proptest! {
        /// Whatever bytes arrive, nothing panics, and an answer tells nobody but a known MAC.
        #[test]
        fn any_message_is_survived(bytes: Vec<u8>, kind in 0_u8..9, hlen: u8) {
            let leases = leases();
            let mut whole = request(MessageType::Discover, []).to_vec().unwrap();
            whole[2] = hlen;
            // The message type is the first option, behind its code and length.
            whole[242] = kind;
            whole.truncate(whole.len() - 1);
            whole.extend(&bytes);
            if let Some(message) = decode(&whole)
                && let Some(answer) = answer(&message, &leases)
            {
                prop_assert_eq!(answer.message.chaddr(), MAC);
                prop_assert!(answer.message.to_vec().is_ok());
            }
        }
    }
}
