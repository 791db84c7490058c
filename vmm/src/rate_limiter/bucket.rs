//! One token bucket, in whole numbers.
//!
//! A bucket of *size* tokens that fills in *refill* nanoseconds gains *size / refill* tokens a nanosecond, which is no
//! whole number. So its level is kept in units of 1/*refill* of a token: every nanosecond adds exactly
//! *size* units, a token is *refill* units, and nothing is ever rounded, however often the bucket is looked at.
//! Both factors have 64 bits, the product 128: no configuration overflows.

use std::time::{Duration, Instant};

use crate::api;

#[derive(Debug, Clone)]
pub struct TokenBucket {
    /// Tokens in a full bucket; not 0.
    size: u64,
    /// Nanoseconds from empty to full, which is also how many units are a token; not 0.
    refill: u64,
    /// Tokens left of those given once at the start. They go first.
    burst: u64,
    /// Units in the bucket; at most `capacity`.
    level: u128,
    /// Units taken beyond what was there. The refill pays them back before the level rises, so `level` is 0 as long as
    /// there are any.
    debt: u128,
    /// Until when the refill is in `level`.
    filled: Instant,
}

impl TokenBucket {
    /// A full bucket; `None` if `size` or `refill_time` is 0, which means no limit.
    pub fn new(config: &api::TokenBucket, now: Instant) -> Option<Self> {
        // 584 years of nanoseconds are as good as the more that could be asked for.
        let refill = config.refill_time.saturating_mul(1_000_000);
        if config.size == 0 || refill == 0 {
            return None;
        }
        let level = u128::from(config.size) * u128::from(refill);
        let burst = config.one_time_burst.unwrap_or(0);
        Some(TokenBucket { size: config.size, refill, burst, level, debt: 0, filled: now })
    }

    fn capacity(&self) -> u128 {
        u128::from(self.size) * u128::from(self.refill)
    }

    /// Lets time pass until `now`.
    fn fill(&mut self, now: Instant) {
        let gained = now.saturating_duration_since(self.filled).as_nanos().saturating_mul(self.size.into());
        self.filled = self.filled.max(now);
        let paid = gained.min(self.debt);
        self.debt -= paid;
        self.level = self.level.saturating_add(gained - paid).min(self.capacity());
    }

    /// How long `tokens` have to wait, seen from `now`; zero if they can be taken at once.
    ///
    /// More tokens than the bucket can ever hold wait until it is full, and then leave a debt: they
    /// are late by their size, not for ever.
    pub fn wait(&mut self, tokens: u64, now: Instant) -> Duration {
        self.fill(now);
        let of_level = tokens.saturating_sub(self.burst);
        if of_level == 0 {
            return Duration::ZERO;
        }
        let needed = (u128::from(of_level) * u128::from(self.refill)).min(self.capacity());
        let missing = needed.saturating_sub(self.level).saturating_add(self.debt);
        let nanoseconds = missing.div_ceil(self.size.into());
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }

