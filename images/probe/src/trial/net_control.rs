//! The control queue of a network device with several pairs of queues (virtio 1.2, 5.1.6.5): commands by the rules, and any others.
//!
//! Every command is answered; what differs is the answer.

use mallee_probe::random::Random;

use super::device::{Descriptor, Device, flag};
use super::{Failure, Outcome, scratch};
use crate::virtio::device_type::NET;

/// Answers (`VIRTIO_NET_OK`, `VIRTIO_NET_ERR`).
const DONE: u16 = 0;
const REFUSED: u16 = 1;
/// What is where an answer should come, before it does.
const NOTHING: u16 = 0xff;
/// Where commands and answers are in the buffers.
const COMMAND: usize = 0;
const ANSWER: usize = 64;

/// The control queue's number: queues are in pairs, and one that has no partner is this one.
pub fn queue(device: &Device) -> Option<u16> {
    (device.kind == NET && !device.queues.is_multiple_of(2)).then(|| device.queues - 1)
}

/// `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`.
fn set_pairs(pairs: u16) -> [u8; 4] {
    let [low, high] = pairs.to_le_bytes();
    [4, 0, low, high]
}

/// Uses fewer and more pairs, at last all of them. Leaves the device with its commands answered; does nothing to another
/// device.
pub fn by_the_rules(device: &Device) -> Outcome {
    let Some(queue) = queue(device) else { return Ok(()) };
    let all = queue / 2;
    for (position, pairs) in [all, 1, all].into_iter().enumerate() {
        if command(device, queue, position as u16, &set_pairs(pairs))? != DONE {
            return Err(failed(device, "it does not use the pairs of queues that it has"));
        }
    }
    Ok(())
}

/// Commands of all kinds, lengths and numbers: refused, unless by chance one is right.
pub fn attack(device: &Device, random: &mut Random) -> Outcome {
    let Some(queue) = queue(device) else { return Ok(()) };
    let all = queue / 2;
    for position in 0..32 {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&set_pairs(random.next_u32() as u16 % (all + 3)));
        let mut length = 4;
        match random.next_u32() % 5 {
            0 => bytes[0] = random.next_u32() as u8,
            1 => bytes[1] = random.next_u32() as u8,
            2 => bytes[2..4].copy_from_slice(&(random.next_u32() as u16).to_le_bytes()),
            3 => length = 1 + random.next_u32() as usize % bytes.len(),
            _ => {}
        }
        let pairs = u16::from_le_bytes([bytes[2], bytes[3]]);
        let is_right = length == 4 && bytes[..2] == [4, 0] && (1..=all).contains(&pairs);
        let expected = if is_right { DONE } else { REFUSED };
        if command(device, queue, position, &bytes[..length])? != expected {
            return Err(failed(device, "it gives a wrong answer to a command"));
        }
    }
    Ok(())
}

/// Has the device answer a command, the queue's `position`th.
fn command(device: &Device, queue: u16, position: u16, bytes: &[u8]) -> Result<u16, Failure> {
    let (place, answer) = (scratch::buffer(COMMAND), scratch::buffer(ANSWER));
    for (offset, byte) in (0..).zip(bytes) {
        scratch::write(place + offset, *byte);
    }
    scratch::write(answer, NOTHING);
    device.describe(queue, 0, Descriptor { address: place, length: bytes.len() as u32, flags: flag::NEXT, next: 1 });
    device.describe(queue, 1, Descriptor { address: answer, length: 1, flags: flag::WRITE, next: 0 });
    device.offer(queue, position, 0);
    device.advance(queue, position + 1);
    device.kick(queue);
    match device.wait_until(|| device.used(queue) == position + 1) {
        true => Ok(scratch::read16(answer)),
        false => Err(failed(device, "a command is not answered")),
    }
}

fn failed(device: &Device, what: &'static str) -> Failure {
    Failure { device: device.index, what }
}
