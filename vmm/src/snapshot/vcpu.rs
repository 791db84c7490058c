//! A vCPU in a snapshot.
//!
//! The order in which KVM's parts are read and written is not free (arch/x86/kvm/x86.c and lapic.c):
//!
//! * Reading the run state first lets KVM take pending INIT and SIPI into account, which changes what is read after it; reading the events
//!   comes last, as the other calls move pending ones about.
//! * CPUID is written first, as registers are checked against it; the system registers before the local APIC, whose base they hold;
//!   the local APIC before the MSRs, as the deadline timer's is only taken by an APIC in that mode; the TSC before that deadline, which is counted in it;
//!   the general registers before the events, as they clear pending exceptions.
//!
//! Time: the TSC goes on from where it was *plus the time that has passed since*, as the kernel's documentation of KVM_VCPU_TSC_OFFSET wants it, so that a guest
//! whose clock is the TSC has the right time again; a deadline that has passed meanwhile fires at once.

use kvm_bindings::{
    CpuId, Msrs, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::file::{Flaw, Kind, Reader, Writer};
use crate::error::{Error, Result};

/// As many as KVM takes in one call (KVM_MAX_MSR_ENTRIES, KVM_MAX_CPUID_ENTRIES).
const MAX_ENTRIES: usize = 256;
/// More MSRs than any kernel lists.
const MAX_MSRS: usize = 4096;
const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Memory types, which KVM keeps and does not list: variable ranges, fixed ranges, default.
const MTRRS: [std::ops::RangeInclusive<u32>; 5] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];
/// Words of the part of the extended state that every KVM has.
const XSAVE_WORDS: usize = size_of::<kvm_xsave>() / size_of::<u32>();
/// KVM takes a TSC that differs by less for the same (parts per million; its `tsc_tolerance_ppm`).
const TSC_TOLERANCE: u64 = 250;

/// See the module.
#[derive(Debug, Clone)]
pub struct VcpuState {
    run_state: kvm_mp_state,
    registers: kvm_regs,
    system: kvm_sregs,
    /// As long as KVM says; at least [`XSAVE_WORDS`].
    extended: Vec<u32>,
    extended_control: kvm_xcrs,
    debug: kvm_debugregs,
    local_apic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    cpuid: Vec<kvm_cpuid_entry2>,
    /// 0: this KVM does not say.
    tsc_khz: u32,
    events: kvm_vcpu_events,
}

/// What of a VM has to be known to save its vCPUs.
pub struct Shape {
    msrs: Vec<u32>,
    extended_words: usize,
}

impl Shape {
    pub fn of(kvm: &Kvm, vm: &VmFd) -> Result<Self> {
        let list = kvm.get_msr_index_list().map_err(Error::kvm("KVM_GET_MSR_INDEX_LIST"))?;
        let mut msrs = list.as_slice().to_vec();
        msrs.extend(MTRRS.into_iter().flatten());
        msrs.sort_unstable();
        msrs.dedup();
        Ok(Shape { msrs, extended_words: extended_words(vm) })
    }
}

/// Length of the extended state: longer than a page only where a feature was turned on for guests (AMX).
fn extended_words(vm: &VmFd) -> usize {
    let bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
    bytes.div_ceil(size_of::<u32>()).max(XSAVE_WORDS)
}

