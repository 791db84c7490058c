//! The boot CPU's registers, descriptor table and page tables, as the 64-bit boot protocol wants them
//! (Documentation/arch/x86/boot.rst): flat segments `__BOOT_CS` 0x10 and `__BOOT_DS` 0x18, paging on
//! with the kernel, zero page and command line mapped one to one, interrupts off, RSI at the zero page. Or as PVH
//! wants them (Xen's docs/misc/pvh.pandoc): 32-bit flat segments, protected mode, no paging, interrupts off, EBX at the start info.

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::api::BootProtocol;
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, layout};

const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
const BOOT_TSS: u16 = 0x20;
/// Null, unused, 64-bit code, data, 64-bit TSS (its upper half is zero).
const GDT: [u64; 6] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_ffff, 0];

/// Null, unused, 32-bit code, data, 32-bit TSS.
const GDT_32: [u64; 5] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS: u64 = 1 << 1;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;

/// Makes `vcpu` start at `entry` as `protocol` says.
pub fn set_up_boot_cpu(vcpu: &VcpuFd, memory: &GuestMemory, entry: GuestAddress, protocol: BootProtocol) -> Result<()> {
    match protocol {
        BootProtocol::Linux => set_up_long_mode(vcpu, memory, entry),
        BootProtocol::Pvh => set_up_protected_mode(vcpu, memory, entry),
    }
}

/// As PVH wants it. The table is for whoever looks: a kernel loads its own before it loads a segment.
fn set_up_protected_mode(vcpu: &VcpuFd, memory: &GuestMemory, entry: GuestAddress) -> Result<()> {
    write_gdt(memory, &GDT_32).map_err(|error| Error::Memory(format!("boot tables: {error}")))?;
    let mut sregs = vcpu.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?;
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (size_of_val(&GDT_32) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = kvm_segment { db: 1, l: 0, ..segment(BOOT_CS, 0xb, true) };
    let data = segment(BOOT_DS, 0x3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { selector: BOOT_TSS, type_: 0xb, present: 1, limit: 0x67, ..Default::default() };
    // ET is 1 on every processor of today.
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    vcpu.set_sregs(&sregs).map_err(Error::kvm("KVM_SET_SREGS"))?;
    let regs = kvm_regs { rip: entry.0, rbx: layout::PVH_START_INFO, rflags: RFLAGS, ..Default::default() };
    vcpu.set_regs(&regs).map_err(Error::kvm("KVM_SET_REGS"))
}

fn set_up_long_mode(vcpu: &VcpuFd, memory: &GuestMemory, entry: GuestAddress) -> Result<()> {
    write_tables(memory).map_err(|error| Error::Memory(format!("boot tables: {error}")))?;
    let mut sregs = vcpu.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?;
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    let code = segment(BOOT_CS, 0xb, true);
    let data = segment(BOOT_DS, 0x3, false);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { selector: BOOT_TSS, type_: 0xb, present: 1, limit: 0xffff, ..Default::default() };
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.cr3 = layout::PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs).map_err(Error::kvm("KVM_SET_SREGS"))?;
    vcpu.set_regs(&kvm_regs {
        rip: entry.0,
        rsi: layout::ZERO_PAGE,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        rflags: RFLAGS,
        ..Default::default()
    })
    .map_err(Error::kvm("KVM_SET_REGS"))
}

/// A flat 4 GiB segment.
fn segment(selector: u16, type_: u8, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}

fn write_gdt(memory: &GuestMemory, table: &[u64]) -> std::result::Result<(), vm_memory::GuestMemoryError> {
    for (index, descriptor) in table.iter().enumerate() {
        memory.write_obj(*descriptor, GuestAddress(layout::GDT + index as u64 * 8))?;
    }
    Ok(())
}

fn write_tables(memory: &GuestMemory) -> std::result::Result<(), vm_memory::GuestMemoryError> {
    write_gdt(memory, &GDT)?;
    memory.write_obj(layout::PDPT | PRESENT_WRITABLE, GuestAddress(layout::PML4))?;
    for gib in 0..4u64 {
        let directory = layout::PAGE_DIRECTORIES + gib * 4096;
        memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(layout::PDPT + gib * 8))?;
        let mut entries = [0u8; 4096];
        for (index, entry) in entries.chunks_exact_mut(8).enumerate() {
            let page = gib << 30 | (index as u64) << 21;
            entry.copy_from_slice(&(page | PRESENT_WRITABLE | LARGE_PAGE).to_le_bytes());
        }
        memory.write_slice(&entries, GuestAddress(directory))?;
    }
    Ok(())
}
