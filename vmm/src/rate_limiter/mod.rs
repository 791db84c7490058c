//! How much a device may move and how often, as Firecracker's API shapes it: a token bucket for bytes and one
//! for operations, each of them optional.
//!
//! A limiter belongs to one queue and lives in its worker's thread. Queues of one device may share their buckets ([`RateLimiter::share`]), each
//! with a limiter, and so a timer, of its own: what the device may move is the same however many queues it has. The worker asks before it
//! serves a request. If the answer is "later", it puts the request back into its ring (nothing of it is kept
//! on our side, so a guest that is held back costs no memory) and goes on when [`RateLimiter::timer`] becomes
//! readable. Guest memory is full of requests that are worth nothing here: time is the host's monotonic clock, and a
//! guest cannot make it run faster by asking more often.
//!
//! A request needs tokens of both buckets or takes none: what waits for bytes uses up no operation.

mod bucket;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use crate::api;
use crate::bus::lock;
use bucket::TokenBucket;

/// Longest time until a waiting worker asks again. It only bounds what the timer is given: asking early is harmless.
const LONGEST_SLEEP: Duration = Duration::from_secs(3600);

pub struct RateLimiter {
    /// Held for an addition and a comparison; waited for only where several queues share it.
    buckets: Arc<Mutex<Buckets>>,
    timer: TimerFd,
    /// The timer is armed, or has fired and was not looked at.
    waiting: bool,
}

struct Buckets {
    bytes: Option<TokenBucket>,
    operations: Option<TokenBucket>,
}

impl RateLimiter {
    /// `None` if `config` limits nothing: then there is no timer to wait for either.
    pub fn new(config: &api::RateLimiter) -> io::Result<Option<Self>> {
        let now = Instant::now();
        let bucket = |config: &Option<api::TokenBucket>| config.as_ref().and_then(|it| TokenBucket::new(it, now));
        let (bytes, operations) = (bucket(&config.bandwidth), bucket(&config.ops));
        if bytes.is_none() && operations.is_none() {
            return Ok(None);
        }
        let buckets = Arc::new(Mutex::new(Buckets { bytes, operations }));
        Ok(Some(RateLimiter { buckets, timer: TimerFd::new()?, waiting: false }))
    }

    /// Another limiter over the same buckets, for another queue of the device.
    pub fn share(&self) -> io::Result<Self> {
        Ok(RateLimiter { buckets: self.buckets.clone(), timer: TimerFd::new()?, waiting: false })
    }

    /// Changes what of a device's limits is given; a bucket of no size takes its limit away. Who shares the buckets sees it too.
    pub fn change(limiter: &mut Option<Self>, config: &api::RateLimiter) -> io::Result<()> {
        let Some(present) = limiter else {
            *limiter = RateLimiter::new(config)?;
            return Ok(());
        };
        let now = Instant::now();
        let mut buckets = lock(&present.buckets);
        if let Some(bandwidth) = &config.bandwidth {
            buckets.bytes = TokenBucket::new(bandwidth, now);
        }
        if let Some(ops) = &config.ops {
            buckets.operations = TokenBucket::new(ops, now);
        }
        Ok(())
    }

    /// Becomes readable when a request that was told to wait has its tokens; then [`Self::wake`] must be called.
    pub fn timer(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Takes what one operation of `bytes` bytes costs. If it is not there nothing is taken, the timer is
    /// set to when it will be, and the answer is false.
    pub fn admit(&mut self, bytes: u64) -> bool {
        let wait = {
            let mut buckets = lock(&self.buckets);
            let wait = buckets.wait(bytes, Instant::now());
            if wait.is_zero() {
                buckets.take(bytes);
            }
            wait
        };
        self.sleep(wait)
    }

    /// For an operation whose size is not known before it is done (the next frame of a tap): whether one of any size may
    /// be begun. If not, the timer is set. Afterwards [`Self::charge`] takes what it has cost; the next one
    /// waits until that is paid.
    pub fn is_open(&mut self) -> bool {
        let wait = lock(&self.buckets).wait(1, Instant::now());
        self.sleep(wait)
    }

    /// Takes what one operation of `bytes` bytes has cost, leaving a debt where it is more than there was.
    pub fn charge(&mut self, bytes: u64) {
        lock(&self.buckets).take(bytes);
    }

    /// To be called when the timer is readable. The answer to the next request says how things stand.
    pub fn wake(&mut self) {
        // A timer that was set again since it fired has nothing to read, and the read would sleep.
        if !self.waiting || self.timer.is_armed().unwrap_or(true) {
            return;
        }
        self.waiting = false;
        if let Err(error) = self.timer.wait() {
            tracing::warn!(%error, "rate limiter's timer");
        }
    }

    /// Sets the timer to `wait` from now; true if there is nothing to wait for.
    fn sleep(&mut self, wait: Duration) -> bool {
        // A zero would disarm the timer.
        if wait.is_zero() {
            return true;
        }
        match self.timer.reset(wait.min(LONGEST_SLEEP), None) {
            Ok(()) => self.waiting = true,
            Err(error) => tracing::error!(%error, "rate limiter's timer"),
        }
        false
    }
}

impl Buckets {
    fn wait(&mut self, bytes: u64, now: Instant) -> Duration {
        let bytes = self.bytes.as_mut().map_or(Duration::ZERO, |bucket| bucket.wait(bytes, now));
        let operations = self.operations.as_mut().map_or(Duration::ZERO, |bucket| bucket.wait(1, now));
        bytes.max(operations)
    }

