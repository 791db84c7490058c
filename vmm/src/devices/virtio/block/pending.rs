//! Requests that the kernel works on, each with the guest's buffers that it uses.
//!
//! The kernel reads and writes those buffers at any time until it says that it is done. So they are kept here, with the mapping that they
//! are in, and nothing here goes away before all is done: not when the device is stopped ([`Pending::drain`]), and not when its thread panics.

use std::io;
use std::time::Instant;

use super::super::iovec::{GuestByte, IoVec};
use super::super::queue::Chain;
use super::request::Operation;
use crate::backends::disk::ring::Ring;
use crate::memory::GuestMemory;

/// A request that is done.
pub struct Done {
    pub head: u16,
    pub status: GuestByte,
    /// How many bytes of the driver's buffers were written.
    pub outcome: io::Result<u32>,
    pub begun: Instant,
}

pub struct Pending {
    /// Always there, but for the end.
    ring: Option<Ring>,
    slots: Vec<Slot>,
    free: Vec<u16>,
    memory: GuestMemory,
}

/// One request. Its list of segments is kept for the next one.
struct Slot {
    work: Work,
    /// What is still to be moved.
    data: IoVec,
    request: Option<Request>,
}

#[derive(Clone, Copy)]
enum Work {
    Read { offset: u64 },
    Write { offset: u64, then_sync: bool },
    Sync,
}

struct Request {
    head: u16,
    status: GuestByte,
    /// Bytes that a read is for.
    length: u32,
    begun: Instant,
}

impl Pending {
    /// For at most `slots` requests, as many as the ring has entries. Their buffers are in `memory`.
    pub fn new(ring: Ring, slots: u16, memory: GuestMemory) -> Self {
        let slot = |_| Slot { work: Work::Sync, data: IoVec::default(), request: None };
        Pending { ring: Some(ring), slots: (0..slots).map(slot).collect(), free: (0..slots).collect(), memory }
    }

    pub fn ring(&self) -> Option<&Ring> {
        self.ring.as_ref()
    }

    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    pub fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Begins a read, write or flush with the chain's data, and takes that. False if it is another operation or there is no room; after an
    /// error the request is lost.
    pub fn begin(
        &mut self,
        operation: &Operation,
        chain: &mut Chain,
        status: &GuestByte,
        write_through: bool,
    ) -> io::Result<bool> {
        let (work, data) = match operation {
            Operation::Read { offset } => (Work::Read { offset: *offset }, Some(&mut chain.writable)),
            Operation::Write { offset } => {
                (Work::Write { offset: *offset, then_sync: write_through }, Some(&mut chain.readable))
            }
            Operation::Flush => (Work::Sync, None),
            Operation::Identify | Operation::Discard(_) | Operation::WriteZeroes { .. } => return Ok(false),
        };
        let Some(index) = self.free.pop() else { return Ok(false) };
        let slot = &mut self.slots[usize::from(index)];
        slot.work = work;
        slot.data.clear();
        if let Some(data) = data {
            std::mem::swap(&mut slot.data, data);
        }
        let length = if let Work::Read { .. } = work { slot.data.len() as u32 } else { 0 };
        slot.request = Some(Request { head: chain.head, status: status.clone(), length, begun: Instant::now() });
        if let Err(error) = self.add(index) {
            self.slots[usize::from(index)].request = None;
            self.free.push(index);
            return Err(error);
        }
        Ok(true)
    }

    /// Puts what is left of a slot's work into the ring.
    fn add(&mut self, index: u16) -> io::Result<()> {
        let slot = &self.slots[usize::from(index)];
        let ring = self.ring.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        // SAFETY: the segments are in `self.memory`, which is not let go before the ring has nothing under way (`drain`).
        unsafe {
            match slot.work {
                Work::Read { offset } => ring.read(index.into(), slot.data.segments(), offset),
                Work::Write { offset, .. } => ring.write(index.into(), slot.data.segments(), offset),
                Work::Sync => ring.sync(index.into()),
            }
        }
    }

    /// Hands over what was begun.
    pub fn submit(&mut self) -> io::Result<()> {
        self.ring.as_mut().map_or(Ok(()), |ring| ring.submit(0))
    }

    /// The next request that is done. One that the kernel did a part of goes on with the rest.
    pub fn next(&mut self) -> Option<Done> {
        loop {
            let (token, result) = self.ring.as_mut()?.next()?;
            // Tokens are ours, and each comes back once.
            let index = u16::try_from(token).ok().filter(|index| usize::from(*index) < self.slots.len())?;
            let Some(outcome) = self.advance(index, result) else { continue };
            let Some(request) = self.slots[usize::from(index)].request.take() else { continue };
            self.free.push(index);
            let Request { head, status, length, begun } = request;
            return Some(Done { head, status, outcome: outcome.map(|()| length), begun });
        }
    }

    /// Takes account of what the kernel did; nothing if there is more to be done.
    fn advance(&mut self, index: u16, result: io::Result<u32>) -> Option<io::Result<()>> {
        let slot = &mut self.slots[usize::from(index)];
        let moved = match result {
            Ok(moved) => moved,
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                return self.go_on(index);
            }
            Err(error) => return Some(Err(error)),
        };
        slot.data.consume(moved as usize);
        match &mut slot.work {
            Work::Sync => return Some(Ok(())),
            Work::Read { .. } | Work::Write { .. } if moved == 0 && !slot.data.is_empty() => {
                return Some(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            Work::Read { .. } | Work::Write { then_sync: false, .. } if slot.data.is_empty() => return Some(Ok(())),
            Work::Write { .. } if slot.data.is_empty() => slot.work = Work::Sync,
            Work::Read { offset } | Work::Write { offset, .. } => *offset += u64::from(moved),
        }
        self.go_on(index)
    }

    fn go_on(&mut self, index: u16) -> Option<io::Result<()>> {
        self.add(index).err().map(Err)
    }

    /// Waits for all, and gives each to `done`.
    pub fn drain(&mut self, mut done: impl FnMut(Done)) {
        while !self.is_empty() {
            let Some(ring) = &mut self.ring else { return };
            if let Err(error) = ring.submit(1) {
                if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ResourceBusy) {
                    std::thread::yield_now();
                    continue;
                }
                // The kernel may have the buffers for ever, and so their mapping must stay.
                tracing::error!(%error, "io_uring: cannot wait for what is under way");
                std::mem::forget(self.memory.clone());
                return;
            }
            while let Some(request) = self.next() {
                done(request);
            }
        }
    }

    /// Gives the ring back; nothing may be under way.
    pub fn into_ring(mut self) -> Option<Ring> {
        self.ring.take()
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if self.ring.is_some() {
            self.drain(drop);
        }
    }
}
