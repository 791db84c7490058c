//! Walls for a process that a guest may take over: a mount namespace whose root holds what was named and nothing else,
//! namespaces of its own, no capability, no way to gain one.
//!
//! One implementation for two callers. `mallee-vmm --jail` goes in by itself, between reading its configuration and
//! running a guest: no program is started inside, so the root needs no libraries. The agent's child goes in between `fork` and `exec`,
//! so that also the program's loader and start run inside, and the program may be one that the agent does not trust; its root
//! holds the libraries too. What differs (which files, which namespaces, who is told what) is the callers'; how a root is made and
//! entered and rights are given up is here.
//!
//! Everything that needs memory is done by the `Jail`'s makers; what follows makes system calls and nothing else, as the child of a process
//! with several threads must (fork(2), signal-safety(7)). A failed call's name is written to standard error, since only
//! a number passes from such a child to its parent.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use libc::{c_char, c_int, c_ulong, c_void};

/// Everything that will be done, with all its memory.
#[derive(Debug)]
pub struct Jail {
    root: CString,
    /// Where the process is afterwards.
    working_folder: CString,
    /// On the new root's own file system, by path: a folder comes before what is in it.
    skeleton: BTreeMap<PathBuf, Node>,
    /// By path inside: what is mounted on a folder comes before what is mounted within it.
    bindings: BTreeMap<PathBuf, Mount>,
}

#[derive(Debug)]
enum Node {
    Folder(CString),
    EmptyFile(CString),
    Device { path: CString, number: libc::dev_t, mode: libc::mode_t, owner: u32 },
}

#[derive(Debug)]
enum Mount {
    Bind { host: CString, inside: CString, writable: bool },
    Proc { inside: CString },
}

impl Jail {
    /// A jail that will be mounted on the folder `root`; its files of the host stay below. The process will be in `working_folder`, which is
    /// made.
    ///
    /// # Errors
    /// A path that holds a NUL byte or `..`, here and below.
    pub fn new(root: &Path, working_folder: &Path) -> io::Result<Self> {
        let mut jail = Jail {
            root: c_path(root)?,
            working_folder: c_path(&Path::new("/").join(plain(working_folder)?))?,
            skeleton: BTreeMap::new(),
            bindings: BTreeMap::new(),
        };
        jail.folder(working_folder)?;
        Ok(jail)
    }

    /// An empty folder at the absolute path `inside`, and those that it is in.
    pub fn folder(&mut self, inside: &Path) -> io::Result<()> {
        let mut path = PathBuf::new();
        for part in plain(inside)?.components() {
            path.push(part);
            let node = Node::Folder(self.at(&path)?);
            self.skeleton.entry(path.clone()).or_insert(node);
        }
        Ok(())
    }

