//! What to answer to a query (RFC 1035), or that somebody else must be asked.
//!
//! A pure function of the query's bytes and the view. Names of the VPC's zones and of its addresses are answered with authority;
//! addresses that can only be private (RFC 6303) are never asked of others, who would learn of the lab's insides from
//! the question and could answer it falsely.

use std::net::Ipv4Addr;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, NS, PTR, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use ipnet::{IpNet, Ipv4Net};

use super::view::View;

/// Seconds. As EC2's resolver answers for private names.
const TTL: u32 = 60;
/// What a client without EDNS takes over UDP (RFC 1035, section 4.2.1).
const PLAIN_UDP_LIMIT: u16 = 512;
/// Fragments get lost (RFC 9715): larger answers go over TCP.
pub const UDP_LIMIT: u16 = 1232;

/// Networks whose reverse names mean something only where they are used (RFC 6303, section 4.1 and 4.2).
const PRIVATE: [Ipv4Net; 5] = [
    Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(172, 16, 0, 0), 12),
    Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8),
];

/// What is to be done about a datagram or a message over TCP.
#[derive(Debug)]
pub enum Verdict {
    /// Send this back.
    Answer(Message),
    /// Ask the node's name servers what this message asks, and if they cannot be asked, send back [`failure`] of the question.
    Forward(Question, Message),
    /// It is no query.
    Ignore,
}

/// A well-formed query with exactly one question.
#[derive(Debug, Clone)]
pub struct Question {
    pub id: u16,
    pub query: Query,
    recursion_desired: bool,
    /// What the client takes over UDP, in bytes.
    pub udp_limit: u16,
    has_edns: bool,
}

/// Judges what came in.
pub fn judge(bytes: &[u8], view: &View) -> Verdict {
    let Ok(message) = Message::from_vec(bytes) else { return unreadable(bytes) };
    if message.metadata.message_type != MessageType::Query {
        return Verdict::Ignore;
    }
    let (id, op_code) = (message.metadata.id, message.metadata.op_code);
    if op_code != OpCode::Query {
        return Verdict::Answer(Message::error_msg(id, op_code, ResponseCode::NotImp));
    }
    let [query] = message.queries.as_slice() else {
        return Verdict::Answer(Message::error_msg(id, op_code, ResponseCode::FormErr));
    };
    let edns_limit = message.edns.as_ref().map(|edns| edns.max_payload().clamp(PLAIN_UDP_LIMIT, UDP_LIMIT));
    let question = Question {
        id,
        query: query.clone(),
        recursion_desired: message.metadata.recursion_desired,
        udp_limit: edns_limit.unwrap_or(PLAIN_UDP_LIMIT),
        has_edns: edns_limit.is_some(),
    };
    if query.query_class != DNSClass::IN {
        return Verdict::Answer(question.reply(ResponseCode::Refused));
    }
    match local(&question, view) {
        Some(answer) => Verdict::Answer(answer),
        None => Verdict::Forward(question, message),
    }
}

/// An error for who sent something that begins like a query; nothing for other noise, and never an answer to an answer.
fn unreadable(bytes: &[u8]) -> Verdict {
    match bytes {
        [a, b, flags, _, ..] if bytes.len() >= 12 && flags & 0x80 == 0 => {
            Verdict::Answer(Message::error_msg(u16::from_be_bytes([*a, *b]), OpCode::Query, ResponseCode::FormErr))
        }
        _ => Verdict::Ignore,
    }
}

/// The answer when nobody could be asked.
pub fn failure(question: &Question) -> Message {
    question.reply(ResponseCode::ServFail)
}

/// The answer when the question may not be asked now.
pub fn refusal(question: &Question) -> Message {
    question.reply(ResponseCode::Refused)
}

/// The answer to what is ours to answer.
fn local(question: &Question, view: &View) -> Option<Message> {
    let name = &question.query.name;
    if let Some(zone) = view.zone(name) {
        return Some(in_zone(question, zone, view));
    }
    reverse(question, reverse_of(name)?, view)
}

/// What a name below `in-addr.arpa` is about.
struct Reverse {
    /// `0.10.in-addr.arpa` is 10.0.0.0/16.
    network: Ipv4Net,
    /// The name lies below that of the network, as what is asked for DNS service discovery does (RFC 6763, section 11).
    is_below: bool,
}

