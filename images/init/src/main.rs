//! The first process of Mallee's own guest images, and the small commands that talk to it.
//!
//! The program runs twice in one boot. From the initial RAM file system ([`initramfs`]) it loads the
//! few kernel modules without which there is no disk, mounts the root file system and starts itself
//! from there. As the root's `/sbin/init` ([`boot`]) it does what an EC2 guest has to do: address by
//! DHCP, key, host name and user data from the metadata service, an ssh server; and all the while
//! what the first process of any Unix has to do: reap children, and go down in order
//! ([`supervisor`], [`power`]).
//!
//! What it reports ([`report`]) goes two ways: a byte to the monitor's boot timer port, so that the
//! host knows each phase on its own clock, and a line to the console, for people.
//!
//! It never gives up on what may still come (an address, the metadata service) and never waits for it
//! without a bound before letting somebody log in. A failure of one service is told and does not take
//! the others along.

mod boot;
mod button;
mod grow;
mod host_keys;
mod identity;
mod initramfs;
mod metadata;
mod modules;
mod net;
mod power;
mod report;
mod ssh;
mod supervisor;
mod user_data;

use std::process::ExitCode;

fn main() -> ExitCode {
    let name = std::env::args().next().unwrap_or_default();
    let name = name.rsplit('/').next().unwrap_or_default();
    if std::process::id() == 1 {
        return if initramfs::is_here() { initramfs::run() } else { boot::run() };
    }
    match power::Target::from_command(name) {
        Some(target) => power::ask_init(target),
        None => {
            eprintln!(
                "{name}: this is the guest's first process; the kernel starts it. \
                 Called as poweroff, halt or reboot it asks the running one to go down."
            );
            ExitCode::from(2)
        }
    }
}
