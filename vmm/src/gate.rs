//! How vCPUs' threads are held while their VM is paused, and sent to their end.
//!
//! # No lost wake-up
//!
//! A vCPU's thread may be anywhere when it is called: inside `KVM_RUN` (in the guest, or asleep because the guest halted or has not woken this
//! vCPU yet), serving an exit, or between the two. Three steps make sure that it comes:
//!
//! 1. The caller writes its order and sets `called`, and only then sends the signal.
//! 2. The signal's handler runs on the vCPU's own thread and sets `immediate_exit` in its `kvm_run` (`vcpu::kick`). Inside `KVM_RUN` the
//!    signal ends the call; before it, the flag ends the next call at once.
//! 3. The thread clears that flag only right before it looks at `called`. A signal before the look is answered by the look, one after it by the flag.
//!
//! A signal itself can be lost where the kernel's queue for the user is full (`pthread_kill` says EAGAIN), so whoever has not come is called again after a while.
//!
//! Two may want the threads to wait: the main thread, all of them (the order), and the debugger, some of them ([`Gate::hold`]). A thread goes on when
//! neither does.
//!
//! A caller never waits longer than its patience: a thread can be held up in a device whose host side hangs. It then takes its order back, and
//! the VM goes on as if nothing had been.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::bus::lock;

/// After this long, who has not come is called again.
const AGAIN: Duration = Duration::from_millis(10);

/// What the threads are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Run,
    Wait,
    End,
}

/// What a thread hears at the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passage {
    GoOn,
    End,
}

/// Those that have not come in time, by index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing(pub Vec<u8>);

pub struct Gate {
    /// A bit for each thread that is to come: what it looks at between two exits, without the lock.
    called: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    order: Order,
    /// A bit for each thread that the debugger holds.
    held: u64,
    /// A bit for each thread that waits at the gate, and one for each that has ended.
    waiting: u64,
    ended: u64,
}

