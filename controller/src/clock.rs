//! Time as the controller writes it down: nanoseconds since 1970, UTC.

use std::time::{SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;

/// Nanoseconds since 1970. A clock set before 1970 reads as 1970.
pub fn unix_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

/// As the database keeps it: SQLite's integers are signed.
pub fn now() -> i64 {
    i64::try_from(unix_ns()).unwrap_or(i64::MAX)
}

/// A moment of the database as a calendar date.
pub fn date(unix_ns: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(unix_ns)).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}
