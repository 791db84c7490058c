//! The program under ptrace(2): which system calls each kind of thread makes once it is under its filter, and what becomes of one
//! that it may not make.
//!
//! It is the program itself that runs, with its own filters. A tracer sees a call before the filter does (since Linux
//! 4.8), so it can also put another one in its place. Threads are told apart by the names in the table of rules; what filters one
//! is under follows from whom it was started by and what it installed.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::CommandExt;
use std::process::Command;

use libc::{c_int, c_long, c_void, pid_t};

use super::check;
use crate::rules::{KINDS, Rule};

/// A system call with its arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    pub number: i64,
    pub args: [u64; 6],
}

impl Call {
    pub fn matches(&self, rule: &Rule) -> bool {
        let holds =
            |arg: &crate::rules::Arg| self.args[usize::from(arg.index)] as u32 & arg.mask == arg.value & arg.mask;
        self.number == rule.call && rule.args.iter().all(holds)
    }
}

/// What a run has shown.
#[derive(Default)]
pub struct Seen {
    /// For each kind (by its place in the table), the rules (by name and place in the kind's list) that a call has matched.
    pub used: BTreeMap<usize, BTreeSet<(usize, usize)>>,
    /// Kinds of which a thread was seen under its filter.
    pub alive: BTreeSet<usize>,
    /// Wait status of the process.
    pub status: c_int,
    /// Whether the call to be put in was.
    pub was_injected: bool,
    /// Calls that are in no rule of a filter that the thread is under, with its name: the one that ended the process.
    pub forbidden: Vec<(&'static str, Call)>,
}

/// The kind whose threads are called `name`.
pub fn kind_of(name: &str) -> Option<usize> {
    (0..KINDS.len()).filter(|kind| name.starts_with(KINDS[*kind].thread)).max_by_key(|kind| KINDS[*kind].thread.len())
}

/// Runs `command` to its end. With `inject`, the first call that a thread of that kind makes under its filter becomes the given one.
#[expect(clippy::zombie_processes, reason = "the tracer waits for it by waitpid")]
pub fn run(mut command: Command, inject: Option<(usize, Call)>) -> Seen {
    // SAFETY: one system call, between fork and exec.
    unsafe { command.pre_exec(|| check(libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) as c_int)) };
    let child = command.spawn().unwrap();
    let mut tracer = Tracer {
        process: child.id() as pid_t,
        threads: BTreeMap::new(),
        early: BTreeSet::new(),
        inject,
        seen: Seen::default(),
    };
    tracer.run();
    tracer.seen
}

#[derive(Default)]
struct Thread {
    /// The filters that it is under.
    kinds: BTreeSet<usize>,
    /// Of its own kind.
    own: Option<usize>,
}

struct Tracer {
    process: pid_t,
    threads: BTreeMap<pid_t, Thread>,
    /// Threads that stopped before their start was told: who starts them says under which filters.
    early: BTreeSet<pid_t>,
    inject: Option<(usize, Call)>,
    seen: Seen,
}

/// include/uapi/linux/ptrace.h: `struct ptrace_syscall_info`, as far as it is used.
#[repr(C)]
#[derive(Default)]
struct SyscallInfo {
    op: u8,
    pad: [u8; 3],
    arch: u32,
    instruction_pointer: u64,
    stack_pointer: u64,
    /// On entry number and arguments; on exit the result, and whether it is an error.
    data: [u64; 8],
}

const ENTRY: u8 = 1;
const EXIT: u8 = 2;

impl Tracer {
    fn run(&mut self) {
        let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL;
        let mut begun = false;
        loop {
            let mut status = 0;
            // SAFETY: the kernel writes `status`. Children of this thread alone, so that other tests' are left to them.
            let id = unsafe { libc::waitpid(-1, &mut status, libc::__WALL | libc::__WNOTHREAD) };
            assert!(id > 0, "waitpid: {}", std::io::Error::last_os_error());
            if libc::WIFSTOPPED(status) {
                if !begun {
                    begun = true;
                    self.threads.insert(id, Thread::default());
                    request(libc::PTRACE_SETOPTIONS, id, std::ptr::null_mut(), options as usize as *mut c_void);
                }
                let signal = self.stopped(id, status);
                if self.threads.contains_key(&id) {
                    resume(id, signal);
                }
            } else {
                self.threads.remove(&id);
                if id == self.process {
                    self.seen.status = status;
                    return;
                }
            }
        }
    }

