//! What of a jail only a kernel like Debian's can show: a cgroup of version 2 whose limit holds inside, and Landlock, which closes what the rest of the jail leaves
//! open. The rest is looked at in `vmm/tests/jail.rs`. A second monitor goes into a jail with nothing but a socket; the guest is not needed for it.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use mallee_vmm::api::client::Client;
use mallee_vmm::api::{Action, BootSource, Serial, VmConfig};

use crate::guest::host::{Host, inner};
use crate::guest::link::Link;
use crate::guest::{Check, Outcome, expect, while_doing};

pub const CHECK: Check = Check { name: "jail", configure: |_, _| {}, guest: |_, link| guest(link), host };

const UID: u32 = 64_321;
const GROUP: &str = "/sys/fs/cgroup/mallee-guest-jail";

fn guest(link: &mut Link) -> Outcome {
    link.wait_for("over")?;
    Ok(String::new())
}

fn host(host: &Host, link: &mut Link) -> Outcome {
    let seen = look(host);
    link.say("over")?;
    seen
}

fn look(host: &Host) -> Outcome {
    let config: VmConfig = host.client.get("/vm/config").map_err(while_doing("the configuration"))?;
    let kernel = config.boot_source.ok_or("there is no kernel")?.kernel_image_path;
    let group = Group::new()?;
    let jailed = Jailed::start(host, &kernel)?;
    host.wait("the monitor in the jail", || Ok(jailed.client.instance().ok()))?;
    let pid = inner(jailed.process.id()).ok_or("there is nobody in the jail")?;
    landlock(&jailed, pid)?;
    limit(&jailed, pid, &group, &kernel)?;
    Ok("Landlock closes a folder that nobody named, and the limit of the cgroup holds".into())
}

/// The root is a folder that everybody may read, as the file system goes.
fn landlock(jailed: &Jailed, pid: u32) -> Result<(), String> {
    let root = fs::metadata(format!("/proc/{pid}/root")).map_err(while_doing("the jail's root"))?;
    expect("what others may do with the jail's root", root.permissions().mode() & 0o7, 0o5)?;
    let refusal = jailed.refusal(Path::new("/"))?;
    match refusal.contains("Permission denied") {
        true => Ok(()),
        false => Err(format!("the jail's root was refused otherwise: {refusal}")),
    }
}

/// No thread more than there are: a VM cannot start.
fn limit(jailed: &Jailed, pid: u32, group: &Group, kernel: &Path) -> Result<(), String> {
    let members = group.read("cgroup.procs")?;
    expect("the monitor in its cgroup", members.lines().any(|line| line == pid.to_string()), true)?;
    group.write("pids.max", group.read("pids.current")?.trim())?;
    let refusal = jailed.refusal(kernel)?;
    match refusal.contains("thread") {
        true => Ok(()),
        false => Err(format!("with no thread more it was refused otherwise: {refusal}")),
    }
}

/// A monitor in a jail, which does not outlive its check.
struct Jailed {
    process: Child,
    client: Client,
    folder: PathBuf,
}

impl Jailed {
    fn start(host: &Host, kernel: &Path) -> Result<Self, String> {
        let [root, folder] = ["jail-root", "jail-made"].map(|name| host.folder.join(name));
        fs::create_dir(&root)
            .and_then(|()| fs::create_dir(&folder))
            .and_then(|()| chown(&folder, Some(UID), Some(UID)))
            .map_err(while_doing("the jail's folders"))?;
        let mut command = Command::new(&host.monitor);
        command.arg("--jail").arg(&root).arg(format!("--jail-uid={UID}")).arg("--jail-cgroup").arg(GROUP);
        command.arg("--jail-bind").arg(kernel).arg("--api-sock").arg(folder.join("api")).stdin(Stdio::null());
        let process = command.spawn().map_err(while_doing("starting the monitor"))?;
        Ok(Jailed { process, client: Client::new(folder.join("api")), folder })
    }

    /// Why a VM with this kernel cannot start.
    fn refusal(&self, kernel: &Path) -> Result<String, String> {
        let source =
            BootSource { kernel_image_path: kernel.to_owned(), initrd_path: None, boot_args: None, protocol: None };
        let serial = Serial { serial_out_path: self.folder.join("serial"), size_limit: None };
        let failed = while_doing("configuring the monitor in the jail");
        self.client.put("/boot-source", &source).and_then(|()| self.client.put("/serial", &serial)).map_err(failed)?;
        match self.client.act(Action::InstanceStart) {
            Ok(()) => Err(format!("a VM starts with {}", kernel.display())),
            Err(error) => Ok(error.to_string()),
        }
    }
}

impl Drop for Jailed {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A cgroup that goes with its check; before it the members do.
struct Group(PathBuf);

impl Group {
    fn new() -> Result<Self, String> {
        fs::create_dir(GROUP).map_err(while_doing(GROUP))?;
        Ok(Group(PathBuf::from(GROUP)))
    }

    fn read(&self, name: &str) -> Result<String, String> {
        fs::read_to_string(self.0.join(name)).map_err(while_doing(name))
    }

    fn write(&self, name: &str, value: &str) -> Result<(), String> {
        fs::write(self.0.join(name), value).map_err(while_doing(name))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Whoever is left goes at once (Documentation/admin-guide/cgroup-v2.rst, "cgroup.kill"), and takes a moment to be gone.
        let _ = self.write("cgroup.kill", "1");
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}
