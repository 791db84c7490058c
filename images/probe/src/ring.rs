//! A split virtqueue as it lies in memory, from the driver's side (virtio 1.2, section 2.7).
//!
//! Every field is an atomic, because the device reads and writes the same memory meanwhile: that makes
//! each access whole and puts the order between accesses where one can see it. A chain here is one
//! descriptor, and descriptor *n* always stands for the driver's buffer *n* (a *slot*), so a slot is
//! the driver's until [`Queue::offer`] and again after [`Queue::take`].
//!
//! What the device writes is not trusted: a slot that was not offered is not handed out.

use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

const DESCRIPTOR_WRITE: u32 = 2;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

#[derive(Debug)]
#[repr(C, align(16))]
struct Descriptor {
    address: AtomicU64,
    length: AtomicU32,
    /// Flags in the low half, the next descriptor (unused) in the high half.
    flags: AtomicU32,
}

#[derive(Debug)]
#[repr(C)]
struct Available<const N: usize> {
    flags: AtomicU16,
    index: AtomicU16,
    ring: [AtomicU16; N],
    used_event: AtomicU16,
}

#[derive(Debug)]
#[repr(C)]
struct UsedElement {
    id: AtomicU32,
    length: AtomicU32,
}

#[derive(Debug)]
#[repr(C, align(4))]
struct Used<const N: usize> {
    flags: AtomicU16,
    index: AtomicU16,
    ring: [UsedElement; N],
    available_event: AtomicU16,
}

/// The three areas of a queue of `N` descriptors.
#[derive(Debug)]
#[repr(C)]
pub struct Rings<const N: usize> {
    descriptors: [Descriptor; N],
    available: Available<N>,
    used: Used<N>,
}

impl<const N: usize> Rings<N> {
    /// Empty rings, which are all zeros.
    pub const fn new() -> Self {
        const { assert!(N.is_power_of_two() && N <= 32768, "virtio 1.2, 2.7: a power of two, at most 32768") };
        Rings {
            descriptors: [const {
                Descriptor { address: AtomicU64::new(0), length: AtomicU32::new(0), flags: AtomicU32::new(0) }
            }; N],
            available: Available {
                flags: AtomicU16::new(0),
                index: AtomicU16::new(0),
                ring: [const { AtomicU16::new(0) }; N],
                used_event: AtomicU16::new(0),
            },
            used: Used {
                flags: AtomicU16::new(0),
                index: AtomicU16::new(0),
                ring: [const { UsedElement { id: AtomicU32::new(0), length: AtomicU32::new(0) } }; N],
                available_event: AtomicU16::new(0),
            },
        }
    }
}

impl<const N: usize> Default for Rings<N> {
    fn default() -> Self {
        Self::new()
    }
}

/// Where a slot's buffer is and what the device may do with it.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    pub address: u64,
    pub length: u32,
    /// The device writes it; otherwise it reads it.
    pub writable: bool,
}

/// The driver's end of a queue.
#[derive(Debug)]
pub struct Queue<const N: usize> {
    rings: &'static Rings<N>,
    /// Slots that the device has.
    offered: [bool; N],
    next_available: u16,
    /// Value of `next_available` when the device was last told.
    told: u16,
    next_used: u16,
    /// VIRTIO_F_EVENT_IDX was agreed on: indices in place of flags say when to notify.
    event_index: bool,
}

impl<const N: usize> Queue<N> {
    pub const fn new(rings: &'static Rings<N>, event_index: bool) -> Self {
        Queue { rings, offered: [false; N], next_available: 0, told: 0, next_used: 0, event_index }
    }

    /// Addresses of descriptor table, available ring and used ring, for the device.
    pub fn addresses(&self) -> [u64; 3] {
        let rings = self.rings;
        [(&raw const rings.descriptors) as u64, (&raw const rings.available) as u64, (&raw const rings.used) as u64]
    }