    /// A thread has stopped; returns the signal to deliver to it.
    fn stopped(&mut self, id: pid_t, status: c_int) -> c_int {
        let signal = libc::WSTOPSIG(status);
        if status >> 8 == libc::SIGTRAP | libc::PTRACE_EVENT_CLONE << 8 {
            self.cloned(id);
        } else if signal == libc::SIGTRAP | 0x80 {
            self.at_call(id);
        } else if !self.threads.contains_key(&id) {
            self.early.insert(id);
        } else if signal != libc::SIGTRAP && signal != libc::SIGSTOP {
            return signal;
        }
        0
    }

    fn cloned(&mut self, parent: pid_t) {
        let mut child: u64 = 0;
        request(libc::PTRACE_GETEVENTMSG, parent, std::ptr::null_mut(), (&raw mut child).cast());
        let child = child as pid_t;
        let kinds = self.threads[&parent].kinds.clone();
        self.threads.insert(child, Thread { kinds, own: None });
        if self.early.remove(&child) {
            resume(child, 0);
        }
    }

    fn at_call(&mut self, id: pid_t) {
        let mut info = SyscallInfo::default();
        let size = size_of::<SyscallInfo>() as *mut c_void;
        request(libc::PTRACE_GET_SYSCALL_INFO, id, size, (&raw mut info).cast());
        match info.op {
            ENTRY => {
                let [number, args @ .., _] = info.data;
                self.enters(id, Call { number: number as i64, args });
            }
            EXIT if info.data[0] == 0 && registers(id).orig_rax as i64 == libc::SYS_seccomp => self.confined(id),
            _ => {}
        }
    }

    fn enters(&mut self, id: pid_t, call: Call) {
        let thread = &self.threads[&id];
        for kind in &thread.kinds {
            let used = self.seen.used.entry(*kind).or_default();
            let mut is_allowed = false;
            for (group, rules) in KINDS[*kind].rules.iter().enumerate() {
                for rule in (0..rules.len()).filter(|rule| call.matches(&rules[*rule])) {
                    used.insert((group, rule));
                    is_allowed = true;
                }
            }
            if !is_allowed {
                self.seen.forbidden.push((KINDS[*kind].name, call));
            }
        }
        // The main thread installs two filters, one after the other; after that it is confined.
        if let (Some(own), false) = (thread.own, call.number == libc::SYS_seccomp)
            && self.inject.is_some_and(|(kind, _)| kind == own)
            && let Some((_, call)) = self.inject.take()
        {
            put(id, call);
            self.seen.was_injected = true;
        }
    }

    /// The thread has installed a filter.
    fn confined(&mut self, id: pid_t) {
        let name = std::fs::read_to_string(format!("/proc/{}/task/{id}/comm", self.process)).unwrap();
        let kind = kind_of(name.trim()).unwrap_or_else(|| panic!("thread {name:?} has a filter and is in no rule"));
        let thread = self.threads.get_mut(&id).unwrap();
        thread.kinds.insert(kind);
        thread.own = Some(kind);
        self.seen.alive.insert(kind);
    }
}

fn registers(id: pid_t) -> libc::user_regs_struct {
    // SAFETY: all zeroes is valid for a structure of integers.
    let mut registers = unsafe { std::mem::zeroed::<libc::user_regs_struct>() };
    request(libc::PTRACE_GETREGS, id, std::ptr::null_mut(), (&raw mut registers).cast());
    registers
}

/// Puts `call` in the place of the one that the thread is entering.
fn put(id: pid_t, call: Call) {
    let mut registers = registers(id);
    registers.orig_rax = call.number as u64;
    [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9] = call.args;
    request(libc::PTRACE_SETREGS, id, std::ptr::null_mut(), (&raw mut registers).cast());
}

fn resume(id: pid_t, signal: c_int) {
    // A thread that another one's end takes with it is gone, which is no error.
    // SAFETY: numbers only.
    unsafe { libc::ptrace(libc::PTRACE_SYSCALL, id, 0, c_long::from(signal)) };
}

/// A request on a stopped thread of ours. One that was killed meanwhile leaves what `data` points to as it was.
fn request(request: libc::c_uint, id: pid_t, address: *mut c_void, data: *mut c_void) {
    // SAFETY: `data` points to what the request reads or writes, for the length of the call, or is a number.
    let result = unsafe { libc::ptrace(request, id, address, data) };
    let error = std::io::Error::last_os_error();
    assert!(result >= 0 || error.raw_os_error() == Some(libc::ESRCH), "ptrace {request}: {error}");
}
