//! How long to wait before what failed is tried again.

use std::time::Duration;

/// A wait that doubles from the first to the longest.
#[derive(Debug)]
pub struct Wait {
    first: Duration,
    longest: Duration,
    failures: u32,
}

impl Wait {
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, failures: 0 }
    }

    /// The time to wait now; the next is twice as long.
    pub fn grow(&mut self) -> Duration {
        self.failures = (self.failures + 1).min(16);
        self.time()
    }

    /// What [`Self::grow`] last said; nothing since the last reset.
    pub fn time(&self) -> Duration {
        match self.failures {
            0 => Duration::ZERO,
            failures => (self.first * (1 << (failures - 1))).min(self.longest),
        }
    }

    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_grows_to_its_bound_and_starts_over() {
        let (first, longest) = (Duration::from_millis(250), Duration::from_secs(15));
        let mut wait = Wait::new(first, longest);
        assert_eq!(wait.time(), Duration::ZERO);
        assert_eq!(wait.grow(), first);
        assert_eq!(wait.grow(), first * 2);
        (0..100).for_each(|_| assert!(wait.grow() <= longest));
        assert_eq!(wait.time(), longest);
        wait.reset();
        assert_eq!(wait.time(), Duration::ZERO);
    }
}
