//! The network device (virtio 1.2, section 5.1), with one pair of queues and no offloads: what is
//! received has its checksums, and what is sent brings them.

use mallee_probe::net::{Mac, eth};
use mallee_probe::ring::{Queue, Rings};

use super::buffers::{Buffers, Pool};
use super::mmio::{EVENT_INDEX, Error, Window};

/// VIRTIO_NET_F_MAC: the device has an address to tell.
const FEATURE_MAC: u64 = 1 << 5;
/// `struct virtio_net_hdr`, with `num_buffers` as version 1 always has it (5.1.6).
const HEADER: usize = 12;
/// Descriptors, and frames that can be under way, in each direction.
const RECEIVE_SLOTS: usize = 128;
const TRANSMIT_SLOTS: usize = 64;
/// The longest frame with its header, rounded up to whole cache lines.
const BUFFER: usize = 1536;
const _: () = assert!(HEADER + eth::FRAME_MAX <= BUFFER);

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

static RECEIVE_RINGS: Rings<RECEIVE_SLOTS> = Rings::new();
static TRANSMIT_RINGS: Rings<TRANSMIT_SLOTS> = Rings::new();
static RECEIVE_BUFFERS: Buffers<RECEIVE_SLOTS, BUFFER> = Buffers::new();
static TRANSMIT_BUFFERS: Buffers<TRANSMIT_SLOTS, BUFFER> = Buffers::new();

/// Counted since the device was started.
#[derive(Clone, Copy, Default)]
pub struct Counters {
    pub received: u64,
    pub received_bytes: u64,
    pub sent: u64,
    pub sent_bytes: u64,
    /// Frames that found no free slot.
    pub send_full: u64,
    pub receive_notifications: u64,
    pub send_notifications: u64,
}

pub struct Net {
    window: Window,
    receiver: Receiver,
    transmitter: Transmitter,
}

/// The receiving half, so that a frame may be looked at while an answer is sent.
struct Receiver {
    queue: Queue<RECEIVE_SLOTS>,
    pool: Pool<RECEIVE_SLOTS, BUFFER>,
    received: u64,
    received_bytes: u64,
    notifications: u64,
}

/// The sending half.
pub struct Transmitter {
    queue: Queue<TRANSMIT_SLOTS>,
    pool: Pool<TRANSMIT_SLOTS, BUFFER>,
    free: [u16; TRANSMIT_SLOTS],
    free_count: usize,
    sent: u64,
    sent_bytes: u64,
    full: u64,
    notifications: u64,
}

impl Net {
    /// Brings the device up, and says its address. To be called once.
    pub fn start(window: Window) -> Result<(Net, Option<Mac>), Error> {
        let features = window.negotiate(FEATURE_MAC | EVENT_INDEX)?;
        let mac = (features & FEATURE_MAC != 0).then(|| mac(window));
        let mut receiver = Receiver {
            queue: window.set_up_queue(RECEIVE, &RECEIVE_RINGS, features)?,
            // SAFETY: the only pool over these buffers, as this is called once.
            pool: unsafe { Pool::new(&RECEIVE_BUFFERS) },
            received: 0,
            received_bytes: 0,
            notifications: 0,
        };
        let mut queue = window.set_up_queue(TRANSMIT, &TRANSMIT_RINGS, features)?;
        // Sent frames are taken back when slots are needed.
        queue.refuse_interrupts();
        let transmitter = Transmitter {
            queue,
            // SAFETY: as above.
            pool: unsafe { Pool::new(&TRANSMIT_BUFFERS) },
            free: core::array::from_fn(|slot| slot as u16),
            free_count: TRANSMIT_SLOTS,
            sent: 0,
            sent_bytes: 0,
            full: 0,
            notifications: 0,
        };
        for slot in 0..RECEIVE_SLOTS as u16 {
            receiver.offer(slot);
        }
        window.start();
        let mut net = Net { window, receiver, transmitter };
        net.flush();
        Ok((net, mac))
    }

