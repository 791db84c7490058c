//! The first process of a lab's node; see [`mallee_tests::node`].

use std::{
    io,
    process::{Command, ExitCode},
};

use mallee_tests::node::{
    boot::{self, say},
    control,
    setup::Setup,
    supervisor::Supervisor,
};
use nix::sys::{
    reboot::{RebootMode, reboot},
    wait::wait,
};

fn main() -> ExitCode {
    if std::process::id() != 1 {
        return supervise();
    }
    match boot::boot().and_then(|setup| hand_over(&setup)) {
        Ok(()) => say("the supervisor ended"),
        Err(error) => say(&format!("cannot boot: {error}")),
    }
    // A machine without its supervisor is of no use; that its power goes off is seen on the host.
    nix::unistd::sync();
    let _ = reboot(RebootMode::RB_POWER_OFF);
    ExitCode::FAILURE
}

/// Starts the supervisor and collects every process that ends, until the supervisor does.
fn hand_over(setup: &Setup) -> io::Result<()> {
    let child = Command::new("/init")
        .arg(serde_json::to_string(setup)?)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/root")
        .spawn()?;
    loop {
        if wait()?.pid().is_some_and(|pid| pid.as_raw() == child.id() as i32) {
            return Ok(());
        }
    }
}

fn supervise() -> ExitCode {
    match services() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

fn services() -> io::Result<()> {
    let setup: Setup = serde_json::from_str(&std::env::args().nth(1).unwrap_or_default())?;
    let supervisor = Supervisor::default();
    for service in setup.services {
        supervisor.keep(service)?;
    }
    let uptime = std::fs::read_to_string("/proc/uptime")?;
    let seconds: f64 = uptime.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or_default();
    let booted_ms = (seconds * 1000.0) as u64;
    say(&format!("up after {booted_ms} ms"));
    control::serve(&supervisor, booted_ms)
}
