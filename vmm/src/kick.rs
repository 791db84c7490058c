//! The signal that brings a vCPU's thread out of `KVM_RUN`, or keeps it from going in; `gate` says why both are needed.

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering, compiler_fence};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::error::{Error, Result};

thread_local! {
    /// `kvm_run.immediate_exit` of the vCPU that this thread runs; null on all other threads.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// Installs the handler, for all threads.
pub fn install_handler() -> Result<()> {
    register_signal_handler(SIGRTMIN(), on_kick)
        .map_err(|error| Error::Host { what: "signal handler", source: error.into() })
}

/// Runs on the thread that is kicked. A constant-initialised thread-local without a destructor is plain memory of the thread's: nothing here allocates or
/// locks.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: `Kickable::new` set the pointer on this thread, and its caller keeps the vCPU as long as it is there.
        unsafe { flag.write_volatile(1) };
    }
}

/// Kicks `thread`. One that has ended is not there to be kicked; a full queue of signals is for the caller to try again.
pub fn kick(thread: libc::pthread_t) {
    // SAFETY: the caller holds the thread's handle, which has not been joined, so the id is valid; the signal has a handler.
    unsafe { libc::pthread_kill(thread, SIGRTMIN()) };
}

/// How a thread is kicked by one that may outlive it.
#[derive(Default)]
pub struct Reach(AtomicI32);

impl Reach {
    /// It is the calling thread.
    pub fn set(&self) {
        // SAFETY: takes nothing and cannot fail.
        self.0.store(unsafe { libc::gettid() }, Ordering::Release);
    }

    /// Kicks it. One that has not begun is not there; one that has ended is not either, or is another thread of this process by now,
    /// which a kick too many does nothing to.
    pub fn kick(&self) {
        let thread = self.0.load(Ordering::Acquire);
        if thread != 0 {
            // SAFETY: numbers only; the signal has a handler.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGRTMIN()) };
        }
    }
}

/// That the calling thread's kicks reach `vcpu`, until this is dropped.
pub struct Kickable;

impl Kickable {
    /// # Safety
    ///
    /// `vcpu` must be there until what is returned has been dropped, on the thread that called.
    pub unsafe fn new(vcpu: &mut VcpuFd) -> Self {
        IMMEDIATE_EXIT.set(&raw mut vcpu.get_kvm_run().immediate_exit);
        Kickable
    }

    /// Has the next `KVM_RUN` finish what the last exit began, and come back without entering the guest (Documentation/virt/kvm/api.rst, `immediate_exit`).
    pub fn exit_at_once(&self) {
        self.set(1);
    }

    /// Forgets kicks so far. Whoever calls this looks at the gate next, before it enters the guest.
    pub fn forget(&self) {
        self.set(0);
    }

    fn set(&self, value: u8) {
        // SAFETY: see `on_kick`; this is the same thread.
        unsafe { IMMEDIATE_EXIT.get().write_volatile(value) };
        // The handler runs on this thread: only the compiler could put what follows first.
        compiler_fence(Ordering::SeqCst);
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}
