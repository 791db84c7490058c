//! The protocol's state machine (RFC 2131, figure 5, without the part for rebooting clients).
//!
//! It is driven from outside: [`Client::step`] says what is to be done now, [`Client::receive`] hands it what came in.
//! Time is an argument, so that a test can live through a lease in no time.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use super::lease::Lease;
use super::wire::{self, Reply, Request};

/// The first repetition comes soon (in a virtual network a lost packet means that something was not up yet), the
/// pause doubles to the second.
const PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(16));
/// An offer that is not acknowledged after so many requests is given up.
const SELECT_ATTEMPTS: u32 = 4;
/// Least pause between attempts to lengthen a lease (RFC 2131, 4.4.5).
const LEAST_EXTENSION_PAUSE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    Everybody,
    Server(Ipv4Addr),
}

/// What the caller has to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Send {
        message: Vec<u8>,
        to: Destination,
    },
    /// Receive, until then at most.
    Wait {
        until: Instant,
    },
    /// The interface gets this configuration.
    Configure(Lease),
    /// The lease was lengthened; the interface stays as it is, and no answer is awaited.
    Renewed,
    /// The lease ended: the address must not be used any more.
    Deconfigure,
}

#[derive(Debug)]
enum State {
    /// Looking for a server.
    Selecting { retry: Retry },
    /// A server's offer was chosen, its acknowledgement is awaited.
    Requesting { offer: Lease, retry: Retry },
    /// The lease holds.
    Bound { lease: Lease, since: Instant },
    /// The lease holds and is to be lengthened: asked of its server, or (`rebinding`) of any.
    Extending { lease: Lease, since: Instant, next: Instant },
}

#[derive(Debug)]
struct Retry {
    attempts: u32,
    pause: Duration,
    next: Instant,
}

impl Retry {
    fn new(now: Instant) -> Self {
        Retry { attempts: 0, pause: PAUSE.0, next: now }
    }

    /// True if it is time for another attempt, which is then counted.
    fn is_due(&mut self, now: Instant) -> bool {
        if now < self.next {
            return false;
        }
        self.attempts += 1;
        self.next = now + self.pause;
        self.pause = (self.pause * 2).min(PAUSE.1);
        true
    }
}

#[derive(Debug)]
pub struct Client {
    mac: [u8; 6],
    xid: u32,
    began: Instant,
    /// When the request was sent for which the last answer was awaited: leases count from it.
    asked: Instant,
    state: State,
    /// Told to the caller before anything else.
    news: Option<Step>,
}

impl Client {
    pub fn new(mac: [u8; 6], now: Instant, xid: u32) -> Self {
        Client { mac, xid, began: now, asked: now, state: State::Selecting { retry: Retry::new(now) }, news: None }
    }

    /// What is to be done at `now`. To be called again after each step was carried out.
    pub fn step(&mut self, now: Instant) -> Step {
        if let Some(news) = self.news.take() {
            return news;
        }
        match &mut self.state {
            State::Selecting { retry } => {
                if retry.is_due(now) {
                    return self.say(Request::Discover, Destination::Everybody, now);
                }
                Step::Wait { until: retry.next }
            }
            State::Requesting { offer, retry } => {
                if !retry.is_due(now) {
                    return Step::Wait { until: retry.next };
                }
                if retry.attempts > SELECT_ATTEMPTS {
                    self.start_over(now);
                    return self.step(now);
                }
                let select = Request::Select { address: offer.address, server: offer.server };
                self.say(select, Destination::Everybody, now)
            }
            State::Bound { lease, since } => {
                let renew = *since + lease.renew;
                if now < renew {
                    return Step::Wait { until: renew };
                }
                let (lease, since) = (lease.clone(), *since);
                self.xid = self.xid.wrapping_add(1);
                self.state = State::Extending { lease, since, next: now };
                self.step(now)
            }
            State::Extending { .. } => self.extend(now),
        }
    }

