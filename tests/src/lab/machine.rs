//! A node as a machine: what it is made of, QEMU's arguments for it, its start.

use std::{
    fs::{self, File},
    os::{fd::AsRawFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};

use super::{
    channel::{self, NodeStatus, PORTS},
    error::{LabError, OnPath, output_of},
    folder::{Lab, Node},
    initrd, monitor,
    packages::PackageSet,
    process::Process,
    programs::Places,
    tap,
};
use crate::node::setup::Setup;

pub const QEMU: &str = "qemu-system-x86_64";
const STATE_DISK: &str = "state.img";
const INITRD: &str = "initrd";

/// What gives the node its processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Acceleration {
    /// QEMU translates and emulates AMD-V: works everywhere.
    Tcg,
    /// Hardware KVM that nests.
    Kvm,
}

impl Acceleration {
    /// KVM when a module for real hardware is loaded and nests; else translation. (`/dev/kvm` alone says
    /// nothing: a software KVM has it too.)
    pub fn best() -> Acceleration {
        let nests = ["kvm_intel", "kvm_amd"].iter().any(|module| {
            fs::read_to_string(format!("/sys/module/{module}/parameters/nested"))
                .is_ok_and(|value| matches!(value.trim(), "Y" | "1"))
        });
        if nests && Path::new("/dev/kvm").exists() { Acceleration::Kvm } else { Acceleration::Tcg }
    }

    /// How many processors a node gets unless it is asked for more.
    ///
    /// QEMU 7.2 emulates each in a thread of its own, and with AMD-V in them that has races: of 66 guests
    /// booted in nodes of two, two were ended by a triple fault and two nodes hung with both
    /// processors in the kernel of the node; of the same guests in nodes of one, none.
    pub fn dependable_cpus(self) -> u32 {
        match self {
            Acceleration::Tcg => 1,
            Acceleration::Kvm => 2,
        }
    }
}

/// What a node is made of.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    pub acceleration: Acceleration,
    pub cpus: u32,
    pub memory_mib: u64,
    /// Size of the disk that outlives reboots; it is sparse on the host.
    pub disk_mib: u64,
    /// Bridges of the host that its NICs are ports of: the public side first, then the trunk.
    pub bridges: Vec<String>,
    pub kernel: PathBuf,
    /// More words for the kernel's command line.
    pub kernel_arguments: String,
    pub setup: Setup,
}

impl Machine {
    /// QEMU's arguments; paths are relative to the node's folder, where it runs. `taps` are the
    /// open files of the NICs, in order.
    fn arguments(&self, node: &Node, taps: &[i32]) -> Vec<String> {
        let mut args = Arguments::default();
        args.add("-name", format!("mallee-lab-{}", node.name));
        args.add("-nodefaults", "-no-user-config");
        args.add("-display", "none");
        match self.acceleration {
            Acceleration::Tcg => {
                args.add("-accel", "tcg,thread=multi");
                args.add("-cpu", "max,+svm,+npt");
            }
            Acceleration::Kvm => {
                args.add("-accel", "kvm");
                args.add("-cpu", "host");
            }
        }
        args.add("-M", "q35");
        args.add("-smp", self.cpus.to_string());
        args.add("-m", self.memory_mib.to_string());
        args.add("-kernel", self.kernel.display().to_string());
        args.add("-initrd", INITRD);
        args.add("-append", self.command_line());
        args.add("-chardev", "file,id=console,path=console.log,append=on");
        args.add("-serial", "chardev:console");
        args.add("-qmp", format!("unix:{},server=on,wait=off", monitor::SOCKET));
        args.add("-drive", format!("if=none,id=state,file={STATE_DISK},format=raw,cache=unsafe,discard=unmap"));
        args.add("-device", "virtio-blk-pci,drive=state,serial=state");
        args.add("-device", "virtio-rng-pci");
        self.ports(&mut args);
        for (nic, tap) in taps.iter().enumerate() {
            args.add("-netdev", format!("tap,id=nic{nic},fd={tap}"));
            let mac = tap::mac(&node.folder, nic);
            args.add("-device", format!("virtio-net-pci,netdev=nic{nic},mac={mac},romfile="));
        }
        args.0
    }

    /// Ports for commands (a socket each) and for the services' logs (a file each).
    fn ports(&self, args: &mut Arguments) {
        args.add("-device", "virtio-serial-pci,max_ports=16");
        for n in 0..PORTS {
            let socket = channel::socket_name(n);
            args.add("-chardev", format!("socket,id=control{n},path={socket},server=on,wait=off"));
            args.add("-device", format!("virtserialport,chardev=control{n},name={}", channel::port_name(n)));
        }
        for service in &self.setup.services {
            let name = &service.name;
            args.add("-chardev", format!("file,id=log-{name},path={name}.log,append=on"));
            args.add("-device", format!("virtserialport,chardev=log-{name},name={}", service.log_port()));
        }
    }

    fn command_line(&self) -> String {
        // Mitigations cost an emulated machine much and protect nobody. The TSC of an emulated machine is
        // steady; without the word the kernel spends a second finding out.
        format!(
            "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable random.trust_cpu=on {}",
            self.kernel_arguments
        )
    }
}

#[derive(Default)]
struct Arguments(Vec<String>);

impl Arguments {
    fn add(&mut self, name: &str, value: impl Into<String>) {
        self.0.push(name.to_owned());
        self.0.push(value.into());
    }
}

