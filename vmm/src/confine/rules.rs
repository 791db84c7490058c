//! Which system calls each kind of thread may make, and with what arguments.
//!
//! Data and nothing else: `build.rs` compiles it to BPF, `confine::seccomp` holds the programs, and `tests/confinement.rs`
//! checks that every rule here was needed in a run of the test guests. A call that is in no rule ends the
//! process (SIGSYS).
//!
//! A thread inherits the filters of the thread that starts it, and filters only ever add up. Therefore the main thread,
//! which starts the workers, may do all that a worker may; a vCPU's thread, the one nearest to the guest, starts none and may do
//! very little.

#![allow(dead_code)] // each of its three readers needs another part

/// A test of one argument.
#[derive(Debug, Clone, Copy)]
pub struct Arg {
    /// 0 to 5.
    pub index: u8,
    /// Which bits matter. Only the lower 32 are looked at.
    pub mask: u32,
    pub value: u32,
}

/// A call that is allowed.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    pub name: &'static str,
    pub call: i64,
    /// All of these must hold.
    pub args: &'static [Arg],
}

/// A kind of thread.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// Name of the filter.
    pub name: &'static str,
    /// Name of the thread, or its beginning (`/proc/*/task/*/comm`).
    pub thread: &'static str,
    pub rules: &'static [&'static [Rule]],
}

macro_rules! call {
    ($name:ident) => {
        Rule { name: stringify!($name), call: libc_number::$name as i64, args: &[] }
    };
    ($name:ident, $($index:literal: $value:expr),+) => {
        Rule {
            name: stringify!($name),
            call: libc_number::$name as i64,
            args: &[$(Arg { index: $index, mask: u32::MAX, value: $value as u32 }),+],
        }
    };
    ($name:ident, $index:literal & $mask:expr => $value:expr) => {
        Rule {
            name: stringify!($name),
            call: libc_number::$name as i64,
            args: &[Arg { index: $index, mask: $mask as u32, value: $value as u32 }],
        }
    };
}

/// The numbers under the calls' own names.
mod libc_number {
    pub use libc::{
        SYS_accept4 as accept4, SYS_brk as brk, SYS_clock_nanosleep as clock_nanosleep, SYS_clone as clone,
        SYS_clone3 as clone3, SYS_close as close, SYS_connect as connect, SYS_epoll_create1 as epoll_create1,
        SYS_epoll_ctl as epoll_ctl, SYS_epoll_wait as epoll_wait, SYS_eventfd2 as eventfd2, SYS_exit as exit,
        SYS_exit_group as exit_group, SYS_fallocate as fallocate, SYS_fcntl as fcntl, SYS_fdatasync as fdatasync,
        SYS_flock as flock, SYS_fstatfs as fstatfs, SYS_fsync as fsync, SYS_ftruncate as ftruncate, SYS_futex as futex,
        SYS_getpid as getpid, SYS_getrandom as getrandom, SYS_io_uring_enter as io_uring_enter,
        SYS_io_uring_register as io_uring_register, SYS_ioctl as ioctl, SYS_lseek as lseek, SYS_madvise as madvise,
        SYS_mmap as mmap, SYS_mprotect as mprotect, SYS_mremap as mremap, SYS_munmap as munmap, SYS_openat as openat,
        SYS_poll as poll, SYS_prctl as prctl, SYS_pread64 as pread64, SYS_preadv as preadv, SYS_pwrite64 as pwrite64,
        SYS_pwritev as pwritev, SYS_read as read, SYS_readv as readv, SYS_recvfrom as recvfrom, SYS_rename as rename,
        SYS_restart_syscall as restart_syscall, SYS_rseq as rseq, SYS_rt_sigprocmask as rt_sigprocmask,
        SYS_rt_sigreturn as rt_sigreturn, SYS_sched_yield as sched_yield, SYS_seccomp as seccomp, SYS_sendto as sendto,
        SYS_set_robust_list as set_robust_list, SYS_setsockopt as setsockopt, SYS_shutdown as shutdown,
        SYS_socket as socket, SYS_statx as statx, SYS_tgkill as tgkill, SYS_timerfd_create as timerfd_create,
        SYS_timerfd_gettime as timerfd_gettime, SYS_timerfd_settime as timerfd_settime, SYS_unlink as unlink,
        SYS_write as write, SYS_writev as writev,
    };
}

