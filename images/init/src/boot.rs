//! The boot of the root file system, from its init to a login.
//!
//! Three things run side by side, since each waits for something else: the DHCP client (the network),
//! the host key (entropy and the processor), and after them the metadata. The ssh server starts when all
//! three are there, or, if the metadata service stays silent, after [`METADATA_PATIENCE`] without the keys
//! that it would have named; they are added when it answers.

use std::fs;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::mount::{MsFlags, mount};

use crate::metadata::{self, Metadata};
use crate::power;
use crate::report::{self, Phase};
use crate::supervisor::{self, Children, Signals};
use crate::{grow, host_keys, identity, net, ssh, user_data};

/// For everything that is started from here.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How long the login waits for the metadata service.
const METADATA_PATIENCE: Duration = Duration::from_secs(15);

/// Runs the machine until it goes down.
pub fn run() -> ExitCode {
    power::take_ctrl_alt_del();
    // Before any thread: threads inherit what is blocked.
    let signals = match Signals::take() {
        Ok(signals) => signals,
        Err(error) => {
            report::line(format_args!("signals cannot be taken: {error}"));
            return power::off_now();
        }
    };
    mount_the_rest();
    set_hostname_from_file();
    let children = Children::default();
    let for_boot = children.clone();
    thread::spawn(move || to_login(&for_boot));
    let target = supervisor::run(&children, &signals);
    power::go_down(&children, target)
}

/// Everything up to the login and after it, in a thread beside the supervisor.
fn to_login(children: &Children) {
    let host_key = spawn_host_key(children);
    let metadata = spawn_network_and_metadata();
    let made_now = host_key.join().unwrap_or(false);
    let in_time = match metadata.recv_timeout(METADATA_PATIENCE) {
        Ok(metadata) => Some(metadata),
        Err(RecvTimeoutError::Timeout) => {
            report::line("no metadata yet: the ssh server starts with the keys that are there");
            None
        }
        Err(RecvTimeoutError::Disconnected) => None,
    };
    if let Some(metadata) = &in_time {
        become_instance(children, metadata, made_now);
    }
    ssh::start(children);
    host_keys::print(children);
    grow::grow_root(&root_device());
    let metadata = match in_time {
        Some(metadata) => metadata,
        None => {
            let Ok(metadata) = metadata.recv() else {
                return;
            };
            // The server has shown its key by now; it stays.
            become_instance(children, &metadata, true);
            metadata
        }
    };
    user_data::run(children, &metadata);
}

/// Applies what the metadata says. On a disk that was another instance's the host key is made anew.
fn become_instance(children: &Children, metadata: &Metadata, key_is_own: bool) {
    let remembered = identity::remembered_instance();
    let first_boot = remembered.as_ref() != Some(&metadata.instance_id);
    if remembered.is_some() && first_boot && !key_is_own {
        report::line("this disk was another instance's: the host key is made anew");
        if let Err(error) = host_keys::make(children) {
            report::line(format_args!("host key: {error}"));
        }
    }
    identity::apply(metadata, first_boot);
    if first_boot && let Err(error) = identity::remember_instance(&metadata.instance_id) {
        report::line(format_args!("the instance's id cannot be kept: {error}"));
    }
    report::reached(Phase::Metadata, &metadata.instance_id);
}

fn spawn_host_key(children: &Children) -> JoinHandle<bool> {
    let children = children.clone();
    thread::spawn(move || {
        host_keys::ensure(&children).unwrap_or_else(|error| {
            report::line(format_args!("there is no host key, so no ssh: {error}"));
            false
        })
    })
}

fn spawn_network_and_metadata() -> Receiver<Metadata> {
    let (configured, first_lease) = channel();
    let (found, metadata): (Sender<Metadata>, _) = channel();
    thread::spawn(move || net::run(&configured));
    thread::spawn(move || {
        if first_lease.recv().is_ok() {
            // If nobody waits for it any more the machine is going down.
            let _ = found.send(metadata::fetch());
        }
    });
    metadata
}

fn mount_the_rest() {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    for (kind, target, flags, data) in [
        ("tmpfs", "/run", safe | MsFlags::MS_NOEXEC, "mode=0755"),
        ("tmpfs", "/tmp", safe, "mode=1777"),
        ("devpts", "/dev/pts", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"),
    ] {
        let _ = fs::create_dir_all(target);
        if let Err(error) = mount(Some(kind), target, Some(kind), flags, Some(data)) {
            report::line(format_args!("{target} cannot be mounted: {error}"));
        }
    }
}

/// Until the metadata service says otherwise.
fn set_hostname_from_file() {
    let name = fs::read_to_string("/etc/hostname").unwrap_or_default();
    let name = name.trim();
    if !name.is_empty() {
        let _ = nix::unistd::sethostname(name);
    }
}

/// The block device behind `/`, as the kernel has it.
fn root_device() -> String {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let device = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (device, target) = (fields.next()?, fields.next()?);
        (target == "/" && device.starts_with("/dev/")).then(|| device.to_owned())
    });
    device.unwrap_or_else(|| "/dev/vda".to_owned())
}
