//! A vCPU's thread: enter the guest, serve the exit, enter again.
//!
//! The thread ends when the guest asks for the machine's end, when KVM gives up, or when it is told to
//! stop. It never ends the process: it tells the monitor through the [`ExitSignal`].
//!
//! It begins at the [`Gate`], and comes back there whenever the VM is paused. The vCPU itself lies behind a lock that the thread holds except at the
//! gate: there its state is complete (KVM has finished the access that the last exit was about), and the main thread may read it.

use std::os::unix::thread::JoinHandleExt;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::api::ExitReason;
use crate::bus::{Bus, lock};
use crate::confine::{self, ThreadKind};
use crate::devices::MachineRequest;
use crate::error::{Error, Result};
use crate::gate::{Gate, Passage};
use crate::gdb::{self, Report, Stop};
use crate::kick::{self, Kickable, Reach};
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

/// A vCPU that has a thread.
pub struct RunningVcpu {
    vcpu: Arc<Mutex<Vcpu>>,
    reach: Arc<Reach>,
    thread: JoinHandle<()>,
}

impl Vcpu {
    /// Starts the thread, which waits at `gate`.
    pub fn start(self, bus: Arc<Bus>, exit: Arc<ExitSignal>, gate: Arc<Gate>) -> Result<RunningVcpu> {
        let index = self.index;
        let vcpu = Arc::new(Mutex::new(self));
        let own = vcpu.clone();
        let reach = Arc::new(Reach::default());
        let own_reach = reach.clone();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || {
                own_reach.set();
                run(&own, &bus, &exit, &Leaving { gate: &gate, index });
            })
            .map_err(Error::host("vCPU thread"))?;
        Ok(RunningVcpu { vcpu, reach, thread })
    }
}

impl RunningVcpu {
    /// Calls the thread out of the guest; where it goes then is the gate's business.
    pub fn kick(&self) {
        kick::kick(self.thread.as_pthread_t() as libc::pthread_t);
    }

    /// For the debugger, which outlives the thread: the vCPU, to be locked at the gate, and how its thread is called there.
    pub fn share(&self) -> (Arc<Mutex<Vcpu>>, Arc<Reach>) {
        (self.vcpu.clone(), self.reach.clone())
    }

    /// Looks at the vCPU of a thread that is at the gate or has ended; waits for one that is not.
    pub fn look<T>(&self, look: impl FnOnce(&VcpuFd) -> T) -> T {
        look(&lock(&self.vcpu).fd)
    }

    /// After the gate has sent it to its end.
    pub fn join(self) {
        let _ = self.thread.join();
    }
}

/// Tells the gate that a thread has ended, also when it panics.
struct Leaving<'a> {
    gate: &'a Gate,
    index: u8,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.gate.leave(self.index);
    }
}

fn run(vcpu: &Mutex<Vcpu>, bus: &Bus, exit: &ExitSignal, here: &Leaving<'_>) {
    let metrics = metrics::vcpu(here.index);
    confine::enter(ThreadKind::Vcpu);
    // SAFETY: `vcpu` outlives this function's frame.
    let kickable = unsafe { Kickable::new(&mut lock(vcpu).fd) };
    while here.gate.pass(here.index) == Passage::GoOn {
        let mut vcpu = lock(vcpu);
        let ended = run_until_called(&mut vcpu, bus, &metrics, here.gate, &kickable);
        if let Some((reason, message)) = ended {
            exit.raise(reason, message);
            return;
        }
    }
    if let Ok(regs) = lock(vcpu).fd.get_regs() {
        tracing::debug!(vcpu = here.index, rip = format!("{:#x}", regs.rip), "stopped");
    }
}