fn reverse_of(name: &Name) -> Option<Reverse> {
    let labels = name.iter().len();
    // From the labels of an address down to those of an eighth of all addresses: the longest that says a network.
    (3..=labels.min(6)).rev().find_map(|count| match name.trim_to(count).parse_arpa_name() {
        Ok(IpNet::V4(network)) => Some(Reverse { network, is_below: labels > count }),
        _ => None,
    })
}

fn in_zone(question: &Question, zone: &Name, view: &View) -> Message {
    let name = &question.query.name;
    let mut reply = question.reply(ResponseCode::NoError);
    reply.metadata.authoritative = true;
    let is_apex = name == zone;
    let address = view.address_of(name);
    let data = match (question.query.query_type, address) {
        (RecordType::A, Some(address)) => Some(RData::A(A(address))),
        (RecordType::SOA, _) if is_apex => Some(RData::SOA(authority(zone))),
        (RecordType::NS, _) if is_apex => Some(RData::NS(NS(server_of(zone)))),
        _ => None,
    };
    match data {
        Some(data) => {
            reply.add_answer(Record::from_rdata(name.clone(), TTL, data));
        }
        None => {
            if !is_apex && address.is_none() {
                reply.metadata.response_code = ResponseCode::NXDomain;
            }
            deny(&mut reply, zone);
        }
    }
    reply
}

/// `None` for what others may know.
fn reverse(question: &Question, about: Reverse, view: &View) -> Option<Message> {
    let Reverse { network, is_below } = about;
    let name = &question.query.name;
    let is_address = network.prefix_len() == 32;
    let host = view.name_of(network.addr()).filter(|_| is_address);
    if host.is_none() && !view.holds(&network) && !PRIVATE.iter().any(|private| private.contains(&network)) {
        return None;
    }
    let mut reply = question.reply(ResponseCode::NoError);
    reply.metadata.authoritative = true;
    match (host, question.query.query_type) {
        (Some(host), RecordType::PTR) if !is_below => {
            reply.add_answer(Record::from_rdata(name.clone(), TTL, RData::PTR(PTR(host))));
        }
        (Some(_), _) if !is_below => deny(&mut reply, name),
        // The name of a network is there, with nothing of its own: one that is not has nothing below it (RFC 8020), and resolvers ask for it on their way (RFC 9156).
        _ if !is_address && !is_below => deny(&mut reply, name),
        _ => {
            reply.metadata.response_code = ResponseCode::NXDomain;
            deny(&mut reply, &name.base_name());
        }
    }
    Some(reply)
}

/// Says for how long there is nothing (RFC 2308, section 3).
fn deny(reply: &mut Message, zone: &Name) {
    reply.add_authority(Record::from_rdata(zone.clone(), TTL, RData::SOA(authority(zone))));
}

fn authority(zone: &Name) -> SOA {
    let server = server_of(zone);
    SOA::new(server.clone(), server, 1, 3600, 600, 86_400, TTL)
}

fn server_of(zone: &Name) -> Name {
    // A zone that is so long that nothing fits before it names itself.
    zone.prepend_label("ns").unwrap_or_else(|_| zone.clone())
}

impl Question {
    fn reply(&self, code: ResponseCode) -> Message {
        let mut reply = Message::response(self.id, OpCode::Query);
        reply.metadata.recursion_desired = self.recursion_desired;
        reply.metadata.recursion_available = true;
        reply.metadata.response_code = code;
        reply.add_query(self.query.clone());
        if self.has_edns {
            let mut edns = Edns::new();
            edns.set_max_payload(UDP_LIMIT);
            reply.set_edns(edns);
        }
        reply
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::testing;
    use proptest::prelude::*;

    const HOST: &str = "ip-172-31-0-4.mallee-1.compute.internal.";

    fn view() -> View {
        let network = testing::network();
        View::of(&network, network.segments.values().next().unwrap())
    }

    fn ask(name: &str, kind: RecordType) -> Verdict {
        let mut message = Message::query();
        message.metadata.id = 77;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        judge(&message.to_vec().unwrap(), &view())
    }

    fn answered(name: &str, kind: RecordType) -> Message {
        match ask(name, kind) {
            Verdict::Answer(reply) => reply,
            other => panic!("{name}: {other:?}"),
        }
    }

    #[test]
    fn a_private_name_is_answered_with_its_address() {
        let reply = answered(HOST, RecordType::A);
        assert_eq!((reply.metadata.id, reply.metadata.authoritative), (77, true));
        assert_eq!(reply.answers[0].data, RData::A(A::new(172, 31, 0, 4)));
    }

    #[test]
    fn a_name_without_an_address_of_that_kind_exists_all_the_same() {
        let reply = answered(HOST, RecordType::AAAA);
        assert_eq!(reply.metadata.response_code, ResponseCode::NoError);
        assert!(reply.answers.is_empty() && reply.authorities.len() == 1);
        let reply = answered("nobody.mallee-1.compute.internal.", RecordType::A);
        assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain);
    }

