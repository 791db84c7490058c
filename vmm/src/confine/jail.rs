//! `--jail`: the process takes itself into a jail (`api::jail`) in two steps.
//!
//! 1. [`Jail::enter`], when the configuration file has been read and before anything that it names is opened: limits, the cgroup, namespaces, and a
//!    root that holds what the configuration names, at the same paths, so that the configuration means the same inside.
//! 2. [`leave_host`], when the VM is built (or before the first request is read, if there is only a socket): the host's network and all rights are
//!    given up, and Landlock says once more which files may be used. A tap is opened in between, in the host's network namespace.
//!
//! With namespaces of processes a child goes in; the process that was started stays outside, passes SIGTERM and SIGINT on,
//! and ends as its child does. No guest can reach it: it shares no memory with the child.
//!
//! What may not happen here: a guest's instruction before step 2.

use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, Scope,
};

use crate::api::VmConfig;
use crate::api::jail;
use crate::bus::lock;
use crate::error::{Error, Result};

/// Descriptors that the process may have: 32 vCPUs and 18 devices with all their queues need fewer (an interface with 16 pairs about 200).
const OPEN_FILES: u64 = 4096;
/// Group and user without rights where none is given ("nobody", kernel's overflow id).
const NOBODY: u32 = 65534;

/// The command line's part.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Go into a jail that is mounted on this folder (with a root of its own, in namespaces of its own, as another user, without
    /// capabilities). Needs root.
    #[arg(long, value_name = "FOLDER")]
    jail: Option<PathBuf>,
    /// User that the process becomes in the jail.
    #[arg(long, default_value_t = NOBODY, requires = "jail")]
    jail_uid: u32,
    /// Group that it becomes.
    #[arg(long, default_value_t = NOBODY, requires = "jail")]
    jail_gid: u32,
    /// A file or folder that is there in the jail, at its own path, for reading: what a request on the socket will name. What the configuration file names
    /// needs no mention.
    #[arg(long, value_name = "PATH", requires = "jail")]
    jail_bind: Vec<PathBuf>,
    /// The same for reading and writing.
    #[arg(long, value_name = "PATH", requires = "jail")]
    jail_bind_writable: Vec<PathBuf>,
    /// A cgroup's folder, made by the caller with the limits that it wants; the process moves there.
    #[arg(long, value_name = "FOLDER", requires = "jail")]
    jail_cgroup: Option<PathBuf>,
    /// A network namespace (/run/netns/…) to be in; without it, one with no network, after the taps have been opened.
    #[arg(long, value_name = "FILE", requires = "jail")]
    jail_netns: Option<PathBuf>,
}

/// What is still to be done by [`leave_host`].
struct Leaving {
    uid: u32,
    gid: u32,
    has_network: bool,
    /// What may be used inside, and whether it may be written.
    paths: Vec<(PathBuf, bool)>,
}

static LEAVING: Mutex<Option<Leaving>> = Mutex::new(None);

impl Arguments {
    /// Step 1, if a jail is asked for. `memory` is the memory file of a snapshot; `socket` is the API's, which is still to be made. Returns in
    /// the process that is to go on.
    pub fn enter(&self, config: Option<&VmConfig>, memory: Option<&Path>, socket: Option<&Path>) -> Result<()> {
        let Some(root) = &self.jail else { return Ok(()) };
        let failed = Error::host("jail");
        refuse_unusable(root)?;
        let paths = self.paths(config, memory, socket)?;
        let here = std::env::current_dir().map_err(&failed)?;
        let mut jail = jail::Jail::new(root, &here).map_err(&failed)?;
        jail.monitor_devices(self.jail_uid).map_err(&failed)?;
        if config.is_some_and(|config| config.network_interfaces.iter().any(|interface| interface.vhost_net)) {
            jail.vhost_net(self.jail_uid).map_err(&failed)?;
        }
        for (path, writable) in &paths {
            jail.bind(path, path, *writable).map_err(Error::file("for the jail:", path))?;
        }
        self.join().map_err(&failed)?;
        jail::limit_resources(OPEN_FILES).map_err(&failed)?;
        // The child that goes on is the first of the new namespace.
        // SAFETY: flags only.
        jail::check(unsafe { libc::unshare(libc::CLONE_NEWPID) }, "unshare: processes\n").map_err(&failed)?;
        stand_outside().map_err(&failed)?;
        jail.enter(libc::CLONE_NEWIPC | libc::CLONE_NEWUTS).map_err(&failed)?;
        let (uid, gid) = (self.jail_uid, self.jail_gid);
        let has_network = self.jail_netns.is_some();
        *lock(&LEAVING) = Some(Leaving { uid, gid, has_network, paths });
        Ok(())
    }

