//! A vCPU's registers in the order in which GDB knows them (gdb/features/i386/64bit-core.xml and 64bit-sse.xml).
//!
//! All are read; general registers, RIP and RFLAGS are written. What of a segment is more than its selector GDB does not know, so a
//! selector that is written says too little.

use gdbstub_arch::x86::reg::X86_64CoreRegs;
use kvm_ioctls::VcpuFd;

pub fn read(fd: &VcpuFd, to: &mut X86_64CoreRegs) -> Result<(), kvm_ioctls::Error> {
    let regs = fd.get_regs()?;
    to.regs = [
        regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rbp, regs.rsp, regs.r8, regs.r9, regs.r10,
        regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ];
    to.rip = regs.rip;
    // The upper half is reserved.
    to.eflags = regs.rflags as u32;
    let sregs = fd.get_sregs()?;
    to.segments.cs = sregs.cs.selector.into();
    to.segments.ss = sregs.ss.selector.into();
    to.segments.ds = sregs.ds.selector.into();
    to.segments.es = sregs.es.selector.into();
    to.segments.fs = sregs.fs.selector.into();
    to.segments.gs = sregs.gs.selector.into();
    let fpu = fd.get_fpu()?;
    for (to, from) in to.st.iter_mut().zip(&fpu.fpr) {
        to.copy_from_slice(&from[..10]);
    }
    for (to, from) in to.xmm.iter_mut().zip(&fpu.xmm) {
        *to = u128::from_le_bytes(*from);
    }
    to.fpu.fctrl = fpu.fcw.into();
    to.fpu.fstat = fpu.fsw.into();
    to.fpu.ftag = fpu.ftwx.into();
    to.fpu.fop = fpu.last_opcode.into();
    to.mxcsr = fpu.mxcsr;
    Ok(())
}

pub fn write(fd: &VcpuFd, from: &X86_64CoreRegs) -> Result<(), kvm_ioctls::Error> {
    let mut regs = fd.get_regs()?;
    let general = [
        &mut regs.rax,
        &mut regs.rbx,
        &mut regs.rcx,
        &mut regs.rdx,
        &mut regs.rsi,
        &mut regs.rdi,
        &mut regs.rbp,
        &mut regs.rsp,
        &mut regs.r8,
        &mut regs.r9,
        &mut regs.r10,
        &mut regs.r11,
        &mut regs.r12,
        &mut regs.r13,
        &mut regs.r14,
        &mut regs.r15,
    ];
    for (to, from) in general.into_iter().zip(from.regs) {
        *to = from;
    }
    regs.rip = from.rip;
    regs.rflags = from.eflags.into();
    fd.set_regs(&regs)
}
