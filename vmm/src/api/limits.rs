//! How much a device may move: token buckets, with Firecracker's members.

use serde::{Deserialize, Serialize};

/// A token bucket: `size` tokens that come back evenly within `refill_time` milliseconds, and `one_time_burst` more
/// that do not. A size or refill time of 0 is no limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    pub size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    pub refill_time: u64,
}

/// What a device may move (tokens are bytes) and how often (operations, packets). What is absent is not limited.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

impl RateLimiter {
    /// What `present` has become by a change to these limits: a bucket that is given replaces its own.
    pub fn over(self, present: Option<RateLimiter>) -> Option<RateLimiter> {
        let RateLimiter { bandwidth, ops } = present.unwrap_or_default();
        let merged = RateLimiter { bandwidth: self.bandwidth.or(bandwidth), ops: self.ops.or(ops) };
        (merged != RateLimiter::default()).then_some(merged)
    }
}
