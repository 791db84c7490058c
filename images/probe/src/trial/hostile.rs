//! The enemy: every way that is known to hurt a device, in an order that a seed gives.
//!
//! Three things are expected of the monitor, and looked at from inside here: a device with a broken ring stops (it wants a reset, or gives
//! nothing more back), the other devices go on, and after a reset by the rules it works again. That the
//! process neither ends nor grows is for whoever started it to see.

use core::arch::asm;

use mallee_probe::random::Random;

use super::device::{Descriptor, Device, flag};
use super::{Failure, Outcome, exercise, net_control, scratch};
use crate::machine::serial;
use crate::virtio::mmio::{STRIDE, WINDOWS, register, status};

/// Times that each device is attacked.
const ROUNDS: usize = 24;
/// Where there is no RAM: the windows, a local APIC, far beyond the end, and the last bytes that there are.
const HOLES: [u64; 6] = [0xd000_0000, 0xfee0_0000, 0xffff_f000, 1 << 40, 1 << 52, u64::MAX - 4095];

/// What is done to one device.
const ATTACKS: [fn(&Device, &mut Random) -> Outcome; 9] = [
    broken_chain,
    broken_chain,
    broken_index,
    frozen_registers,
    reset_in_flight,
    misplaced_queues,
    random_registers,
    random_status,
    senseless_commands,
];

pub fn all(seed: u64) -> Outcome {
    let mut random = Random::new(seed);
    for device in super::devices() {
        for _ in 0..ROUNDS {
            pick(&mut random, &ATTACKS)(&device, &mut random)?;
            random_ports(&mut random);
        }
        // The attacked one still holds what was done to it last.
        for other in super::devices().filter(|other| other.index != device.index) {
            exercise::one(&other)?;
        }
        device.reset();
        exercise::one(&device)?;
        serial::line(format_args!("probe: device {} of type {} endured {ROUNDS} attacks", device.index, device.kind));
    }
    Ok(())
}

fn pick<T: Copy>(random: &mut Random, list: &[T]) -> T {
    list[random.next_u32() as usize % list.len()]
}

fn start(device: &Device) -> Outcome {
    device.reset();
    device.start(0).map_err(|what| Failure { device: device.index, what })
}

/// A chain that no device may follow to its end.
fn broken_chain(device: &Device, random: &mut Random) -> Outcome {
    start(device)?;
    let Some(queue) = any_queue(device, random) else { return Ok(()) };
    let size = device.size(queue);
    let whole = Descriptor { address: scratch::buffer(0), length: 64, flags: flag::WRITE, next: 0 };
    let chain = |from: u16, to: u16| Descriptor { flags: flag::WRITE | flag::NEXT, next: to, ..at(from) };
    match random.next_u32() % 9 {
        // Loops: onto itself, and of two.
        0 => device.describe(queue, 0, chain(0, 0)),
        1 => {
            device.describe(queue, 0, chain(0, 1));
            device.describe(queue, 1, chain(1, 0));
        }
        // A next that is out of range.
        2 => device.describe(queue, 0, chain(0, pick(random, &[size, size + 1, 0x7fff, 0xffff]))),
        // Lengths that wrap, or leave RAM.
        3 => device.describe(queue, 0, Descriptor { address: u64::MAX - 3, length: 8, ..whole }),
        4 => device.describe(queue, 0, Descriptor { length: u32::MAX, ..whole }),
        // Holes.
        5 => device.describe(queue, 0, Descriptor { address: pick(random, &HOLES), ..whole }),
        // Readable after writable.
        6 => {
            device.describe(queue, 0, chain(0, 1));
            device.describe(queue, 1, Descriptor { flags: 0, ..whole });
        }
        // Indirect tables: of no whole descriptor, in a hole, of themselves.
        7 => {
            let address = pick(random, &[scratch::buffer(0), HOLES[0], HOLES[3]]);
            let length = pick(random, &[0, 15, 17, u32::MAX]);
            device.describe(queue, 0, Descriptor { address, length, flags: flag::INDIRECT, next: 0 });
        }
        _ => {
            let table = scratch::queue(queue).descriptors;
            let flags = flag::INDIRECT;
            device.describe(queue, 0, Descriptor { address: table, length: 16, flags, next: 0 });
        }
    }
    device.offer(queue, 0, 0);
    device.advance(queue, 1);
    must_stop(device, queue)
}

/// Heads and indices that are out of range.
fn broken_index(device: &Device, random: &mut Random) -> Outcome {
    start(device)?;
    let Some(queue) = any_queue(device, random) else { return Ok(()) };
    let size = device.size(queue);
    if random.next_u32().is_multiple_of(2) {
        device.offer(queue, 0, pick(random, &[size, size + 1, 0xffff]));
        device.advance(queue, 1);
    } else {
        device.advance(queue, pick(random, &[size + 1, 0x8000, 0xffff]));
    }
    must_stop(device, queue)
}

/// Kicks, and sees that the queue stops: the device wants a reset, or no request of this queue comes back although
/// it is kicked again.
fn must_stop(device: &Device, queue: u16) -> Outcome {
    device.kick(queue);
    let mut looks = 0;
    let stopped = device.wait_until(|| {
        looks += 1;
        device.needs_reset() || looks > 2000
    });
    let before = device.used(queue);
    device.kick(queue);
    match stopped && (device.needs_reset() || device.used(queue) == before) && before == 0 {
        true => Ok(()),
        false => Err(Failure { device: device.index, what: "it goes on with a broken ring" }),
    }
}