    /// Takes the next frame that was received to `handle`, together with the sending half. False if there is none.
    pub fn receive(&mut self, handle: impl FnOnce(&[u8], &mut Transmitter)) -> bool {
        let Some((slot, length)) = self.receiver.queue.take() else { return false };
        // SAFETY: the slot was just taken back.
        let buffer = unsafe { self.receiver.pool.bytes(slot) };
        let end = (length as usize).min(BUFFER);
        if let Some(frame) = buffer[..end].get(HEADER..) {
            self.receiver.received += 1;
            self.receiver.received_bytes += frame.len() as u64;
            handle(frame, &mut self.transmitter);
        }
        self.receiver.offer(slot);
        true
    }

    /// The sending half, to send what nothing asked for.
    pub fn transmitter(&mut self) -> &mut Transmitter {
        &mut self.transmitter
    }

    /// Tells the device of what was put into the queues, if it wants to know.
    pub fn flush(&mut self) {
        if self.transmitter.queue.must_notify() {
            self.transmitter.notifications += 1;
            self.window.notify(TRANSMIT);
        }
        if self.receiver.queue.must_notify() {
            self.receiver.notifications += 1;
            self.window.notify(RECEIVE);
        }
    }

    /// Asks for an interrupt at the next frame. False if one is there already.
    pub fn want_interrupt(&mut self) -> bool {
        self.receiver.queue.want_interrupt()
    }

    /// Asks to be left alone: the queue is being looked at.
    pub fn refuse_interrupts(&mut self) {
        self.receiver.queue.refuse_interrupts();
    }

    /// See [`Window::acknowledge_interrupt`].
    pub fn acknowledge_interrupt(&self) {
        self.window.acknowledge_interrupt();
    }

    pub fn counters(&self) -> Counters {
        Counters {
            received: self.receiver.received,
            received_bytes: self.receiver.received_bytes,
            receive_notifications: self.receiver.notifications,
            ..self.transmitter.counters()
        }
    }
}

/// The device's address, in two words of its configuration.
fn mac(window: Window) -> Mac {
    let [a, b, c, d] = window.configuration(0).to_le_bytes();
    let [e, f, ..] = window.configuration(4).to_le_bytes();
    Mac([a, b, c, d, e, f])
}

impl Receiver {
    fn offer(&mut self, slot: u16) {
        let buffer = self.pool.describe(slot, BUFFER, true);
        self.queue.offer(slot, buffer);
    }
}

impl Transmitter {
    /// Puts the frame that `build` writes into the queue; see `mallee_probe::net::Host::transmit`.
    pub fn transmit(&mut self, build: impl FnOnce(&mut [u8]) -> Option<usize>) {
        if self.free_count == 0 {
            self.reclaim();
        }
        let Some(index) = self.free_count.checked_sub(1) else {
            self.full += 1;
            return;
        };
        let slot = self.free[index];
        // SAFETY: a free slot is one that was never offered or was taken back.
        let buffer = unsafe { self.pool.bytes(slot) };
        buffer[..HEADER].fill(0);
        let frame = &mut buffer[HEADER..HEADER + eth::FRAME_MAX];
        let Some(length) = build(frame) else { return };
        self.free_count = index;
        self.sent += 1;
        self.sent_bytes += length as u64;
        let buffer = self.pool.describe(slot, HEADER + length, false);
        self.queue.offer(slot, buffer);
    }

    fn reclaim(&mut self) {
        while let Some((slot, _)) = self.queue.take() {
            self.free[self.free_count] = slot;
            self.free_count += 1;
        }
    }

    pub fn counters(&self) -> Counters {
        Counters {
            sent: self.sent,
            sent_bytes: self.sent_bytes,
            send_full: self.full,
            send_notifications: self.notifications,
            ..Counters::default()
        }
    }
}