    /// Gives a slot to the device. It is seen by the device at once, though perhaps not looked
    /// for until [`Queue::must_notify`] was obeyed. Offering a slot twice does nothing.
    pub fn offer(&mut self, slot: u16, buffer: Buffer) {
        let index = usize::from(slot);
        if core::mem::replace(&mut self.offered[index], true) {
            return;
        }
        let descriptor = &self.rings.descriptors[index];
        descriptor.address.store(buffer.address, Ordering::Relaxed);
        descriptor.length.store(buffer.length, Ordering::Relaxed);
        descriptor.flags.store(if buffer.writable { DESCRIPTOR_WRITE } else { 0 }, Ordering::Relaxed);
        let available = &self.rings.available;
        available.ring[usize::from(self.next_available) % N].store(slot, Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
        available.index.store(self.next_available, Ordering::Release);
    }

    /// Takes back a slot that the device is done with, and how many bytes it wrote.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        while self.next_used != self.rings.used.index.load(Ordering::Acquire) {
            let element = &self.rings.used.ring[usize::from(self.next_used) % N];
            let (id, length) = (element.id.load(Ordering::Relaxed), element.length.load(Ordering::Relaxed));
            self.next_used = self.next_used.wrapping_add(1);
            if let Some(offered) = self.offered.get_mut(id as usize)
                && core::mem::take(offered)
            {
                // The id is below N, which is at most 32768.
                return Some((id as u16, length));
            }
        }
        None
    }

    /// Whether the device wants to be told of what was offered since it was last asked here.
    pub fn must_notify(&mut self) -> bool {
        let (old, new) = (self.told, self.next_available);
        if old == new {
            return false;
        }
        self.told = new;
        // The index must be seen by the device before its wish is read (2.7.13.4.1).
        fence(Ordering::SeqCst);
        if self.event_index {
            let event = self.rings.used.available_event.load(Ordering::Relaxed);
            // 2.7.10: the event lies in what is new.
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.rings.used.flags.load(Ordering::Relaxed) & USED_NO_NOTIFY == 0
        }
    }

    /// Asks for an interrupt when the next slot is done. False if one is done already, and then no
    /// interrupt may come for it.
    pub fn want_interrupt(&mut self) -> bool {
        if self.event_index {
            self.rings.available.used_event.store(self.next_used, Ordering::Relaxed);
        } else {
            self.rings.available.flags.store(0, Ordering::Relaxed);
        }
        // The wish must be seen by the device before its progress is read (2.7.7).
        fence(Ordering::SeqCst);
        self.rings.used.index.load(Ordering::Acquire) == self.next_used
    }

    /// Asks for no interrupts. A hint: one may come all the same.
    pub fn refuse_interrupts(&mut self) {
        if self.event_index {
            // As far from where the device is as an index can be.
            let far = self.next_used.wrapping_sub(1);
            self.rings.available.used_event.store(far, Ordering::Relaxed);
        } else {
            self.rings.available.flags.store(AVAIL_NO_INTERRUPT, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BUFFER: Buffer = Buffer { address: 0x1000, length: 64, writable: true };

    fn queue(event_index: bool) -> (Queue<4>, &'static Rings<4>) {
        let rings: &'static Rings<4> = Box::leak(Box::new(Rings::new()));
        (Queue::new(rings, event_index), rings)
    }

    /// What a device does with a slot.
    fn complete(rings: &Rings<4>, id: u32, length: u32) {
        let index = rings.used.index.load(Ordering::Acquire);
        let element = &rings.used.ring[usize::from(index) % 4];
        element.id.store(id, Ordering::Relaxed);
        element.length.store(length, Ordering::Relaxed);
        rings.used.index.store(index.wrapping_add(1), Ordering::Release);
    }

    #[test]
    fn the_areas_lie_as_the_specification_has_them() {
        let (queue, rings) = queue(false);
        let [descriptors, available, used] = queue.addresses();
        assert_eq!((available - descriptors, descriptors % 16, available % 2, used % 4), (64, 0, 0, 0));
        assert_eq!((&raw const rings.available.used_event) as u64 - available, 4 + 2 * 4);
        assert_eq!((&raw const rings.used.available_event) as u64 - used, 4 + 8 * 4);
    }

    #[test]
    fn a_slot_that_was_not_offered_is_not_handed_out() {
        let (mut queue, rings) = queue(false);
        queue.offer(2, BUFFER);
        for id in [0, 4, u32::MAX, 2, 2] {
            complete(rings, id, 60);
        }
        assert_eq!(queue.take(), Some((2, 60)));
        assert_eq!(queue.take(), None);
    }

    #[test]
    fn with_flags_the_device_says_when_it_is_awake() {
        let (mut queue, rings) = queue(false);
        assert!(!queue.must_notify(), "nothing is new");
        queue.offer(0, BUFFER);
        assert!(queue.must_notify());
        rings.used.flags.store(USED_NO_NOTIFY, Ordering::Relaxed);
        queue.offer(1, BUFFER);
        assert!(!queue.must_notify());
    }

    #[test]
    fn with_indices_the_device_is_told_when_its_event_is_passed() {
        let (mut queue, rings) = queue(true);
        queue.offer(0, BUFFER);
        assert!(queue.must_notify(), "the event is 0, the first");
        queue.offer(1, BUFFER);
        assert!(!queue.must_notify(), "the event was passed");
        rings.used.available_event.store(3, Ordering::Relaxed);
        queue.offer(2, BUFFER);
        assert!(!queue.must_notify(), "the event is not reached");
        queue.offer(3, BUFFER);
        assert!(queue.must_notify());
    }

    #[test]
    fn an_interrupt_is_not_waited_for_when_something_is_done() {
        for event_index in [false, true] {
            let (mut queue, rings) = queue(event_index);
            queue.offer(0, BUFFER);
            assert!(queue.want_interrupt());
            complete(rings, 0, 1);
            assert!(!queue.want_interrupt());
            assert_eq!(queue.take(), Some((0, 1)));
            assert!(queue.want_interrupt());
        }
    }

    proptest! {
        #[test]
        fn every_slot_comes_back_once_however_often_the_indices_wrap(rounds in 1usize..400, event_index: bool) {
            let (mut queue, rings) = queue(event_index);
            queue.next_available = 65400;
            queue.told = 65400;
            queue.next_used = 65400;
            rings.used.index.store(65400, Ordering::Relaxed);
            for round in 0..rounds {
                let slot = (round % 4) as u16;
                queue.offer(slot, BUFFER);
                complete(rings, slot.into(), round as u32);
                prop_assert_eq!(queue.take(), Some((slot, round as u32)));
                prop_assert_eq!(queue.take(), None);
            }
        }
    }
}