/// Queue registers of a device that runs: nothing may change.
fn frozen_registers(device: &Device, random: &mut Random) -> Outcome {
    start(device)?;
    for queue in 0..device.queues {
        let hole = pick(random, &HOLES);
        device.place(
            queue,
            random.next_u32() as u16,
            scratch::Place { descriptors: hole, available: hole, used: hole },
        );
        device.window.write(register::QUEUE_READY, 0);
        device.kick(queue);
    }
    device.window.write(register::DRIVER_FEATURES, random.next_u32());
    Ok(())
}

/// A reset while the rings are full of requests.
fn reset_in_flight(device: &Device, random: &mut Random) -> Outcome {
    start(device)?;
    for queue in 0..device.queues {
        let size = device.size(queue);
        for slot in 0..size {
            let writable = if random.next_u32().is_multiple_of(2) { flag::WRITE } else { 0 };
            let address = scratch::buffer(usize::from(slot) * 1024);
            device.describe(queue, slot, Descriptor { address, length: 1024, flags: writable, next: 0 });
            device.offer(queue, slot, slot);
        }
        device.advance(queue, size);
        device.kick(queue);
        if random.next_u32().is_multiple_of(3) {
            break;
        }
    }
    device.reset();
    Ok(())
}

/// Queues of impossible sizes and in impossible places.
fn misplaced_queues(device: &Device, random: &mut Random) -> Outcome {
    device.reset();
    let _ = device.window.negotiate(u64::MAX);
    for queue in 0..device.queues {
        let mut place = scratch::queue(queue);
        for part in [&mut place.descriptors, &mut place.available, &mut place.used] {
            match random.next_u32() % 3 {
                0 => *part = pick(random, &HOLES),
                1 => *part += 1,
                _ => {}
            }
        }
        let size = device.size(queue);
        device.place(queue, pick(random, &[0, 1, 3, size, size.wrapping_mul(2), 0x8000, 0xffff]), place);
    }
    device.window.start();
    for queue in 0..=device.queues {
        device.kick(queue);
    }
    device.kick(0xffff);
    Ok(())
}

/// Accesses of every width all over the window, and beyond the last one.
fn random_registers(device: &Device, random: &mut Random) -> Outcome {
    for _ in 0..100 {
        let window =
            if random.next_u32().is_multiple_of(8) { random.next_u32() as u64 % 512 } else { device.index.into() };
        let address = WINDOWS + window * STRIDE + random.next_u64() % (STRIDE - 8);
        access(address, random.next_u32(), random.next_u64());
    }
    Ok(())
}

/// Status bits in no order.
fn random_status(device: &Device, random: &mut Random) -> Outcome {
    for _ in 0..20 {
        let any = random.next_u32();
        let bits = pick(random, &[0, 1, 2, 3, status::FEATURES_OK, status::DRIVER_OK, 0xff, any]);
        device.window.write(register::STATUS, bits);
        device.window.write(register::DRIVER_FEATURES, random.next_u32());
        device.kick(random.next_u32() as u16);
    }
    Ok(())
}

/// Commands to a network device that mean nothing; and one that cannot be answered.
fn senseless_commands(device: &Device, random: &mut Random) -> Outcome {
    start(device)?;
    let Some(queue) = net_control::queue(device) else { return Ok(()) };
    net_control::attack(device, random)?;
    start(device)?;
    device.describe(queue, 0, Descriptor { address: scratch::buffer(0), length: 4, flags: 0, next: 0 });
    device.offer(queue, 0, 0);
    device.advance(queue, 1);
    must_stop(device, queue)
}

/// Reads and writes of ports, but for those that end the machine and those of the console.
fn random_ports(random: &mut Random) {
    for _ in 0..20 {
        let port = random.next_u32() as u16 & 0xfff;
        let ends = matches!(port, 0x60..=0x64 | 0x3f8..=0x3ff | 0x600..=0x602);
        let value = random.next_u32();
        // SAFETY: ports that the monitor has are left out where they end the machine; no port's device reaches into memory.
        unsafe {
            if value & 1 == 0 {
                asm!("in al, dx", in("dx") port, out("al") _, options(nostack, preserves_flags));
            } else if !ends {
                asm!("out dx, al", in("dx") port, in("al") value as u8, options(nostack, preserves_flags));
            }
        }
    }
}

/// A read or write of 1, 2, 4 or 8 bytes.
fn access(address: u64, how: u32, value: u64) {
    // SAFETY: the address is within the 2 MiB that the page tables map for windows. What a write makes a device do, it does
    // to memory that a descriptor names, and those name the scratch area or none that there is.
    unsafe {
        match how % 8 {
            0 => (address as *mut u8).write_volatile(value as u8),
            1 => (address as *mut u16).write_unaligned(value as u16),
            2 => (address as *mut u32).write_unaligned(value as u32),
            3 => (address as *mut u64).write_unaligned(value),
            4 => drop((address as *const u8).read_volatile()),
            5 => drop((address as *const u32).read_unaligned()),
            6 => drop((address as *const u64).read_unaligned()),
            // Where it counts: a register as it should be accessed, with a value that it should not have.
            _ => ((address & !3) as *mut u32).write_volatile(value as u32),
        }
    }
}

fn any_queue(device: &Device, random: &mut Random) -> Option<u16> {
    (device.queues > 0).then(|| (random.next_u32() % u32::from(device.queues.max(1))) as u16)
}

/// A writable buffer of its own for a slot.
fn at(slot: u16) -> Descriptor {
    Descriptor { address: scratch::buffer(usize::from(slot) * 4096), length: 64, flags: flag::WRITE, next: 0 }
}