// include/uapi/linux/kvm.h, if_tun.h
const KVM_RUN: u32 = 0xae80;
const KVM_GET_REGS: u32 = 0x8090_ae81;
const KVM_KVMCLOCK_CTRL: u32 = 0xaead;
const KVM_GET_MSR_INDEX_LIST: u32 = 0xc004_ae02;
const KVM_CHECK_EXTENSION: u32 = 0xae03;
const KVM_GET_DIRTY_LOG: u32 = 0x4010_ae42;
const KVM_GET_IRQCHIP: u32 = 0xc208_ae62;
const KVM_GET_CLOCK: u32 = 0x8030_ae7c;
const KVM_GET_SREGS: u32 = 0x8138_ae83;
const KVM_GET_MSRS: u32 = 0xc008_ae88;
const KVM_GET_LAPIC: u32 = 0x8400_ae8e;
const KVM_GET_CPUID2: u32 = 0xc008_ae91;
const KVM_GET_MP_STATE: u32 = 0x8004_ae98;
const KVM_GET_VCPU_EVENTS: u32 = 0x8040_ae9f;
const KVM_GET_DEBUGREGS: u32 = 0x8080_aea1;
const KVM_GET_TSC_KHZ: u32 = 0xaea3;
const KVM_GET_XSAVE: u32 = 0x9000_aea4;
const KVM_GET_XSAVE2: u32 = 0x9000_aecf;
const KVM_GET_XCRS: u32 = 0x8188_aea6;
const KVM_SET_REGS: u32 = 0x4090_ae82;
const KVM_TRANSLATE: u32 = 0xc018_ae85;
const KVM_GET_FPU: u32 = 0x81a0_ae8c;
const KVM_SET_GUEST_DEBUG: u32 = 0x4048_ae9b;
const KVM_IRQFD: u32 = 0x4020_ae76;
const KVM_IOEVENTFD: u32 = 0x4040_ae79;
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
const TUNSETQUEUE: u32 = 0x4004_54d9;
// include/uapi/linux/vhost.h
const VHOST_SET_OWNER: u32 = 0xaf01;
const VHOST_SET_FEATURES: u32 = 0x4008_af00;
const VHOST_SET_MEM_TABLE: u32 = 0x4008_af03;
const VHOST_SET_LOG_BASE: u32 = 0x4008_af04;
const VHOST_SET_VRING_NUM: u32 = 0x4008_af10;
const VHOST_SET_VRING_ADDR: u32 = 0x4028_af11;
const VHOST_SET_VRING_BASE: u32 = 0x4008_af12;
const VHOST_GET_VRING_BASE: u32 = 0xc008_af12;
const VHOST_SET_VRING_KICK: u32 = 0x4008_af20;
const VHOST_SET_VRING_CALL: u32 = 0x4008_af21;
const VHOST_SET_VRING_ERR: u32 = 0x4008_af22;
const VHOST_NET_SET_BACKEND: u32 = 0x4008_af30;
// include/uapi/linux/userfaultfd.h
const UFFDIO_COPY: u32 = 0xc028_aa03;
const UFFDIO_ZEROPAGE: u32 = 0xc020_aa04;
// include/uapi/linux/io_uring.h
const REGISTER_FILES_UPDATE: u32 = 6;

/// What every thread of a Rust program on glibc does: memory, locks, its end.
const RUNTIME: &[Rule] = &[
    call!(futex),
    call!(munmap),
    call!(madvise, 2: libc::MADV_DONTNEED),
    call!(mmap, 2 & libc::PROT_EXEC => 0),
    call!(mprotect, 2 & libc::PROT_EXEC => 0),
    call!(brk),
    call!(rt_sigprocmask),
    // The standard library's channels, when two meet at the same place of one.
    call!(sched_yield),
    // The kernel's own, to go on waiting after a stop (SIGSTOP, a frozen cgroup).
    call!(restart_syscall),
    call!(exit),
    call!(write),
    call!(close),
];

/// Waiting for several descriptors.
const WAIT: &[Rule] = &[
    call!(epoll_wait),
    call!(epoll_ctl),
    call!(read),
    // A worker whose queue is broken waits for its end alone.
    call!(poll, 1: 1),
];

const VCPU: &[Rule] = &[
    call!(ioctl, 1: KVM_RUN),
    // Where the guest stood when it was stopped or KVM gave up.
    call!(ioctl, 1: KVM_GET_REGS),
    // The signal that interrupts KVM_RUN.
    call!(rt_sigreturn),
    // The console's window.
    call!(timerfd_settime),
];

