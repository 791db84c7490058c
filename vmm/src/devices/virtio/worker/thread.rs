//! The thread of a worker: sleeps in `epoll`, does what it is woken for, and hands the worker back when it is told to stop.

use std::io;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Worker, watch};
use crate::bus::lock;
use crate::confine;

/// Number under which the stop event is in the epoll set; a worker's own are below.
const STOP: u64 = u64::MAX;

/// A worker's thread.
pub(super) struct Running<W> {
    stop: EventFd,
    thread: JoinHandle<Option<W>>,
}

impl<W: Worker> Running<W> {
    /// Starts the thread; gives the worker back if that fails.
    pub(super) fn start(worker: W) -> Result<Self, (W, io::Error)> {
        let prepared = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).and_then(|stop| {
            let epoll = Epoll::new()?;
            let told_to_stop = stop.try_clone()?;
            watch(&epoll, stop.as_raw_fd(), EventSet::IN, STOP)?;
            worker.register(&epoll)?;
            Ok((stop, told_to_stop, epoll))
        });
        let (stop, told_to_stop, epoll) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return Err((worker, error)),
        };
        // The worker lies in a slot, so that it is not lost if there is no thread to be had. Nobody waits for anybody: it is there before the thread is.
        let slot = Arc::new(Mutex::new(Some(worker)));
        let taken = slot.clone();
        let thread = std::thread::Builder::new().name(W::NAME.into()).spawn(move || {
            let mut worker = lock(&taken).take()?;
            let works = AssertUnwindSafe(|| {
                work(&mut worker, &epoll, &told_to_stop);
                worker.finish();
            });
            if catch_unwind(works).is_err() {
                // A mistake of ours or of a library's; the driver must not wait for a device that is gone.
                worker.interrupt().need_reset();
                return None;
            }
            Some(worker)
        });
        match thread {
            Ok(thread) => Ok(Running { stop, thread }),
            Err(error) => {
                let worker = lock(&slot).take().expect("only a thread takes it, and there is none");
                Err((worker, error))
            }
        }
    }

    /// Ends the thread and takes the worker back; `None` if it has panicked.
    pub(super) fn stop(self) -> Option<W> {
        if let Err(error) = self.stop.write(1) {
            tracing::error!(%error, "a device cannot be stopped");
            return None;
        }
        self.thread.join().ok().flatten()
    }
}

/// Works until it is told to stop.
fn work<W: Worker>(worker: &mut W, epoll: &Epoll, stop: &EventFd) {
    confine::enter(W::KIND);
    let mut ready = [EpollEvent::default(); 8];
    loop {
        let count = match epoll.wait(-1, &mut ready) {
            Ok(count) => count,
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
            Err(error) => {
                tracing::error!(%error, device = W::NAME, "epoll");
                return;
            }
        };
        for event in &ready[..count] {
            if event.data() == STOP {
                return;
            }
            if let Err(why) = worker.handle(event.data(), event.event_set(), epoll) {
                tracing::warn!(device = W::NAME, %why, "the driver must reset the device");
                worker.interrupt().need_reset();
                wait_for(stop);
                return;
            }
        }
    }
}

/// Sleeps until `event` is readable.
fn wait_for(event: &EventFd) {
    let mut poll = libc::pollfd { fd: event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one `pollfd` is passed, of which the kernel writes `revents`.
    while unsafe { libc::poll(&mut poll, 1, -1) } <= 0 {}
}

#[cfg(test)]
mod tests {
    use super::super::Shell;
    use super::*;
    use crate::confine::ThreadKind;
    use crate::devices::virtio::queue::Broken;
    use crate::devices::virtio::{Interrupt, QueuePosition};

    /// Fails at its first event.
    struct Failing {
        event: EventFd,
        interrupt: Arc<Interrupt>,
    }

    impl Worker for Failing {
        const NAME: &'static str = "failing";
        const KIND: ThreadKind = ThreadKind::Rng;
        type Parts = EventFd;

        fn register(&self, epoll: &Epoll) -> io::Result<()> {
            watch(epoll, self.event.as_raw_fd(), EventSet::IN, 0)
        }

        fn handle(&mut self, _: u64, _: EventSet, _: &Epoll) -> Result<(), Broken> {
            panic!("as it is meant to")
        }

        fn interrupt(&self) -> &Interrupt {
            &self.interrupt
        }

        fn take_apart(self) -> (EventFd, Vec<QueuePosition>) {
            (self.event, vec![QueuePosition::default()])
        }
    }

    #[test]
    fn a_worker_that_panics_leaves_a_device_that_asks_for_a_reset_and_has_nothing_to_start() {
        let interrupt = Arc::new(Interrupt::alone());
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let kick = event.try_clone().unwrap();
        let mut shell = Shell::new(event);
        let start = |shell: &mut Shell<Failing>| shell.start(|event| Failing { event, interrupt: interrupt.clone() });
        start(&mut shell).unwrap();
        assert!(shell.parts().is_none());
        assert_eq!(shell.stop(), [QueuePosition::default()]);
        start(&mut shell).unwrap();
        kick.write(1).unwrap();
        while !interrupt.is_reset_needed() {
            std::thread::yield_now();
        }
        assert_eq!(shell.stop(), []);
        assert!(shell.parts().is_none() && start(&mut shell).is_err());
    }
}
