//! The floor: the KVM calls without which no guest runs, and nothing else. What a monitor takes
//! beyond it is the monitor's own. With the interrupt controllers, it is the floor of a VM that is restored.

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::{
    error::BenchError,
    guest::{self, LOAD_ADDRESS},
};

/// Runs the smallest guest until its byte comes, and has `say` pass it on while the VM is still there: taking one down costs more than making one.
pub fn first_byte(memory_mib: usize, with_interrupt_chip: bool, say: impl FnOnce(u8)) -> Result<(), BenchError> {
    let failed = |what: &'static str| move |error: kvm_ioctls::Error| BenchError::Floor(format!("{what}: {error}"));
    let size = memory_mib << 20;
    let memory: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)])
        .map_err(|e| BenchError::Floor(format!("guest memory: {e}")))?;
    memory
        .write_slice(guest::code(), GuestAddress(LOAD_ADDRESS))
        .map_err(|e| BenchError::Floor(format!("guest memory: {e}")))?;
    let host_address =
        memory.get_host_address(GuestAddress(0)).map_err(|e| BenchError::Floor(format!("guest memory: {e}")))?;

    let vm = Kvm::new().and_then(|kvm| kvm.create_vm()).map_err(failed("KVM_CREATE_VM"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: size as u64,
        userspace_addr: host_address as u64,
    };
    // SAFETY: the region is `memory`'s own, which outlives the VM: it is dropped after it.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
    if with_interrupt_chip {
        vm.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
    }
    let mut vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
    let mut special = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    // Protected mode, flat, no paging: what PVH begins with.
    special.cr0 |= 1;
    special.cs = segment(11);
    for data in [&mut special.ds, &mut special.es, &mut special.ss] {
        *data = segment(3);
    }
    vcpu.set_sregs(&special).map_err(failed("KVM_SET_SREGS"))?;
    let mut registers = vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?;
    registers.rip = LOAD_ADDRESS;
    registers.rflags = 2;
    vcpu.set_regs(&registers).map_err(failed("KVM_SET_REGS"))?;
    match vcpu.run().map_err(failed("KVM_RUN"))? {
        VcpuExit::IoOut(_, &[byte, ..]) => {
            say(byte);
            Ok(())
        }
        other => Err(BenchError::Floor(format!("the guest ended with {other:?}"))),
    }
}

/// A flat 4 GiB segment; `kind` as in its descriptor (11: code, 3: data, both accessed).
fn segment(kind: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: if kind == 11 { 8 } else { 16 },
        type_: kind,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}
