//! The one way to read the wall clock: nanoseconds since 1970, as every message has it.

use std::time::{SystemTime, UNIX_EPOCH};

/// Nanoseconds since 1970; 0 when the clock stands before that.
pub fn unix_ns() -> u64 {
    to_unix_ns(SystemTime::now())
}

/// `time` in nanoseconds since 1970; 0 when it lies before that.
pub fn to_unix_ns(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}