const API: &[Rule] = &[call!(accept4), call!(setsockopt), call!(recvfrom), call!(sendto)];

const BLOCK: &[Rule] = &[
    call!(preadv),
    call!(pwritev),
    call!(fdatasync),
    // A qcow2 image's.
    call!(fsync),
    call!(fallocate, 1: libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE),
    call!(fallocate, 1: libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE),
    // What a ring can do was settled when it was made (`backends::disk::ring`).
    call!(io_uring_enter),
];

/// Another file behind a drive; in a jail, one that was put there.
const REOPEN: &[Rule] = &[
    call!(openat),
    call!(flock),
    call!(lseek),
    call!(statx),
    call!(fstatfs),
    call!(timerfd_create),
    call!(io_uring_register, 1: REGISTER_FILES_UPDATE),
];

const NET: &[Rule] = &[
    call!(readv),
    call!(writev),
    // The driver uses more or fewer of the tap's queues.
    call!(ioctl, 1: TUNSETQUEUE),
];

/// Having the kernel move frames. Of no use without a descriptor of its device, which is opened before the filters are there.
const VHOST: &[Rule] = &[
    call!(ioctl, 1: VHOST_SET_OWNER),
    call!(ioctl, 1: VHOST_SET_FEATURES),
    call!(ioctl, 1: VHOST_SET_MEM_TABLE),
    call!(ioctl, 1: VHOST_SET_LOG_BASE),
    call!(ioctl, 1: VHOST_SET_VRING_NUM),
    call!(ioctl, 1: VHOST_SET_VRING_ADDR),
    call!(ioctl, 1: VHOST_SET_VRING_BASE),
    call!(ioctl, 1: VHOST_SET_VRING_KICK),
    call!(ioctl, 1: VHOST_SET_VRING_CALL),
    call!(ioctl, 1: VHOST_SET_VRING_ERR),
];

/// Giving the kernel a tap for a queue, and taking it back.
const VHOST_TAP: &[Rule] = &[call!(ioctl, 1: VHOST_NET_SET_BACKEND), call!(ioctl, 1: VHOST_GET_VRING_BASE)];

/// Asking the kernel what it has moved, over a socket that answers nothing else (`backends::tap_counters`).
const TAP_COUNTERS: &[Rule] = &[call!(sendto), call!(recvfrom)];

const RNG: &[Rule] = &[call!(getrandom)];

/// A rate limiter's timer, or a device's own.
const TIMER: &[Rule] = &[call!(timerfd_settime), call!(timerfd_gettime)];

const VSOCK: &[Rule] = &[
    call!(accept4),
    // Non-blocking.
    call!(ioctl, 1: libc::FIONBIO),
    // Clients' first lines, and the answers to them.
    call!(recvfrom),
    call!(sendto),
    // To whoever listens on the host; in a jail, that is who was put there.
    call!(socket, 0: libc::AF_UNIX),
    call!(connect),
    call!(readv),
    call!(writev),
    call!(shutdown),
];

const CONSOLE: &[Rule] =
    &[call!(accept4), call!(ioctl, 1: libc::FIONBIO), call!(readv), call!(sendto), call!(ftruncate)];

/// A page server, for one VM: what it opens is open.
const PAGER: &[Rule] = &[
    call!(ioctl, 1: UFFDIO_COPY),
    call!(ioctl, 1: UFFDIO_ZEROPAGE),
    call!(pread64),
    call!(read),
    // The VM's faults, and its end.
    call!(poll, 1: 2),
];

/// Starting a worker when its driver is ready.
const START_WORKER: &[Rule] = &[
    call!(clone, 0: CLONE_THREAD_FLAGS),
    // Answered with ENOSYS by a filter of its own, because its flags are in memory, where no filter sees them; glibc then uses clone.
    call!(clone3),
    call!(rseq),
    call!(set_robust_list),
    call!(prctl, 0: libc::PR_SET_NAME),
    // The worker's own filter.
    call!(seccomp, 0: libc::SECCOMP_SET_MODE_FILTER),
    call!(eventfd2),
    call!(epoll_create1),
    call!(fcntl, 1: libc::F_DUPFD_CLOEXEC),
    call!(ioctl, 1: KVM_IRQFD),
    call!(ioctl, 1: KVM_IOEVENTFD),
    call!(ioctl, 1: TUNSETOFFLOAD),
];

/// As glibc's pthread_create passes them (nptl/pthread_create.c).
pub const CLONE_THREAD_FLAGS: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID;

