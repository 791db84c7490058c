//! Puts a thread under its filter. The programs were compiled by `build.rs` from `rules`.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

mod filters {
    include!(concat!(env!("OUT_DIR"), "/filters.rs"));
}

static IS_ON: AtomicBool = AtomicBool::new(false);

/// A kind of thread; see `rules` for what each may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    Monitor,
    Api,
    Vcpu,
    Block,
    Net,
    Rng,
    Vsock,
    Balloon,
    Console,
    Pager,
    Gdb,
}

impl ThreadKind {
    fn filter(self) -> &'static [libc::sock_filter] {
        match self {
            ThreadKind::Monitor => &filters::MONITOR,
            ThreadKind::Api => &filters::API,
            ThreadKind::Vcpu => &filters::VCPU,
            ThreadKind::Block => &filters::BLOCK,
            ThreadKind::Net => &filters::NET,
            ThreadKind::Rng => &filters::RNG,
            ThreadKind::Vsock => &filters::VSOCK,
            ThreadKind::Balloon => &filters::BALLOON,
            ThreadKind::Console => &filters::CONSOLE,
            ThreadKind::Pager => &filters::PAGER,
            ThreadKind::Gdb => &filters::GDB,
        }
    }
}

/// From now on threads are confined by [`enter`]. The program says so, a library's tests do not.
pub fn turn_on() {
    IS_ON.store(true, Ordering::Relaxed);
}

/// Gives up, for this process and all it may start, what set-user-id programs could add (`no_new_privs`), which is also what lets a
/// process without privileges install filters. To be called before the first thread is started.
pub fn give_up_new_privileges() -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())
}

/// Confines the calling thread, and those that it starts, for good.
///
/// A thread that cannot be confined must not go on: the process ends with status 1.
pub fn enter(kind: ThreadKind) {
    if !IS_ON.load(Ordering::Relaxed) {
        return;
    }
    let result = install(kind.filter()).and_then(|()| match kind {
        ThreadKind::Monitor => install(&filters::NO_CLONE3),
        _ => Ok(()),
    });
    if let Err(error) = result {
        eprintln!("mallee-vmm: seccomp filter of the {kind:?} thread: {error}; --no-seccomp does without");
        std::process::exit(1);
    }
}

fn install(filter: &'static [libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(io::Error::other)?,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel copies `len` instructions from the program, which are valid as long as `filter`, and
    // writes nothing.
    check(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) })
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
