//! The DHCP client: RFC 2131's state machine (section 4.4), without what a guest that never sleeps through
//! its lease can leave out (INIT-REBOOT, DECLINE, RELEASE).
//!
//! It begins again faster than the RFC's four seconds: a guest of a cloud is often up before the
//! network's other end, and nobody is served by waiting.

use core::net::Ipv4Addr;
use core::time::Duration;

use super::dhcp_message::{Kind, Reply, Request};
use super::{Address, Mac};
use crate::random::Random;
use crate::time::Instant;

/// First wait for an answer; each further one is twice as long, up to [`WAIT_MAX`].
const WAIT_MIN: Duration = Duration::from_millis(200);
const WAIT_MAX: Duration = Duration::from_secs(16);
/// Requests for one offer before the search begins anew.
const REQUESTS: u32 = 4;
/// Shortest wait between two tries to renew (RFC 2131, 4.4.5).
const RENEW_WAIT_MIN: Duration = Duration::from_secs(60);
/// A lease is for ever (RFC 2131, 3.3).
const FOR_EVER: u32 = u32::MAX;

/// What a server gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    pub address: Address,
    pub server: Ipv4Addr,
    /// `None`: for ever.
    pub time: Option<Duration>,
}

/// When a lease must be renewed from its server, renewed from any, and given up.
#[derive(Clone, Copy, Debug)]
struct Times {
    renew: Instant,
    rebind: Instant,
    expire: Instant,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Looking for a server.
    Selecting,
    /// A server's offer is being accepted.
    Requesting { address: Ipv4Addr, server: Ipv4Addr },
    /// The lease is good.
    Bound(Lease, Times),
    /// It is being renewed by the server that gave it.
    Renewing(Lease, Times),
    /// It is being renewed by whoever answers.
    Rebinding(Lease, Times),
}

/// What comes of a reply or of time passing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Bound(Lease),
    Lost,
}

#[derive(Debug)]
pub struct Client {
    mac: Mac,
    state: State,
    transaction: u32,
    /// Messages sent in this state.
    attempts: u32,
    began: Instant,
    deadline: Instant,
}

/// What to send, and to whom: `None` is everybody.
pub type Outgoing = (Request, Option<Ipv4Addr>);

impl Client {
    /// A client that sends its first message when it is polled first.
    pub fn new(mac: Mac, now: Instant, random: &mut Random) -> Self {
        Client { mac, state: State::Selecting, transaction: random.next_u32(), attempts: 0, began: now, deadline: now }
    }

    /// When [`Client::poll`] has something to do.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Goes on when the deadline has come: what to send, and whether the lease is lost.
    pub fn poll(&mut self, now: Instant, random: &mut Random) -> (Option<Outgoing>, Option<Change>) {
        if now < self.deadline {
            return (None, None);
        }
        let lost = self.advance(now, random);
        let outgoing = self.request(now);
        self.attempts += 1;
        self.deadline = self.next_try(now, random);
        (Some(outgoing), lost)
    }

    /// Into the state that the time asks for.
    fn advance(&mut self, now: Instant, random: &mut Random) -> Option<Change> {
        match self.state {
            State::Selecting => {}
            State::Requesting { .. } if self.attempts < REQUESTS => {}
            State::Requesting { .. } => self.restart(now, random),
            State::Bound(_, times) | State::Renewing(_, times) | State::Rebinding(_, times) if now >= times.expire => {
                self.restart(now, random);
                return Some(Change::Lost);
            }
            State::Bound(lease, times) => {
                self.began = now;
                self.transaction = random.next_u32();
                self.enter(State::Renewing(lease, times));
            }
            State::Renewing(lease, times) if now >= times.rebind => self.enter(State::Rebinding(lease, times)),
            State::Renewing(..) | State::Rebinding(..) => {}
        }
        None
    }

    fn enter(&mut self, state: State) {
        self.state = state;
        self.attempts = 0;
    }

    fn restart(&mut self, now: Instant, random: &mut Random) {
        self.began = now;
        self.deadline = now;
        self.transaction = random.next_u32();
        self.enter(State::Selecting);
    }

