//! One TCP connection of a client that sends one short request and reads until the end.
//!
//! What it leaves out of RFC 9293 for that: what is sent always fits in one segment, so the whole of
//! it is sent again; what comes out of order is not kept, the peer sends it again; the local port is
//! chosen at random, so there is no TIME-WAIT; the window never closes, because what is too much to
//! keep is read and counted.

use core::fmt;
use core::time::Duration;

use super::tcp_segment::{Flags, Segment};
use crate::time::Instant;
use crate::wire::Writer;

/// First wait for an acknowledgment; each further one is twice as long. (RFC 6298, section 2, begins
/// with 1 s; the metadata service is on this host.)
const WAIT: Duration = Duration::from_millis(250);
/// Transmissions of the same thing before the peer is given up.
const ATTEMPTS: u32 = 6;
/// How long a peer that owes us something may be silent.
const SILENCE: Duration = Duration::from_secs(15);
/// Bytes that the peer may have under way.
pub const WINDOW: u16 = 16384;

/// What a connection sends: text of at most [`Message::MAX`] bytes; what is longer is cut off.
#[derive(Debug)]
pub struct Message {
    bytes: [u8; Message::MAX],
    length: usize,
}

impl Message {
    pub const MAX: usize = 256;

    pub fn new(text: fmt::Arguments<'_>) -> Self {
        let mut bytes = [0; Message::MAX];
        let mut writer = Writer::new(&mut bytes);
        // A `Writer` cuts off and does not fail.
        let _ = fmt::write(&mut writer, text);
        let length = writer.len();
        Message { bytes, length }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// Why a connection ended without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    Refused,
    TimedOut,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A SYN was sent, or is about to be.
    Opening,
    /// The request is sent and the answer is read.
    Open,
    /// Our FIN is sent, after all of the answer was read.
    Closing,
    Closed,
}

#[derive(Debug)]
pub struct Connection {
    local_port: u16,
    remote_port: u16,
    message: Message,
    state: State,
    /// Oldest sequence number of ours that is not acknowledged.
    unacknowledged: u32,
    /// Sequence number of the message's first byte.
    message_at: u32,
    /// Next sequence number of the peer's.
    expected: u32,
    peer_is_done: bool,
    must_acknowledge: bool,
    /// Transmissions since something was acknowledged.
    attempts: u32,
    deadline: Instant,
}

/// What a segment brought.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress<'a> {
    Nothing,
    /// The next bytes of the answer, and whether they are the last.
    Data(&'a [u8], bool),
    Failed(Failure),
}

impl Connection {
    /// A connection that sends its SYN when it is polled first.
    pub fn open([local_port, remote_port]: [u16; 2], initial_sequence: u32, message: Message, now: Instant) -> Self {
        Connection {
            local_port,
            remote_port,
            message,
            state: State::Opening,
            unacknowledged: initial_sequence,
            message_at: initial_sequence.wrapping_add(1),
            expected: 0,
            peer_is_done: false,
            must_acknowledge: false,
            attempts: 0,
            deadline: now,
        }
    }

    pub fn is_for(&self, segment: &Segment<'_>) -> bool {
        !self.is_closed() && segment.destination_port == self.local_port && segment.source_port == self.remote_port
    }

    /// Both sides have said their last, or it failed.
    pub fn is_closed(&self) -> bool {
        let settled = self.peer_is_done && !self.must_acknowledge && self.unacknowledged == self.end();
        self.state == State::Closed || self.state == State::Closing && settled
    }

    /// When [`Connection::poll`] has something to do.
    pub fn deadline(&self) -> Instant {
        match self.must_acknowledge {
            _ if self.is_closed() => Instant::NEVER,
            true => Instant::BEGIN,
            false => self.deadline,
        }
    }

    /// Says our last. To be called when the answer has been read.
    pub fn close(&mut self, now: Instant) {
        match self.state {
            State::Open => self.enter(State::Closing, now),
            State::Opening => self.state = State::Closed,
            State::Closing | State::Closed => {}
        }
    }

    /// Into a state in which there is something to send at once.
    fn enter(&mut self, state: State, now: Instant) {
        self.state = state;
        self.attempts = 0;
        self.deadline = now;
    }

    /// Sequence number after all that is to be sent in this state.
    fn end(&self) -> u32 {
        // A message is shorter than a segment.
        let length = self.message.length as u32;
        match self.state {
            State::Opening => self.message_at,
            State::Open | State::Closed => self.message_at.wrapping_add(length),
            State::Closing => self.message_at.wrapping_add(length).wrapping_add(1),
        }
    }