    /// Takes `tokens` whether they are there or not: of the burst first, then of the bucket, the rest as a debt.
    /// Before comes [`Self::wait`].
    pub fn take(&mut self, tokens: u64) {
        let of_burst = tokens.min(self.burst);
        self.burst -= of_burst;
        let units = u128::from(tokens - of_burst) * u128::from(self.refill);
        let of_level = units.min(self.level);
        self.level -= of_level;
        self.debt = self.debt.saturating_add(units - of_level);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bucket(size: u64, one_time_burst: u64, refill_time: u64, now: Instant) -> TokenBucket {
        TokenBucket::new(&api::TokenBucket { size, one_time_burst: Some(one_time_burst), refill_time }, now).unwrap()
    }

    #[test]
    fn a_size_or_refill_time_of_zero_is_no_limit() {
        for (size, refill_time) in [(0, 100), (100, 0)] {
            let config = api::TokenBucket { size, one_time_burst: None, refill_time };
            assert!(TokenBucket::new(&config, Instant::now()).is_none());
        }
    }

    #[test]
    fn the_wait_is_exact_to_the_nanosecond() {
        let start = Instant::now();
        let mut bucket = bucket(3, 0, 1000, start);
        bucket.take(3);
        // A third of a second, rounded up: never too early.
        assert_eq!(bucket.wait(1, start), Duration::from_nanos(333_333_334));
        assert_ne!(bucket.wait(1, start + Duration::from_nanos(333_333_333)), Duration::ZERO);
        assert_eq!(bucket.wait(1, start + Duration::from_nanos(333_333_334)), Duration::ZERO);
    }

    #[test]
    fn the_burst_is_given_once() {
        let start = Instant::now();
        let mut bucket = bucket(10, 5, 1000, start);
        assert_eq!(bucket.wait(15, start), Duration::ZERO);
        bucket.take(15);
        assert_eq!(bucket.wait(1, start), Duration::from_millis(100));
        let later = start + Duration::from_secs(100);
        assert_eq!(bucket.wait(10, later), Duration::ZERO);
        bucket.take(10);
        assert_eq!(bucket.wait(1, later), Duration::from_millis(100));
    }

    #[test]
    fn more_than_the_bucket_holds_waits_for_a_full_one_and_leaves_a_debt() {
        let start = Instant::now();
        let mut bucket = bucket(10, 0, 1000, start);
        bucket.take(1);
        assert_eq!(bucket.wait(25, start), Duration::from_millis(100));
        let full = start + Duration::from_millis(100);
        assert_eq!(bucket.wait(25, full), Duration::ZERO);
        bucket.take(25);
        assert_eq!(bucket.wait(1, full), Duration::from_millis(1600));
    }

    #[test]
    fn the_largest_numbers_do_not_overflow() {
        let start = Instant::now();
        let far = start + Duration::from_secs(1 << 40);
        for (size, refill_time) in [(u64::MAX, u64::MAX), (u64::MAX, 1), (1, u64::MAX)] {
            let mut bucket = bucket(size, 0, refill_time, start);
            for _ in 0..4 {
                bucket.take(u64::MAX);
            }
            assert!(bucket.wait(u64::MAX, start) > Duration::ZERO);
            bucket.wait(u64::MAX, far);
            bucket.wait(u64::MAX, start);
        }
    }

    proptest! {
        /// Looking at a bucket often gives it the same level as looking once: nothing is rounded away.
        #[test]
        fn it_does_not_drift(
            size in 1u64..1_000_000, refill_time in 1u64..100_000,
            steps in proptest::collection::vec(1u64..1_000_000, 1..100),
        ) {
            let start = Instant::now();
            let mut often = bucket(size, 0, refill_time, start);
            often.take(size);
            let mut once = often.clone();
            let mut now = start;
            for step in &steps {
                now += Duration::from_nanos(*step);
                often.wait(1, now);
            }
            prop_assert_eq!(often.wait(size, now), once.wait(size, now));
            prop_assert_eq!(often.level, once.level);
        }

        /// Whatever is asked for when: in any span, no more passes than a full bucket, the burst, what was refilled in
        /// that time, and the one request that was larger than the bucket. And who waits as told gets on.
        #[test]
        fn it_never_gives_too_much_and_is_never_stuck(
            size in 1u64..10_000, burst in 0u64..10_000, refill_time in 1u64..10_000,
            requests in proptest::collection::vec((0u64..20_000, 0u64..5_000_000), 1..200),
        ) {
            let start = Instant::now();
            let mut bucket = bucket(size, burst, refill_time, start);
            let (mut now, mut given, mut largest) = (start, 0u128, 0u64);
            for (tokens, pause) in requests {
                now += Duration::from_nanos(pause);
                let wait = bucket.wait(tokens, now);
                if !wait.is_zero() {
                    now += wait - Duration::from_nanos(1);
                    prop_assert!(!bucket.wait(tokens, now).is_zero(), "woken too late");
                    now += Duration::from_nanos(1);
                    prop_assert!(bucket.wait(tokens, now).is_zero(), "woken too early");
                }
                bucket.take(tokens);
                given += u128::from(tokens);
                largest = largest.max(tokens);
                // In units, so that the comparison is exact too.
                let refill = u128::from(refill_time) * 1_000_000;
                let refilled = (now - start).as_nanos() * u128::from(size);
                let over = u128::from(largest.saturating_sub(size));
                let limit = (u128::from(size) + u128::from(burst) + over) * refill + refilled;
                prop_assert!(given * refill <= limit);
            }
        }
    }
}
