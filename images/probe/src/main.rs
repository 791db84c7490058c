//! The probe: a guest without an operating system, for measuring what a machine costs.
//!
//! From reset to the first packet there is nothing here but what this folder holds, so a time taken
//! on it is a time of the monitor, the network and the host. Protocols live in the library of this
//! package (no unsafe code, tested on the host); this program is the machine below them:
//!
//! * `boot`: the two dozen instructions of ring 0, the tables they load, and traps;
//! * `machine`: ports, serial line, clock, interrupt controllers, sleeping, reset;
//! * `virtio`: the transport, the queue and the drivers;
//! * `run`: the one loop that joins devices and protocols;
//! * `trial`: what is done instead to try the monitor: drivers by the rules, and against them.
//!
//! Everything after `boot` runs in ring 3. That costs nothing on real hardware, and it is what makes
//! the probe run at native speed on a software KVM, which emulates ring 0 one instruction at a time.

#![no_std]
#![no_main]
#![deny(unsafe_op_in_unsafe_fn)]

mod boot;
mod machine;
mod run;
mod trial;
mod virtio;

use core::panic::PanicInfo;

use mallee_probe::net::Mac;
use mallee_probe::net::stack::Stack;
use mallee_probe::options::Options;
use mallee_probe::random::Random;
use mallee_probe::time::Instant;
use mallee_probe::windows;

use machine::clock::{self, Measurement};
use machine::console::Console;
use machine::{Phase, apic, serial};
use run::{Guest, Outside, Statistics};
use virtio::net::Net;

/// The first Rust code, in ring 3, called once by `boot::entry` with the zero page's address.
///
/// The order is that of what others wait for: the phase and the first serial byte, then the first
/// DHCP message, and only then what is nice to read.
extern "C" fn main(zero_page: u64) -> ! {
    machine::phase(Phase::Init);
    serial::line(format_args!("mallee probe {}", env!("CARGO_PKG_VERSION")));
    boot::traps::install();
    apic::enable();
    let measurement = Measurement::begin();
    let mut console = Console::new();
    // SAFETY: the address is the one that was passed at entry; the image's own memory begins at 1 MiB
    // and the protocol keeps what it hands over out of the image's way.
    let command_line = unsafe { boot::zero_page::command_line(zero_page) };
    console.line(format_args!("probe: command line \"{command_line}\""));
    let options = Options::parse(command_line, |word| console.line(format_args!("probe: not understood: {word}")));

    if let Some(trial) = options.trial {
        console.drain();
        trial::run(trial)
    }
    let named = windows::named(command_line, |word| console.line(format_args!("probe: not understood: {word}")));
    let found = virtio::scan(named);
    let seed = found.entropy.and_then(|window| virtio::rng::seed(window).unwrap_or_default());
    let Some(window) = found.net else {
        console.line(format_args!("probe: no network device"));
        stop(console)
    };
    let (mut net, mac) = match Net::start(window) {
        Ok(started) => started,
        Err(error) => {
            console.line(format_args!("probe: network device: {error}"));
            stop(console)
        }
    };
    let mut random = Random::new(seed.unwrap_or_else(clock::ticks));
    let mac = mac.unwrap_or_else(|| private_mac(&mut random));
    let mut stack = Stack::new(mac, options, random, Instant::BEGIN);
    let statistics = Statistics::default();
    let transmitter = net.transmitter();
    stack.poll(Instant::BEGIN, &mut Outside { transmitter, console: &mut console, statistics });
    net.flush();

    console.line(format_args!("probe: network device {mac}"));
    if seed.is_none() {
        console.line(format_args!("probe: no entropy device"));
    }
    if let Some(window) = found.block {
        console.line(format_args!("probe: block device of {} bytes, not used", virtio::blk::capacity(window)));
    }
    window.route_interrupt();
    Guest { net, stack, clock: measurement.end(), console, sleeps: 0 }.run()
}

/// An address of our own choice: locally administered, of one station.
fn private_mac(random: &mut Random) -> Mac {
    let [_, b, c, d, e, f, ..] = random.next_u64().to_le_bytes();
    Mac([2, b, c, d, e, f])
}

/// Nothing can be done without a network: sleeps for ever.
fn stop(mut console: Console) -> ! {
    console.drain();
    loop {
        machine::idle::sleep(|| {});
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    serial::line(format_args!("probe: {info}"));
    machine::reset()
}