    fn extend(&mut self, now: Instant) -> Step {
        let State::Extending { lease, since, next } = &mut self.state else {
            return Step::Wait { until: now };
        };
        let (rebind, expire) = (*since + lease.rebind, *since + lease.expire);
        if now >= expire {
            self.start_over(now);
            return Step::Deconfigure;
        }
        if now < *next {
            return Step::Wait { until: *next };
        }
        let (to, end) =
            if now < rebind { (Destination::Server(lease.server), rebind) } else { (Destination::Everybody, expire) };
        // Half of the time that is left, and no oftener than once a minute, but at the end of the phase
        // in any case.
        let pause = ((end - now) / 2).max(LEAST_EXTENSION_PAUSE);
        *next = (now + pause).min(end);
        let extend = Request::Extend { address: lease.address };
        self.say(extend, to, now)
    }

    /// Takes the payload of a datagram that came to the client's port.
    pub fn receive(&mut self, payload: &[u8], now: Instant) {
        let Some(reply) = wire::decode(payload, self.mac, self.xid) else {
            return;
        };
        match (&self.state, reply) {
            (State::Selecting { .. }, Reply::Offer(offer)) => {
                self.state = State::Requesting { offer, retry: Retry::new(now) };
            }
            (State::Requesting { offer, .. }, Reply::Ack(lease)) if lease.address == offer.address => {
                self.bind(lease, true);
            }
            (State::Extending { lease: old, .. }, Reply::Ack(lease)) => {
                let changed = !old.same_configuration(&lease);
                self.bind(lease, changed);
            }
            (State::Requesting { .. }, Reply::Nak) => self.start_over(now),
            (State::Extending { .. }, Reply::Nak) => {
                self.start_over(now);
                self.news = Some(Step::Deconfigure);
            }
            // Late or repeated; nothing to do.
            _ => {}
        }
    }

    fn bind(&mut self, lease: Lease, configure: bool) {
        self.news = Some(if configure { Step::Configure(lease.clone()) } else { Step::Renewed });
        self.state = State::Bound { lease, since: self.asked };
    }

    fn start_over(&mut self, now: Instant) {
        self.xid = self.xid.wrapping_add(1);
        self.began = now;
        // Not at once: a server that refuses would be asked in a tight circle.
        let mut retry = Retry::new(now + PAUSE.0);
        retry.pause = PAUSE.0 * 2;
        self.state = State::Selecting { retry };
    }

