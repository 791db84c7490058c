//! The machine as GDB sees it: a thread for each vCPU (GDB counts from 1), guest-virtual memory through the page tables of the vCPU that is
//! looked at.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints as BreakpointsExtension, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps,
    SwBreakpoint, SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::breakpoints::Breakpoints;
use super::debug_registers::Event;
use super::{Report, Stop, registers};
use crate::bus::lock;
use crate::gate::Gate;
use crate::kick::Reach;
use crate::memory::GuestMemory;
use crate::vcpu::{self, ExitSignal, Vcpu};
use crate::vm::RunningVm;

/// How long a stop waits for the vCPUs.
const PATIENCE: Duration = Duration::from_secs(10);
const PAGE: u64 = 4096;
/// Exceptions (Intel SDM, 7.15).
const DEBUG_EXCEPTION: u32 = 1;
const BREAKPOINT_EXCEPTION: u32 = 3;

/// What a vCPU does when the guest goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Continue,
    Step,
}

pub struct Guest {
    vcpus: Vec<Arc<Mutex<Vcpu>>>,
    reach: Vec<Arc<Reach>>,
    gate: Arc<Gate>,
    memory: GuestMemory,
    breakpoints: Breakpoints,
    /// As GDB has said of each; the others go on, unless `is_locked`.
    actions: Vec<Option<Action>>,
    is_locked: bool,
    /// Who is told when the guest cannot go on.
    exit: Arc<ExitSignal>,
}

/// GDB's number of a vCPU.
pub fn tid(vcpu: u8) -> Tid {
    Tid::MIN.saturating_add(vcpu.into())
}

impl Guest {
    pub fn new(vm: &RunningVm, exit: Arc<ExitSignal>) -> Self {
        let (vcpus, reach): (Vec<_>, Vec<_>) = vm.vcpus().map(|vcpu| vcpu.share()).unzip();
        let actions = vec![None; vcpus.len()];
        let (gate, memory) = (vm.gate(), vm.memory.clone());
        Guest { vcpus, reach, gate, memory, breakpoints: Breakpoints::default(), actions, is_locked: false, exit }
    }

    /// Brings all vCPUs to the gate.
    pub fn halt(&mut self) -> Result<(), &'static str> {
        let count = self.vcpus.len() as u8;
        let call = |index: u8| self.reach[usize::from(index)].kick();
        self.gate.hold(count, PATIENCE, call).map_err(|_| "a vCPU does not come out of its guest")
    }

    /// The debugger is gone: everything as it was, and on.
    pub fn let_go(&mut self) {
        self.breakpoints.clear(&self.memory);
        for vcpu in &self.vcpus {
            let _ = lock(vcpu).fd.set_guest_debug(&kvm_bindings::kvm_guest_debug::default());
        }
        self.gate.release(u64::MAX);
    }

    /// Says to GDB why a vCPU has stopped; nothing if that is the guest's own business, and it goes on or ends.
    pub fn stopped(&mut self, report: Report) -> Result<Option<MultiThreadStopReason<u64>>, &'static str> {
        self.halt()?;
        let tid = tid(report.vcpu);
        let exit = match report.stop {
            Stop::Exception(exit) => exit,
            Stop::NotEmulated(at) if self.is_ours(report.vcpu, at) => {
                return Ok(Some(MultiThreadStopReason::SwBreak(tid)));
            }
            Stop::NotEmulated(at) => {
                let (reason, message) = vcpu::not_emulated(report.vcpu, at);
                self.exit.raise(reason, message);
                return Ok(None);
            }
        };
        match exit.exception {
            BREAKPOINT_EXCEPTION if !self.is_ours(report.vcpu, exit.pc) => {
                self.go_on(Some(report.vcpu))?;
                Ok(None)
            }
            BREAKPOINT_EXCEPTION => Ok(Some(MultiThreadStopReason::SwBreak(tid))),
            DEBUG_EXCEPTION => Ok(Some(self.debug_exception(tid, exit.dr6))),
            _ => Ok(Some(trap(tid))),
        }
    }

    /// A debug register's event, or a step.
    fn debug_exception(&self, tid: Tid, dr6: u64) -> MultiThreadStopReason<u64> {
        let Some(met) = self.breakpoints.hardware.met(dr6) else { return trap(tid) };
        let watched = |kind| MultiThreadStopReason::Watch { tid, kind, addr: met.address };
        match met.event {
            Event::Execute => MultiThreadStopReason::HwBreak(tid),
            Event::Write => watched(WatchKind::Write),
            Event::Access => watched(WatchKind::ReadWrite),
        }
    }

    /// Whether the `int3` that this vCPU is at was put there by GDB.
    fn is_ours(&self, vcpu: u8, address: u64) -> bool {
        let vcpu = &self.vcpus[usize::from(vcpu)];
        translate(&lock(vcpu).fd, address).is_some_and(|physical| self.breakpoints.has_software(physical))
    }

    /// Lets the vCPUs run as GDB wants each; the guest's own `int3` is given to the vCPU that met it.
    fn go_on(&mut self, own_int3: Option<u8>) -> Result<(), &'static str> {
        let mut released = 0;
        for (index, (vcpu, action)) in self.vcpus.iter().zip(&self.actions).enumerate() {
            if action.is_none() && self.is_locked {
                continue;
            }
            let debug = self.breakpoints.control(*action == Some(Action::Step), own_int3 == Some(index as u8));
            lock(vcpu).fd.set_guest_debug(&debug).map_err(|_| "KVM_SET_GUEST_DEBUG")?;
            released |= 1 << index;
        }
        self.gate.release(released);
        Ok(())
    }

    fn vcpu(&self, tid: Tid) -> Result<&Mutex<Vcpu>, TargetError<&'static str>> {
        self.vcpus.get(tid.get() - 1).map(Arc::as_ref).ok_or(TargetError::NonFatal)
    }

    fn set_action(&mut self, tid: Tid, action: Action) -> Result<(), &'static str> {
        *self.actions.get_mut(tid.get() - 1).ok_or("there is no such vCPU")? = Some(action);
        Ok(())
    }

    /// The first vCPU's: a kernel is mapped in all of them alike.
    fn physical(&self, address: u64) -> Option<u64> {
        translate(&lock(self.vcpus.first()?).fd, address)
    }
}

