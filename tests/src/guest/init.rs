//! The guest's first process: mounts, modules, the checks one after the other, power off.

use std::ffi::CString;
use std::fs::{self, File};
use std::path::Path;

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::termios::tcdrain;

use super::link::Link;
use super::{Machine, Outcome, checks, disk_bench, net_bench};

/// Where the initial RAM file system has its modules, in loading order by name.
pub const MODULES: &str = "/modules";
/// Every line that is meant for the host begins so.
pub const MARK: &str = "guest-check:";

/// Does all of it; ends with the machine's power off.
pub fn run() -> ! {
    println!("{MARK} init");
    let line = prepare();
    if let Some(bench) = line.as_deref().ok().and_then(asked_bench) {
        if let Err(why) = bench() {
            println!("{MARK} FAIL bench {why}");
        }
        power_off();
    }
    match line.and_then(|line| Machine::from_words(&line).ok_or_else(|| format!("what to check? {line}"))) {
        Ok(machine) => {
            for (place, name) in machine.checks.iter().enumerate() {
                report(name, check(&machine, place, name));
            }
            println!("{MARK} done");
        }
        Err(why) => println!("{MARK} FAIL init {why}"),
    }
    power_off()
}

/// What the command line asks to be measured, if anything.
fn asked_bench(line: &str) -> Option<fn() -> Result<(), String>> {
    line.split_whitespace().find_map(|word| match word {
        disk_bench::WORD => Some(disk_bench::run as fn() -> Result<(), String>),
        net_bench::WORD => Some(net_bench::run),
        _ => None,
    })
}

fn power_off() -> ! {
    // What the serial port's driver has not sent yet would be lost.
    let _ = tcdrain(std::io::stdout());
    let _ = reboot(RebootMode::RB_POWER_OFF);
    loop {
        std::thread::park();
    }
}

/// Mounts and modules; the command line.
fn prepare() -> Result<String, String> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        match mount(Some(kind), target, Some(kind), MsFlags::empty(), None::<&str>) {
            // The kernel mounted it before.
            Ok(()) | Err(Errno::EBUSY) => {}
            Err(error) => return Err(format!("mounting {target}: {error}")),
        }
    }
    load_modules()?;
    // From here on the kernel does not speak into the middle of our lines.
    let _ = fs::write("/proc/sys/kernel/printk", "1");
    fs::read_to_string("/proc/cmdline").map_err(|error| format!("/proc/cmdline: {error}"))
}

fn load_modules() -> Result<(), String> {
    let mut paths: Vec<_> = fs::read_dir(MODULES)
        .map_err(|error| format!("{MODULES}: {error}"))?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    paths.sort();
    paths.iter().try_for_each(|path| load(path).map_err(|error| format!("module {}: {error}", path.display())))
}

fn load(path: &Path) -> std::io::Result<()> {
    match finit_module(&File::open(path)?, &CString::default(), ModuleInitFlags::empty()) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn check(machine: &Machine, place: usize, name: &str) -> Outcome {
    let check = checks::find(name).ok_or("there is no such check")?;
    let mut link = Link::to_host(place).map_err(|error| format!("the line to the host: {error}"))?;
    (check.guest)(machine, &mut link)
}

fn report(name: &str, outcome: Outcome) {
    match outcome {
        Ok(seen) => println!("{MARK} PASS {name} {seen}"),
        Err(why) => println!("{MARK} FAIL {name} {why}"),
    }
}
