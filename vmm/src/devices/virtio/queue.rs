//! A split virtqueue as a device uses it.
//!
//! `virtio-queue` walks the rings and bounds its indices. Three things are added here. A chain that is broken
//! anywhere (a loop, an index or address out of range, a readable descriptor after a writable one) is an
//! error, where the crate's iterator just ends early. Several used elements can be published at once,
//! which mergeable receive buffers need: a driver must never see half of a packet. And the driver's
//! "no interrupt" flag is honoured where event indices are not negotiated.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

use super::QueuePosition;
use super::iovec::IoVec;
use crate::memory::GuestMemory;
use crate::metrics::QueueMetrics;

/// The driver has broken the ring; the queue must not be used again before a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Broken(pub &'static str);

/// The buffers of one request.
#[derive(Default)]
pub struct Chain {
    /// Index of its first descriptor, by which it is given back.
    pub head: u16,
    /// What the driver wrote for the device to read.
    pub readable: IoVec,
    /// What the device may write.
    pub writable: IoVec,
}

/// A request that is done: its head, and how many bytes the device wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    pub head: u16,
    pub length: u32,
}

/// A queue's parts by guest-physical address, and its number of descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rings {
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

pub struct VirtQueue {
    queue: Queue,
    memory: GuestMemory,
    event_idx: bool,
    /// Used elements published since the driver was last considered for an interrupt.
    published: Wrapping<u16>,
    /// Bytes that the driver gave with the request popped last.
    popped_bytes: u64,
    metrics: Arc<QueueMetrics>,
}

impl VirtQueue {
    /// `queue` has been checked with `is_valid` against `memory`, and both stay as they are.
    pub fn new(queue: Queue, memory: GuestMemory) -> Self {
        let event_idx = queue.event_idx_enabled();
        VirtQueue { queue, memory, event_idx, published: Wrapping(0), popped_bytes: 0, metrics: Arc::default() }
    }

    /// What happens in the queue is counted in `metrics` from now on, by the one thread that has the queue.
    pub fn counted_in(self, metrics: Arc<QueueMetrics>) -> Self {
        VirtQueue { metrics, ..self }
    }

    /// Goes on where a queue over the same rings has stopped.
    pub fn go_to(&mut self, position: QueuePosition) {
        self.queue.set_next_avail(position.next_available);
        self.queue.set_next_used(position.next_used);
    }

    pub fn position(&self) -> QueuePosition {
        QueuePosition { next_available: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    /// Where the rings are, for who works on them in our place.
    pub fn rings(&self) -> Rings {
        Rings {
            size: self.queue.size(),
            descriptors: self.queue.desc_table(),
            available: self.queue.avail_ring(),
            used: self.queue.used_ring(),
        }
    }

    /// How many requests were given back, as the driver sees it (modulo 2¹⁶): where [`Self::position`] is not ours to know.
    pub fn used_index(&self) -> Result<u16, Broken> {
        let index = GuestAddress(self.queue.used_ring()).unchecked_add(2);
        self.memory.load(index, Ordering::Acquire).map(u16::from_le).map_err(|_| Broken("used ring"))
    }

    /// Where this queue's work is counted.
    pub fn metrics(&self) -> &QueueMetrics {
        &self.metrics
    }

    /// Takes the next request into `chain`; false if there is none.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, Broken> {
        let popped = self.pop_uncounted(chain);
        match &popped {
            Ok(true) => {
                self.popped_bytes = chain.readable.len() as u64;
                self.metrics.requests.increment();
                self.metrics.bytes_read.add(self.popped_bytes);
            }
            Ok(false) => {}
            Err(_) => self.metrics.descriptor_errors.increment(),
        }
        popped
    }

    fn pop_uncounted(&mut self, chain: &mut Chain) -> Result<bool, Broken> {
        chain.readable.clear();
        chain.writable.clear();
        let mut available = self.queue.iter(&self.memory).map_err(|_| Broken("available index out of range"))?;
        let Some(descriptors) = available.next() else { return Ok(false) };
        chain.head = descriptors.head_index();
        let mut last: Option<Descriptor> = None;
        for descriptor in descriptors {
            let address = GuestAddress(descriptor.addr().raw_value());
            let length = descriptor.len() as usize;
            match (descriptor.is_write_only(), chain.writable.is_empty()) {
                (true, _) => chain.writable.push_writable(&self.memory, address, length),
                (false, true) => chain.readable.push(&self.memory, address, length),
                (false, false) => return Err(Broken("readable descriptor after a writable one")),
            }
            .map_err(|_| Broken("descriptor outside of guest memory, or too many"))?;
            last = Some(descriptor);
        }
        match last {
            Some(last) if !last.has_next() => Ok(true),
            // The crate ends an iteration that it cannot go on with; a whole chain ends with a last one.
            _ => Err(Broken("descriptor chain without an end")),
        }
    }

    /// Puts back the request that was popped last.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
        self.metrics.requests.take_back(1);
        self.metrics.bytes_read.take_back(self.popped_bytes);
    }

