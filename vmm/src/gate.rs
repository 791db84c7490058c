//! How vCPUs' threads are held while their VM is paused, and sent to their end.
//!
//! # No lost wake-up
//!
//! A vCPU's thread may be anywhere when it is called: inside `KVM_RUN` (in the guest, or asleep because the guest halted or has not woken this
//! vCPU yet), serving an exit, or between the two. Three steps make sure that it comes:
//!
//! 1. The caller writes its order and sets `is_called`, and only then sends the signal.
//! 2. The signal's handler runs on the vCPU's own thread and sets `immediate_exit` in its `kvm_run` (`vcpu::kick`). Inside `KVM_RUN` the
//!    signal ends the call; before it, the flag ends the next call at once.
//! 3. The thread clears that flag only right before it looks at `is_called`. A signal before the look is answered by the look, one after it by the flag.
//!
//! A signal itself can be lost where the kernel's queue for the user is full (`pthread_kill` says EAGAIN), so whoever has not come is called again after a while.
//!
//! A caller never waits longer than its patience: a thread can be held up in a device whose host side hangs. It then takes its order back, and
//! the VM goes on as if nothing had been.

use std::sync::atomic::{AtomicBool, Ordering};
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
    /// True while the order is another than [`Order::Run`]: what a thread looks at between two exits, without the lock.
    is_called: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    order: Order,
    /// A bit for each thread that waits at the gate, and one for each that has ended.
    waiting: u64,
    ended: u64,
}

impl Gate {
    /// An open gate, or one at which threads wait until [`Self::open`].
    pub fn new(is_open: bool) -> Self {
        let order = if is_open { Order::Run } else { Order::Wait };
        let state = State { order, waiting: 0, ended: 0 };
        Gate { is_called: AtomicBool::new(!is_open), state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Whether the threads are to come to the gate. Cheap.
    pub fn is_called(&self) -> bool {
        self.is_called.load(Ordering::Acquire)
    }

    /// For the thread `index`, with nothing in its hands: waits as long as the gate is closed.
    pub fn pass(&self, index: u8) -> Passage {
        let bit = 1 << index;
        let mut state = lock(&self.state);
        state.waiting |= bit;
        self.changed.notify_all();
        while state.order == Order::Wait {
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
        lock(&self.state).order = Order::Run;
        self.is_called.store(false, Ordering::Release);
        self.changed.notify_all();
    }

    /// Sends the threads to their end. Those that are returned have not come to it within `patience`; the order stands.
    pub fn end(&self, count: u8, patience: Duration, call: impl Fn(u8)) -> Result<(), Missing> {
        self.order(Order::End, count, patience, call)
    }

    fn order(&self, order: Order, count: u8, patience: Duration, call: impl Fn(u8)) -> Result<(), Missing> {
        let deadline = Instant::now() + patience;
        let all = (1u64 << count) - 1;
        let mut state = lock(&self.state);
        state.order = order;
        self.is_called.store(true, Ordering::Release);
        self.changed.notify_all();
        loop {
            let missing = match order {
                Order::End => all & !state.ended,
                Order::Run | Order::Wait => all & !(state.ended | state.waiting),
            };
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
                            while !gate.is_called() {
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
    fn who_does_not_come_is_called_again_named_and_nobody_is_kept_waiting() {
        let counters = Counters::start(2);
        let calls = AtomicU64::new(0);
        let missing = counters.gate.close(3, 5 * AGAIN, |index| {
            assert!(index <= 2);
            calls.fetch_add(u64::from(index == 2), Ordering::SeqCst);
        });
        assert_eq!(missing, Err(Missing(vec![2])));
        assert!(calls.load(Ordering::SeqCst) > 1);
        assert!(!counters.gate.is_called(), "the others go on");
        counters.gate.leave(2);
        counters.gate.close(3, LONG, |_| {}).unwrap();
        counters.gate.end(3, LONG, |_| {}).unwrap();
        counters.threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}
