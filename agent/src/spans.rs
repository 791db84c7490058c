//! Measured stretches of time on their way to the controller.
//!
//! Bounded: a controller that is away for a week costs a fixed amount of memory, and the oldest
//! spans go first. A span that was sent on a connection which broke soon after is sent again; its
//! `id` is the same each time, so that the controller keeps one.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::api::Span;

/// Spans kept while the controller is away: about 4 MB, the boots of some hundred instances.
const CAPACITY: usize = 8192;

/// How long a sent span may still be lost with its connection: longer than the keep-alive takes to
/// find out that the other side is gone (`session`).
const DOUBTFUL: Duration = Duration::from_secs(40);

/// Spans in one message.
const BATCH: usize = 256;

#[derive(Debug, Default)]
pub struct SpanBuffer {
    queues: Mutex<Queues>,
    filled: Notify,
}

#[derive(Debug, Default)]
struct Queues {
    waiting: VecDeque<Span>,
    sent: VecDeque<(Instant, Span)>,
    dropped: u64,
}

impl SpanBuffer {
    pub fn push(&self, span: Span) {
        let mut queues = self.lock();
        queues.waiting.push_back(span);
        queues.shrink();
        self.filled.notify_one();
    }

    /// The next spans to send; waits until there is one.
    pub async fn next(&self) -> Vec<Span> {
        loop {
            let batch = self.take();
            if !batch.is_empty() {
                return batch;
            }
            self.filled.notified().await;
        }
    }

    fn take(&self) -> Vec<Span> {
        let mut queues = self.lock();
        let now = Instant::now();
        while queues.sent.front().is_some_and(|(when, _)| now.duration_since(*when) > DOUBTFUL) {
            queues.sent.pop_front();
        }
        let count = queues.waiting.len().min(BATCH);
        let batch: Vec<Span> = queues.waiting.drain(..count).collect();
        queues.sent.extend(batch.iter().map(|span| (now, span.clone())));
        batch
    }

    /// The connection broke: what was sent lately may not have arrived.
    pub fn send_doubtful_again(&self) {
        let mut queues = self.lock();
        while let Some((when, span)) = queues.sent.pop_back() {
            if when.elapsed() <= DOUBTFUL {
                queues.waiting.push_front(span);
            }
        }
        queues.shrink();
        self.filled.notify_one();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queues {
    fn shrink(&mut self) {
        while self.waiting.len() > CAPACITY {
            self.waiting.pop_front();
            self.dropped += 1;
            if self.dropped.is_power_of_two() {
                tracing::warn!(dropped = self.dropped, "measurements dropped: the controller is away for long");
            }
        }
        while self.sent.len() > CAPACITY {
            self.sent.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(name: usize) -> Span {
        Span { name: name.to_string(), ..Default::default() }
    }

    #[tokio::test]
    async fn a_broken_connection_sends_again_in_order() {
        let buffer = SpanBuffer::default();
        (0..3).for_each(|n| buffer.push(span(n)));
        assert_eq!(buffer.next().await.len(), 3);
        buffer.push(span(3));
        buffer.send_doubtful_again();
        let names: Vec<String> = buffer.next().await.into_iter().map(|span| span.name).collect();
        assert_eq!(names, ["0", "1", "2", "3"]);
    }

    #[test]
    fn the_oldest_go_when_it_is_full() {
        let buffer = SpanBuffer::default();
        (0..CAPACITY + 5).for_each(|n| buffer.push(span(n)));
        assert_eq!(buffer.lock().waiting.len(), CAPACITY);
        assert_eq!(buffer.take()[0].name, "5");
    }
}