    #[test]
    fn an_address_of_the_vpc_has_a_name_and_other_private_ones_stay_here() {
        let reply = answered("4.0.31.172.in-addr.arpa.", RecordType::PTR);
        assert_eq!(reply.answers[0].data, RData::PTR(PTR(Name::from_ascii(HOST).unwrap())));
        let reply = answered("4.3.2.10.in-addr.arpa.", RecordType::PTR);
        assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain);
    }

    #[test]
    fn what_is_above_or_below_private_addresses_stays_here_too() {
        for (name, code) in [
            ("10.in-addr.arpa.", ResponseCode::NoError),
            ("0.10.in-addr.arpa.", ResponseCode::NoError),
            ("0.31.172.IN-ADDR.arpa.", ResponseCode::NoError),
            ("lb._dns-sd._udp.0.0.31.172.in-addr.arpa.", ResponseCode::NXDomain),
            ("x.4.0.31.172.in-addr.arpa.", ResponseCode::NXDomain),
            ("0-25.1.168.192.in-addr.arpa.", ResponseCode::NXDomain),
        ] {
            let reply = answered(name, RecordType::PTR);
            assert_eq!(reply.metadata.response_code, code, "{name}");
            assert!(reply.answers.is_empty() && reply.authorities.len() == 1, "{name}");
        }
    }

    #[test]
    fn others_names_are_asked_of_others() {
        for name in [
            "example.org.",
            "1.1.1.1.in-addr.arpa.",
            "172.in-addr.arpa.",
            "in-addr.arpa.",
            "x.in-addr.arpa.",
            "compute.internal.",
        ] {
            assert!(matches!(ask(name, RecordType::A), Verdict::Forward(..)), "{name}");
        }
    }

    #[test]
    fn what_is_no_plain_query_is_refused_and_an_answer_never_answered() {
        let code = |message: &Message| match judge(&message.to_vec().unwrap(), &view()) {
            Verdict::Answer(reply) => Some(reply.metadata.response_code),
            _ => None,
        };
        let mut two = Message::query();
        two.add_query(Query::query(Name::root(), RecordType::A)).add_query(Query::query(Name::root(), RecordType::A));
        assert_eq!(code(&two), Some(ResponseCode::FormErr));
        let update = Message::new(1, MessageType::Query, OpCode::Update);
        assert_eq!(code(&update), Some(ResponseCode::NotImp));
        assert_eq!(code(&Message::response(1, OpCode::Query)), None);
        assert!(matches!(judge(&[0; 11], &view()), Verdict::Ignore));
        assert!(matches!(judge(&[0xff; 40], &view()), Verdict::Ignore));
    }

    proptest! {
        #[test]
        fn any_datagram_is_survived(bytes: Vec<u8>, position in 0usize..64, noise: Vec<u8>) {
            let view = view();
            judge(&bytes, &view);
            let mut message = Message::query();
            message.add_query(Query::query(Name::from_ascii(HOST).unwrap(), RecordType::A));
            let mut near = message.to_vec().unwrap();
            let end = near.len().min(position + noise.len());
            if position < end {
                near[position..end].copy_from_slice(&noise[..end - position]);
            }
            if let Verdict::Answer(reply) = judge(&near, &view) {
                prop_assert!(reply.to_vec().is_ok());
            }
        }
    }
}
