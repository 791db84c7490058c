//! Why a vCPU came out of the guest, counted.

use kvm_ioctls::VcpuExit;

use super::counters::Tally;

/// Reasons as they are told; KVM has more, none of which a guest of ours should cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum ExitKind {
    IoIn,
    IoOut,
    MmioRead,
    MmioWrite,
    Halt,
    IrqWindow,
    Shutdown,
    SystemEvent,
    FailEntry,
    InternalError,
    Debug,
    /// KVM_RUN was interrupted by a signal: a pause, a stop, a debugger.
    Interrupted,
    Other,
}

impl ExitKind {
    pub const ALL: [ExitKind; 13] = [
        ExitKind::IoIn,
        ExitKind::IoOut,
        ExitKind::MmioRead,
        ExitKind::MmioWrite,
        ExitKind::Halt,
        ExitKind::IrqWindow,
        ExitKind::Shutdown,
        ExitKind::SystemEvent,
        ExitKind::FailEntry,
        ExitKind::InternalError,
        ExitKind::Debug,
        ExitKind::Interrupted,
        ExitKind::Other,
    ];

    pub fn of(exit: &Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Self {
        match exit {
            Ok(VcpuExit::IoIn(..)) => ExitKind::IoIn,
            Ok(VcpuExit::IoOut(..)) => ExitKind::IoOut,
            Ok(VcpuExit::MmioRead(..)) => ExitKind::MmioRead,
            Ok(VcpuExit::MmioWrite(..)) => ExitKind::MmioWrite,
            Ok(VcpuExit::Hlt) => ExitKind::Halt,
            Ok(VcpuExit::IrqWindowOpen) => ExitKind::IrqWindow,
            Ok(VcpuExit::Shutdown) => ExitKind::Shutdown,
            Ok(VcpuExit::SystemEvent(..)) => ExitKind::SystemEvent,
            Ok(VcpuExit::FailEntry(..)) => ExitKind::FailEntry,
            Ok(VcpuExit::InternalError) => ExitKind::InternalError,
            Ok(VcpuExit::Debug(..)) => ExitKind::Debug,
            Ok(VcpuExit::Intr) => ExitKind::Interrupted,
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => ExitKind::Interrupted,
            _ => ExitKind::Other,
        }
    }

    /// Firecracker's names for the four that it counts.
    pub fn name(self) -> &'static str {
        match self {
            ExitKind::IoIn => "exit_io_in",
            ExitKind::IoOut => "exit_io_out",
            ExitKind::MmioRead => "exit_mmio_read",
            ExitKind::MmioWrite => "exit_mmio_write",
            ExitKind::Halt => "exit_hlt",
            ExitKind::IrqWindow => "exit_irq_window",
            ExitKind::Shutdown => "exit_shutdown",
            ExitKind::SystemEvent => "exit_system_event",
            ExitKind::FailEntry => "exit_fail_entry",
            ExitKind::InternalError => "exit_internal_error",
            ExitKind::Debug => "exit_debug",
            ExitKind::Interrupted => "exit_interrupted",
            ExitKind::Other => "exit_other",
        }
    }
}

/// Counted by the vCPU's own thread.
#[derive(Debug)]
pub struct VcpuMetrics {
    pub index: u8,
    exits: [Tally; ExitKind::ALL.len()],
}

impl VcpuMetrics {
    pub(super) fn new(index: u8) -> Self {
        VcpuMetrics { index, exits: Default::default() }
    }

    pub fn count(&self, kind: ExitKind) {
        self.exits[kind as usize].increment();
    }

    pub fn exits(&self, kind: ExitKind) -> u64 {
        self.exits[kind as usize].get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_place_and_a_name_of_its_own() {
        let metrics = VcpuMetrics::new(0);
        for (place, kind) in ExitKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, place);
            assert!(ExitKind::ALL.iter().all(|other| *other == kind || other.name() != kind.name()));
            metrics.count(kind);
            assert_eq!(metrics.exits(kind), 1);
        }
    }

    #[test]
    fn a_signal_is_no_failure() {
        let interrupted = Err(kvm_ioctls::Error::new(libc::EINTR));
        assert_eq!(ExitKind::of(&interrupted), ExitKind::Interrupted);
        assert_eq!(ExitKind::of(&Err(kvm_ioctls::Error::new(libc::EFAULT))), ExitKind::Other);
        assert_eq!(ExitKind::of(&Ok(VcpuExit::IoOut(0x3f8, &[0]))), ExitKind::IoOut);
    }
}