    fn take(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.take(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(bandwidth: Option<(u64, u64)>, ops: Option<(u64, u64)>) -> api::RateLimiter {
        let bucket = |(size, refill_time)| api::TokenBucket { size, one_time_burst: None, refill_time };
        api::RateLimiter { bandwidth: bandwidth.map(bucket), ops: ops.map(bucket) }
    }

    /// Sleeps until the timer is readable; false after `milliseconds`.
    fn fires_within(limiter: &RateLimiter, milliseconds: i32) -> bool {
        let mut poll = libc::pollfd { fd: limiter.timer(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one `pollfd` is passed, of which the kernel writes `revents`.
        unsafe { libc::poll(&mut poll, 1, milliseconds) == 1 }
    }

    #[test]
    fn what_limits_nothing_is_no_limiter() {
        assert!(RateLimiter::new(&config(None, None)).unwrap().is_none());
        assert!(RateLimiter::new(&config(Some((0, 10)), Some((10, 0)))).unwrap().is_none());
    }

    #[test]
    fn a_change_is_of_what_is_given_and_no_size_is_no_limit() {
        let mut limiter = None;
        RateLimiter::change(&mut limiter, &config(Some((10, 3_600_000)), None)).unwrap();
        assert!(limiter.as_mut().unwrap().admit(10) && !limiter.as_mut().unwrap().admit(10));
        RateLimiter::change(&mut limiter, &config(None, Some((2, 3_600_000)))).unwrap();
        assert!(!limiter.as_mut().unwrap().admit(10));
        RateLimiter::change(&mut limiter, &config(Some((0, 0)), None)).unwrap();
        let admitted = (0..3).filter(|_| limiter.as_mut().unwrap().admit(1 << 40)).count();
        assert_eq!(admitted, 2);
    }

    #[test]
    fn a_request_that_must_wait_takes_of_neither_bucket_and_is_woken() {
        let mut limiter = RateLimiter::new(&config(Some((1000, 50)), Some((1_000_000, 1)))).unwrap().unwrap();
        assert!(limiter.admit(1000));
        assert!(!limiter.admit(1000));
        let untouched = lock(&limiter.buckets).operations.as_mut().unwrap().wait(1_000_000, Instant::now());
        assert_eq!(untouched, Duration::ZERO);
        // Twenty seconds stand for "for ever"; the timer is set to 50 ms.
        assert!(fires_within(&limiter, 20_000));
        limiter.wake();
        assert!(!fires_within(&limiter, 0));
        assert!(limiter.admit(1000));
    }

    #[test]
    fn waking_a_limiter_that_does_not_wait_does_not_sleep() {
        let mut limiter = RateLimiter::new(&config(None, Some((1, 1)))).unwrap().unwrap();
        limiter.wake();
        assert!(limiter.admit(u64::MAX));
    }

    #[test]
    fn a_timer_that_is_set_again_after_it_fired_is_not_slept_on() {
        let mut limiter = RateLimiter::new(&config(None, Some((1, 20)))).unwrap().unwrap();
        assert!(limiter.admit(1));
        assert!(!limiter.admit(1));
        assert!(fires_within(&limiter, 20_000));
        // Both the kick and the timer were ready, and the kick was handled first.
        assert!(limiter.admit(1));
        limiter.sleep(LONGEST_SLEEP);
        limiter.wake();
        assert!(limiter.waiting);
    }

    #[test]
    fn an_operation_of_unknown_size_is_charged_afterwards() {
        let mut limiter = RateLimiter::new(&config(Some((1000, 3_600_000)), None)).unwrap().unwrap();
        assert!(limiter.is_open());
        limiter.charge(5000);
        assert!(!limiter.is_open());
        assert!(limiter.waiting);
    }

    #[test]
    fn queues_that_share_their_buckets_have_together_what_one_would_have() {
        let mut limiters = vec![RateLimiter::new(&config(None, Some((5, 3_600_000)))).unwrap().unwrap()];
        limiters.push(limiters[0].share().unwrap());
        let admitted = (0..10).filter(|turn| limiters[turn % 2].admit(1)).count();
        assert_eq!(admitted, 5);
        assert!(limiters.iter().all(|limiter| limiter.waiting));
        let mut first = Some(limiters.remove(0));
        RateLimiter::change(&mut first, &config(None, Some((1, 3_600_000)))).unwrap();
        assert!(limiters[0].admit(1) && !first.unwrap().admit(1));
    }
}