/// Makes the node's folder ready and starts its machine. Does not wait for it to boot.
///
/// The lab is `lock`ed by the caller; see [`become_machine`].
pub fn start(
    lab: &Lab,
    lock: &Flock<File>,
    node: &Node,
    machine: &Machine,
    packages: &PackageSet,
    places: &Places,
    credentials: Option<&Path>,
) -> Result<(), LabError> {
    if node.is_running() {
        return Err(LabError::Running { node: node.name.clone() });
    }
    fs::create_dir_all(&node.folder).on("making", &node.folder)?;
    let setup =
        serde_json::to_vec_pretty(&machine.setup).map_err(std::io::Error::other).on("describing", &node.folder)?;
    let archives = [initrd::base(packages)?, initrd::programs(places, &lab.folder)?];
    initrd::assemble(&node.folder.join(INITRD), &archives, &setup, credentials)?;
    make_disk(&node.folder.join(STATE_DISK), machine.disk_mib)?;
    node.save_machine(machine)?;
    power_on(node, lock, places)
}

/// Starts `mallee-lab exec-node`, which becomes the machine, and waits until it has said who it is.
fn power_on(node: &Node, lock: &Flock<File>, places: &Places) -> Result<(), LabError> {
    let log_path = node.folder.join("qemu.log");
    let log = File::options().create(true).append(true).open(&log_path).on("opening", &log_path)?;
    let program = places.find("mallee-lab")?;
    let lock = lock.as_raw_fd();
    let mut command = Command::new(&program);
    command.arg("exec-node").arg(&node.folder).arg(lock.to_string()).stdin(Stdio::null());
    command.stdout(log.try_clone().on("opening", &log_path)?).stderr(log);
    // SAFETY: fcntl(2) and setsid(2) are async-signal-safe and touch no memory of ours; the descriptor is
    // the caller's lock, which is open for as long as the caller lends it.
    unsafe {
        command.pre_exec(move || {
            keep_over_exec(lock, true)?;
            nix::unistd::setsid().map(drop).map_err(std::io::Error::from)
        });
    }
    let child =
        command.spawn().map_err(|source| LabError::NoProgram { program: program.display().to_string(), source })?;
    // Until the machine's own file names it, wait; a machine that fails says so in its log.
    let began = Instant::now();
    while node.process().is_none_or(|process| process.pid != child.id() as i32) {
        let process_gone = !Path::new(&format!("/proc/{}/exe", child.id())).exists();
        if process_gone || began.elapsed() > Duration::from_secs(10) {
            return Err(LabError::Died {
                node: node.name.clone(),
                console: fs::read_to_string(&log_path).unwrap_or_default(),
            });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Becomes the node's QEMU; returns only when it cannot.
///
/// The process writes down who it is *before* it becomes a machine, and holds the lab's lock (the
/// descriptor `lock`, inherited) until it has: whoever ends the lab knows of every machine that there
/// is or will be, also when the program that was starting them was killed.
pub fn become_machine(folder: &Path, lock: i32) -> Result<std::convert::Infallible, LabError> {
    let node =
        Node { name: folder.file_name().unwrap_or_default().to_string_lossy().into_owned(), folder: folder.to_owned() };
    let own = Process::own().on("reading", "/proc/self/stat")?;
    own.write(&node.process_file())?;
    keep_over_exec(lock, false).on("letting go of the lock of", folder)?;
    let machine = node.machine()?;
    for n in 0..PORTS {
        let _ = fs::remove_file(folder.join(channel::socket_name(n)));
    }
    let mut taps = Vec::new();
    for (nic, bridge) in machine.bridges.iter().enumerate() {
        taps.push(tap::open(&tap::name(folder, nic), bridge)?);
    }
    let descriptors: Vec<i32> = taps.iter().map(AsRawFd::as_raw_fd).collect();
    let source = Command::new(QEMU).args(machine.arguments(&node, &descriptors)).current_dir(folder).exec();
    Err(LabError::NoProgram { program: QEMU.to_owned(), source })
}

/// Whether a descriptor stays open in the program that is executed next.
fn keep_over_exec(descriptor: i32, keep: bool) -> std::io::Result<()> {
    let flags = if keep { 0 } else { libc::FD_CLOEXEC };
    // SAFETY: F_SETFD changes a flag of a descriptor, if there is one with this number, and nothing else.
    if unsafe { libc::fcntl(descriptor, libc::F_SETFD, flags) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

/// Waits until the node's supervisor answers, that is, its services were started.
pub fn wait_booted(node: &Node, patience: Duration) -> Result<NodeStatus, LabError> {
    let deadline = Instant::now() + patience;
    loop {
        match channel::status(&node.folder, Duration::from_millis(500)) {
            Ok(status) => return Ok(status),
            Err(_) if !node.is_running() => {
                return Err(LabError::Died { node: node.name.clone(), console: last_words(node) });
            }
            Err(_) if Instant::now() > deadline => {
                return Err(LabError::Silent {
                    node: node.name.clone(),
                    seconds: patience.as_secs(),
                    console: node.console_tail(30),
                });
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn last_words(node: &Node) -> String {
    let log = fs::read_to_string(node.folder.join("qemu.log")).unwrap_or_default();
    format!("{}\n{log}", node.console_tail(30))
}

/// An ext4 file system in a sparse file; one that is there is kept.
fn make_disk(path: &Path, size_mib: u64) -> Result<(), LabError> {
    if path.is_file() {
        return Ok(());
    }
    output_of(
        Command::new("mke2fs")
            .args(["-q", "-t", "ext4", "-L", "mallee-state", "-E", "lazy_itable_init=1,lazy_journal_init=1"])
            .arg(path)
            .arg(format!("{size_mib}M")),
    )?;
    Ok(())
}
