//! The queues of an interface's tap, and how many of them get frames.
//!
//! A queue is locked by who uses it: by its pair's worker for a batch of frames, by the control queue while it is attached or detached. So a frame that was
//! read before its queue was detached is in the guest's ring before the guest hears that the queue is not used any more
//! (virtio 1.2, 5.1.6.5.6.1: then the device must not use it). Nobody waits for a lock otherwise, as no two pairs use the same queue.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, Ordering};

use crate::backends::tap::Tap;
use crate::bus::lock;

pub struct Taps {
    queues: Vec<Mutex<Tap>>,
    in_use: AtomicU16,
}

impl Taps {
    /// With the first queue in use. There is at least one, and there are at most `MAX_PAIRS`.
    pub fn new(queues: Vec<Tap>) -> io::Result<Self> {
        let in_use = AtomicU16::new(queues.len() as u16);
        let taps = Taps { queues: queues.into_iter().map(Mutex::new).collect(), in_use };
        taps.use_first(1)?;
        Ok(taps)
    }

    pub fn queue(&self, index: usize) -> &Mutex<Tap> {
        &self.queues[index]
    }

    /// Whether so many could be used.
    pub fn has(&self, count: u16) -> bool {
        (1..=self.queues.len()).contains(&count.into())
    }

    pub fn in_use(&self) -> u16 {
        self.in_use.load(Ordering::Relaxed)
    }

    /// Attaches the first `count` queues and detaches the others. An error leaves those in use that were.
    pub fn use_first(&self, count: u16) -> io::Result<()> {
        if count == self.in_use() {
            return Ok(());
        }
        let set = |count: u16| {
            let mut queues = (0..).zip(&self.queues);
            queues.try_for_each(|(index, queue): (u16, _)| lock(queue).attach(index < count))
        };
        if let Err(error) = set(count) {
            if let Err(again) = set(self.in_use()) {
                tracing::error!(error = %again, "the queues of a tap are not as they were");
            }
            return Err(error);
        }
        self.in_use.store(count, Ordering::Relaxed);
        Ok(())
    }
}
