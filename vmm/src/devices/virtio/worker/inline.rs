//! A worker without a thread, for fuzz targets: what there is to do is done when the device is stopped, in the caller's thread, so that
//! the same input takes the same way each time.

use std::io;

use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::Worker;

/// Rounds of events at most: a descriptor that stays readable must not keep a stopping device for ever.
const ROUNDS: usize = 16;

pub(super) struct Running<W> {
    worker: W,
    epoll: Epoll,
}

impl<W: Worker> Running<W> {
    pub(super) fn start(worker: W) -> Result<Self, (W, io::Error)> {
        match Epoll::new().and_then(|epoll| worker.register(&epoll).map(|()| epoll)) {
            Ok(epoll) => Ok(Running { worker, epoll }),
            Err(error) => Err((worker, error)),
        }
    }

    /// Does what the worker has been woken for, and takes it back.
    pub(super) fn stop(mut self) -> Option<W> {
        let mut ready = [EpollEvent::default(); 8];
        for _ in 0..ROUNDS {
            let count = self.epoll.wait(0, &mut ready).unwrap_or(0);
            for event in &ready[..count] {
                if let Err(why) = self.worker.handle(event.data(), event.event_set(), &self.epoll) {
                    tracing::debug!(%why, "the driver must reset the device");
                    self.worker.interrupt().need_reset();
                    self.worker.finish();
                    return Some(self.worker);
                }
            }
            if count == 0 {
                break;
            }
        }
        self.worker.finish();
        Some(self.worker)
    }
}
