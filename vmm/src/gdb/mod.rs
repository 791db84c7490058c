//! `--gdb SOCKET`: GDB's remote protocol on a Unix socket, so that a kernel can be walked through from its first instruction.
//!
//! `target` is the machine as GDB sees it (a thread for each vCPU), `breakpoints` and `debug_registers` what was asked to be stopped at, `registers` the
//! two orders of registers, `wire` the connection; the protocol itself is the `gdbstub` crate's. This file is the debugger's thread, and how
//! vCPUs' threads tell it that they have stopped.
//!
//! The debugger holds vCPUs at the gate (`gate`): all of them from the start, until GDB says go on. A vCPU that stops (a breakpoint, a step) closes the gate
//! for all before it tells, so that nothing runs while GDB looks. Devices go on: what they have for the guest waits. A
//! client that goes away, in whatever way, takes its breakpoints with it, and the guest goes on.
//!
//! A KVM in software cannot carry out an `int3`, and gives up in front of it. While a debugger is there that is a stop like any other; if the `int3` is not the
//! debugger's, the machine ends as it would have without one.
//!
//! Whoever can connect to the socket owns the guest. It is made with the rights of the process' umask, and not there without `--gdb`.

mod breakpoints;
mod debug_registers;
mod registers;
mod target;
mod wire;

use std::collections::VecDeque;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use gdbstub::common::Signal;
use gdbstub::stub::run_blocking::{BlockingEventLoop, Event, WaitForStopReasonError};
use gdbstub::stub::{GdbStub, MultiThreadStopReason};
use kvm_bindings::kvm_debug_exit_arch;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::lock;
use crate::confine::{self, ThreadKind};
use crate::error::{Error, Result};
use crate::vcpu::ExitSignal;
use crate::vm::RunningVm;
use target::Guest;
use wire::{Ready, Wire};

/// What a vCPU has stopped for.
#[derive(Debug, Clone, Copy)]
pub enum Stop {
    /// An exception that is the debugger's, as KVM says.
    Exception(kvm_debug_exit_arch),
    /// In front of an instruction at this address that KVM cannot carry out.
    NotEmulated(u64),
}

#[derive(Debug, Clone, Copy)]
pub struct Report {
    pub vcpu: u8,
    pub stop: Stop,
}

/// There from the start to the end of a process with `--gdb`.
pub struct Debugger {
    listener: UnixListener,
    /// There is a client. Changes only while the guest stands still.
    is_attached: AtomicBool,
    reports: Mutex<VecDeque<Report>>,
    told: EventFd,
}

static DEBUGGER: OnceLock<Debugger> = OnceLock::new();

/// The debugger, if there is one.
pub fn get() -> Option<&'static Debugger> {
    DEBUGGER.get()
}

/// Makes the socket. Before any vCPU has a thread.
pub fn listen(path: &Path) -> Result<()> {
    let listener = UnixListener::bind(path).map_err(Error::file("socket for gdb", path))?;
    let told = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::host("eventfd"))?;
    let _ = DEBUGGER.set(Debugger { listener, is_attached: AtomicBool::new(false), reports: Mutex::default(), told });
    Ok(())
}

/// Starts the thread, if there is a debugger.
pub fn serve(vm: &RunningVm, exit: &Arc<ExitSignal>) -> Result<()> {
    let Some(debugger) = get() else { return Ok(()) };
    let mut guest = Guest::new(vm, exit.clone());
    std::thread::Builder::new()
        .name("gdb".into())
        .spawn(move || {
            confine::enter(ThreadKind::Gdb);
            debugger.run(&mut guest);
        })
        .map(drop)
        .map_err(Error::host("debugger's thread"))
}

impl Debugger {
    pub fn is_attached(&self) -> bool {
        self.is_attached.load(Ordering::Acquire)
    }

    /// For a vCPU's thread, which has closed the gate before.
    pub fn tell(&self, report: Report) {
        lock(&self.reports).push_back(report);
        if let Err(error) = self.told.write(1) {
            tracing::error!(%error, "cannot tell the debugger");
        }
    }

    fn next(&self) -> Option<Report> {
        let _ = self.told.read();
        lock(&self.reports).pop_front()
    }

    /// What was told and not looked at; a vCPU that still has a reason to stop stops again.
    fn forget(&self) {
        lock(&self.reports).clear();
    }

    fn run(&self, guest: &mut Guest) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::error!(%error, "the debugger's socket");
                    return;
                }
            };
            if let Err(why) = self.debug(stream, guest) {
                tracing::error!(why, "the debugger cannot stop the guest");
                return;
            }
        }
    }

    /// One client, from its coming to its going. The guest stands still at both.
    fn debug(&self, stream: UnixStream, guest: &mut Guest) -> std::result::Result<(), &'static str> {
        guest.halt()?;
        self.is_attached.store(true, Ordering::Release);
        let ended = GdbStub::new(Wire::new(stream)).run_blocking::<Session>(guest);
        tracing::info!(?ended, "a debugger has left");
        guest.halt()?;
        self.is_attached.store(false, Ordering::Release);
        self.forget();
        guest.let_go();
        Ok(())
    }
}

/// The time between GDB's "go on" and the next stop.
enum Session {}

impl BlockingEventLoop for Session {
    type Target = Guest;
    type Connection = Wire;
    type StopReason = MultiThreadStopReason<u64>;

    fn wait_for_stop_reason(
        guest: &mut Guest,
        wire: &mut Wire,
    ) -> std::result::Result<Event<Self::StopReason>, WaitForStopReasonError<&'static str, std::io::Error>> {
        let debugger = get().ok_or(WaitForStopReasonError::Target("no debugger"))?;
        loop {
            match wire.wait(&debugger.told).map_err(WaitForStopReasonError::Connection)? {
                Ready::Data => {
                    let byte = gdbstub::conn::ConnectionExt::read(wire).map_err(WaitForStopReasonError::Connection)?;
                    return Ok(Event::IncomingData(byte));
                }
                Ready::Other => {}
            }
            while let Some(report) = debugger.next() {
                if let Some(reason) = guest.stopped(report).map_err(WaitForStopReasonError::Target)? {
                    debugger.forget();
                    return Ok(Event::TargetStopped(reason));
                }
            }
        }
    }

    fn on_interrupt(guest: &mut Guest) -> std::result::Result<Option<Self::StopReason>, &'static str> {
        guest.halt()?;
        Ok(Some(MultiThreadStopReason::SignalWithThread { tid: target::tid(0), signal: Signal::SIGINT }))
    }
}
