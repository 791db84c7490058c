//! The thread of a worker: sleeps in `epoll`, does what it is woken for, and hands the worker back when it is told to stop.

use std::io;
use std::os::fd::AsRawFd;
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Worker, watch};
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
        // The worker goes through a channel, so that it is not lost if there is no thread to be had.
        let (sender, receiver) = std::sync::mpsc::sync_channel::<W>(1);
        let thread = std::thread::Builder::new()
            .name(W::NAME.into())
            .spawn(move || receiver.recv().ok().map(|worker| work(worker, &epoll, &told_to_stop)));
        match thread {
            Ok(thread) => {
                // The channel has room for one, and the receiver lives in the thread.
                let _ = sender.send(worker);
                Ok(Running { stop, thread })
            }
            Err(error) => Err((worker, error)),
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

fn work<W: Worker>(mut worker: W, epoll: &Epoll, stop: &EventFd) -> W {
    confine::enter(W::KIND);
    let mut ready = [EpollEvent::default(); 8];
    loop {
        let count = match epoll.wait(-1, &mut ready) {
            Ok(count) => count,
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
            Err(error) => {
                tracing::error!(%error, device = W::NAME, "epoll");
                return worker;
            }
        };
        for event in &ready[..count] {
            if event.data() == STOP {
                return worker;
            }
            if let Err(why) = worker.handle(event.data(), event.event_set(), epoll) {
                tracing::warn!(device = W::NAME, %why, "the driver must reset the device");
                worker.interrupt().need_reset();
                wait_for(stop);
                return worker;
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