    /// Gives requests back, all at the same instant in the driver's eyes.
    pub fn publish(&mut self, used: &[Used]) -> Result<(), Broken> {
        let ring = self.queue.used_ring();
        let size = self.queue.size();
        let first = Wrapping(self.queue.next_used());
        for (index, element) in used.iter().enumerate() {
            let slot = (first + Wrapping(index as u16)).0 % size;
            let mut bytes = [0; 8];
            bytes[..4].copy_from_slice(&u32::from(element.head).to_le_bytes());
            bytes[4..].copy_from_slice(&element.length.to_le_bytes());
            self.memory
                .write_slice(&bytes, GuestAddress(ring).unchecked_add(4 + 8 * u64::from(slot)))
                .map_err(|_| Broken("used ring"))?;
        }
        self.metrics.bytes_written.add(used.iter().map(|element| u64::from(element.length)).sum());
        let next = first + Wrapping(used.len() as u16);
        self.memory
            .store(next.0.to_le(), GuestAddress(ring).unchecked_add(2), Ordering::Release)
            .map_err(|_| Broken("used ring"))?;
        self.queue.set_next_used(next.0);
        self.published += Wrapping(used.len() as u16);
        Ok(())
    }

    /// Whether the driver wants to be told of what was published since this was last asked
    /// (virtio 1.2, 2.7.7.2).
    pub fn needs_interrupt(&mut self) -> Result<bool, Broken> {
        let published = std::mem::replace(&mut self.published, Wrapping(0));
        if published.0 == 0 {
            return Ok(false);
        }
        self.metrics.batch.record(published.0.into());
        let wanted = self.is_interrupt_wanted(published)?;
        match wanted {
            true => self.metrics.interrupts.increment(),
            false => self.metrics.interrupts_suppressed.increment(),
        }
        Ok(wanted)
    }

    fn is_interrupt_wanted(&self, published: Wrapping<u16>) -> Result<bool, Broken> {
        // What was published must be seen before the driver's wish is read.
        fence(Ordering::SeqCst);
        let available = GuestAddress(self.queue.avail_ring());
        if !self.event_idx {
            return Ok(self.load(available)? & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0);
        }
        let size = u64::from(self.queue.size());
        let event = Wrapping(self.load(available.unchecked_add(4 + 2 * size))?);
        let new = Wrapping(self.queue.next_used());
        Ok(new - event - Wrapping(1) < published)
    }

    fn load(&self, address: GuestAddress) -> Result<u16, Broken> {
        self.memory.load(address, Ordering::Relaxed).map(u16::from_le).map_err(|_| Broken("available ring"))
    }

    /// Asks the driver for kicks; true if there are requests already, for which none will come.
    pub fn enable_kicks(&mut self) -> Result<bool, Broken> {
        self.queue.enable_notification(&self.memory).map_err(|_| Broken("used ring"))
    }

    /// Kicks are not needed while the device looks at the queue anyway.
    pub fn disable_kicks(&mut self) -> Result<(), Broken> {
        self.queue.disable_notification(&self.memory).map_err(|_| Broken("used ring"))
    }
}

#[cfg(test)]
pub mod testing {
    //! A driver's side of a queue, for the tests of devices.

    use super::*;
    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::mock::MockSplitQueue;

    pub use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

    pub const QUEUE_SIZE: u16 = 16;

    pub fn memory() -> GuestMemory {
        crate::memory::map(&[(GuestAddress(0), 0x10_0000)], None, false).unwrap()
    }

    /// (address, length, device may write).
    pub type Buffer = (u64, u32, bool);

    /// Makes chains of the given buffers available in a queue at address 0.
    pub fn queue_with(memory: &GuestMemory, chains: &[&[Buffer]]) -> VirtQueue {
        let driver = MockSplitQueue::new(memory, QUEUE_SIZE);
        let mut descriptors = Vec::new();
        for chain in chains {
            for (index, (address, length, writable)) in chain.iter().enumerate() {
                let mut flags = if *writable { VRING_DESC_F_WRITE } else { 0 };
                let last = index + 1 == chain.len();
                flags |= if last { 0 } else { VRING_DESC_F_NEXT };
                let next = if last { 0 } else { descriptors.len() as u16 + 1 };
                descriptors.push(RawDescriptor::from(Descriptor::new(*address, *length, flags as u16, next)));
            }
        }
        driver.add_desc_chains(&descriptors, 0).unwrap();
        VirtQueue::new(driver.create_queue().unwrap(), memory.clone())
    }

    /// Where the number of requests that were given back is.
    pub fn used_index(queue: &VirtQueue) -> GuestAddress {
        GuestAddress(queue.queue.used_ring() + 2)
    }