impl VcpuState {
    /// Reads a vCPU that does not run.
    pub fn save(fd: &VcpuFd, shape: &Shape) -> Result<Self> {
        let run_state = fd.get_mp_state().map_err(Error::kvm("KVM_GET_MP_STATE"))?;
        Ok(VcpuState {
            run_state,
            registers: fd.get_regs().map_err(Error::kvm("KVM_GET_REGS"))?,
            system: fd.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?,
            extended: read_extended(fd, shape.extended_words)?,
            extended_control: fd.get_xcrs().map_err(Error::kvm("KVM_GET_XCRS"))?,
            debug: fd.get_debug_regs().map_err(Error::kvm("KVM_GET_DEBUGREGS"))?,
            local_apic: fd.get_lapic().map_err(Error::kvm("KVM_GET_LAPIC"))?,
            msrs: read_msrs(fd, &shape.msrs)?,
            cpuid: fd.get_cpuid2(MAX_ENTRIES).map_err(Error::kvm("KVM_GET_CPUID2"))?.as_slice().to_vec(),
            tsc_khz: fd.get_tsc_khz().unwrap_or(0),
            events: fd.get_vcpu_events().map_err(Error::kvm("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Makes a new vCPU what the saved one was; `elapsed_ns` have passed in between.
    pub fn restore(&self, vm: &VmFd, fd: &VcpuFd, elapsed_ns: u64) -> Result<()> {
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| unusable("too many CPUID entries"))?;
        fd.set_cpuid2(&cpuid).map_err(Error::kvm("KVM_SET_CPUID2"))?;
        self.restore_tsc_frequency(fd)?;
        fd.set_mp_state(self.run_state).map_err(Error::kvm("KVM_SET_MP_STATE"))?;
        fd.set_regs(&self.registers).map_err(Error::kvm("KVM_SET_REGS"))?;
        fd.set_sregs(&self.system).map_err(Error::kvm("KVM_SET_SREGS"))?;
        write_extended(vm, fd, &self.extended)?;
        fd.set_xcrs(&self.extended_control).map_err(Error::kvm("KVM_SET_XCRS"))?;
        fd.set_debug_regs(&self.debug).map_err(Error::kvm("KVM_SET_DEBUGREGS"))?;
        fd.set_lapic(&self.local_apic).map_err(Error::kvm("KVM_SET_LAPIC"))?;
        write_msrs(fd, &self.msrs_after(elapsed_ns))?;
        fd.set_vcpu_events(&self.events).map_err(Error::kvm("KVM_SET_VCPU_EVENTS"))
    }

    /// The guest measured its TSC once. On a host whose own runs at another rate, KVM scales it, if the processor can.
    fn restore_tsc_frequency(&self, fd: &VcpuFd) -> Result<()> {
        let (saved, here) = (u64::from(self.tsc_khz), u64::from(fd.get_tsc_khz().unwrap_or(0)));
        if saved == 0 || here.abs_diff(saved) * 1_000_000 <= saved * TSC_TOLERANCE {
            return Ok(());
        }
        fd.set_tsc_khz(self.tsc_khz).map_err(|_| {
            unusable(&format!("its TSC runs at {saved} kHz, this host's at {here} kHz, and it cannot be scaled"))
        })
    }

    /// The MSRs as they are to be written, in their order.
    fn msrs_after(&self, elapsed_ns: u64) -> Vec<kvm_msr_entry> {
        let ticks = u128::from(elapsed_ns) * u128::from(self.tsc_khz) / 1_000_000;
        let mut msrs = self.msrs.clone();
        for msr in msrs.iter_mut().filter(|msr| msr.index == IA32_TSC) {
            // A TSC wraps, too.
            msr.data = msr.data.wrapping_add(ticks as u64);
        }
        msrs.sort_by_key(|msr| match msr.index {
            IA32_TSC => 1,
            IA32_TSC_DEADLINE => 2,
            _ => 0,
        });
        msrs
    }

    pub fn write(&self, index: u16, writer: &mut Writer) {
        writer.record(Kind::RunState, index, &self.run_state);
        writer.record(Kind::Registers, index, &self.registers);
        writer.record(Kind::SystemRegisters, index, &self.system);
        writer.record(Kind::ExtendedState, index, &self.extended[..]);
        writer.record(Kind::ExtendedControl, index, &self.extended_control);
        writer.record(Kind::DebugRegisters, index, &self.debug);
        writer.record(Kind::LocalApic, index, &self.local_apic);
        writer.record(Kind::ModelSpecific, index, &self.msrs[..]);
        writer.record(Kind::Cpuid, index, &self.cpuid[..]);
        writer.record(Kind::TscFrequency, index, &self.tsc_khz);
        writer.record(Kind::Events, index, &self.events);
    }

    pub fn read(index: u16, reader: &mut Reader<'_>) -> std::result::Result<Self, Flaw> {
        Ok(VcpuState {
            run_state: reader.record(Kind::RunState, index)?,
            registers: reader.record(Kind::Registers, index)?,
            system: reader.record(Kind::SystemRegisters, index)?,
            extended: reader.records(Kind::ExtendedState, index, usize::from(u16::MAX))?,
            extended_control: reader.record(Kind::ExtendedControl, index)?,
            debug: reader.record(Kind::DebugRegisters, index)?,
            local_apic: reader.record(Kind::LocalApic, index)?,
            msrs: reader.records(Kind::ModelSpecific, index, MAX_MSRS)?,
            cpuid: reader.records(Kind::Cpuid, index, MAX_ENTRIES)?,
            tsc_khz: reader.record(Kind::TscFrequency, index)?,
            events: reader.record(Kind::Events, index)?,
        })
    }
}

fn unusable(why: &str) -> Error {
    Error::BadConfiguration(format!("the snapshot cannot be restored here: {why}"))
}

/// Room for the extended state of `words` words.
fn extended_buffer(words: usize) -> Result<Xsave> {
    Xsave::new(words.saturating_sub(XSAVE_WORDS)).map_err(|_| Error::Memory("extended state of a vCPU".into()))
}

fn read_extended(fd: &VcpuFd, words: usize) -> Result<Vec<u32>> {
    let mut buffer = extended_buffer(words)?;
    if words > XSAVE_WORDS {
        // SAFETY: the buffer is as long as KVM_CAP_XSAVE2 says, and this process turns no feature on for its guests later.
        unsafe { fd.get_xsave2(&mut buffer) }.map_err(Error::kvm("KVM_GET_XSAVE2"))?;
        let extra = buffer.as_slice();
        return Ok([&buffer.as_fam_struct_ref().xsave.region[..], extra].concat());
    }
    Ok(fd.get_xsave().map_err(Error::kvm("KVM_GET_XSAVE"))?.region.to_vec())
}

fn write_extended(vm: &VmFd, fd: &VcpuFd, words: &[u32]) -> Result<()> {
    if words.len() != extended_words(vm) {
        return Err(unusable("its vCPUs have another extended state (XSAVE) than this host's"));
    }
    let mut buffer = extended_buffer(words.len())?;
    let (region, extra) = words.split_at(XSAVE_WORDS);
    buffer.as_mut_slice().copy_from_slice(extra);
    // SAFETY: only the fixed part is written, not the length of the rest.
    unsafe { buffer.as_mut_fam_struct() }.xsave.region.copy_from_slice(region);
    // SAFETY: KVM reads as many bytes as KVM_CAP_XSAVE2 says, or a page, and the buffer has exactly that.
    unsafe { fd.set_xsave2(&buffer) }.map_err(Error::kvm("KVM_SET_XSAVE"))
}

/// Those of `indices` that this vCPU has. KVM stops at one that it has not.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let asked = &rest[..rest.len().min(MAX_ENTRIES)];
        let entries: Vec<_> = asked.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| Error::Memory("list of MSRs".into()))?;
        let count = fd.get_msrs(&mut msrs).map_err(Error::kvm("KVM_GET_MSRS"))?;
        values.extend_from_slice(&msrs.as_slice()[..count]);
        rest = &rest[(count + 1).min(asked.len())..];
    }
    Ok(values)
}

/// Writes all of them. One that KVM does not take is no matter if it has that value already; else the guest would not be what it was.
fn write_msrs(fd: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<()> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let asked = &rest[..rest.len().min(MAX_ENTRIES)];
        let list = Msrs::from_entries(asked).map_err(|_| Error::Memory("list of MSRs".into()))?;
        let count = fd.set_msrs(&list).map_err(Error::kvm("KVM_SET_MSRS"))?;
        if let Some(refused) = asked.get(count) {
            let here = read_msrs(fd, &[refused.index])?;
            if here.first().is_none_or(|here| here.data != refused.data) {
                return Err(unusable(&format!("KVM does not take {:#x} in MSR {:#x}", refused.data, refused.index)));
            }
        }
        rest = &rest[(count + 1).min(asked.len())..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm() -> (Kvm, VmFd, VcpuFd) {
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let cpuid = crate::cpu::cpuid::Template::new(&kvm, 1).unwrap().for_vcpu(0, None).unwrap();
        vcpu.set_cpuid2(&cpuid).unwrap();
        crate::cpu::lapic::set(&vcpu).unwrap();
        (kvm, vm, vcpu)
    }

    #[test]
    fn a_vcpu_in_a_new_vm_becomes_what_the_saved_one_was() {
        let (kvm, first_vm, first) = vm();
        let mut registers = first.get_regs().unwrap();
        (registers.rax, registers.rip, registers.rflags) = (0x1234_5678_9abc, 0x20_0000, 0x202);
        first.set_regs(&registers).unwrap();
        let mut extended = first.get_xsave().unwrap();
        // A register of the x87 unit, and that its state is in use.
        (extended.region[8], extended.region[128]) = (0xdead_beef, 3);
        // SAFETY: a structure that was just read, with no feature beyond it.
        unsafe { first.set_xsave(&extended) }.unwrap();
        let mut debug = first.get_debug_regs().unwrap();
        debug.db[1] = 0x1000;
        first.set_debug_regs(&debug).unwrap();

        let state = VcpuState::save(&first, &Shape::of(&kvm, &first_vm).unwrap()).unwrap();
        let mut writer = Writer::new();
        state.write(7, &mut writer);
        let bytes = writer.finish();
        let mut reader = Reader::new(&bytes).unwrap();
        let state = VcpuState::read(7, &mut reader).unwrap();
        reader.finish().unwrap();

        let second_vm = kvm.create_vm().unwrap();
        second_vm.create_irq_chip().unwrap();
        let second = second_vm.create_vcpu(0).unwrap();
        state.restore(&second_vm, &second, 5_000_000).unwrap();
        assert_eq!(second.get_regs().unwrap(), registers);
        assert_eq!(second.get_sregs().unwrap(), first.get_sregs().unwrap());
        assert_eq!(second.get_xsave().unwrap().region[8], 0xdead_beef);
        assert_eq!(second.get_debug_regs().unwrap(), debug);
        assert_eq!(second.get_lapic().unwrap(), first.get_lapic().unwrap());
        assert_eq!(second.get_cpuid2(MAX_ENTRIES).unwrap(), first.get_cpuid2(MAX_ENTRIES).unwrap());
    }

    #[test]
    fn the_tsc_comes_before_the_deadline_and_both_last_with_the_time_that_has_passed() {
        let (kvm, vm, vcpu) = vm();
        let mut state = VcpuState::save(&vcpu, &Shape::of(&kvm, &vm).unwrap()).unwrap();
        state.tsc_khz = 2_000_000;
        state.msrs = [(IA32_TSC_DEADLINE, 9), (IA32_TSC, u64::MAX), (0x2ff, 6)]
            .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() })
            .to_vec();
        let order: Vec<_> = state.msrs_after(1500).iter().map(|msr| (msr.index, msr.data)).collect();
        assert_eq!(order, [(0x2ff, 6), (IA32_TSC, 2999), (IA32_TSC_DEADLINE, 9)]);
        state.msrs_after(u64::MAX);
    }

    #[test]
    fn what_this_host_cannot_do_is_refused() {
        let (kvm, vm, vcpu) = vm();
        let mut state = VcpuState::save(&vcpu, &Shape::of(&kvm, &vm).unwrap()).unwrap();
        state.extended.pop();
        let error = state.restore(&vm, &vcpu, 0).unwrap_err().to_string();
        assert!(error.contains("XSAVE"), "{error}");
        state.extended.push(0);
        // No processor has it.
        state.msrs.push(kvm_msr_entry { index: 0xdead_0000, data: 1, ..Default::default() });
        let error = state.restore(&vm, &vcpu, 0).unwrap_err().to_string();
        assert!(error.contains("0xdead0000"), "{error}");
    }
}
