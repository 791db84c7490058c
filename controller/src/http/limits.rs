//! How often one caller may ask.
//!
//! A token bucket per account, as EC2 has per account and operation, and a smaller one per address
//! for requests whose signature does not hold, so that who sends many of them is told to wait before
//! he is told why. That is for clients that repeat a mistake; a secret has 240 bits and needs no such
//! protection, and a request that is signed well is never held back by it. Only the Query services
//! are limited: S3 clients are held back by the disk.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Callers remembered at most; those that have all their tokens are forgotten first.
const REMEMBERED: usize = 4096;

#[derive(Debug, Clone, Copy)]
pub struct Rate {
    /// Requests that may come at once.
    pub burst: f64,
    /// Requests that come back each second.
    pub per_second: f64,
}

/// Token buckets by caller.
#[derive(Debug)]
pub struct Limiter<K> {
    rate: Rate,
    buckets: Mutex<HashMap<K, (f64, Instant)>>,
}

impl<K: Hash + Eq + Clone> Limiter<K> {
    pub fn new(rate: Rate) -> Limiter<K> {
        Limiter { rate, buckets: Mutex::new(HashMap::new()) }
    }

    /// Takes one token; false when there is none.
    pub fn allow(&self, caller: &K, now: Instant) -> bool {
        // A panic while the lock was held leaves numbers, and any numbers are good enough here.
        let mut buckets = self.buckets.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if buckets.len() >= REMEMBERED && !buckets.contains_key(caller) {
            let refill = Duration::from_secs_f64(self.rate.burst / self.rate.per_second);
            buckets.retain(|_, (_, last)| now.saturating_duration_since(*last) < refill);
            if buckets.len() >= REMEMBERED {
                return false;
            }
        }
        let (tokens, last) = buckets.entry(caller.clone()).or_insert((self.rate.burst, now));
        let back = now.saturating_duration_since(*last).as_secs_f64() * self.rate.per_second;
        *tokens = (*tokens + back).min(self.rate.burst);
        *last = now;
        if *tokens < 1.0 {
            return false;
        }
        *tokens -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_the_rate() {
        let limiter = Limiter::new(Rate { burst: 3.0, per_second: 2.0 });
        let start = Instant::now();
        let allowed = |at: Duration| limiter.allow(&"a", start + at);
        assert_eq!([0, 0, 0, 0].map(|ms| allowed(Duration::from_millis(ms))), [true, true, true, false]);
        assert!(allowed(Duration::from_millis(500)));
        assert!(!allowed(Duration::from_millis(500)));
        assert!(limiter.allow(&"b", start));
    }

    #[test]
    fn memory_is_bounded_and_the_idle_are_forgotten() {
        let limiter = Limiter::new(Rate { burst: 2.0, per_second: 1.0 });
        let start = Instant::now();
        for caller in 0..REMEMBERED {
            assert!(limiter.allow(&caller, start));
        }
        assert!(!limiter.allow(&REMEMBERED, start));
        assert!(limiter.allow(&REMEMBERED, start + Duration::from_secs(3)));
        assert_eq!(limiter.buckets.lock().unwrap().len(), 1);
    }
}
