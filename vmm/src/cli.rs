//! The command line, and what the process leaves behind when it ends: a last event and an exit status.

use std::ffi::c_int;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Parser;
use serde::de::DeserializeOwned;

use crate::api::{EventKind, ExitReason, SnapshotLoad, VmConfig};
use crate::check_kvm;
use crate::confine;
use crate::error::{Error, Result};
use crate::events::Events;
use crate::gdb;
use crate::log::Log;
use crate::metrics;
use crate::monitor::Monitor;
use crate::pager;
use crate::snapshot::load::Loaded;
use crate::trace;

/// Runs one microVM.
#[derive(Debug, Parser)]
#[command(name = "mallee-vmm", version)]
struct Arguments {
    /// Name of the VM, as `GET /` tells it.
    #[arg(long, default_value = "anonymous-instance")]
    id: String,
    /// Unix socket on which Firecracker's REST API is served; it must not exist yet.
    #[arg(long)]
    api_sock: Option<PathBuf>,
    /// Start at once with this configuration (Firecracker's JSON).
    #[arg(long)]
    config_file: Option<PathBuf>,
    /// Start with the VM of a snapshot: a file with the JSON of `PUT /snapshot/load`.
    #[arg(long, conflicts_with = "config_file")]
    restore_file: Option<PathBuf>,
    /// Append what happens to this file, one JSON object a line.
    #[arg(long)]
    events_path: Option<PathBuf>,
    #[command(flatten)]
    pager: pager::Arguments,
    #[command(flatten)]
    jail: confine::jail::Arguments,
    /// For learning: write a line for each exit of a vCPU to this file, which must not exist (microseconds, vCPU, reason; of an access
    /// also address, bytes and value). Ends after a million.
    #[arg(long, value_name = "FILE")]
    trace_exits: Option<PathBuf>,
    /// For learning and debugging: wait at the first instruction for GDB, which connects to this Unix socket (`target remote SOCKET`); it
    /// must not exist yet. Whoever may connect to it has the guest.
    #[arg(long, value_name = "SOCKET")]
    gdb: Option<PathBuf>,
    /// For debugging: install no system call filters.
    #[arg(long)]
    no_seccomp: bool,
    /// Find out in a throw-away VM what this host's KVM can run, print it as JSON and end.
    #[arg(long)]
    check_kvm: bool,
    /// error, warn, info, debug or trace; the log goes to standard error.
    #[arg(long, default_value = "warn")]
    log_level: tracing::Level,
}

/// What the C runtime leaves to the program.
fn set_up_process() {
    // SAFETY: one thread exists, and neither call takes memory. Writing to a pipe without a reader becomes an error
    // instead of the end; one heap serves all threads, of which none allocates often, instead of 64 MiB of addresses
    // and some touched pages for each.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// The program's `main`; returns the exit status.
pub fn main() -> c_int {
    metrics::process_started();
    set_up_process();
    let arguments = Arguments::parse();
    let log = Log::start(arguments.log_level);
    if arguments.check_kvm {
        return print_check();
    }
    if let Some(served) = serve_pages(&arguments) {
        return served;
    }
    if arguments.api_sock.is_none() && arguments.config_file.is_none() && arguments.restore_file.is_none() {
        eprintln!("mallee-vmm: give --api-sock, and --config-file or --restore-file, or one of the three (see --help)");
        return 2;
    }
    let events = match Events::open(arguments.events_path.as_deref()) {
        Ok(events) => Arc::new(events),
        Err(error) => {
            eprintln!("mallee-vmm: {error}");
            return status(error.reason());
        }
    };
    let gdb_socket = arguments.gdb.clone();
    let (reason, message) = run(arguments, &events, log).unwrap_or_else(|e| (e.reason(), e.to_string()));
    if matches!(reason, ExitReason::BadConfiguration | ExitReason::HostFailure) {
        eprintln!("mallee-vmm: {message}");
    }
    if let Some(socket) = gdb_socket.filter(|_| gdb::get().is_some()) {
        // In a jail it cannot be seen, and is its caller's.
        let _ = std::fs::remove_file(socket);
    }
    let status = match (reason, message.as_str()) {
        (ExitReason::Signal, crate::monitor::INTERRUPTED) => 130,
        _ => status(reason),
    };
    events.emit(EventKind::Exit { reason, message });
    status
}

fn run(arguments: Arguments, events: &Arc<Events>, log: Log) -> Result<(ExitReason, String)> {
    confine_or_warn(arguments.no_seccomp)?;
    events.emit(EventKind::ProcessStarted { pid: std::process::id() });
    arguments.trace_exits.as_deref().map_or(Ok(()), trace::start)?;
    arguments.gdb.as_deref().map_or(Ok(()), gdb::listen)?;
    let config: Option<VmConfig> = arguments.config_file.as_deref().map(read_json).transpose()?;
    let request: Option<SnapshotLoad> = arguments.restore_file.as_deref().map(read_json).transpose()?;
    let snapshot = request.as_ref().map(Loaded::read).transpose()?;
    let named = config.as_ref().or(snapshot.as_ref().map(|snapshot| &snapshot.config));
    let memory = snapshot.as_ref().map(Loaded::memory_path);
    arguments.jail.enter(named, memory, arguments.api_sock.as_deref())?;
    let mut monitor = Monitor::new(arguments.id, events.clone(), log)?;
    if let Some(config) = config {
        monitor.start(config)?;
    }
    if let Some(snapshot) = snapshot {
        monitor.restore(snapshot, request.is_some_and(|request| request.resume_vm))?;
    }
    confine::jail::leave_host()?;
    if let Some(path) = &arguments.api_sock {
        monitor.serve(path)?;
    }
    monitor.run()
}

/// Serves pages in the place of a VM; returns only when that is not possible.
fn serve_pages(arguments: &Arguments) -> Option<c_int> {
    let confined = || confine_or_warn(arguments.no_seccomp);
    match arguments.pager.serve(confined)? {
        Ok(()) => Some(0),
        Err(error) => {
            eprintln!("mallee-vmm: {error}");
            Some(status(error.reason()))
        }
    }
}

fn confine_or_warn(no_seccomp: bool) -> Result<()> {
    if no_seccomp {
        eprintln!("mallee-vmm: WARNING: --no-seccomp: a guest that takes over this process may make any system call");
    } else {
        confine::turn_on();
    }
    confine::give_up_new_privileges().map_err(Error::host("no_new_privs"))
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(Error::file("config file", path))?;
    serde_json::from_slice(&text)
        .map_err(|error| Error::BadConfiguration(format!("config file {}: {error}", path.display())))
}

/// Exit statuses as [`ExitReason`] documents them.
fn status(reason: ExitReason) -> c_int {
    match reason {
        ExitReason::PowerOff | ExitReason::Reset => 0,
        ExitReason::HostFailure => 1,
        ExitReason::BadConfiguration => 2,
        ExitReason::Signal => 143,
    }
}

fn print_check() -> c_int {
    match serde_json::to_string(&check_kvm::check()) {
        Ok(json) => {
            println!("{json}");
            0
        }
        Err(error) => {
            eprintln!("mallee-vmm: {error}");
            1
        }
    }
}
