//! The jail that a VMM starts in: what the child process does between `fork` and `exec`.
//!
//! The guest is the enemy, and a VMM that it took over should find nothing: it is a user of its own
//! (an id that no other process of the machine has), in a mount namespace whose root holds its
//! program, the C library, its instance's `vm/` folder, its image files for reading, and three device
//! nodes. It cannot gain privileges, writes no core file with guest memory in it, and is in its
//! instance's cgroup. It keeps the node's network namespace: the tap is opened there, and its user
//! may open that tap alone.
//!
//! Everything that needs memory is prepared by [`Jail::prepare`] before the fork: in the child of a
//! process with several threads only system calls may be made (fork(2), signal-safety(7)).

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use libc::{c_char, c_int, c_ulong};

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

/// Everything the child will do, with all its memory.
#[derive(Debug)]
pub struct Jail {
    root: CString,
    operations: Vec<Operation>,
    lock: RawFd,
    pid_file: RawFd,
    cgroup: Option<RawFd>,
    uid: u32,
}

#[derive(Debug)]
enum Operation {
    Folder(CString),
    EmptyFile(CString),
    Bind { host: CString, inside: CString, writable: bool },
    Device { path: CString, number: libc::dev_t, mode: libc::mode_t, uid: u32 },
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
    /// When the host has no `/dev/kvm`, or a path holds a NUL byte.
    pub fn prepare(root: &Path, uid: u32, bindings: &[Binding], descriptors: &Descriptors<'_>) -> io::Result<Self> {
        let inside = |path: &str| c_path(&root.join(path.trim_start_matches('/')));
        let mut operations = Vec::new();
        for folder in ["/dev", "/dev/net", "/proc", "/usr", "/image"] {
            operations.push(Operation::Folder(inside(folder)?));
        }
        for folder in LIBRARIES.iter().filter(|folder| Path::new(folder).is_dir()) {
            operations.push(Operation::Folder(inside(folder)?));
            operations.push(Operation::Bind {
                host: c_path(Path::new(folder))?,
                inside: inside(folder)?,
                writable: false,
            });
        }
        for binding in bindings {
            let place = inside(binding.inside)?;
            let is_folder = std::fs::metadata(&binding.host)?.is_dir();
            operations.push(if is_folder { Operation::Folder(place) } else { Operation::EmptyFile(place) });
            operations.push(Operation::Bind {
                host: c_path(&binding.host)?,
                inside: inside(binding.inside)?,
                writable: binding.writable,
            });
        }
        // Numbers: Documentation/admin-guide/devices.txt. KVM's minor number is fixed at 232.
        for (path, major, minor, mode, owner) in [
            ("/dev/kvm", 10, 232, 0o600, uid),
            ("/dev/net/tun", 10, 200, 0o600, uid),
            ("/dev/null", 1, 3, 0o666, 0),
            ("/dev/urandom", 1, 9, 0o444, 0),
        ] {
            let number = libc::makedev(major, minor);
            operations.push(Operation::Device { path: inside(path)?, number, mode, uid: owner });
        }
        Ok(Self {
            root: c_path(root)?,
            operations,
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
        // SAFETY: umask takes a number and cannot fail.
        unsafe { libc::umask(0) };
        write_pid(self.pid_file)?;
        if let Some(cgroup) = self.cgroup {
            write_all(cgroup, b"0", "cgroup.procs\n")?;
        }
        self.limit_descriptors()?;
        self.make_root()?;
        self.enter_root()?;
        self.drop_privileges()
    }

    /// Nothing of the agent's goes over `exec` except standard input, output, error and the lock.
    fn limit_descriptors(&self) -> io::Result<()> {
        // SAFETY: close_range with CLOSE_RANGE_CLOEXEC only sets flags on this process's own table.
        let result = unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        check(result as c_int, "close_range\n")?;
        // SAFETY: `lock` is open in the child: the caller of `spawn` holds it (see `Descriptors`).
        check(unsafe { libc::fcntl(self.lock, libc::F_SETFD, 0) }, "fcntl\n")?;
        let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: `none` is a valid rlimit for the length of the call.
        check(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &none) }, "setrlimit\n")
    }

    fn make_root(&self) -> io::Result<()> {
        // SAFETY: unshare takes flags only; the child has one thread.
        check(unsafe { libc::unshare(libc::CLONE_NEWNS) }, "unshare\n")?;
        // Slave: what the host unmounts goes here as well, what is mounted here is not seen there.
        mount(None, c"/", None, libc::MS_REC | libc::MS_SLAVE, None, "mount: slave\n")?;
        mount(
            Some(c"mallee"),
            &self.root,
            Some(c"tmpfs"),
            libc::MS_NOSUID,
            Some(c"mode=755,size=1m"),
            "mount: root\n",
        )?;
        self.operations.iter().try_for_each(Operation::carry_out)
    }

