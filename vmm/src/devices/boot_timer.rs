//! The boot timer port: a byte written here becomes an event with the host's time, so that a guest's
//! phases can be laid beside the host's on one clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::api::EventKind;
use crate::events::Events;

/// A guest must not fill the host's disk with events; a boot has a handful.
const MAX_EVENTS: u32 = 256;

pub struct BootTimer {
    events: Arc<Events>,
    written: AtomicU32,
}

impl BootTimer {
    pub fn new(events: Arc<Events>) -> Self {
        BootTimer { events, written: AtomicU32::new(0) }
    }

    pub fn write(&self, value: u8) {
        if self.written.load(Ordering::Relaxed) < MAX_EVENTS {
            self.written.fetch_add(1, Ordering::Relaxed);
            self.events.emit(EventKind::BootTimer { value });
        }
    }
}
