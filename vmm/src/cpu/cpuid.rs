//! CPUID: what KVM supports on this host, made true for this guest.
//!
//! KVM reports the *host's* topology; the guest's is one package of `n` cores with one thread each, and
//! the APIC id is the vCPU's index. The hypervisor bit and KVM's own leaves must be seen by
//! the guest: one that does not know it runs under KVM calibrates the TSC against timers, which costs
//! Linux about two seconds here.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2 as Entry};
use kvm_ioctls::{Cap, Kvm};

use crate::error::{Error, Result};

/// As many entries as KVM can return (KVM_MAX_CPUID_ENTRIES of current kernels).
const MAX_ENTRIES: usize = 256;

const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHE: u32 = 0x4;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_HYPERVISOR: u32 = 0x4000_0000;
/// Frequencies in kHz: EAX the TSC's, EBX the APIC bus's (a convention of hypervisors).
const LEAF_FREQUENCIES: u32 = 0x4000_0010;
const LEAF_EXTENDED_FEATURES: u32 = 0x8000_0001;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_CACHE: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
const AMD_ECX_CMP_LEGACY: u32 = 1 << 1;
/// KVM's emulated APIC timer counts nanoseconds.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// CPUID of the VM; [`Template::for_vcpu`] makes it that of one vCPU.
pub struct Template {
    cpuid: CpuId,
    vcpus: u8,
}

impl Template {
    /// Reads what KVM supports.
    pub fn new(kvm: &Kvm, vcpus: u8) -> Result<Self> {
        let mut cpuid = kvm.get_supported_cpuid(MAX_ENTRIES).map_err(Error::kvm("KVM_GET_SUPPORTED_CPUID"))?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        for entry in cpuid.as_mut_slice() {
            patch_common(entry, vcpus, tsc_deadline);
        }
        Ok(Template { cpuid, vcpus })
    }

    /// CPUID of vCPU `index`. `tsc_khz` is the guest's TSC frequency, where KVM tells it.
    pub fn for_vcpu(&self, index: u8, tsc_khz: Option<u32>) -> Result<CpuId> {
        let mut entries: Vec<Entry> = self
            .cpuid
            .as_slice()
            .iter()
            .filter(|entry| !matches!(entry.function, LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2))
            .copied()
            .collect();
        for entry in &mut entries {
            patch_identity(entry, index);
        }
        let highest = entries.iter().map(|e| e.function).filter(|f| *f < LEAF_HYPERVISOR).max();
        if highest >= Some(LEAF_TOPOLOGY) {
            entries.extend(topology(LEAF_TOPOLOGY, index, self.vcpus));
        }
        if let Some(khz) = tsc_khz {
            announce_frequencies(&mut entries, khz);
        }
        CpuId::from_entries(&entries).map_err(|_| Error::Memory("KVM reports more CPUID entries than it takes".into()))
    }
}

/// What is the same for all vCPUs.
fn patch_common(entry: &mut Entry, vcpus: u8, tsc_deadline: bool) {
    let others = u32::from(vcpus) - 1;
    match entry.function {
        LEAF_FEATURES => {
            entry.ecx |= ECX_HYPERVISOR;
            if tsc_deadline {
                entry.ecx |= ECX_TSC_DEADLINE;
            }
            entry.ebx = entry.ebx & 0xff00_ffff | u32::from(vcpus) << 16;
            set(&mut entry.edx, EDX_HTT, vcpus > 1);
        }
        LEAF_CACHE if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { others } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | others << 26;
        }
        LEAF_EXTENDED_FEATURES => set(&mut entry.ecx, AMD_ECX_CMP_LEGACY, vcpus > 1),
        // On Intel these bits are reserved and zero.
        LEAF_AMD_SIZES if entry.ecx != 0 || vcpus > 1 => {
            entry.ecx = entry.ecx & !0xf0ff | others | apic_id_bits(vcpus) << 12;
        }
        LEAF_AMD_CACHE if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { others } else { 0 };
            entry.eax = entry.eax & !(0xfff << 14) | sharing << 14;
        }
        _ => {}
    }
}

/// What names one vCPU.
fn patch_identity(entry: &mut Entry, index: u8) {
    let id = u32::from(index);
    match entry.function {
        LEAF_FEATURES => entry.ebx = entry.ebx & 0x00ff_ffff | id << 24,
        LEAF_AMD_TOPOLOGY => {
            entry.eax = id;
            // One thread a core, the core's number the APIC id; one node.
            entry.ebx = id & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// Extended topology enumeration: thread level, core level, end.
fn topology(function: u32, index: u8, vcpus: u8) -> [Entry; 3] {
    let level = |index_of_level: u32, eax: u32, ebx: u32, kind: u32| Entry {
        function,
        index: index_of_level,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: index_of_level | kind << 8,
        edx: u32::from(index),
        ..Default::default()
    };
    [level(0, 0, 1, 1), level(1, apic_id_bits(vcpus), vcpus.into(), 2), level(2, 0, 0, 0)]
}

fn announce_frequencies(entries: &mut Vec<Entry>, tsc_khz: u32) {
    let Some(hypervisor) = entries.iter_mut().find(|e| e.function == LEAF_HYPERVISOR) else {
        return;
    };
    hypervisor.eax = hypervisor.eax.max(LEAF_FREQUENCIES);
    entries.retain(|entry| entry.function != LEAF_FREQUENCIES);
    entries.push(Entry { function: LEAF_FREQUENCIES, eax: tsc_khz, ebx: APIC_BUS_KHZ, ..Default::default() });
}

/// Bits that hold the numbers of `vcpus` cores.
fn apic_id_bits(vcpus: u8) -> u32 {
    u32::from(vcpus).next_power_of_two().trailing_zeros()
}

fn set(register: &mut u32, bits: u32, on: bool) {
    if on { *register |= bits } else { *register &= !bits }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_numbers_fit_into_their_bits() {
        for vcpus in 1..=32u8 {
            assert!(u32::from(vcpus) <= 1 << apic_id_bits(vcpus));
        }
        assert_eq!(apic_id_bits(1), 0);
        assert_eq!(apic_id_bits(3), 2);
    }

    #[test]
    fn each_vcpu_has_its_apic_id_in_both_leaves() {
        let mut entry = Entry { function: LEAF_FEATURES, ebx: 0xffff_ffff, ..Default::default() };
        patch_common(&mut entry, 4, true);
        patch_identity(&mut entry, 3);
        assert_eq!(entry.ebx, 0x0304_ffff);
        assert_eq!(entry.ecx, ECX_HYPERVISOR | ECX_TSC_DEADLINE);
        assert!(topology(LEAF_TOPOLOGY, 3, 4).iter().all(|level| level.edx == 3));
    }

    #[test]
    fn frequencies_are_announced_only_where_the_hypervisor_leaf_is() {
        let mut entries = vec![Entry { function: 0, ..Default::default() }];
        announce_frequencies(&mut entries, 1000);
        assert_eq!(entries.len(), 1);
        entries.push(Entry { function: LEAF_HYPERVISOR, eax: 0x4000_0001, ..Default::default() });
        announce_frequencies(&mut entries, 1000);
        assert_eq!(entries[1].eax, LEAF_FREQUENCIES);
        assert_eq!(entries[2].eax, 1000);
    }
}
