//! Numbers that one or several threads count and any thread reads.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Counted by any thread.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub const fn new() -> Self {
        Counter(AtomicU64::new(0))
    }

    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Relaxed);
    }

    pub fn increment(&self) {
        self.add(1);
    }

    /// For what is measured rather than counted.
    pub fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Counted by one thread at a time, which therefore needs no locked instruction. A second writer would lose counts, and
/// nothing worse.
#[derive(Debug, Default)]
pub struct Tally(AtomicU64);

impl Tally {
    pub fn add(&self, count: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(count), Relaxed);
    }

    /// Takes back what was added for something that did not happen after all.
    pub fn take_back(&self, count: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_sub(count), Relaxed);
    }

    pub fn increment(&self) {
        self.add(1);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Buckets of a [`Histogram`]: values of 0 and 1, up to 3, up to 7 … the last one takes the rest.
pub const BUCKETS: usize = 20;

/// How values are distributed, in powers of two. Written by one thread at a time, as a [`Tally`].
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [Tally; BUCKETS],
    sum: Tally,
}

impl Histogram {
    pub fn record(&self, value: u64) {
        self.buckets[Self::bucket(value)].increment();
        self.sum.add(value);
    }

    /// In microseconds.
    #[allow(dead_code)] // for devices that measure
    pub fn record_time(&self, time: Duration) {
        self.record(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    fn bucket(value: u64) -> usize {
        (63 - (value | 1).leading_zeros() as usize).min(BUCKETS - 1)
    }

    /// Largest value of a bucket; `None` for the last, which has no bound.
    pub fn bound(bucket: usize) -> Option<u64> {
        (bucket < BUCKETS - 1).then(|| (2u64 << bucket) - 1)
    }

    /// How many values each bucket has.
    pub fn counts(&self) -> [u64; BUCKETS] {
        std::array::from_fn(|bucket| self.buckets[bucket].get())
    }

    pub fn sum(&self) -> u64 {
        self.sum.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_tally_gives_back_what_it_took() {
        let tally = Tally::default();
        tally.add(7);
        tally.take_back(3);
        tally.increment();
        assert_eq!(tally.get(), 5);
    }

    proptest! {
        #[test]
        fn every_value_is_in_the_one_bucket_that_bounds_it(value: u64) {
            let histogram = Histogram::default();
            histogram.record(value);
            let bucket = histogram.counts().iter().position(|count| *count == 1).unwrap();
            prop_assert_eq!(histogram.counts().iter().sum::<u64>(), 1);
            prop_assert!(Histogram::bound(bucket).is_none_or(|bound| value <= bound));
            if let Some(below) = bucket.checked_sub(1).and_then(Histogram::bound) {
                prop_assert!(value > below);
            }
        }
    }
}