const MONITOR: &[Rule] = &[
    // The console's file is begun anew.
    call!(openat),
    call!(rename),
    // The sockets of vsock and console go with them; a console's new size.
    call!(unlink),
    call!(ioctl, 1: libc::TIOCSWINSZ),
    // vCPUs are called out of their guest with a signal.
    call!(tgkill, 2: 34),
    call!(getpid),
    // The guest was paused.
    call!(ioctl, 1: KVM_KVMCLOCK_CTRL),
    // Input that the guest does not take yet.
    call!(clock_nanosleep),
    call!(exit_group),
];

/// Saving a paused VM: reading what only KVM has, and writing files. Restoring comes before the filters.
const SNAPSHOT: &[Rule] = &[
    // How a block of 128 KiB and more grows (glibc's realloc): the state of many vCPUs.
    call!(mremap),
    call!(ioctl, 1: KVM_GET_MSR_INDEX_LIST),
    call!(ioctl, 1: KVM_CHECK_EXTENSION),
    call!(ioctl, 1: KVM_GET_DIRTY_LOG),
    call!(ioctl, 1: KVM_GET_IRQCHIP),
    call!(ioctl, 1: KVM_GET_CLOCK),
    call!(ioctl, 1: KVM_GET_REGS),
    call!(ioctl, 1: KVM_GET_SREGS),
    call!(ioctl, 1: KVM_GET_MSRS),
    call!(ioctl, 1: KVM_GET_LAPIC),
    call!(ioctl, 1: KVM_GET_CPUID2),
    call!(ioctl, 1: KVM_GET_MP_STATE),
    call!(ioctl, 1: KVM_GET_VCPU_EVENTS),
    call!(ioctl, 1: KVM_GET_DEBUGREGS),
    call!(ioctl, 1: KVM_GET_TSC_KHZ),
    call!(ioctl, 1: KVM_GET_XSAVE),
    // Only where guests have AMX.
    call!(ioctl, 1: KVM_GET_XSAVE2),
    call!(ioctl, 1: KVM_GET_XCRS),
    call!(pwrite64),
    call!(statx),
    call!(flock),
];

const GDB: &[Rule] = &[
    call!(accept4),
    // The connection, and who has stopped.
    call!(poll, 1: 2),
    call!(read),
    call!(recvfrom),
    call!(sendto),
    call!(ioctl, 1: KVM_GET_REGS),
    call!(ioctl, 1: KVM_SET_REGS),
    call!(ioctl, 1: KVM_GET_SREGS),
    call!(ioctl, 1: KVM_GET_FPU),
    call!(ioctl, 1: KVM_TRANSLATE),
    call!(ioctl, 1: KVM_SET_GUEST_DEBUG),
    // vCPUs are called out of their guest with a signal.
    call!(tgkill, 2: 34),
    call!(getpid),
];

/// Names as of the threads.
pub const KINDS: &[Kind] = &[
    Kind {
        name: "MONITOR",
        thread: "mallee-vmm",
        rules: &[
            RUNTIME,
            WAIT,
            MONITOR,
            SNAPSHOT,
            START_WORKER,
            REOPEN,
            BLOCK,
            NET,
            VHOST,
            VHOST_TAP,
            TAP_COUNTERS,
            RNG,
            VSOCK,
            CONSOLE,
            TIMER,
        ],
    },
    Kind { name: "API", thread: "api", rules: &[RUNTIME, API] },
    Kind { name: "GDB", thread: "gdb", rules: &[RUNTIME, GDB] },
    Kind { name: "VCPU", thread: "vcpu", rules: &[RUNTIME, VCPU] },
    Kind { name: "BLOCK", thread: "virtio-blk", rules: &[RUNTIME, WAIT, BLOCK, TIMER] },
    Kind { name: "NET", thread: "virtio-net", rules: &[RUNTIME, WAIT, NET, VHOST_TAP, TIMER] },
    Kind { name: "RNG", thread: "virtio-rng", rules: &[RUNTIME, WAIT, RNG, TIMER] },
    Kind { name: "VSOCK", thread: "virtio-vsock", rules: &[RUNTIME, WAIT, VSOCK, TIMER] },
    Kind { name: "BALLOON", thread: "virtio-balloon", rules: &[RUNTIME, WAIT] },
    Kind { name: "CONSOLE", thread: "virtio-console", rules: &[RUNTIME, WAIT, CONSOLE] },
    Kind { name: "PAGER", thread: "pager", rules: &[RUNTIME, PAGER] },
];
