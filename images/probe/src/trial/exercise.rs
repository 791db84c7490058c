//! Every device by the rules: some requests through each of its queues, twice, with a reset in between.
//!
//! [`requests`] says what a device's queue is given; a device type that is not in it gets plain buffers. A device that
//! waits for somebody else (a receive queue) is not waited for.

use mallee_probe::net::eth;

use super::device::{Descriptor, Device, flag};
use super::{Failure, Outcome, net_control, scratch};
use crate::machine::serial;
use crate::virtio::device_type::{BALLOON, BLOCK, CONSOLE, ENTROPY, NET, VSOCK};

/// Times that each device is set up, used and reset.
const ROUNDS: u32 = 2;
/// A feature that changes what the queues are for: several ports of a console (virtio 1.2, 5.3.3).
const CONSOLE_MULTIPORT: u64 = 1 << 1;

/// What is done with a queue.
enum Use {
    /// Chains, each of which comes back.
    Answered(&'static [&'static [Part]]),
    /// Chains that come back when somebody else sends something.
    Waits(&'static [&'static [Part]]),
    Nothing,
}

/// One buffer of a chain.
#[derive(Clone, Copy)]
enum Part {
    /// The device reads these bytes, then zeros up to the length.
    Read(&'static [u8], u32),
    /// The device may write so many bytes.
    Write(u32),
    /// The device reads the number of a page that the guest has no use for.
    Page,
}

use Part::{Page, Read, Write};

pub fn all() -> Outcome {
    for device in super::devices() {
        for _ in 0..ROUNDS {
            one(&device)?;
        }
        serial::line(format_args!("probe: device {} of type {} exercised", device.index, device.kind));
    }
    Ok(())
}

/// Sets `device` up, uses it, and resets it.
pub fn one(device: &Device) -> Outcome {
    let failed = |what| Failure { device: device.index, what };
    let without = match device.kind {
        CONSOLE => CONSOLE_MULTIPORT,
        _ => 0,
    };
    device.start(without).map_err(failed)?;
    net_control::by_the_rules(device)?;
    for queue in 0..device.queues {
        if net_control::queue(device) == Some(queue) {
            continue;
        }
        let (chains, answered) = match requests(device.kind, queue) {
            Use::Answered(chains) => (chains, true),
            Use::Waits(chains) => (chains, false),
            Use::Nothing => continue,
        };
        let mut slot = 0;
        for (position, chain) in chains.iter().enumerate() {
            device.offer(queue, position as u16, slot);
            slot = describe(device, queue, slot, chain);
        }
        device.advance(queue, chains.len() as u16);
        device.kick(queue);
        if answered && !device.wait_until(|| usize::from(device.used(queue)) >= chains.len()) {
            return Err(failed("a request does not come back"));
        }
    }
    if device.needs_reset() {
        return Err(failed("it wants a reset after requests by the rules"));
    }
    device.reset();
    Ok(())
}

/// Writes the chain's descriptors from `first` on; the slot behind them.
fn describe(device: &Device, queue: u16, first: u16, chain: &[Part]) -> u16 {
    for (index, part) in chain.iter().enumerate() {
        let slot = first + index as u16;
        // A place of its own for each slot, in pages.
        let address = scratch::buffer(usize::from(slot) * 4096);
        let (length, mut flags) = match part {
            Read(bytes, length) => {
                for offset in 0..u64::from(*length) {
                    scratch::write(address + offset, bytes.get(offset as usize).copied().unwrap_or(0));
                }
                (*length, 0)
            }
            Write(length) => (*length, flag::WRITE),
            Page => {
                scratch::write(address, (scratch::buffer(scratch::BUFFERS_SIZE - 4096) >> 12) as u32);
                (4, 0)
            }
        };
        let mut next = 0;
        if index + 1 < chain.len() {
            flags |= flag::NEXT;
            next = slot + 1;
        }
        device.describe(queue, slot, Descriptor { address, length, flags, next });
    }
    first + chain.len() as u16
}

/// Request header of a block device: type, reserved, sector.
const fn block(kind: u8) -> [u8; 1] {
    [kind]
}

const BLOCK_REQUESTS: &[&[Part]] = &[
    &[Read(&block(0), 16), Write(4096), Write(1)],    // read
    &[Read(&block(1), 16), Read(&[], 512), Write(1)], // write
    &[Read(&block(4), 16), Write(1)],                 // flush
    &[Read(&block(8), 16), Write(20), Write(1)],      // get the id
    // Discard and write zeroes: one range of eight sectors (virtio 1.2, 5.2.6).
    &[Read(&block(11), 16), Read(&[0, 0, 0, 0, 0, 0, 0, 0, 8], 16), Write(1)],
    &[Read(&block(13), 16), Read(&[0, 0, 0, 0, 0, 0, 0, 0, 8], 16), Write(1)],
    &[Read(&block(99), 16), Write(1)], // none that there is
];

/// A frame to everybody, of a type that nobody knows, behind an empty header.
const FRAME: &[u8] =
    &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x88, 0xb5];

/// `struct virtio_vsock_hdr` (5.10.6): a request from port 1024 of CID 3 to port 52 of the host, a stream.
const VSOCK_REQUEST: &[u8] = &[
    3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 52, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0,
    1,
];

const BUFFERS: &[&[Part]] = &[&[Write(2048)], &[Write(2048)], &[Write(2048)], &[Write(2048)]];

fn requests(kind: u32, queue: u16) -> Use {
    match (kind, queue) {
        (NET, _) if queue.is_multiple_of(2) => Use::Waits(BUFFERS),
        (NET, _) => Use::Answered(&[&[Read(FRAME, 72)], &[Read(FRAME, 12), Read(FRAME, 60)]]),
        (BLOCK, _) => Use::Answered(BLOCK_REQUESTS),
        (CONSOLE, 0) => Use::Waits(BUFFERS),
        (CONSOLE, 1) => Use::Answered(&[&[Read(b"hello from the console\n", 23)]]),
        (ENTROPY, _) => Use::Answered(&[&[Write(64)], &[Write(4096), Write(4096)]]),
        // Inflate, deflate; the others wait for the host.
        (BALLOON, 0 | 1) => Use::Answered(&[&[Page]]),
        (BALLOON, _) => Use::Nothing,
        (VSOCK, 1) => Use::Answered(&[&[Read(VSOCK_REQUEST, 44)]]),
        (VSOCK, _) => Use::Waits(BUFFERS),
        _ => Use::Waits(BUFFERS),
    }
}

const _: () = assert!(FRAME.len() + 46 <= 12 + eth::FRAME_MAX);
