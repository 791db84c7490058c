//! Which kind of KVM this host has, found by running instructions in a throw-away VM.
//!
//! CPU flags do not tell: a software KVM shows the same ones. What it cannot do is run
//! a kernel's ring-0 instructions, which it emulates one by one and gives up on (KVM_EXIT_INTERNAL_ERROR). Each
//! probe below is a few bytes of ring-0 code that a booting Linux executes, ending with a write to
//! a port; a KVM that never gets there cannot run Linux.

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use crate::api::{BootProtocol, KvmCheck, KvmClass};
use crate::cpu::{cpuid, regs};
use crate::error::{Error, Result};
use crate::memory::{self, GuestMemory};

/// Where a probe's code, its interrupt table and handler, and its save area lie.
const CODE: u64 = 0x10_0000;
const IDT: u64 = 0x10_1000;
const HANDLER: u64 = 0x10_2000;
const DONE_PORT: u16 = 0x10;
/// An emulator that goes on is stopped after this many exits.
const MAX_EXITS: usize = 64;

/// Writes to [`DONE_PORT`], then halts.
const DONE: &[u8] = &[0xe6, 0x10, 0xf4];

struct Probe {
    name: &'static str,
    code: &'static [u8],
}

const BARE: Probe = Probe { name: "port output", code: &[] };

const PROBES: &[Probe] = &[
    // popcnt %rax, %rax
    Probe { name: "popcnt", code: &[0xf3, 0x48, 0x0f, 0xb8, 0xc0] },
    // lidt (IDT descriptor at 0x101ff0); int3
    Probe { name: "int3", code: &[0x0f, 0x01, 0x1c, 0x25, 0xf0, 0x1f, 0x10, 0x00, 0xcc] },
    // mov %cr4,%rax; or $0x40200,%eax (OSXSAVE, OSFXSR); mov %rax,%cr4; xor %ecx,%ecx; xor %edx,%edx;
    // mov $3,%eax; xsetbv; mov $0x103000,%edi; xsave (%rdi); xrstor (%rdi)
    Probe {
        name: "xsave and xrstor",
        code: &[
            0x0f, 0x20, 0xe0, 0x0d, 0x00, 0x02, 0x04, 0x00, 0x0f, 0x22, 0xe0, 0x31, 0xc9, 0x31, 0xd2, 0xb8, 0x03, 0x00,
            0x00, 0x00, 0x0f, 0x01, 0xd1, 0xbf, 0x00, 0x30, 0x10, 0x00, 0x0f, 0xae, 0x27, 0x0f, 0xae, 0x2f,
        ],
    },
];

/// Runs the probes.
pub fn check() -> KvmCheck {
    let (class, detail) = match classify() {
        Ok(verdict) => verdict,
        Err(error) => (KvmClass::None, error.to_string()),
    };
    KvmCheck { class, detail }
}

fn classify() -> Result<(KvmClass, String)> {
    let kvm = Kvm::new().map_err(Error::kvm("open /dev/kvm"))?;
    if let Outcome::Stopped(how) = run(&kvm, &BARE)? {
        return Ok((KvmClass::None, format!("even a port write does not run: {how}")));
    }
    let mut failures = Vec::new();
    for probe in PROBES {
        if let Outcome::Stopped(how) = run(&kvm, probe)? {
            failures.push(format!("{} ({how})", probe.name));
        }
    }
    Ok(match failures.is_empty() {
        true => (KvmClass::Hardware, "kernel-mode instructions run: unmodified kernels boot".into()),
        false => (
            KvmClass::Software,
            format!(
                "KVM emulates kernel mode and cannot run {}: Linux does not boot, guests that work in user mode do",
                failures.join(", ")
            ),
        ),
    })
}

enum Outcome {
    Done,
    Stopped(String),
}

/// Runs one probe in a VM of its own.
fn run(kvm: &Kvm, probe: &Probe) -> Result<Outcome> {
    let memory = memory::allocate(memory::MIN_MIB, false)?;
    write_code(&memory, probe).map_err(|error| Error::Memory(error.to_string()))?;
    let vm = kvm.create_vm().map_err(Error::kvm("KVM_CREATE_VM"))?;
    memory::attach(&vm, &memory)?;
    let mut vcpu = vm.create_vcpu(0).map_err(Error::kvm("KVM_CREATE_VCPU"))?;
    let cpuid = cpuid::Template::new(kvm, 1)?.for_vcpu(0, None)?;
    vcpu.set_cpuid2(&cpuid).map_err(Error::kvm("KVM_SET_CPUID2"))?;
    regs::set_up_boot_cpu(&vcpu, &memory, GuestAddress(CODE), BootProtocol::Linux)?;
    Ok(watch(&mut vcpu))
}

fn watch(vcpu: &mut VcpuFd) -> Outcome {
    for _ in 0..MAX_EXITS {
        let how = match vcpu.run() {
            Ok(VcpuExit::IoOut(DONE_PORT, _)) => return Outcome::Done,
            Ok(VcpuExit::IoOut(..) | VcpuExit::IoIn(..) | VcpuExit::Intr) => continue,
            Ok(VcpuExit::InternalError) => "internal error".into(),
            Ok(VcpuExit::Shutdown) => "triple fault".into(),
            Ok(other) => format!("{other:?}"),
            Err(error) if error.errno() == libc::EINTR => continue,
            Err(error) => error.to_string(),
        };
        return Outcome::Stopped(how);
    }
    Outcome::Stopped("no progress".into())
}

/// Code, and an interrupt table whose every gate leads to a handler that returns.
fn write_code(memory: &GuestMemory, probe: &Probe) -> std::result::Result<(), vm_memory::GuestMemoryError> {
    memory.write_slice(&[probe.code, DONE].concat(), GuestAddress(CODE))?;
    // iretq
    memory.write_slice(&[0x48, 0xcf], GuestAddress(HANDLER))?;
    for vector in 0..32u64 {
        let gate = HANDLER & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (HANDLER >> 16 & 0xffff) << 48;
        memory.write_obj(gate, GuestAddress(IDT + vector * 16))?;
        memory.write_obj(0u64, GuestAddress(IDT + vector * 16 + 8))?;
    }
    memory.write_obj(32u16 * 16 - 1, GuestAddress(IDT + 0xff0))?;
    memory.write_obj(IDT, GuestAddress(IDT + 0xff2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_a_kvm_that_is_one_or_the_other() {
        let check = check();
        assert_ne!(check.class, KvmClass::None, "{}", check.detail);
    }
}
