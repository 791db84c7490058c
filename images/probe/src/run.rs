//! The one loop: frames in, answers out, and sleep.
//!
//! It looks at the receive queue for as long as frames come and a little longer ([`LINGER`]), with
//! interrupts refused. Then it writes what waits for the console, and then it sleeps until the
//! device or the stack's next deadline wakes it.

use core::fmt;
use core::time::Duration;

use mallee_probe::net::stack::Stack;
use mallee_probe::net::{Event, Host};
use mallee_probe::time::Instant;

use crate::machine::clock::{self, Clock};
use crate::machine::console::Console;
use crate::machine::{self, Phase, idle};
use crate::virtio::net::{self, Net, Transmitter};

/// How long the queue is looked at after the last frame before the guest sleeps. Being woken costs more
/// than that, and who asks one question often asks the next.
const LINGER: Duration = Duration::from_micros(100);
/// Frames handled before the device is told of the answers.
const BATCH: usize = 32;

/// All that the loop works with.
pub struct Guest {
    pub net: Net,
    pub stack: Stack,
    pub clock: Clock,
    pub console: Console,
    pub sleeps: u64,
}

/// The machine as the stack sees it.
pub struct Outside<'a> {
    pub transmitter: &'a mut Transmitter,
    pub console: &'a mut Console,
    pub statistics: Statistics<'a>,
}

/// What the stats service tells of the machine.
#[derive(Default)]
pub struct Statistics<'a> {
    net: net::Counters,
    sleeps: u64,
    /// `None` until its rate is measured.
    clock: Option<&'a Clock>,
}

impl Guest {
    /// Runs for ever.
    pub fn run(mut self) -> ! {
        let mut last_frame = self.clock.now();
        loop {
            let now = self.clock.now();
            if self.receive(now) {
                last_frame = now;
            }
            self.poll(now);
            self.net.flush();
            if now.since(last_frame) >= LINGER && !self.console.step() {
                self.sleep();
            }
        }
    }

    /// Handles what has arrived. False if nothing has.
    fn receive(&mut self, now: Instant) -> bool {
        let counters = self.net.counters();
        let Guest { net, stack, console, clock, sleeps } = self;
        let handled = (0..BATCH).take_while(|_| {
            net.receive(|frame, transmitter| {
                let statistics = Statistics { net: counters, sleeps: *sleeps, clock: Some(&*clock) };
                stack.receive(now, frame, &mut Outside { transmitter, console, statistics });
            })
        });
        handled.count() > 0
    }

    fn poll(&mut self, now: Instant) {
        if now < self.stack.deadline() {
            return;
        }
        let Guest { net, stack, console, .. } = self;
        let transmitter = net.transmitter();
        stack.poll(now, &mut Outside { transmitter, console, statistics: Statistics::default() });
    }

    fn sleep(&mut self) {
        self.clock.wake_at(self.stack.deadline());
        if self.net.want_interrupt() {
            self.sleeps += 1;
            idle::sleep(|| self.net.acknowledge_interrupt());
        }
        self.net.refuse_interrupts();
    }
}

impl Host for Outside<'_> {
    fn transmit(&mut self, build: impl FnOnce(&mut [u8]) -> Option<usize>) {
        self.transmitter.transmit(build);
    }

    fn report(&mut self, event: Event<'_>) {
        match event {
            Event::Address { address, server, lease } => {
                machine::phase(Phase::Network);
                self.console.line(format_args!("probe: address {}/{}", address.ip, address.prefix));
                if let Some(gateway) = address.gateway {
                    self.console.line(format_args!("probe: gateway {gateway}"));
                }
                if let (Some(server), Some(lease)) = (server, lease) {
                    self.console.line(format_args!("probe: lease of {} s from {server}", lease.as_secs()));
                }
            }
            Event::AddressLost => self.console.line(format_args!("probe: the lease is lost")),
            Event::Metadata { path, body: Some(body) } => {
                self.console.line(format_args!("probe: {path}: {}", Excerpt(body)));
            }
            Event::Metadata { path, body: None } => self.console.line(format_args!("probe: {path}: not found")),
            Event::MetadataFailed { why, again_in } => {
                self.console.line(format_args!("probe: metadata: {why}; again in {} ms", again_in.as_millis()))
            }
            Event::MetadataRead => machine::phase(Phase::Metadata),
            Event::PowerOff { by } => {
                self.console.line(format_args!("probe: turned off by {by}"));
                self.console.drain();
                machine::power_off();
            }
        }
    }

    fn statistics(&mut self, out: &mut dyn fmt::Write) -> fmt::Result {
        let Statistics { net, sleeps, clock } = &self.statistics;
        for (name, value) in [
            ("received", net.received),
            ("received_bytes", net.received_bytes),
            ("sent", net.sent),
            ("sent_bytes", net.sent_bytes),
            ("send_full", net.send_full),
            ("receive_notifications", net.receive_notifications),
            ("send_notifications", net.send_notifications),
            ("sleeps", *sleeps),
            ("tsc", clock::ticks()),
            ("tsc_per_second", clock.map_or(0, Clock::rate)),
        ] {
            writeln!(out, "{name} {value}")?;
        }
        Ok(())
    }
}

/// The first line of somebody's text, as far as it can be shown on a terminal.
struct Excerpt<'a>(&'a [u8]);

/// Characters of an excerpt.
const EXCERPT_MAX: usize = 120;

impl fmt::Display for Excerpt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = self.0.split(|byte| *byte == b'\n').next().unwrap_or_default();
        for byte in line.iter().take(EXCERPT_MAX) {
            let shown = if byte.is_ascii_graphic() || *byte == b' ' { char::from(*byte) } else { '.' };
            fmt::Write::write_char(f, shown)?;
        }
        if line.len() < self.0.trim_ascii_end().len() || line.len() > EXCERPT_MAX {
            write!(f, " … ({} bytes)", self.0.len())?;
        }
        Ok(())
    }
}
