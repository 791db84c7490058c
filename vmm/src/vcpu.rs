//! A vCPU's thread: enter the guest, serve the exit, enter again.
//!
//! The thread ends when the guest asks for the machine's end, when KVM gives up, or when it is told to
//! stop. It never ends the process: it tells the monitor through the [`ExitSignal`].

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::api::ExitReason;
use crate::bus::{Bus, lock};
use crate::confine::{self, ThreadKind};
use crate::devices::MachineRequest;
use crate::error::{Error, Result};
use crate::metrics::{self, ExitKind, VcpuMetrics};
use crate::trace;

/// Why the VM ends. The first one who says so is heard.
pub struct ExitSignal {
    verdict: Mutex<Option<(ExitReason, String)>>,
    event: EventFd,
}

impl ExitSignal {
    pub fn new() -> Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::host("eventfd"))?;
        Ok(ExitSignal { verdict: Mutex::new(None), event })
    }

    pub fn raise(&self, reason: ExitReason, message: impl Into<String>) {
        lock(&self.verdict).get_or_insert((reason, message.into()));
        if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "cannot tell the monitor that the VM ended");
        }
    }

    /// Becomes readable when there is a verdict.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    pub fn verdict(&self) -> Option<(ExitReason, String)> {
        lock(&self.verdict).clone()
    }
}

/// A vCPU that has not run yet.
pub struct Vcpu {
    pub index: u8,
    pub fd: VcpuFd,
}

/// A vCPU that runs.
pub struct RunningVcpu {
    thread: JoinHandle<()>,
    stop: Arc<AtomicBool>,
}

impl Vcpu {
    /// Starts the thread, which enters the guest at once.
    pub fn start(self, bus: Arc<Bus>, exit: Arc<ExitSignal>) -> Result<RunningVcpu> {
        let stop = Arc::new(AtomicBool::new(false));
        let told_to_stop = stop.clone();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{}", self.index))
            .spawn(move || run(self, &bus, &exit, &told_to_stop))
            .map_err(Error::host("vCPU thread"))?;
        Ok(RunningVcpu { thread, stop })
    }
}

impl RunningVcpu {
    /// Makes the thread leave the guest and end. A signal can fall between the thread's look at the flag and
    /// its entry into the guest, so it is sent until it has had its effect.
    pub fn stop(self) {
        use std::os::unix::thread::JoinHandleExt;
        self.stop.store(true, Ordering::Release);
        while !self.thread.is_finished() {
            // SAFETY: the thread has not been joined, so its id is valid; the signal has a handler.
            unsafe { libc::pthread_kill(self.thread.as_pthread_t() as libc::pthread_t, SIGRTMIN()) };
            std::thread::sleep(Duration::from_micros(200));
        }
        let _ = self.thread.join();
    }
}

/// The signal that interrupts KVM_RUN needs a handler, or it would end the process.
pub fn install_kick_handler() -> Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), nothing)
        .map_err(|error| Error::Host { what: "signal handler", source: error.into() })
}

fn run(mut vcpu: Vcpu, bus: &Bus, exit: &ExitSignal, stop: &AtomicBool) {
    let metrics = metrics::vcpu(vcpu.index);
    confine::enter(ThreadKind::Vcpu);
    while !stop.load(Ordering::Acquire) {
        if let Some((reason, message)) = run_once(&mut vcpu, bus, &metrics) {
            exit.raise(reason, message);
            return;
        }
    }
    if let Ok(regs) = vcpu.fd.get_regs() {
        tracing::debug!(vcpu = vcpu.index, rip = format!("{:#x}", regs.rip), "stopped");
    }
}

/// Enters the guest until its next exit. `Some` ends the machine.
fn run_once(vcpu: &mut Vcpu, bus: &Bus, metrics: &VcpuMetrics) -> Option<(ExitReason, String)> {
    let index = vcpu.index;
    let failure = |what: String| Some((ExitReason::HostFailure, format!("vCPU {index}: {what}")));
    let came_out = vcpu.fd.run();
    let kind = ExitKind::of(&came_out);
    metrics.count(kind);
    let trace = trace::get();
    let accessed = |address: u64, data: &[u8]| {
        if let Some(trace) = trace {
            trace.access(index, kind, address, data);
        }
    };
    match (trace, kind) {
        (None, _) | (_, ExitKind::IoIn | ExitKind::IoOut | ExitKind::MmioRead | ExitKind::MmioWrite) => {}
        (Some(trace), _) => trace.exit(index, kind),
    }
    match came_out {
        Ok(VcpuExit::IoOut(port, data)) => {
            accessed(port.into(), data);
            bus.write_port(port, data).map(machine_request)
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            bus.read_port(port, data);
            accessed(port.into(), data);
            None
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            bus.read_mmio(address, data);
            accessed(address, data);
            None
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            accessed(address, data);
            bus.write_mmio(address, data);
            None
        }
        Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => None,
        Ok(VcpuExit::Shutdown) => Some((ExitReason::Reset, format!("vCPU {index}: triple fault or shutdown"))),
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
            Some((ExitReason::PowerOff, "system event: shutdown".into()))
        }
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET | KVM_SYSTEM_EVENT_CRASH, _)) => {
            Some((ExitReason::Reset, "system event: reset".into()))
        }
        Ok(VcpuExit::FailEntry(reason, _)) => {
            failure(format!("the processor refused to enter the guest, reason {reason:#x}"))
        }
        Ok(VcpuExit::InternalError) => {
            let at = vcpu.fd.get_regs().map_or(0, |regs| regs.rip);
            failure(format!(
                "KVM could not emulate the instruction at {at:#x} (KVM_EXIT_INTERNAL_ERROR): \
                 a software KVM cannot run this guest"
            ))
        }
        Ok(other) => failure(format!("unexpected exit {other:?}")),
        Err(error) => match error.errno() {
            libc::EINTR | libc::EAGAIN => None,
            _ => failure(format!("KVM_RUN: {error}")),
        },
    }
}

fn machine_request(request: MachineRequest) -> (ExitReason, String) {
    match request {
        MachineRequest::PowerOff => (ExitReason::PowerOff, "the guest powered off".into()),
        MachineRequest::Reset => (ExitReason::Reset, "the guest asked for a reset".into()),
    }
}