    /// What the device gave back so far.
    pub fn used(memory: &GuestMemory, queue: &VirtQueue) -> Vec<Used> {
        let ring = queue.queue.used_ring();
        let count: u16 = memory.read_obj(GuestAddress(ring + 2)).unwrap();
        (0..u64::from(count))
            .map(|index| {
                let pair: [u32; 2] = memory.read_obj(GuestAddress(ring + 4 + 8 * index)).unwrap();
                Used { head: pair[0] as u16, length: pair[1] }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::testing::*;
    use super::*;
    use proptest::prelude::*;
    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::mock::MockSplitQueue;

    #[test]
    fn a_chain_is_split_into_what_may_be_read_and_written() {
        let memory = memory();
        let mut queue = queue_with(&memory, &[&[(0x8000, 16, false), (0x9000, 512, true), (0xa000, 1, true)]]);
        let mut chain = Chain::default();
        assert!(queue.pop(&mut chain).unwrap());
        assert_eq!((chain.readable.len(), chain.writable.len()), (16, 513));
        assert!(!queue.pop(&mut chain).unwrap());
    }

    #[test]
    fn buffers_out_of_bounds_and_in_false_order_break_the_queue() {
        let memory = memory();
        for buffers in [
            &[(0xf_fff0, 17, true)][..],
            &[(u64::MAX - 3, 8, false)],
            &[(0x10_0000_0000, 1, false)],
            &[(0x8000, 1, true), (0x9000, 1, false)],
        ] {
            let mut queue = queue_with(&memory, &[buffers]);
            assert!(queue.pop(&mut Chain::default()).is_err(), "{buffers:x?}");
        }
    }

    #[test]
    fn a_loop_of_descriptors_breaks_the_queue() {
        let memory = memory();
        let driver = MockSplitQueue::new(&memory, QUEUE_SIZE);
        let looped: Vec<RawDescriptor> =
            (0..2).map(|i| Descriptor::new(0x8000, 8, VRING_DESC_F_NEXT as u16, 1 - i).into()).collect();
        driver.add_desc_chains(&looped, 0).unwrap();
        // The mock clears the last one's flag; a hostile driver does not.
        let table = driver.desc_table_addr();
        memory.write_obj(VRING_DESC_F_NEXT as u16, table.unchecked_add(16 + 12)).unwrap();
        memory.write_obj(0u16, table.unchecked_add(16 + 14)).unwrap();
        let mut queue = VirtQueue::new(driver.create_queue().unwrap(), memory.clone());
        assert!(queue.pop(&mut Chain::default()).is_err());
    }

    #[test]
    fn used_elements_appear_together() {
        let memory = memory();
        let mut queue = queue_with(&memory, &[&[(0x8000, 4, true)], &[(0x9000, 4, true)]]);
        let elements = [Used { head: 0, length: 4 }, Used { head: 1, length: 2 }];
        queue.publish(&elements).unwrap();
        assert_eq!(used(&memory, &queue), elements);
        assert!(queue.needs_interrupt().unwrap());
        assert!(!queue.needs_interrupt().unwrap());
        let counted = queue.metrics();
        assert_eq!((counted.bytes_written.get(), counted.interrupts.get(), counted.batch.sum()), (6, 1, 2));
    }

    #[test]
    fn a_request_that_is_put_back_is_not_counted() {
        let memory = memory();
        let mut queue = queue_with(&memory, &[&[(0x8000, 16, false)]]);
        let mut chain = Chain::default();
        assert!(queue.pop(&mut chain).unwrap());
        queue.undo_pop();
        let counted = |queue: &VirtQueue| (queue.metrics().requests.get(), queue.metrics().bytes_read.get());
        assert_eq!(counted(&queue), (0, 0));
        assert!(queue.pop(&mut chain).unwrap());
        assert_eq!(counted(&queue), (1, 16));
    }

    proptest! {
        #[test]
        fn no_ring_content_panics_or_leaves_guest_memory(
            descriptors in proptest::collection::vec((any::<u64>(), any::<u32>(), 0u16..8, any::<u16>()), 1..16),
            heads in proptest::collection::vec(any::<u16>(), 1..32),
            index: u16,
        ) {
            let memory = memory();
            let driver = MockSplitQueue::new(&memory, QUEUE_SIZE);
            for (slot, (address, length, flags, next)) in descriptors.iter().enumerate() {
                let address = if length % 3 == 0 { address % 0x10_0000 } else { *address };
                let length = if length % 2 == 0 { length % 4096 } else { *length };
                let raw = RawDescriptor::from(Descriptor::new(address, length, *flags, next % 20));
                driver.desc_table().store(slot as u16, raw).unwrap();
            }
            for (slot, head) in heads.iter().enumerate() {
                driver.avail().ring().ref_at(slot % QUEUE_SIZE as usize).unwrap().store(head.to_le());
            }
            driver.avail().idx().store(index);
            let mut queue = VirtQueue::new(driver.create_queue().unwrap(), memory.clone());
            let mut chain = Chain::default();
            for _ in 0..QUEUE_SIZE {
                match queue.pop(&mut chain) {
                    Ok(true) => queue.publish(&[Used { head: chain.head, length: 0 }]).unwrap(),
                    Ok(false) | Err(_) => break,
                }
            }
        }
    }
}
