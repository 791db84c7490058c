//! How far a node's clock is from ours.
//!
//! A message carries the sender's time; what passes until we read it is latency, never less than
//! nothing. So the smallest difference seen lately is the best estimate of "our clock less theirs",
//! too large by the fastest latency and never too small: a node's span can seem late by that much,
//! never early. (The idea of NTP's minimum filter, RFC 5905 section 10, for one direction.)

use std::collections::VecDeque;

/// Messages remembered: clocks drift, so an old minimum must go.
const WINDOW: usize = 32;

#[derive(Debug, Default)]
pub struct ClockOffset {
    differences: VecDeque<i64>,
}

impl ClockOffset {
    /// Notes a message that was sent at `sent` (their clock) and read at `read` (ours), nanoseconds.
    pub fn note(&mut self, sent: u64, read: u64) {
        if self.differences.len() == WINDOW {
            self.differences.pop_front();
        }
        self.differences.push_back(read.cast_signed().saturating_sub(sent.cast_signed()));
    }

    /// Their time on our clock.
    pub fn ours(&self, theirs: u64) -> u64 {
        let offset = self.differences.iter().copied().min().unwrap_or(0);
        theirs.saturating_add_signed(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_message_sets_the_offset() {
        let mut offset = ClockOffset::default();
        // Their clock is 1000 behind; latencies 50, 5, 90.
        for (sent, latency) in [(100, 50), (200, 5), (300, 90)] {
            offset.note(sent, sent + 1000 + latency);
        }
        assert_eq!(offset.ours(400), 1405);
    }

    #[test]
    fn an_old_minimum_is_forgotten() {
        let mut offset = ClockOffset::default();
        offset.note(100, 100);
        for _ in 0..WINDOW {
            offset.note(100, 150);
        }
        assert_eq!(offset.ours(0), 50);
    }
}
