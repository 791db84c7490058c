//! An interface whose frames the host's kernel moves (`backends::vhost`): a kernel's thread for each pair of queues, and one of ours beside them.
//!
//! Ours, the guard, sleeps: it answers the control queue, if there is one, and asks the driver for a reset when the kernel says that a ring is broken. It also ends the
//! kernel's work, as a reset comes in a vCPU's thread, which may not. A queue of the tap that is detached gets no frames any more, but the kernel may
//! still deliver what it had taken from it; drivers keep the buffers of pairs that they do not use.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::epoll::{Epoll, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::control::Control;
use super::taps::Taps;
use crate::backends::tap_counters::TapCounters;
use crate::backends::vhost::{DirtyLog, Pair, Vhost};
use crate::bus::lock;
use crate::confine::ThreadKind;
use crate::devices::virtio::queue::Broken;
use crate::devices::virtio::worker::{Shell, Worker, watch};
use crate::devices::virtio::{Activation, ActiveQueue, Interrupt, QueuePosition};
use crate::memory::GuestMemory;
use crate::metrics::Elsewhere;

/// Numbers in the guard's epoll set.
const ERROR: u64 = 0;
const CONTROL_KICK: u64 = 1;

pub struct Kernel {
    guard: Shell<Guard>,
    /// Of the frames, which no queue of ours sees.
    counters: Arc<dyn Elsewhere>,
}

/// What the guard is lent.
struct Parts {
    /// One for each pair. Closed before the log, which they write to.
    vhosts: Vec<Vhost>,
    log: Option<DirtyLog>,
    errors: EventFd,
}

/// What the kernel works with.
struct Working {
    queues: Vec<[ActiveQueue; 2]>,
    memory: GuestMemory,
}

impl Kernel {
    pub fn new(vhosts: Vec<Vhost>, counters: TapCounters) -> io::Result<Self> {
        let errors = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Kernel { guard: Shell::new(Parts { vhosts, log: None, errors }), counters: Arc::new(counters) })
    }

    /// Starts the kernel's work on these pairs, and the guard. An error leaves nothing at work.
    pub fn activate(
        &mut self,
        queues: Vec<[ActiveQueue; 2]>,
        control: Option<Control>,
        taps: &Arc<Taps>,
        activation: &Activation,
    ) -> io::Result<()> {
        activation.metrics.count_elsewhere(&self.counters);
        let parts = self.guard.parts().ok_or(io::ErrorKind::ResourceBusy)?;
        let working = Working { queues, memory: activation.memory.clone() };
        if let Err(error) = parts.start(&working, taps, activation) {
            parts.stop(&working);
            return Err(error);
        }
        let (working, taps, interrupt) = (Some(working), taps.clone(), activation.interrupt.clone());
        self.guard.start(|parts| Guard { parts, working, positions: Vec::new(), control, taps, interrupt })
    }

    /// Ends it, and says where the queues stand: the pairs', then the control queue.
    pub fn deactivate(&mut self) -> Vec<QueuePosition> {
        self.guard.stop()
    }
}

impl Parts {
    fn start(&mut self, working: &Working, taps: &Taps, activation: &Activation) -> io::Result<()> {
        // Of a ring of before.
        let _ = self.errors.read();
        self.log = self.log.take().or_else(|| DirtyLog::new(&working.memory));
        for (index, (vhost, queues)) in self.vhosts.iter_mut().zip(&working.queues).enumerate() {
            vhost.start(&Pair {
                queues,
                tap: &lock(taps.queue(index)),
                features: activation.features,
                interrupt: activation.interrupt.line(),
                errors: &self.errors,
                memory: &working.memory,
                log: self.log.as_ref(),
            })?;
        }
        Ok(())
    }

    /// Where the queues of the pairs stand; without those of a pair that does not stop.
    fn stop(&self, working: &Working) -> Vec<QueuePosition> {
        let mut positions = Vec::with_capacity(2 * working.queues.len() + 1);
        for (vhost, queues) in self.vhosts.iter().zip(&working.queues) {
            match vhost.stop(queues, &working.memory) {
                Ok(stand) => positions.extend(stand),
                Err(error) => tracing::error!(%error, "vhost-net does not stop"),
            }
        }
        if let Some(log) = &self.log {
            log.move_to(&working.memory);
        }
        positions
    }
}

struct Guard {
    parts: Parts,
    /// Until the kernel's work was ended; then `positions` says where that left the queues.
    working: Option<Working>,
    positions: Vec<QueuePosition>,
    control: Option<Control>,
    taps: Arc<Taps>,
    interrupt: Arc<Interrupt>,
}

impl Worker for Guard {
    const NAME: &'static str = "virtio-net";
    const KIND: ThreadKind = ThreadKind::Net;
    type Parts = Parts;

    fn register(&self, epoll: &Epoll) -> io::Result<()> {
        watch(epoll, self.parts.errors.as_raw_fd(), EventSet::IN, ERROR)?;
        let control = self.control.as_ref();
        control.map_or(Ok(()), |control| watch(epoll, control.kick().as_raw_fd(), EventSet::IN, CONTROL_KICK))
    }

    fn handle(&mut self, number: u64, _: EventSet, _: &Epoll) -> Result<(), Broken> {
        match (number, &mut self.control) {
            (ERROR, _) => {
                let _ = self.parts.errors.read();
                Err(Broken("vhost-net has found a broken ring"))
            }
            (CONTROL_KICK, Some(control)) => control.run(&self.taps, &self.interrupt),
            _ => Ok(()),
        }
    }

    fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    fn finish(&mut self) {
        if let Some(working) = self.working.take() {
            self.positions = self.parts.stop(&working);
        }
    }

    fn take_apart(mut self) -> (Parts, Vec<QueuePosition>) {
        // If it has not come to have a thread.
        self.finish();
        self.positions.extend(self.control.map(|control| control.position()));
        (self.parts, self.positions)
    }
}