    fn request(&self, now: Instant) -> Outgoing {
        let request = Request {
            kind: Kind::Request,
            transaction: self.transaction,
            seconds: now.since(self.began).as_secs().min(0xffff) as u16,
            client: self.mac,
            address: None,
            requested: None,
            server: None,
        };
        match self.state {
            State::Selecting => (Request { kind: Kind::Discover, ..request }, None),
            State::Requesting { address, server } => {
                (Request { requested: Some(address), server: Some(server), ..request }, None)
            }
            State::Bound(lease, _) | State::Renewing(lease, _) => {
                (Request { address: Some(lease.address.ip), ..request }, Some(lease.server))
            }
            State::Rebinding(lease, _) => (Request { address: Some(lease.address.ip), ..request }, None),
        }
    }

    fn next_try(&self, now: Instant, random: &mut Random) -> Instant {
        // Half of what is left, but not more often than the RFC allows.
        let retry = |end: Instant| end.min(now + (end.since(now) / 2).max(RENEW_WAIT_MIN));
        match self.state {
            State::Selecting | State::Requesting { .. } => now + wait(self.attempts, random),
            State::Bound(_, times) => times.renew,
            State::Renewing(_, times) => retry(times.rebind),
            State::Rebinding(_, times) => retry(times.expire),
        }
    }

    /// Takes a server's message.
    pub fn receive(&mut self, now: Instant, reply: &Reply, random: &mut Random) -> Option<Change> {
        if reply.transaction != self.transaction || reply.client != self.mac {
            return None;
        }
        match (self.state, reply.kind) {
            (State::Selecting, Kind::Offer) => {
                self.enter(State::Requesting { address: reply.address, server: reply.server? });
                self.deadline = now;
                None
            }
            (State::Requesting { server, .. }, Kind::Ack | Kind::Nak) if reply.server.is_some_and(|s| s != server) => {
                None
            }
            (State::Requesting { server, .. }, Kind::Ack) => self.bind(now, reply, server),
            (State::Renewing(lease, _) | State::Rebinding(lease, _), Kind::Ack) => self.bind(now, reply, lease.server),
            (State::Requesting { .. }, Kind::Nak) => {
                self.restart(now, random);
                None
            }
            (State::Renewing(..) | State::Rebinding(..), Kind::Nak) => {
                self.restart(now, random);
                Some(Change::Lost)
            }
            _ => None,
        }
    }

    fn bind(&mut self, now: Instant, reply: &Reply, server: Ipv4Addr) -> Option<Change> {
        let prefix = reply.mask.map_or(32, |mask| mask.to_bits().leading_ones() as u8);
        let seconds = reply.lease.filter(|seconds| *seconds > 0)?;
        let time = (seconds != FOR_EVER).then(|| Duration::from_secs(seconds.into()));
        let lease = Lease {
            address: Address { ip: reply.address, prefix, gateway: reply.router },
            server: reply.server.unwrap_or(server),
            time,
        };
        let times = time
            .map_or(Times { renew: Instant::NEVER, rebind: Instant::NEVER, expire: Instant::NEVER }, |time| {
                times(now, time, reply)
            });
        self.deadline = times.renew;
        self.enter(State::Bound(lease, times));
        Some(Change::Bound(lease))
    }
}

/// The server's own times where they are in order, else the RFC's: half and seven eighths.
fn times(now: Instant, lease: Duration, reply: &Reply) -> Times {
    let seconds = |value: Option<u32>| value.map(|seconds| Duration::from_secs(seconds.into()));
    let (renew, rebind) = match (seconds(reply.renewal), seconds(reply.rebinding)) {
        (Some(renew), Some(rebind)) if !renew.is_zero() && renew <= rebind && rebind <= lease => (renew, rebind),
        _ => (lease / 2, lease * 7 / 8),
    };
    Times { renew: now + renew, rebind: now + rebind, expire: now + lease }
}

/// The wait after a number of messages without an answer, a tenth more or less.
fn wait(attempts: u32, random: &mut Random) -> Duration {
    let wait = WAIT_MIN.saturating_mul(1 << attempts.saturating_sub(1).min(10)).min(WAIT_MAX);
    wait * (90 + random.next_u32() % 21) / 100
}

#[cfg(test)]
mod tests {
    use super::super::dhcp_message;
    use super::*;