    /// The segment to send now, if there is one.
    pub fn poll(&mut self, now: Instant) -> Result<Option<Segment<'_>>, Failure> {
        if self.is_closed() {
            return Ok(None);
        }
        if now >= self.deadline {
            if self.attempts >= ATTEMPTS || self.unacknowledged == self.end() {
                return self.fail(Failure::TimedOut).map_or(Ok(None), Err);
            }
            self.deadline = now + WAIT * (1 << self.attempts);
            self.attempts += 1;
            self.must_acknowledge = false;
            return Ok(Some(self.outstanding()));
        }
        let acknowledge = core::mem::take(&mut self.must_acknowledge);
        Ok(acknowledge.then(|| self.segment(self.end(), Flags::ACK, &[])))
    }

    /// Everything that is not acknowledged.
    fn outstanding(&self) -> Segment<'_> {
        if self.state == State::Opening {
            return Segment { acknowledgment: 0, ..self.segment(self.unacknowledged, Flags::SYN, &[]) };
        }
        let sent = self.unacknowledged.wrapping_sub(self.message_at) as usize;
        let payload = self.message.bytes().get(sent..).unwrap_or_default();
        let mut flags = Flags::ACK;
        if !payload.is_empty() {
            flags = flags.with(Flags::PSH);
        }
        if self.state == State::Closing {
            flags = flags.with(Flags::FIN);
        }
        self.segment(self.unacknowledged, flags, payload)
    }

    fn segment<'a>(&self, sequence: u32, flags: Flags, payload: &'a [u8]) -> Segment<'a> {
        Segment {
            source_port: self.local_port,
            destination_port: self.remote_port,
            sequence,
            acknowledgment: self.expected,
            flags,
            payload,
        }
    }

    /// Ends it. Once closing, the answer has been read and nothing has failed.
    fn fail(&mut self, failure: Failure) -> Option<Failure> {
        let was = core::mem::replace(&mut self.state, State::Closed);
        (was != State::Closing).then_some(failure)
    }

    /// Takes a segment for which [`Connection::is_for`] holds.
    pub fn receive<'a>(&mut self, now: Instant, segment: &Segment<'a>) -> Progress<'a> {
        match self.state {
            State::Opening => self.opening(now, segment),
            State::Open | State::Closing => self.open_or_closing(now, segment),
            State::Closed => Progress::Nothing,
        }
    }

    fn opening<'a>(&mut self, now: Instant, segment: &Segment<'a>) -> Progress<'a> {
        if !segment.flags.has(Flags::ACK) || segment.acknowledgment != self.message_at {
            return Progress::Nothing;
        }
        if segment.flags.has(Flags::RST) {
            return self.fail(Failure::Refused).map_or(Progress::Nothing, Progress::Failed);
        }
        if segment.flags.has(Flags::SYN) {
            self.unacknowledged = self.message_at;
            self.expected = segment.sequence.wrapping_add(1);
            self.enter(State::Open, now);
        }
        Progress::Nothing
    }

    fn open_or_closing<'a>(&mut self, now: Instant, segment: &Segment<'a>) -> Progress<'a> {
        if segment.flags.has(Flags::RST) {
            // Only at the very place (RFC 5961, 3.2).
            let failure = if segment.sequence == self.expected { self.fail(Failure::Refused) } else { None };
            return failure.map_or(Progress::Nothing, Progress::Failed);
        }
        if !segment.flags.has(Flags::ACK) {
            return Progress::Nothing;
        }
        self.acknowledged(now, segment.acknowledgment);
        if segment.length() == 0 {
            return Progress::Nothing;
        }
        self.must_acknowledge = true;
        self.next_data(segment)
    }

    fn acknowledged(&mut self, now: Instant, acknowledgment: u32) {
        let end = self.end();
        let fresh = acknowledgment.wrapping_sub(self.unacknowledged);
        if fresh == 0 || fresh > end.wrapping_sub(self.unacknowledged) {
            return;
        }
        self.unacknowledged = acknowledgment;
        self.attempts = 0;
        self.deadline = now + if acknowledgment == end { SILENCE } else { WAIT };
    }

    /// What of the segment is new, if it is what comes next.
    fn next_data<'a>(&mut self, segment: &Segment<'a>) -> Progress<'a> {
        let known = self.expected.wrapping_sub(segment.sequence) as usize;
        let fresh = match segment.payload.get(known..) {
            Some(fresh) if !self.peer_is_done && !segment.flags.has(Flags::SYN) => fresh,
            _ => return Progress::Nothing,
        };
        self.peer_is_done = segment.flags.has(Flags::FIN);
        // At most a segment's length.
        self.expected = self.expected.wrapping_add(fresh.len() as u32).wrapping_add(u32::from(self.peer_is_done));
        match fresh {
            [] if !self.peer_is_done => Progress::Nothing,
            _ => Progress::Data(fresh, self.peer_is_done),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The server's end, as simple as it can be: it answers to one request with `ANSWER` and closes.
    #[derive(Default)]
    struct Server {
        sent: usize,
        received: Vec<u8>,
        finished: bool,
        fin_acknowledged: bool,
    }

    const ANSWER: &[u8] = b"the answer, which comes in several segments";
    const THEIR_SEQUENCE: u32 = u32::MAX - 10;
    const OUR_SEQUENCE: u32 = u32::MAX - 3;
    const MSS: usize = 10;

    struct Copied(Segment<'static>, Vec<u8>);

    fn copy(segment: &Segment<'_>) -> Copied {
        Copied(Segment { payload: &[], ..*segment }, segment.payload.to_vec())
    }

    impl Server {
        fn segment(&self, flags: Flags, payload: &'static [u8], sequence: u32) -> Segment<'static> {
            let acknowledgment = OUR_SEQUENCE.wrapping_add(1 + self.received.len() as u32 + u32::from(self.finished));
            Segment { source_port: 80, destination_port: 5000, sequence, acknowledgment, flags, payload }
        }

        fn receive(&mut self, Copied(segment, payload): &Copied) -> Vec<Segment<'static>> {
            if segment.flags.has(Flags::SYN) {
                return vec![self.segment(Flags::SYN.with(Flags::ACK), &[], THEIR_SEQUENCE)];
            }
            let at = segment.sequence.wrapping_sub(OUR_SEQUENCE.wrapping_add(1)) as usize;
            if at <= self.received.len() {
                self.received.truncate(at);
                self.received.extend(payload);
                self.finished |= segment.flags.has(Flags::FIN);
            }
            let acknowledged = segment.acknowledgment.wrapping_sub(THEIR_SEQUENCE.wrapping_add(1)) as usize;
            self.fin_acknowledged = acknowledged > ANSWER.len();
            self.sent = acknowledged.min(ANSWER.len());
            if self.received.is_empty() || self.fin_acknowledged {
                return vec![self.segment(Flags::ACK, &[], THEIR_SEQUENCE.wrapping_add(1 + acknowledged as u32))];
            }
            let end = (self.sent + MSS).min(ANSWER.len());
            let flags = if end == ANSWER.len() { Flags::ACK.with(Flags::FIN) } else { Flags::ACK };
            vec![self.segment(flags, &ANSWER[self.sent..end], THEIR_SEQUENCE.wrapping_add(1 + self.sent as u32))]
        }
    }

    fn connection() -> Connection {
        Connection::open([5000, 80], OUR_SEQUENCE, Message::new(format_args!("question")), Instant::BEGIN)
    }

    /// Runs a connection over a link that loses and doubles what `fate` says.
    fn run(mut fate: impl FnMut() -> usize) -> (Result<Vec<u8>, Failure>, Server) {
        let (mut connection, mut server, mut answer) = (connection(), Server::default(), Vec::new());
        let mut now = Instant::BEGIN;
        while !connection.is_closed() {
            now = now.max(connection.deadline());
            let mut replies = Vec::new();
            loop {
                match connection.poll(now) {
                    Ok(None) => break,
                    Err(failure) => return (Err(failure), server),
                    Ok(Some(segment)) => {
                        let segment = copy(&segment);
                        (0..fate()).for_each(|_| replies.extend(server.receive(&segment)));
                    }
                }
            }
            for reply in replies {
                for _ in 0..fate() {
                    if !connection.is_for(&reply) {
                        continue;
                    }
                    match connection.receive(now, &reply) {
                        Progress::Nothing => {}
                        Progress::Failed(failure) => return (Err(failure), server),
                        Progress::Data(bytes, last) => {
                            answer.extend_from_slice(bytes);
                            if last {
                                connection.close(now);
                            }
                        }
                    }
                }
            }
        }
        (Ok(answer), server)
    }

    #[test]
    fn question_and_answer_across_the_wrap_of_both_sequence_numbers() {
        let (answer, server) = run(|| 1);
        assert_eq!(answer.unwrap(), ANSWER);
        assert_eq!(server.received, b"question");
        assert!(server.finished && server.fin_acknowledged);
    }

    #[test]
    fn a_peer_that_does_not_answer_is_given_up() {
        assert_eq!(run(|| 0).0, Err(Failure::TimedOut));
    }

    #[test]
    fn a_refusal_counts_only_if_it_answers_our_syn() {
        let mut connection = connection();
        connection.poll(Instant::BEGIN).unwrap();
        let reset = Server::default().segment(Flags::RST.with(Flags::ACK), &[], 0);
        let stray = Segment { acknowledgment: 7, ..reset };
        assert_eq!(connection.receive(Instant::BEGIN, &stray), Progress::Nothing);
        assert_eq!(connection.receive(Instant::BEGIN, &reset), Progress::Failed(Failure::Refused));
        assert!(connection.is_closed());
    }

    proptest! {
        #[test]
        fn loss_and_doubling_change_nothing_or_are_told(fates in proptest::collection::vec(0usize..3, 1..200)) {
            let mut fates = fates.into_iter();
            let (answer, server) = run(|| fates.next().unwrap_or(1));
            if let Ok(answer) = answer {
                prop_assert_eq!(answer, ANSWER);
                prop_assert_eq!(server.received, b"question");
            }
        }
    }
}