    fn enter_root(&self) -> io::Result<()> {
        // SAFETY (this and the calls below): every path is a NUL-terminated constant or owned by self.
        check(unsafe { libc::chdir(self.root.as_ptr()) }, "chdir\n")?;
        let here = c".".as_ptr();
        // SAFETY: both arguments are NUL-terminated constants.
        if unsafe { libc::syscall(libc::SYS_pivot_root, here, here) } == 0 {
            // The old root lies over the new one now (pivot_root(2), "pivot_root(".", ".")").
            // SAFETY: as above.
            check(unsafe { libc::umount2(here, libc::MNT_DETACH) }, "umount\n")?;
        } else {
            // The initial ramfs cannot be pivoted away (a node that runs from its initrd): the new root
            // is moved over it instead, as switch_root(8) does.
            mount(Some(c"."), c"/", None, libc::MS_MOVE, None, "mount: move\n")?;
            // SAFETY: as above.
            check(unsafe { libc::chroot(here) }, "chroot\n")?;
        }
        // Its own processes only (proc(5), `hidepid`).
        let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        mount(Some(c"proc"), c"/proc", Some(c"proc"), flags, Some(c"hidepid=2"), "mount: proc\n")?;
        mount(None, c"/", None, libc::MS_REMOUNT | libc::MS_RDONLY | libc::MS_NOSUID, None, "mount: read-only\n")?;
        // SAFETY: as above.
        check(unsafe { libc::chdir(c"/vm".as_ptr()) }, "chdir /vm\n")
    }

    fn drop_privileges(&self) -> io::Result<()> {
        // SAFETY: an empty list: the pointer is not read.
        check(unsafe { libc::setgroups(0, std::ptr::null()) }, "setgroups\n")?;
        // SAFETY: numbers only, here and in the calls that follow.
        check(unsafe { libc::setresgid(self.uid, self.uid, self.uid) }, "setresgid\n")?;
        // SAFETY: as above.
        check(unsafe { libc::setresuid(self.uid, self.uid, self.uid) }, "setresuid\n")?;
        // SAFETY: as above.
        check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, "no_new_privs\n")?;
        // SAFETY: as above; cannot fail.
        unsafe { libc::umask(0o077) };
        Ok(())
    }
}

impl Operation {
    fn carry_out(&self) -> io::Result<()> {
        match self {
            Self::Folder(path) => {
                // SAFETY: `path` is NUL-terminated, here and below.
                check(unsafe { libc::mkdir(path.as_ptr(), 0o755) }, "mkdir\n")
            }
            Self::EmptyFile(path) => {
                // SAFETY: as above. A regular file by mknod(2): no descriptor to close again.
                check(unsafe { libc::mknod(path.as_ptr(), libc::S_IFREG | 0o600, 0) }, "mknod: file\n")
            }
            Self::Bind { host, inside, writable } => {
                mount(Some(host), inside, None, libc::MS_BIND, None, "mount: bind\n")?;
                let keep = libc::MS_BIND | libc::MS_REMOUNT | libc::MS_NOSUID | libc::MS_NODEV;
                let flags = if *writable { keep | libc::MS_NOEXEC } else { keep | libc::MS_RDONLY };
                mount(None, inside, None, flags, None, "mount: bind flags\n")
            }
            Self::Device { path, number, mode, uid } => {
                // SAFETY: as above.
                check(unsafe { libc::mknod(path.as_ptr(), libc::S_IFCHR | mode, *number) }, "mknod: device\n")?;
                // SAFETY: as above.
                check(unsafe { libc::chown(path.as_ptr(), *uid, *uid) }, "chown\n")
            }
        }
    }
}

fn mount(
    source: Option<&std::ffi::CStr>,
    target: &std::ffi::CStr,
    kind: Option<&std::ffi::CStr>,
    flags: c_ulong,
    data: Option<&std::ffi::CStr>,
    step: &'static str,
) -> io::Result<()> {
    let pointer = |text: Option<&std::ffi::CStr>| text.map_or(std::ptr::null::<c_char>(), std::ffi::CStr::as_ptr);
    // SAFETY: each pointer is null or NUL-terminated and valid for the call; null is what mount(2)
    // wants for what a given kind of mount does not use.
    let result = unsafe { libc::mount(pointer(source), target.as_ptr(), pointer(kind), flags, pointer(data).cast()) };
    check(result, step)
}

/// The error of a failed call, after its name was written to standard error: what `spawn` hands to
/// the parent is only the number.
fn check(result: c_int, step: &'static str) -> io::Result<()> {
    if result >= 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    // SAFETY: the bytes are valid for the call; a failure to write is of no consequence.
    unsafe { libc::write(2, step.as_ptr().cast(), step.len()) };
    Err(error)
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

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}