impl Gate {
    /// An open gate, or one at which threads wait until [`Self::open`].
    pub fn new(is_open: bool) -> Self {
        let order = if is_open { Order::Run } else { Order::Wait };
        let state = State { order, held: 0, waiting: 0, ended: 0 };
        Gate { called: AtomicU64::new(state.called()), state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Whether the thread `index` is to come to the gate. Cheap.
    pub fn is_called(&self, index: u8) -> bool {
        self.called.load(Ordering::Acquire) & 1 << index != 0
    }

    /// For the thread `index`, with nothing in its hands: waits as long as the gate is closed.
    pub fn pass(&self, index: u8) -> Passage {
        let bit = 1 << index;
        let mut state = lock(&self.state);
        state.waiting |= bit;
        self.changed.notify_all();
        while state.keeps(bit) {
            state = self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        state.waiting &= !bit;
        match state.order {
            Order::End => Passage::End,
            Order::Run | Order::Wait => Passage::GoOn,
        }
    }

    /// For the thread `index`, when it ends for whatever reason.
    pub fn leave(&self, index: u8) {
        lock(&self.state).ended |= 1 << index;
        self.changed.notify_all();
    }

    /// Closes the gate and waits until all of the threads below `count` wait at it or have ended. `call` sends the signal to one.
    pub fn close(&self, count: u8, patience: Duration, call: impl Fn(u8)) -> Result<(), Missing> {
        let closed = self.order(Order::Wait, count, patience, call);
        if closed.is_err() {
            self.open();
        }
        closed
    }

    /// Lets the threads go on.
    pub fn open(&self) {
        self.change(|state| state.order = Order::Run);
    }

    /// Has the threads of `mask` wait from now on, and does not wait for them: a thread that is one of them may call this.
    pub fn shut(&self, mask: u64) {
        self.change(|state| state.held |= mask);
    }

    /// Has all of the threads below `count` wait, for whatever [`Self::open`] says, until [`Self::release`]; returns when they do, or have ended.
    pub fn hold(&self, count: u8, patience: Duration, call: impl Fn(u8)) -> Result<(), Missing> {
        self.shut(u64::MAX);
        self.gather(count, patience, call, |state| state.ended | state.waiting)
    }

    /// Lets the threads of `mask` go, as far as the debugger held them.
    pub fn release(&self, mask: u64) {
        self.change(|state| state.held &= !mask);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = lock(&self.state);
        change(&mut state);
        self.called.store(state.called(), Ordering::Release);
        self.changed.notify_all();
    }

    /// Sends the threads to their end. Those that are returned have not come to it within `patience`; the order stands.
    pub fn end(&self, count: u8, patience: Duration, call: impl Fn(u8)) -> Result<(), Missing> {
        self.order(Order::End, count, patience, call)
    }

    fn order(&self, order: Order, count: u8, patience: Duration, call: impl Fn(u8)) -> Result<(), Missing> {
        self.change(|state| state.order = order);
        self.gather(count, patience, call, |state| match order {
            Order::End => state.ended,
            Order::Run | Order::Wait => state.ended | state.waiting,
        })
    }

    /// Waits until all of the threads below `count` are among those that `came` says.
    fn gather(
        &self,
        count: u8,
        patience: Duration,
        call: impl Fn(u8),
        came: impl Fn(&State) -> u64,
    ) -> Result<(), Missing> {
        let deadline = Instant::now() + patience;
        let all = (1u64 << count) - 1;
        let mut state = lock(&self.state);
        loop {
            let missing = all & !came(&state);
            if missing == 0 {
                return Ok(());
            }
            let indices = (0..count).filter(|index| missing & 1 << index != 0);
            if Instant::now() >= deadline {
                return Err(Missing(indices.collect()));
            }
            indices.for_each(&call);
            let waited = self.changed.wait_timeout(state, AGAIN).unwrap_or_else(|poisoned| poisoned.into_inner());
            state = waited.0;
        }
    }
}

impl State {
    /// A bit for each thread that is to come to the gate.
    fn called(&self) -> u64 {
        if self.order == Order::Run { self.held } else { u64::MAX }
    }

    /// Whether the thread with this bit waits.
    fn keeps(&self, bit: u64) -> bool {
        match self.order {
            Order::Run => self.held & bit != 0,
            Order::Wait => true,
            Order::End => false,
        }
    }
}

impl Missing {
    /// For a person.
    pub fn names(&self) -> String {
        self.0.iter().map(u8::to_string).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;

    const LONG: Duration = Duration::from_secs(60);

    /// Threads that count as long as they are not called.
    struct Counters {
        gate: Arc<Gate>,
        counts: Arc<Vec<AtomicU64>>,
        threads: Vec<std::thread::JoinHandle<()>>,
    }

    impl Counters {
        fn start(count: u8) -> Self {
            let gate = Arc::new(Gate::new(false));
            let counts: Arc<Vec<AtomicU64>> = Arc::new((0..count).map(|_| AtomicU64::new(0)).collect());
            let threads = (0..count)
                .map(|index| {
                    let (gate, counts) = (gate.clone(), counts.clone());
                    std::thread::spawn(move || {
                        loop {
                            while !gate.is_called(index) {
                                counts[index as usize].fetch_add(1, Ordering::SeqCst);
                            }
                            if gate.pass(index) == Passage::End {
                                break;
                            }
                        }
                        gate.leave(index);
                    })
                })
                .collect();
            Counters { gate, counts, threads }
        }

        fn counts(&self) -> Vec<u64> {
            self.counts.iter().map(|count| count.load(Ordering::SeqCst)).collect()
        }
    }

    #[test]
    fn threads_stand_still_between_closing_and_opening_however_often() {
        let counters = Counters::start(3);
        for _ in 0..200 {
            counters.gate.close(3, LONG, |_| {}).unwrap();
            let before = counters.counts();
            std::thread::yield_now();
            assert_eq!(counters.counts(), before);
            counters.gate.open();
        }
        counters.gate.end(3, LONG, |_| {}).unwrap();
        counters.threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    #[test]
    fn who_is_held_by_either_waits_and_the_others_run() {
        let counters = Counters::start(3);
        let stands = |index: usize| {
            let before = counters.counts()[index];
            std::thread::yield_now();
            counters.counts()[index] == before
        };
        counters.gate.hold(3, LONG, |_| {}).unwrap();
        counters.gate.close(3, LONG, |_| {}).unwrap();
        counters.gate.open();
        assert!((0..3).all(stands), "the debugger holds them still");
        counters.gate.release(1 << 1);
        let before = counters.counts()[1];
        while counters.counts()[1] == before {
            std::thread::yield_now();
        }
        assert!(stands(0) && stands(2));
        counters.gate.close(3, LONG, |_| {}).unwrap();
        counters.gate.release(u64::MAX);
        assert!((0..3).all(stands));
        counters.gate.end(3, LONG, |_| {}).unwrap();
        counters.threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    #[test]
    fn who_does_not_come_is_called_again_named_and_nobody_is_kept_waiting() {
        let counters = Counters::start(2);
        let calls = AtomicU64::new(0);
        let missing = counters.gate.close(3, 5 * AGAIN, |index| {
            assert!(index <= 2);
            calls.fetch_add(u64::from(index == 2), Ordering::SeqCst);
        });
        assert_eq!(missing, Err(Missing(vec![2])));
        assert!(calls.load(Ordering::SeqCst) > 1);
        assert!(!counters.gate.is_called(0), "the others go on");
        counters.gate.leave(2);
        counters.gate.close(3, LONG, |_| {}).unwrap();
        counters.gate.end(3, LONG, |_| {}).unwrap();
        counters.threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}
