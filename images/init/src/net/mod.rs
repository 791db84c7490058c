//! The guest's network: the loopback, and the first Ethernet interface with what DHCP says of it.
//!
//! The client runs for as long as the machine does: until there is a lease, and then to keep it.

mod dhcp;
mod interface;
mod resolver;

use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

use dhcp::client::{Client, Step};
use dhcp::lease::Lease;
use dhcp::socket::Exchange;
use interface::Interface;

use crate::report::{self, Phase};

/// Pause before a failed system call is tried again.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Serves for ever. `configured` is told once, at the first lease.
pub fn run(configured: &Sender<()>) {
    if let Err(error) = Interface::loopback().up() {
        report::line(format_args!("loopback: {error}"));
    }
    let interface = wait_for_interface();
    loop {
        // Only system calls can fail; the protocol itself retries without end.
        let Err(error) = serve(&interface, configured);
        report::line(format_args!("{}: {error}; trying again", interface.name()));
        thread::sleep(RETRY_PAUSE);
    }
}

fn wait_for_interface() -> Interface {
    let mut told = false;
    loop {
        match Interface::first_ethernet() {
            Some(interface) => return interface,
            None if told => {}
            None => {
                report::line("there is no network interface yet");
                told = true;
            }
        }
        thread::sleep(Duration::from_millis(if told { 250 } else { 5 }));
    }
}

fn serve(interface: &Interface, configured: &Sender<()>) -> std::io::Result<std::convert::Infallible> {
    interface.up()?;
    let mac = interface.mac()?;
    let mut client = Client::new(mac, Instant::now(), random_u32());
    // Open only while an answer is expected: in between, packets need not be looked at.
    let mut exchange: Option<Exchange> = None;
    loop {
        match client.step(Instant::now()) {
            Step::Send { message, to } => {
                let open = match exchange.take() {
                    Some(open) => open,
                    None => Exchange::open(interface, mac)?,
                };
                // A lost or refused datagram is the same to the protocol: it sends again.
                if let Err(error) = open.send(&message, to) {
                    report::line(format_args!("DHCP: {error}"));
                }
                exchange = Some(open);
            }
            Step::Wait { until } => match &exchange {
                Some(open) => {
                    if let Some(packet) = open.receive_until(until)? {
                        client.receive(&packet, Instant::now());
                    }
                }
                None => thread::sleep(until.saturating_duration_since(Instant::now())),
            },
            Step::Configure(lease) => {
                exchange = None;
                configure(interface, &lease)?;
                report::reached(Phase::Network, format_args!("{} {lease}", interface.name()));
                let _ = configured.send(());
            }
            Step::Renewed => exchange = None,
            Step::Deconfigure => {
                report::line("the lease ended without a renewal");
                interface.clear_address()?;
            }
        }
    }
}

fn configure(interface: &Interface, lease: &Lease) -> std::io::Result<()> {
    if let Some(mtu) = lease.mtu {
        // A device may refuse an MTU; an address is worth more than that.
        if let Err(error) = interface.set_mtu(mtu) {
            report::line(format_args!("MTU {mtu}: {error}"));
        }
    }
    interface.set_address(lease.address, lease.netmask())?;
    for route in &lease.routes {
        if let Err(error) = interface.add_route(route) {
            report::line(format_args!("route {route}: {error}"));
        }
    }
    resolver::write(lease)
}

fn random_u32() -> u32 {
    let mut bytes = [0u8; 4];
    // SAFETY: the buffer is writable for its whole length. With GRND_NONBLOCK it may stay zero early in
    // the boot, which only means that the transaction's number is less random.
    unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
    u32::from_ne_bytes(bytes)
}