    fn say(&mut self, request: Request, to: Destination, now: Instant) -> Step {
        self.asked = now;
        let secs = u16::try_from((now - self.began).as_secs()).unwrap_or(u16::MAX);
        Step::Send { message: wire::encode(request, self.mac, self.xid, secs), to }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use smoltcp::wire::{DhcpMessageType, DhcpPacket, DhcpRepr};

    use super::super::wire::tests::{MAC, reply};
    use super::*;

    const XID: u32 = 100;

    fn sent(step: &Step) -> (DhcpMessageType, Option<Ipv4Addr>, u32, Destination) {
        let Step::Send { message, to } = step else { panic!("{step:?}") };
        let packet = DhcpPacket::new_checked(&message[..]).unwrap();
        let repr = DhcpRepr::parse(&packet).unwrap();
        (repr.message_type, repr.requested_ip, repr.transaction_id, *to)
    }

    /// A client with a lease of an hour that began at the returned instant.
    fn bound() -> (Client, Instant) {
        let now = Instant::now();
        let mut client = Client::new(MAC, now, XID);
        assert_eq!(sent(&client.step(now)).0, DhcpMessageType::Discover);
        client.receive(&reply(DhcpMessageType::Offer, XID, 3600, &[]), now);
        let (kind, address, xid, to) = sent(&client.step(now));
        assert_eq!((kind, xid, to), (DhcpMessageType::Request, XID, Destination::Everybody));
        assert_eq!(address, Some(Ipv4Addr::new(172, 31, 0, 4)));
        client.receive(&reply(DhcpMessageType::Ack, XID, 3600, &[]), now);
        assert!(matches!(client.step(now), Step::Configure(_)));
        (client, now)
    }

    #[test]
    fn it_asks_until_there_is_an_answer() {
        let mut now = Instant::now();
        let began = now;
        let mut client = Client::new(MAC, now, XID);
        let mut asked = 0;
        while now < began + Duration::from_secs(3600) {
            match client.step(now) {
                Step::Send { .. } => asked += 1,
                Step::Wait { until } => now = until,
                other => panic!("{other:?}"),
            }
        }
        assert!(asked > 3600 / 17, "{asked}");
    }

    #[test]
    fn a_lease_is_renewed_by_its_server_and_nothing_is_reconfigured() {
        let (mut client, began) = bound();
        assert_eq!(client.step(began), Step::Wait { until: began + Duration::from_secs(1800) });
        let now = began + Duration::from_secs(1800);
        let (kind, requested, xid, to) = sent(&client.step(now));
        assert_eq!((kind, requested), (DhcpMessageType::Request, None));
        assert_eq!(to, Destination::Server(Ipv4Addr::new(172, 31, 0, 1)));
        client.receive(&reply(DhcpMessageType::Ack, xid, 3600, &[]), now);
        assert_eq!(client.step(now), Step::Renewed);
        assert_eq!(client.step(now), Step::Wait { until: now + Duration::from_secs(1800) });
    }

    #[test]
    fn a_lease_that_nobody_renews_ends_and_the_search_begins_again() {
        let (mut client, began) = bound();
        let mut now = began;
        let mut everybody = 0;
        let ended = loop {
            match client.step(now) {
                Step::Wait { until } => {
                    assert!(until > now);
                    now = until;
                }
                Step::Send { to: Destination::Everybody, .. } => everybody += 1,
                Step::Send { .. } => {}
                Step::Deconfigure => break now,
                other => panic!("{other:?}"),
            }
        };
        assert!(everybody > 0, "any server was asked before the end");
        assert_eq!(ended, began + Duration::from_secs(3600));
        let Step::Wait { until } = client.step(now) else { panic!() };
        assert_eq!(sent(&client.step(until)).0, DhcpMessageType::Discover);
    }

    #[test]
    fn a_refused_extension_takes_the_address_away() {
        let (mut client, began) = bound();
        let now = began + Duration::from_secs(1800);
        let xid = sent(&client.step(now)).2;
        client.receive(&reply(DhcpMessageType::Nak, xid, 0, &[]), now);
        assert_eq!(client.step(now), Step::Deconfigure);
    }

    #[test]
    fn an_unacknowledged_offer_is_given_up() {
        let mut now = Instant::now();
        let mut client = Client::new(MAC, now, XID);
        client.step(now);
        client.receive(&reply(DhcpMessageType::Offer, XID, 60, &[]), now);
        let mut requests = 0;
        loop {
            match client.step(now) {
                Step::Wait { until } => now = until,
                step => match sent(&step).0 {
                    DhcpMessageType::Request => requests += 1,
                    DhcpMessageType::Discover => break,
                    other => panic!("{other:?}"),
                },
            }
        }
        assert_eq!(requests, SELECT_ATTEMPTS);
    }

    proptest! {
        /// Whatever comes in, at whatever time: no panic, no busy loop, and no address without an acknowledgement.
        #[test]
        fn any_sequence_is_survived(events in proptest::collection::vec((0u8..6, 0u64..5_000_000), 0..60)) {
            let mut now = Instant::now();
            let mut client = Client::new(MAC, now, XID);
            let mut acknowledged = false;
            for (kind, milliseconds) in events {
                let kind = match kind {
                    0 => Some(DhcpMessageType::Offer),
                    1 => Some(DhcpMessageType::Ack),
                    2 => Some(DhcpMessageType::Nak),
                    _ => None,
                };
                if let Some(kind) = kind {
                    acknowledged |= kind == DhcpMessageType::Ack;
                    let xid = client.xid;
                    client.receive(&reply(kind, xid, 60, &[]), now);
                } else {
                    now += Duration::from_millis(milliseconds);
                }
                for left in (0..10).rev() {
                    match client.step(now) {
                        Step::Wait { until } => { prop_assert!(until > now); break; }
                        Step::Configure(_) => prop_assert!(acknowledged),
                        _ => {}
                    }
                    prop_assert!(left > 0, "it never waits");
                }
            }
        }
    }
}
