//! The control queue (virtio 1.2, 5.1.6.5): the driver's commands, each answered with one byte.
//!
//! There is one command that is done, the number of pairs in use. Any other, one of another length than its own, and one that asks for
//! pairs that are not there, is answered "error" and changes nothing. Only what could not be answered (a command without a place for the answer) is a broken queue.

use virtio_bindings::virtio_net::{VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK};
use vmm_sys_util::eventfd::EventFd;

use super::taps::Taps;
use crate::devices::virtio::queue::{Broken, Chain, Used};
use crate::devices::virtio::{ActiveQueue, Interrupt, QueuePosition};

/// Class, command, and the number of pairs (little-endian).
const PAIRS_SET: usize = 4;
/// Commands answered in one go before frames and the stop event get their turn.
const BATCH: usize = 16;

pub struct Control {
    queue: ActiveQueue,
    chain: Chain,
    /// Whether the driver has accepted that there are several pairs.
    is_multi_queue: bool,
}

impl Control {
    pub fn new(queue: ActiveQueue, is_multi_queue: bool) -> Self {
        Control { queue, chain: Chain::default(), is_multi_queue }
    }

    pub fn kick(&self) -> &EventFd {
        &self.queue.kick
    }

    pub fn position(&self) -> QueuePosition {
        self.queue.queue.position()
    }

    /// Answers the commands that are there; to be called at a kick.
    pub fn run(&mut self, taps: &Taps, interrupt: &Interrupt) -> Result<(), Broken> {
        self.queue.take_kick();
        for _ in 0..BATCH {
            if !self.queue.queue.pop(&mut self.chain)? {
                break;
            }
            let answer = if self.obey(taps) { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            if !self.chain.writable.write_at(0, &[answer as u8]) {
                return Err(Broken("control command without a place for its answer"));
            }
            self.queue.queue.publish(&[Used { head: self.chain.head, length: 1 }])?;
        }
        if self.queue.queue.needs_interrupt()? {
            interrupt.queue();
        }
        if self.queue.queue.enable_kicks()? {
            let _ = self.queue.kick.write(1);
        }
        Ok(())
    }

    /// Does what the command says; false if it cannot be done.
    fn obey(&self, taps: &Taps) -> bool {
        let mut command = [0; PAIRS_SET];
        let is_whole = self.chain.readable.len() == PAIRS_SET && self.chain.readable.read_at(0, &mut command);
        let [class, kind, low, high] = command;
        let is_known = u32::from(class) == VIRTIO_NET_CTRL_MQ && u32::from(kind) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
        let pairs = u16::from_le_bytes([low, high]);
        if !is_whole || !is_known || !self.is_multi_queue || !taps.has(pairs) {
            return false;
        }
        let set = taps.use_first(pairs);
        if let Err(error) = &set {
            tracing::warn!(%error, pairs, "virtio-net: the tap's queues");
        }
        set.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;
    use crate::backends::tap::Tap;
    use crate::devices::virtio::queue::testing::{memory, queue_with, used};

    fn taps(count: usize) -> Taps {
        let tap = |_| {
            let (_, device) = UnixDatagram::pair().unwrap();
            Tap::from_file(File::from(OwnedFd::from(device)))
        };
        Taps::new((0..count).map(tap).collect()).unwrap()
    }

    /// The answer to a command over so many bytes from the first on, and the pairs in use afterwards.
    fn answer(command: &[u8], is_multi_queue: bool) -> (u8, u16) {
        let memory = memory();
        memory.write_slice(command, GuestAddress(0x8000)).unwrap();
        memory.write_slice(&[9], GuestAddress(0x9000)).unwrap();
        // In two pieces, as a driver may: the length of a piece means nothing (2.7.4.2).
        let (first, rest) = (1, command.len() as u32 - 1);
        let chain = [(0x8000, first, false), (0x8001, rest, false), (0x9000, 1, true)];
        let queue = queue_with(&memory, &[&chain]);
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut control = Control::new(ActiveQueue { queue, kick }, is_multi_queue);
        let taps = taps(4);
        control.run(&taps, &Interrupt::alone()).unwrap();
        assert_eq!(used(&memory, &control.queue.queue), [Used { head: 0, length: 1 }]);
        (memory.read_obj(GuestAddress(0x9000)).unwrap(), taps.in_use())
    }

    #[test]
    fn pairs_that_are_there_are_used() {
        assert_eq!(answer(&[4, 0, 4, 0], true), (0, 4));
        assert_eq!(answer(&[4, 0, 1, 0], true), (0, 1));
        assert_eq!(answer(&[4, 0, 4, 0], false), (1, 1), "the driver has not accepted several");
        for (command, why) in [
            ([4, 0, 0, 0].as_slice(), "none"),
            (&[4, 0, 5, 0], "more than there are"),
            (&[4, 0, 1, 1], "far more"),
            (&[4, 1, 2, 0], "another command"),
            (&[3, 0, 2, 0], "another class"),
            (&[4, 0, 2], "too short"),
            (&[4, 0], "too short"),
            (&[4, 0, 2, 0, 0], "too long"),
        ] {
            assert_eq!(answer(command, true), (1, 1), "{why}");
        }
    }

    #[test]
    fn what_cannot_be_answered_breaks_the_queue() {
        let memory = memory();
        memory.write_slice(&[4, 0, 2, 0], GuestAddress(0x8000)).unwrap();
        let queue = queue_with(&memory, &[&[(0x8000, 4, false)]]);
        let mut control = Control::new(ActiveQueue { queue, kick: EventFd::new(EFD_NONBLOCK).unwrap() }, true);
        assert!(control.run(&taps(2), &Interrupt::alone()).is_err());
    }

    proptest! {
        #[test]
        fn only_one_command_does_anything(command in proptest::collection::vec(0u8..6, 2..7)) {
            let pairs = match command[..] {
                [4, 0, pairs @ 1..=4, 0] => Some(u16::from(pairs)),
                _ => None,
            };
            let expected = pairs.map_or((1, 1), |pairs| (0, pairs));
            prop_assert_eq!(answer(&command, true), expected);
        }
    }
}