    const MAC: Mac = Mac([2, 0, 0, 0, 0, 9]);
    const IP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 9);
    const SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    /// Mask /24, router, server, a lease of 3600 s.
    const OPTIONS: [u8; 24] = [1, 4, 255, 255, 255, 0, 3, 4, 10, 0, 0, 1, 54, 4, 10, 0, 0, 1, 51, 4, 0, 0, 14, 16];

    struct Net {
        client: Client,
        random: Random,
        now: Instant,
    }

    impl Net {
        fn new() -> Self {
            let mut random = Random::new(1);
            Net { client: Client::new(MAC, Instant::BEGIN, &mut random), random, now: Instant::BEGIN }
        }

        /// Lets time pass to the client's deadline.
        fn next(&mut self) -> (Outgoing, Option<Change>) {
            self.now = self.now.max(self.client.deadline());
            let (outgoing, change) = self.client.poll(self.now, &mut self.random);
            (outgoing.unwrap(), change)
        }

        fn answer(&mut self, kind: Kind, request: &Request) -> Option<Change> {
            let reply = dhcp_message::parse(&dhcp_message::tests::reply(kind, request, IP, &OPTIONS)).unwrap();
            self.client.receive(self.now, &reply, &mut self.random)
        }

        fn bind(&mut self) -> Lease {
            let ((discover, _), _) = self.next();
            assert_eq!(self.answer(Kind::Offer, &discover), None);
            let ((request, to), _) = self.next();
            assert_eq!((request.requested, request.server, to), (Some(IP), Some(SERVER), None));
            match self.answer(Kind::Ack, &request) {
                Some(Change::Bound(lease)) => lease,
                other => panic!("{other:?}"),
            }
        }

        fn seconds(&self) -> u64 {
            self.now.micros() / 1_000_000
        }
    }

    #[test]
    fn offer_request_ack_give_a_lease() {
        let address = Address { ip: IP, prefix: 24, gateway: Some(SERVER) };
        let lease = Lease { address, server: SERVER, time: Some(Duration::from_secs(3600)) };
        assert_eq!(Net::new().bind(), lease);
    }

    #[test]
    fn it_asks_again_less_and_less_often_but_never_stops() {
        let mut net = Net::new();
        for _ in 0..60 {
            let ((request, _), _) = net.next();
            assert_eq!(request.kind, Kind::Discover);
        }
        assert!(net.client.deadline().since(net.now) <= WAIT_MAX * 11 / 10);
    }

    #[test]
    fn an_offer_that_is_not_kept_is_given_up() {
        let mut net = Net::new();
        let ((discover, _), _) = net.next();
        net.answer(Kind::Offer, &discover);
        for _ in 0..REQUESTS {
            assert_eq!(net.next().0.0.kind, Kind::Request);
        }
        assert_eq!(net.next().0.0.kind, Kind::Discover);
    }

    #[test]
    fn a_lease_is_renewed_at_half_its_time_from_its_server() {
        let mut net = Net::new();
        net.bind();
        let ((request, to), change) = net.next();
        assert_eq!((net.seconds(), request.address, to, change), (1800, Some(IP), Some(SERVER), None));
        assert!(matches!(net.answer(Kind::Ack, &request), Some(Change::Bound(_))));
        net.next();
        assert_eq!(net.seconds(), 3600);
    }

    #[test]
    fn without_an_answer_everybody_is_asked_and_at_last_the_address_is_lost() {
        let mut net = Net::new();
        net.bind();
        let mut broadcast_from = None;
        loop {
            let ((request, to), change) = net.next();
            if to.is_none() {
                broadcast_from.get_or_insert(net.seconds());
            }
            if change == Some(Change::Lost) {
                assert_eq!(request.kind, Kind::Discover);
                break;
            }
        }
        assert_eq!((broadcast_from, net.seconds()), (Some(3150), 3600));
    }

    #[test]
    fn a_refused_renewal_takes_the_address_at_once() {
        let mut net = Net::new();
        net.bind();
        let ((request, _), _) = net.next();
        assert_eq!(net.answer(Kind::Nak, &request), Some(Change::Lost));
        assert_eq!(net.next().0.0.kind, Kind::Discover);
    }

    #[test]
    fn another_clients_answers_are_nothing() {
        let mut net = Net::new();
        let ((discover, _), _) = net.next();
        net.answer(Kind::Offer, &Request { transaction: !discover.transaction, ..discover });
        net.answer(Kind::Offer, &Request { client: Mac([2; 6]), ..discover });
        net.answer(Kind::Ack, &discover);
        assert_eq!(net.next().0.0.kind, Kind::Discover);
    }
}