fn trap(tid: Tid) -> MultiThreadStopReason<u64> {
    MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGTRAP }
}

/// Guest-virtual to guest-physical, by the vCPU's page tables.
fn translate(fd: &VcpuFd, address: u64) -> Option<u64> {
    let translation = fd.translate_gva(address).ok()?;
    (translation.valid != 0).then_some(translation.physical_address)
}

/// The parts of a range that lie in one page each: address and length.
fn pages(address: u64, length: usize) -> impl Iterator<Item = (u64, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = address.wrapping_add(done as u64);
        let part = ((PAGE - at % PAGE) as usize).min(length - done);
        done += part;
        (part > 0).then_some((at, part))
    })
}

impl Target for Guest {
    type Arch = X86_64_SSE;
    type Error = &'static str;

    fn base_ops(&mut self) -> BaseOps<'_, X86_64_SSE, &'static str> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Guest {
    fn read_registers(&mut self, registers: &mut X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        registers::read(&lock(self.vcpu(tid)?).fd, registers).map_err(|_| TargetError::NonFatal)
    }

    fn write_registers(&mut self, registers: &X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        registers::write(&lock(self.vcpu(tid)?).fd, registers).map_err(|_| TargetError::NonFatal)
    }

    fn read_addrs(&mut self, address: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let vcpu = lock(self.vcpu(tid)?);
        let mut done = 0;
        for (at, part) in pages(address, data.len()) {
            let bytes = &mut data[done..done + part];
            let Some(physical) = translate(&vcpu.fd, at) else { break };
            if self.memory.read_slice(bytes, GuestAddress(physical)).is_err() {
                break;
            }
            self.breakpoints.hide(physical, bytes);
            done += part;
        }
        if done == 0 && !data.is_empty() { Err(TargetError::NonFatal) } else { Ok(done) }
    }

    fn write_addrs(&mut self, address: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let mut done = 0;
        for (at, part) in pages(address, data.len()) {
            let physical = translate(&lock(self.vcpu(tid)?).fd, at).ok_or(TargetError::NonFatal)?;
            if !self.breakpoints.write(&self.memory, physical, &data[done..done + part]) {
                return Err(TargetError::NonFatal);
            }
            done += part;
        }
        Ok(())
    }

    fn list_active_threads(&mut self, register: &mut dyn FnMut(Tid)) -> Result<(), &'static str> {
        (0..self.vcpus.len() as u8).for_each(|vcpu| register(tid(vcpu)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

/// The number that everybody else knows a vCPU by.
impl ThreadExtraInfo for Guest {
    fn thread_extra_info(&self, tid: Tid, buffer: &mut [u8]) -> Result<usize, &'static str> {
        let name = format!("vCPU {}", tid.get() - 1);
        let length = name.len().min(buffer.len());
        buffer[..length].copy_from_slice(&name.as_bytes()[..length]);
        Ok(length)
    }
}

impl MultiThreadResume for Guest {
    fn resume(&mut self) -> Result<(), &'static str> {
        self.go_on(None)
    }

    fn clear_resume_actions(&mut self) -> Result<(), &'static str> {
        self.actions.fill(None);
        self.is_locked = false;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), &'static str> {
        self.set_action(tid, Action::Continue)
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSchedulerLocking for Guest {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), &'static str> {
        self.is_locked = true;
        Ok(())
    }
}

impl MultiThreadSingleStep for Guest {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), &'static str> {
        self.set_action(tid, Action::Step)
    }
}

impl BreakpointsExtension for Guest {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Guest {
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let Some(physical) = self.physical(address) else { return Ok(false) };
        Ok(self.breakpoints.add_software(&self.memory, physical))
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let Some(physical) = self.physical(address) else { return Ok(false) };
        Ok(self.breakpoints.remove_software(&self.memory, physical))
    }
}

impl HwBreakpoint for Guest {
    fn add_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.breakpoints.hardware.add(Event::Execute, address, 1))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.breakpoints.hardware.remove(Event::Execute, address, 1))
    }
}

impl HwWatchpoint for Guest {
    fn add_hw_watchpoint(&mut self, address: u64, length: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        Ok(event(kind).is_some_and(|event| self.breakpoints.hardware.add(event, address, length)))
    }

    fn remove_hw_watchpoint(&mut self, address: u64, length: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        Ok(event(kind).is_some_and(|event| self.breakpoints.hardware.remove(event, address, length)))
    }
}

/// None for reads alone, which no x86 processor watches for. That is refused: GDB would take a write that we call a read for one.
fn event(kind: WatchKind) -> Option<Event> {
    match kind {
        WatchKind::Write => Some(Event::Write),
        WatchKind::ReadWrite => Some(Event::Access),
        WatchKind::Read => None,
    }
}