    /// The host's file or folder `host`, which must be there, at the absolute path `inside`.
    pub fn bind(&mut self, host: &Path, inside: &Path, writable: bool) -> io::Result<()> {
        let is_folder = std::fs::metadata(host)?.is_dir();
        let path = plain(inside)?;
        if path.as_os_str().is_empty() {
            let why = "a jail's root cannot be bound: put files that are to be in it into a folder of their own";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let place = self.at(&path)?;
        if is_folder {
            self.folder(inside)?;
        } else {
            self.folder(inside.parent().unwrap_or(Path::new("/")))?;
            self.skeleton.insert(path.clone(), Node::EmptyFile(place.clone()));
        }
        // What is named twice, for reading and for writing, is writable.
        let writable = writable || matches!(self.bindings.get(&path), Some(Mount::Bind { writable: true, .. }));
        self.bindings.insert(path, Mount::Bind { host: c_path(host)?, inside: place, writable });
        Ok(())
    }

    /// The device nodes that a monitor opens: KVM and taps are for `owner` alone, what any process has is root's.
    pub fn monitor_devices(&mut self, owner: u32) -> io::Result<()> {
        // Numbers: Documentation/admin-guide/devices.txt. KVM's minor number is fixed at 232.
        self.device("/dev/kvm", (10, 232), 0o600, owner)?;
        self.device("/dev/net/tun", (10, 200), 0o600, owner)?;
        self.device("/dev/null", (1, 3), 0o666, 0)?;
        self.device("/dev/urandom", (1, 9), 0o444, 0)
    }

    /// The device node of vhost-net, for `owner` alone: for a monitor with an interface that asks for it.
    pub fn vhost_net(&mut self, owner: u32) -> io::Result<()> {
        self.device("/dev/vhost-net", (10, 238), 0o600, owner)
    }

    /// A character device node at `inside`, which its owner and group may use as `mode` says.
    fn device(&mut self, inside: &str, (major, minor): (u32, u32), mode: u32, owner: u32) -> io::Result<()> {
        let inside = Path::new(inside);
        self.folder(inside.parent().unwrap_or(Path::new("/")))?;
        let path = plain(inside)?;
        let node = Node::Device { path: self.at(&path)?, number: libc::makedev(major, minor), mode, owner };
        self.skeleton.insert(path, node);
        Ok(())
    }

    /// `/proc`, with the processes of the user alone.
    pub fn proc(&mut self) -> io::Result<()> {
        let path = PathBuf::from("proc");
        self.folder(Path::new("/proc"))?;
        self.bindings.insert(path.clone(), Mount::Proc { inside: self.at(&path)? });
        Ok(())
    }

    /// The host's path of a path inside, while the new root is being made.
    fn at(&self, relative: &Path) -> io::Result<CString> {
        c_path(&Path::new(std::ffi::OsStr::from_bytes(self.root.as_bytes())).join(relative))
    }

    /// Goes in, with all rights: a mount namespace and those of `namespaces` (`CLONE_NEW…`), and the new root, read-only but for
    /// what was bound to be written. The process must have one thread.
    ///
    /// # Errors
    /// The first call that failed.
    pub fn enter(&self, namespaces: c_int) -> io::Result<()> {
        // SAFETY: umask takes a number and cannot fail. Modes are meant as they are given.
        let umask = unsafe { libc::umask(0) };
        // SAFETY: unshare takes flags only.
        check(unsafe { libc::unshare(libc::CLONE_NEWNS | namespaces) }, "unshare\n")?;
        // Slave: what the host unmounts goes here as well, what is mounted here is not seen there.
        mount(None, c"/", None, libc::MS_REC | libc::MS_SLAVE, None, "mount: slave\n")?;
        let size = Some(c"mode=755,size=1m");
        mount(Some(c"mallee"), &self.root, Some(c"tmpfs"), libc::MS_NOSUID, size, "mount: root\n")?;
        self.skeleton.values().try_for_each(Node::make)?;
        self.bindings.values().try_for_each(Mount::carry_out)?;
        self.pivot()?;
        // SAFETY: as above.
        unsafe { libc::umask(umask) };
        Ok(())
    }

    fn pivot(&self) -> io::Result<()> {
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
        mount(None, c"/", None, libc::MS_REMOUNT | libc::MS_RDONLY | libc::MS_NOSUID, None, "mount: read-only\n")?;
        // SAFETY: as above.
        check(unsafe { libc::chdir(self.working_folder.as_ptr()) }, "chdir: working folder\n")
    }
}

/// Becomes `uid` and `gid` with no other group, no capability in any set, the bounding set included, and no way to gain one.
///
/// # Errors
/// The first call that failed: the process must have been privileged.
pub fn drop_privileges(uid: u32, gid: u32) -> io::Result<()> {
    // While the capability that allows it is there. Numbers end with the first that the kernel does not know (capabilities(7)).
    for capability in 0..64 {
        // SAFETY: numbers only.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } < 0 {
            break;
        }
    }
    // SAFETY: an empty list: the pointer is not read.
    check(unsafe { libc::setgroups(0, std::ptr::null()) }, "setgroups\n")?;
    // SAFETY: numbers only, here and in the calls that follow.
    check(unsafe { libc::setresgid(gid, gid, gid) }, "setresgid\n")?;
    // SAFETY: as above.
    check(unsafe { libc::setresuid(uid, uid, uid) }, "setresuid\n")?;
    // SAFETY: as above.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, "no_new_privs\n")?;
    // A kernel before 4.3 has no ambient set, which is as good.
    // SAFETY: as above.
    unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) };
    // For uid 0, whose change of ids takes nothing away. include/uapi/linux/capability.h, version 3: two words a set.
    let header: [u32; 2] = [0x2008_0522, 0];
    let none = [0u32; 6];
    // SAFETY: both are as long as the version says, and only read.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    check(result as c_int, "capset\n")
}

