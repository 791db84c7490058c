//! The metadata read: one document after the other, each over a connection of its own.
//!
//! The first one, the instance's id, every instance has; it is asked for until it is there. The
//! others may be absent.

use core::fmt;
use core::net::Ipv4Addr;
use core::time::Duration;

use super::http::{self, Answer};
use super::tcp::{self, Connection, Progress};
use super::tcp_segment::Segment;
use crate::random::Random;
use crate::time::Instant;

/// What is read, in this order.
const DOCUMENTS: [&str; 4] = [
    "/latest/meta-data/instance-id",
    "/latest/meta-data/local-ipv4",
    "/latest/meta-data/public-ipv4",
    "/latest/user-data",
];
const WAIT_MIN: Duration = Duration::from_millis(250);
const WAIT_MAX: Duration = Duration::from_secs(30);

/// Why a document could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    Connection(tcp::Failure),
    /// What came was no HTTP, or only a part of it.
    Garbled,
    Status(u16),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Connection(tcp::Failure::Refused) => f.write_str("connection refused"),
            Failure::Connection(tcp::Failure::TimedOut) => f.write_str("no answer"),
            Failure::Garbled => f.write_str("the answer is no HTTP, or was cut off"),
            Failure::Status(401) => f.write_str("status 401: the service wants a token (IMDSv2)"),
            Failure::Status(status) => write!(f, "status {status}"),
        }
    }
}

/// What came of it.
#[derive(Debug)]
pub enum Outcome<'a> {
    Document { path: &'static str, body: Option<&'a [u8]>, last: bool },
    Failed { why: Failure, again_in: Duration },
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one of it, and nothing to box with")]
enum State {
    /// Until then there is nothing to do.
    Waiting(Instant),
    Reading(Connection),
    Done,
}

#[derive(Debug)]
pub struct Reader {
    server: (Ipv4Addr, u16),
    /// The one that is read or waited for, as an index into [`DOCUMENTS`].
    document: usize,
    failures: u32,
    state: State,
    /// The connection before, while it is closed in order.
    closing: Option<Connection>,
    answer: Answer,
}

impl Reader {
    pub fn new(server: (Ipv4Addr, u16), now: Instant) -> Self {
        Reader { server, document: 0, failures: 0, state: State::Waiting(now), closing: None, answer: Answer::new() }
    }

    pub fn server(&self) -> Ipv4Addr {
        self.server.0
    }

    /// When [`Reader::poll`] has something to do.
    pub fn deadline(&self) -> Instant {
        let reading = match &self.state {
            State::Waiting(until) => *until,
            State::Reading(connection) => connection.deadline(),
            State::Done => Instant::NEVER,
        };
        self.closing.as_ref().map_or(reading, |connection| connection.deadline().min(reading))
    }

    /// Goes on when the deadline has come: gives `send` what is to be sent, and says what came of it.
    pub fn poll(
        &mut self,
        now: Instant,
        random: &mut Random,
        mut send: impl FnMut(&Segment<'_>),
    ) -> Option<Outcome<'static>> {
        if let Some(connection) = &mut self.closing {
            // What fails while it is closed has no consequence.
            while let Ok(Some(segment)) = connection.poll(now) {
                send(&segment);
            }
        }
        self.closing.take_if(|connection| connection.is_closed());
        if let State::Waiting(until) = self.state
            && now >= until
        {
            let ports = [random.port(), self.server.1];
            let message = http::get(self.server.0, DOCUMENTS[self.document]);
            self.state = State::Reading(Connection::open(ports, random.next_u32(), message, now));
            self.answer = Answer::new();
        }
        let State::Reading(connection) = &mut self.state else { return None };
        loop {
            match connection.poll(now) {
                Ok(Some(segment)) => send(&segment),
                Ok(None) => return None,
                Err(failure) => return Some(self.fail(now, Failure::Connection(failure))),
            }
        }
    }

    /// Takes a segment from the server, and says what came of it; `None` if it belongs to no connection here.
    pub fn receive(&mut self, now: Instant, segment: &Segment<'_>) -> Option<Option<Outcome<'_>>> {
        if let Some(connection) = &mut self.closing
            && connection.is_for(segment)
        {
            connection.receive(now, segment);
            return Some(None);
        }
        let State::Reading(connection) = &mut self.state else { return None };
        if !connection.is_for(segment) {
            return None;
        }
        Some(match connection.receive(now, segment) {
            Progress::Nothing => None,
            Progress::Failed(failure) => Some(self.fail(now, Failure::Connection(failure))),
            Progress::Data(bytes, last) => {
                self.answer.add(bytes);
                (last || self.answer.is_complete()).then(|| self.finish(now))
            }
        })
    }

    fn finish(&mut self, now: Instant) -> Outcome<'_> {
        if let State::Reading(mut connection) = core::mem::replace(&mut self.state, State::Waiting(now)) {
            connection.close(now);
            self.closing = Some(connection);
        }
        match self.answer.parse().map(|(status, _)| status) {
            Some(200) => self.next(true),
            Some(404) if self.document > 0 => self.next(false),
            Some(status) => self.fail(now, Failure::Status(status)),
            None => self.fail(now, Failure::Garbled),
        }
    }

    fn next(&mut self, found: bool) -> Outcome<'_> {
        let path = DOCUMENTS[self.document];
        self.document += 1;
        self.failures = 0;
        let last = self.document == DOCUMENTS.len();
        if last {
            self.state = State::Done;
        }
        let body = self.answer.parse().map(|(_, body)| body).filter(|_| found);
        Outcome::Document { path, body, last }
    }

    fn fail(&mut self, now: Instant, why: Failure) -> Outcome<'static> {
        let again_in = WAIT_MIN.saturating_mul(1 << self.failures.min(10)).min(WAIT_MAX);
        self.failures += 1;
        self.state = State::Waiting(now + again_in);
        Outcome::Failed { why, again_in }
    }
}
