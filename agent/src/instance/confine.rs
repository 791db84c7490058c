//! The jail that a VMM starts in: what the child process does between `fork` and `exec`.
//!
//! The guest is the enemy, and a VMM that it took over should find nothing: it is a user of its own
//! (an id that no other process of the machine has), in a mount namespace whose root holds its
//! program, the C library, its instance's `vm/` folder, its image files for reading, and three device
//! nodes. It has no capability and cannot gain one, writes no core file with guest memory in it, and is in its
//! instance's cgroup. It keeps the node's network namespace: the tap is opened there, and its user
//! may open that tap alone.
//!
//! How a root is made and entered and rights are given up is the VMM's own code (`mallee_vmm::api::jail`). The VMM's `--jail` option, which
//! does the same from inside, is not used here for two reasons: the program is started inside already, so that nothing of what it
//! does before `main` happens outside; and the child is the VMM itself, whose process id, lock and pidfd are what an agent that comes back
//! finds it by, where `--jail` would leave a process in between.
//!
//! Everything that needs memory is prepared by [`Jail::prepare`] before the fork: in the child of a
//! process with several threads only system calls may be made (fork(2), signal-safety(7)).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};

use libc::c_int;
use mallee_vmm::api::jail::{self, check};

/// User ids below this are the machine's own (`UID_MIN` of Debian's login.defs): no VMM runs as one of them.
pub const LOWEST_UID: u32 = 1000;

/// A file or folder of the host that the VMM sees.
#[derive(Debug, Clone)]
pub struct Binding {
    pub host: PathBuf,
    /// Absolute, in the jail.
    pub inside: &'static str,
    pub writable: bool,
}

/// Folders that a dynamically linked program needs (ld.so(8): the default search path).
const LIBRARIES: [&str; 3] = ["/lib", "/lib64", "/usr/lib"];
/// Descriptors that a VMM may have.
const OPEN_FILES: u64 = 2048;

/// Everything the child will do, with all its memory.
#[derive(Debug)]
pub struct Jail {
    walls: jail::Jail,
    lock: RawFd,
    pid_file: RawFd,
    cgroup: Option<RawFd>,
    uid: u32,
}

/// Descriptors that the child uses. They must stay open until the child was spawned.
#[derive(Debug)]
pub struct Descriptors<'a> {
    /// Locked by the agent; the child keeps it over `exec`, and so the lock, as long as it lives.
    pub lock: BorrowedFd<'a>,
    /// Receives the child's process id in decimal.
    pub pid_file: BorrowedFd<'a>,
    /// `cgroup.procs` of the instance's group.
    pub cgroup: Option<BorrowedFd<'a>>,
}

impl Jail {
    /// A jail mounted on the empty folder `root`, for the user and group `uid`.
    ///
    /// # Errors
    /// When a path that is to be bound is not there or holds a NUL byte.
    pub fn prepare(root: &Path, uid: u32, bindings: &[Binding], descriptors: &Descriptors<'_>) -> io::Result<Self> {
        let mut walls = jail::Jail::new(root, Path::new("/vm"))?;
        walls.folder(Path::new("/image"))?;
        walls.proc()?;
        for folder in LIBRARIES.map(Path::new).into_iter().filter(|folder| folder.is_dir()) {
            walls.bind(folder, folder, false)?;
        }
        for binding in bindings {
            walls.bind(&binding.host, Path::new(binding.inside), binding.writable)?;
        }
        walls.monitor_devices(uid)?;
        Ok(Self {
            walls,
            lock: descriptors.lock.as_raw_fd(),
            pid_file: descriptors.pid_file.as_raw_fd(),
            cgroup: descriptors.cgroup.map(|group| group.as_raw_fd()),
            uid,
        })
    }

    /// Goes in. For the child alone, between `fork` and `exec`: makes system calls and nothing else.
    ///
    /// # Errors
    /// The first call that failed; its name is written to standard error.
    pub fn enter(&self) -> io::Result<()> {
        // SAFETY: setsid takes no argument. A session of its own: signals to the agent's process group
        // and the end of its terminal do not reach the VMM.
        check(unsafe { libc::setsid() }, "setsid\n")?;
        write_pid(self.pid_file)?;
        if let Some(cgroup) = self.cgroup {
            write_all(cgroup, b"0", "cgroup.procs\n")?;
        }
        self.limit_descriptors()?;
        self.walls.enter(libc::CLONE_NEWIPC | libc::CLONE_NEWUTS)?;
        jail::drop_privileges(self.uid, self.uid)?;
        // SAFETY: takes a number; cannot fail.
        unsafe { libc::umask(0o077) };
        Ok(())
    }

    /// Nothing of the agent's goes over `exec` except standard input, output, error and the lock.
    fn limit_descriptors(&self) -> io::Result<()> {
        // SAFETY: close_range with CLOSE_RANGE_CLOEXEC only sets flags on this process's own table.
        let result = unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        check(result as c_int, "close_range\n")?;
        // SAFETY: `lock` is open in the child: the caller of `spawn` holds it (see `Descriptors`).
        check(unsafe { libc::fcntl(self.lock, libc::F_SETFD, 0) }, "fcntl\n")?;
        jail::limit_resources(OPEN_FILES)
    }
}

fn write_all(fd: RawFd, bytes: &[u8], step: &'static str) -> io::Result<()> {
    // SAFETY: the bytes are valid for the call. These few bytes are written at once or not at all.
    check(unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) } as c_int, step)
}

/// Writes the own process id in decimal, without memory from the heap.
fn write_pid(fd: RawFd) -> io::Result<()> {
    // SAFETY: getpid takes nothing and cannot fail.
    let mut rest = unsafe { libc::getpid() };
    let mut digits = [0u8; 10];
    let mut first = digits.len();
    while rest > 0 && first > 0 {
        first -= 1;
        digits[first] = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    write_all(fd, &digits[first..], "pid\n")
}