    /// What is bound: what the configuration names, and what the command line adds. What is made (a console's file, a socket) is in a
    /// folder, which is bound.
    fn paths(
        &self,
        config: Option<&VmConfig>,
        memory: Option<&Path>,
        socket: Option<&Path>,
    ) -> Result<Vec<(PathBuf, bool)>> {
        let mut paths = Vec::new();
        let mut add = |path: &Path, writable| -> Result<()> {
            paths.push((std::path::absolute(path).map_err(Error::file("for the jail:", path))?, writable));
            Ok(())
        };
        if let Some(config) = config {
            if let Some(boot) = &config.boot_source {
                add(&boot.kernel_image_path, false)?;
                boot.initrd_path.as_deref().map_or(Ok(()), |initrd| add(initrd, false))?;
            }
            for drive in &config.drives {
                add(&drive.path_on_host, !drive.is_read_only)?;
                drive.backing.iter().try_for_each(|image| add(&image.path_on_host, false))?;
            }
            let console = config.serial.as_ref().map(|serial| &serial.serial_out_path);
            let metrics = config.metrics.as_ref().map(|metrics| &metrics.metrics_path);
            let log = config.logger.as_ref().and_then(|logger| logger.log_path.as_ref());
            let vsock = config.vsock.as_ref().map(|vsock| &vsock.uds_path);
            let terminal = config.console.as_ref().map(|console| &console.path);
            for made in [console, metrics, log, vsock, terminal].into_iter().flatten() {
                add(folder_of(made), true)?;
            }
        }
        memory.map_or(Ok(()), |memory| add(memory, false))?;
        socket.map_or(Ok(()), |socket| add(folder_of(socket), true))?;
        self.jail_bind.iter().try_for_each(|path| add(path, false))?;
        self.jail_bind_writable.iter().try_for_each(|path| add(path, true))?;
        Ok(paths)
    }

    /// The caller's cgroup and network namespace.
    fn join(&self) -> io::Result<()> {
        if let Some(group) = &self.jail_cgroup {
            std::fs::write(group.join("cgroup.procs"), "0")?;
        }
        if let Some(namespace) = &self.jail_netns {
            let namespace = std::fs::File::open(namespace)?;
            // SAFETY: a descriptor that is open for the length of the call, and a flag.
            jail::check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) }, "setns\n")?;
        }
        Ok(())
    }
}

/// Step 2, if step 1 was taken and this one was not: nothing of the host's but what is open, and no way back.
pub fn leave_host() -> Result<()> {
    let Some(leaving) = lock(&LEAVING).take() else { return Ok(()) };
    let failed = Error::host("jail");
    if !leaving.has_network {
        // SAFETY: flags only; threads that are started later are in the new namespace too.
        jail::check(unsafe { libc::unshare(libc::CLONE_NEWNET) }, "unshare: network\n").map_err(&failed)?;
    }
    jail::drop_privileges(leaving.uid, leaving.gid).map_err(&failed)?;
    // Forgotten with the change of user (prctl(2)): a jail without the process that answers for it is ended.
    // SAFETY: numbers only.
    jail::check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) }, "pdeathsig\n").map_err(&failed)?;
    restrict_files(&leaving.paths).map_err(|error| Error::Host { what: "Landlock", source: io::Error::other(error) })
}

/// Landlock, as much of it as the kernel has: files as in the root, nothing run, no TCP, no signals or abstract sockets to
/// the outside.
fn restrict_files(paths: &[(PathBuf, bool)]) -> std::result::Result<(), landlock::RulesetError> {
    let abi = ABI::V6;
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = AccessFs::from_write(abi);
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?;
    let devices = (PathBuf::from("/dev"), true);
    for (path, writable) in paths.iter().chain([&devices]) {
        // One that cannot be opened any more cannot be used either.
        let Ok(file) = PathFd::new(path) else { continue };
        let access = if *writable { read | write } else { read };
        ruleset = ruleset.add_rule(PathBeneath::new(file, access))?;
    }
    let status = ruleset.restrict_self()?;
    tracing::debug!(?status.ruleset, "Landlock");
    Ok(())
}

fn refuse_unusable(root: &Path) -> Result<()> {
    let entries = std::fs::read_dir(root).map_err(Error::file("jail's folder", root))?;
    if entries.count() > 0 {
        let why = format!("--jail {}: the folder must be empty; the jail is mounted on it", root.display());
        return Err(Error::BadConfiguration(why));
    }
    // SAFETY: takes nothing and cannot fail.
    match unsafe { libc::geteuid() } {
        0 => Ok(()),
        _ => Err(Error::BadConfiguration("--jail needs root: start it as root, it becomes --jail-uid".into())),
    }
}

/// The folder that a file is, or will be, in.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Forks. The child returns; the parent waits for its end, and ends as it did.
fn stand_outside() -> io::Result<()> {
    // SAFETY: one thread exists, so the child may do whatever it likes.
    match unsafe { libc::fork() } {
        0 => Ok(()),
        child if child > 0 => {
            let status = wait_for_end(child);
            // SAFETY: numbers only; nothing of this copy of the process is to be run at its end.
            unsafe { libc::_exit(status) }
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// Passes signals on until `child` has ended; its exit status, or 128 and the number of the signal that ended it.
fn wait_for_end(child: libc::pid_t) -> libc::c_int {
    let mut status = 0;
    // SAFETY: the set is initialised before it is used, and all pointers are to locals. The child has a mask of its own since the fork.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGCHLD] {
            libc::sigaddset(&mut set, signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        // It may have ended before.
        while libc::waitpid(child, &mut status, libc::WNOHANG) == 0 {
            if let signal @ (libc::SIGTERM | libc::SIGINT) = libc::sigwaitinfo(&set, std::ptr::null_mut()) {
                libc::kill(child, signal);
            }
        }
    }
    match libc::WIFEXITED(status) {
        true => libc::WEXITSTATUS(status),
        false => 128 + libc::WTERMSIG(status),
    }
}