/// Runs the guest until the gate calls; `Some` ends the machine.
fn run_until_called(
    vcpu: &mut Vcpu,
    bus: &Bus,
    metrics: &VcpuMetrics,
    gate: &Gate,
    kickable: &Kickable,
) -> Option<(ExitReason, String)> {
    kickable.forget();
    while !gate.is_called(vcpu.index) {
        match run_once(vcpu, bus, metrics) {
            Step::Served => {}
            Step::Stopped(stop) => stop_for_debugger(vcpu.index, stop, gate),
            Step::Interrupted => kickable.forget(),
            Step::End(reason, message) => return Some((reason, message)),
        }
    }
    // What the guest reads from a port or a device gets to its register only with the next KVM_RUN, and an access may take several exits.
    loop {
        kickable.exit_at_once();
        match run_once(vcpu, bus, metrics) {
            Step::Served => {}
            Step::Stopped(stop) => stop_for_debugger(vcpu.index, stop, gate),
            Step::Interrupted => return None,
            Step::End(reason, message) => return Some((reason, message)),
        }
    }
}

/// Has all vCPUs come to the gate, and tells the debugger why.
fn stop_for_debugger(vcpu: u8, stop: Stop, gate: &Gate) {
    if let Some(debugger) = gdb::get() {
        gate.shut(u64::MAX);
        debugger.tell(Report { vcpu, stop });
    }
}

/// What became of one `KVM_RUN`.
enum Step {
    /// The guest wanted something, and has it.
    Served,
    /// There was nothing to serve: a signal, or the demand to exit at once.
    Interrupted,
    /// The debugger wanted to know of this.
    Stopped(Stop),
    /// The machine ends.
    End(ExitReason, String),
}

/// Enters the guest until its next exit, and serves that.
fn run_once(vcpu: &mut Vcpu, bus: &Bus, metrics: &VcpuMetrics) -> Step {
    let index = vcpu.index;
    let failure = |what: String| Step::End(ExitReason::HostFailure, format!("vCPU {index}: {what}"));
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
            bus.write_port(port, data).map_or(Step::Served, machine_request)
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            bus.read_port(port, data);
            accessed(port.into(), data);
            Step::Served
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            bus.read_mmio(address, data);
            accessed(address, data);
            Step::Served
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            accessed(address, data);
            bus.write_mmio(address, data);
            Step::Served
        }
        Ok(VcpuExit::Debug(exit)) => Step::Stopped(Stop::Exception(exit)),
        Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => Step::Served,
        Ok(VcpuExit::Shutdown) => Step::End(ExitReason::Reset, format!("vCPU {index}: triple fault or shutdown")),
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
            Step::End(ExitReason::PowerOff, "system event: shutdown".into())
        }
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET | KVM_SYSTEM_EVENT_CRASH, _)) => {
            Step::End(ExitReason::Reset, "system event: reset".into())
        }
        Ok(VcpuExit::FailEntry(reason, _)) => {
            failure(format!("the processor refused to enter the guest, reason {reason:#x}"))
        }
        Ok(VcpuExit::InternalError) => {
            let at = vcpu.fd.get_regs().map_or(0, |regs| regs.rip);
            if gdb::get().is_some_and(|debugger| debugger.is_attached()) {
                return Step::Stopped(Stop::NotEmulated(at));
            }
            let (reason, message) = not_emulated(index, at);
            Step::End(reason, message)
        }
        Ok(other) => failure(format!("unexpected exit {other:?}")),
        Err(error) => match error.errno() {
            libc::EINTR | libc::EAGAIN => Step::Interrupted,
            _ => failure(format!("KVM_RUN: {error}")),
        },
    }
}

/// The end of a machine whose vCPU stands in front of an instruction that KVM cannot carry out.
pub fn not_emulated(vcpu: u8, at: u64) -> (ExitReason, String) {
    let message = format!(
        "vCPU {vcpu}: KVM could not emulate the instruction at {at:#x} (KVM_EXIT_INTERNAL_ERROR): \
         a software KVM cannot run this guest"
    );
    (ExitReason::HostFailure, message)
}

fn machine_request(request: MachineRequest) -> Step {
    match request {
        MachineRequest::PowerOff => Step::End(ExitReason::PowerOff, "the guest powered off".into()),
        MachineRequest::Reset => Step::End(ExitReason::Reset, "the guest asked for a reset".into()),
    }
}
