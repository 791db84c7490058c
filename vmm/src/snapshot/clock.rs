//! The VM's clock (kvm-clock) in a snapshot.
//!
//! A restored guest's clock goes on from where it was plus the time that has passed on the host's CLOCK_REALTIME since: it is right again without being
//! told. Where KVM does that itself (KVM_CLOCK_REALTIME, Linux 5.16), reading and setting are one instant; elsewhere
//! they are some microseconds apart. A host's clock that was set back, or one of another host that is late, counts as no time.

use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::{Cap, VmFd};

use super::file::{Flaw, Kind, Reader, Writer};
use crate::error::{Error, Result};
use crate::events::unix_ns;

/// See the module.
#[derive(Debug, Clone)]
pub struct ClockState {
    clock: kvm_clock_data,
    /// CLOCK_REALTIME at that moment (ns).
    wall_ns: u64,
}

impl ClockState {
    pub fn save(vm: &VmFd) -> Result<Self> {
        Ok(ClockState { clock: read(vm)?, wall_ns: unix_ns() })
    }

    /// Sets the clock of a new VM; how much time has passed for the guest (ns).
    pub fn restore(&self, vm: &VmFd) -> Result<u64> {
        // KVM_CHECK_EXTENSION tells the flags that it knows.
        let known = u32::try_from(vm.check_extension_int(Cap::AdjustClock)).unwrap_or(0);
        let is_done_by_kvm = self.clock.flags & known & KVM_CLOCK_REALTIME != 0;
        let mut clock = kvm_clock_data { clock: self.clock.clock, ..Default::default() };
        if is_done_by_kvm {
            (clock.flags, clock.realtime) = (KVM_CLOCK_REALTIME, self.clock.realtime);
        } else {
            clock.clock = clock.clock.saturating_add(unix_ns().saturating_sub(self.wall_ns));
        }
        vm.set_clock(&clock).map_err(Error::kvm("KVM_SET_CLOCK"))?;
        Ok(read(vm)?.clock.saturating_sub(self.clock.clock))
    }

    pub fn write(&self, writer: &mut Writer) {
        writer.record(Kind::Clock, 0, &self.clock);
        writer.record(Kind::WallClock, 0, &self.wall_ns);
    }

    pub fn read(reader: &mut Reader<'_>) -> std::result::Result<Self, Flaw> {
        Ok(ClockState { clock: reader.record(Kind::Clock, 0)?, wall_ns: reader.record(Kind::WallClock, 0)? })
    }
}

fn read(vm: &VmFd) -> Result<kvm_clock_data> {
    vm.get_clock().map_err(Error::kvm("KVM_GET_CLOCK"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ioctls::Kvm;

    #[test]
    fn a_clock_goes_on_with_the_time_that_has_passed_by_either_way() {
        let kvm = Kvm::new().unwrap();
        let mut state = ClockState::save(&kvm.create_vm().unwrap()).unwrap();
        const HOUR: u64 = 3_600_000_000_000;
        state.wall_ns -= HOUR;
        state.clock.realtime = state.clock.realtime.saturating_sub(HOUR);
        for flags in [state.clock.flags, 0] {
            state.clock.flags = flags;
            let vm = kvm.create_vm().unwrap();
            let elapsed = state.restore(&vm).unwrap();
            assert!((HOUR..HOUR + HOUR / 60).contains(&elapsed), "{elapsed} ns by flags {flags:#x}");
            assert!(read(&vm).unwrap().clock >= state.clock.clock + HOUR);
        }
    }

    #[test]
    fn a_host_whose_clock_is_behind_stops_no_guest() {
        let kvm = Kvm::new().unwrap();
        let mut state = ClockState::save(&kvm.create_vm().unwrap()).unwrap();
        (state.wall_ns, state.clock.realtime) = (u64::MAX, i64::MAX as u64);
        for flags in [state.clock.flags, 0] {
            state.clock.flags = flags;
            let elapsed = state.restore(&kvm.create_vm().unwrap()).unwrap();
            assert!(elapsed < 60_000_000_000, "{elapsed} ns by flags {flags:#x}");
        }
    }
}