/// Limits that a monitor never meets: no core file (it would hold the guest's memory), and `files` descriptors.
pub fn limit_resources(files: u64) -> io::Result<()> {
    for (what, limit) in [(libc::RLIMIT_CORE, 0), (libc::RLIMIT_NOFILE, files)] {
        let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
        // SAFETY: `limit` is a valid rlimit for the length of the call.
        check(unsafe { libc::setrlimit(what, &limit) }, "setrlimit\n")?;
    }
    Ok(())
}

impl Node {
    fn make(&self) -> io::Result<()> {
        match self {
            // SAFETY: `path` is NUL-terminated, here and below.
            Node::Folder(path) => check(unsafe { libc::mkdir(path.as_ptr(), 0o755) }, "mkdir\n"),
            Node::EmptyFile(path) => {
                // SAFETY: as above. A regular file by mknod(2): no descriptor to close again.
                check(unsafe { libc::mknod(path.as_ptr(), libc::S_IFREG | 0o600, 0) }, "mknod: file\n")
            }
            Node::Device { path, number, mode, owner } => {
                // SAFETY: as above.
                check(unsafe { libc::mknod(path.as_ptr(), libc::S_IFCHR | mode, *number) }, "mknod: device\n")?;
                // SAFETY: as above.
                check(unsafe { libc::chown(path.as_ptr(), *owner, *owner) }, "chown\n")
            }
        }
    }
}

impl Mount {
    fn carry_out(&self) -> io::Result<()> {
        match self {
            Mount::Bind { host, inside, writable } => {
                mount(Some(host), inside, None, libc::MS_BIND, None, "mount: bind\n")?;
                let keep = libc::MS_BIND | libc::MS_REMOUNT | libc::MS_NOSUID | libc::MS_NODEV;
                let flags = if *writable { keep | libc::MS_NOEXEC } else { keep | libc::MS_RDONLY };
                mount(None, inside, None, flags, None, "mount: bind flags\n")
            }
            Mount::Proc { inside } => {
                // The user's own processes only (proc(5), `hidepid`).
                let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
                mount(Some(c"proc"), inside, Some(c"proc"), flags, Some(c"hidepid=2"), "mount: proc\n")
            }
        }
    }
}

fn mount(
    source: Option<&CStr>,
    target: &CStr,
    kind: Option<&CStr>,
    flags: c_ulong,
    data: Option<&CStr>,
    step: &'static str,
) -> io::Result<()> {
    let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null::<c_char>(), CStr::as_ptr);
    // SAFETY: each pointer is null or NUL-terminated and valid for the call; null is what mount(2)
    // wants for what a given kind of mount does not use.
    let result =
        unsafe { libc::mount(pointer(source), target.as_ptr(), pointer(kind), flags, pointer(data).cast::<c_void>()) };
    check(result, step)
}

/// The error of a failed call, after its name was written to standard error. Allocates nothing.
pub fn check(result: c_int, step: &'static str) -> io::Result<()> {
    if result >= 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    // SAFETY: the bytes are valid for the call; a failure to write is of no consequence.
    unsafe { libc::write(2, step.as_ptr().cast(), step.len()) };
    Err(error)
}

/// An absolute path without its slash, and without ways around.
fn plain(path: &Path) -> io::Result<PathBuf> {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => plain.push(name),
            Component::ParentDir | Component::Prefix(_) => {
                let why = format!("{}: a path in a jail must not contain \"..\"", path.display());
                return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
            }
        }
    }
    Ok(plain)
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}
