//! The thread that a device becomes between DRIVER_OK and reset.
//!
//! A worker owns its queues and backend and sleeps in `epoll` until its driver kicks, its backend has
//! something, or it is told to stop. When it stops it hands itself back, so that the next driver (after
//! a reset, in a second kernel) finds the same backend.
//!
//! [`Shell`] is the device's end of it: what a device lends to its worker is either in there or with the worker, and is not lost
//! between the two when a thread cannot be started. All starting and stopping of workers is here.

#[cfg(feature = "fuzzing")]
mod inline;
#[cfg_attr(feature = "fuzzing", allow(dead_code))]
mod thread;

use std::io;
use std::os::fd::RawFd;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::queue::Broken;
use super::{Interrupt, QueuePosition};
use crate::confine::ThreadKind;
#[cfg(feature = "fuzzing")]
use inline::Running;
#[cfg(not(feature = "fuzzing"))]
use thread::Running;

/// A device at work.
pub trait Worker: Send + 'static {
    /// Name of the thread.
    const NAME: &'static str;

    /// What it may do.
    const KIND: ThreadKind;

    /// What the device lends to it: the backend, and what goes with that.
    type Parts: Send;

    /// Adds what the worker waits for, under numbers of its choice.
    fn register(&self, epoll: &Epoll) -> io::Result<()>;

    /// Does what the event `number` calls for. A broken queue ends the worker's work until a reset.
    fn handle(&mut self, number: u64, events: EventSet, epoll: &Epoll) -> Result<(), Broken>;

    /// The way to its driver.
    fn interrupt(&self) -> &Interrupt;

    /// Called in the worker's own thread when its work ends: what it has begun and cannot leave is brought to an end.
    fn finish(&mut self) {}

    /// Gives back what it was lent, and says where its queues stand, in their order. A request that it holds goes back into its ring
    /// first, and whoever goes on takes it again.
    fn take_apart(self) -> (Self::Parts, Vec<QueuePosition>);
}

/// A device's worker, or the parts that wait for one.
pub struct Shell<W: Worker>(State<W>);

enum State<W: Worker> {
    Idle(W::Parts),
    Working(Running<W>),
    /// The worker has panicked, and what it was lent went with it.
    Lost,
}

impl<W: Worker> Shell<W> {
    pub fn new(parts: W::Parts) -> Self {
        Shell(State::Idle(parts))
    }

    /// The parts, while no worker has them.
    pub fn parts(&mut self) -> Option<&mut W::Parts> {
        match &mut self.0 {
            State::Idle(parts) => Some(parts),
            State::Working(_) | State::Lost => None,
        }
    }

    /// Makes a worker of the parts and starts it. An error leaves everything as it was.
    pub fn start(&mut self, worker: impl FnOnce(W::Parts) -> W) -> io::Result<()> {
        let parts = match std::mem::replace(&mut self.0, State::Lost) {
            State::Idle(parts) => parts,
            other => {
                self.0 = other;
                return Err(io::ErrorKind::ResourceBusy.into());
            }
        };
        match Running::start(worker(parts)) {
            Ok(running) => {
                self.0 = State::Working(running);
                Ok(())
            }
            Err((worker, error)) => {
                self.0 = State::Idle(worker.take_apart().0);
                Err(error)
            }
        }
    }

    /// Ends the worker and takes the parts back; where its queues stand, which is nothing if there is no worker.
    pub fn stop(&mut self) -> Vec<QueuePosition> {
        let running = match std::mem::replace(&mut self.0, State::Lost) {
            State::Working(running) => running,
            other => {
                self.0 = other;
                return Vec::new();
            }
        };
        let Some(worker) = running.stop() else { return Vec::new() };
        let (parts, positions) = worker.take_apart();
        self.0 = State::Idle(parts);
        positions
    }
}

/// Adds `fd` to the set.
pub fn watch(epoll: &Epoll, fd: RawFd, events: EventSet, number: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, number))
}

/// Changes what of `fd` is waited for.
pub fn rewatch(epoll: &Epoll, fd: RawFd, events: EventSet, number: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Modify, fd, EpollEvent::new(events, number))
}
