//! What this node is and can do, as it tells the controller.
//!
//! Asked of the machine itself: processors and memory of the kernel, KVM by running a throw-away VM
//! (`mallee-vmm --check-kvm`; CPU flags lie), the network of netd. Asked again while something is
//! missing, so that a netd that starts late or a module that is loaded later is noticed.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use mallee_netd::api::{CapabilitiesReply, CapabilitiesRequest};
use mallee_vmm::api::{KvmCheck, KvmClass};
use tokio::sync::watch;

use crate::api::{self, NodeFacts};
use crate::instance::Settings;

/// How long the throw-away VM may take.
const KVM_CHECK_TIMEOUT: Duration = Duration::from_secs(20);

/// How long netd may take to say what it can do. The controller hears nothing of this node before the
/// first facts are there: a netd that hangs is told to it, not waited for.
const NETD_TIMEOUT: Duration = Duration::from_secs(5);

/// Keeps `facts` true until the receiver side is gone.
pub async fn watch(
    name: String,
    zone: String,
    settings: Arc<Settings>,
    netd_socket: std::path::PathBuf,
    facts: watch::Sender<Option<NodeFacts>>,
) {
    let mut kvm = check_kvm(&settings.vmm).await;
    loop {
        let network = ask_netd(&netd_socket).await;
        let complete = network.is_ok() && kvm.class != KvmClass::None;
        let now = gather(&name, &zone, &settings.disk_root, &kvm, network);
        facts.send_if_modified(|old| {
            let differs = old.as_ref() != Some(&now);
            *old = Some(now);
            differs
        });
        tokio::select! {
            () = facts.closed() => return,
            () = tokio::time::sleep(Duration::from_secs(if complete { 30 } else { 2 })) => {}
        }
        if kvm.class == KvmClass::None {
            kvm = check_kvm(&settings.vmm).await;
        }
    }
}

fn gather(
    name: &str,
    zone: &str,
    disk: &Path,
    kvm: &KvmCheck,
    network: Result<CapabilitiesReply, String>,
) -> NodeFacts {
    let network = network.unwrap_or_else(|why| CapabilitiesReply {
        capabilities: [("netd".to_owned(), why)].into(),
        ..CapabilitiesReply::default()
    });
    NodeFacts {
        name: name.to_owned(),
        zone: zone.to_owned(),
        cpus: std::thread::available_parallelism().map_or(1, |count| count.get() as u32),
        memory_mib: memory_mib(),
        disk_mib: disk_mib(disk),
        kvm: match kvm.class {
            KvmClass::None => api::KvmClass::None,
            KvmClass::Software => api::KvmClass::Software,
            KvmClass::Hardware => api::KvmClass::Hardware,
        } as i32,
        kvm_detail: kvm.detail.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        network: network.capabilities,
        uplink_address: network.uplink_address,
        underlay_address: network.underlay_address,
        boot_id: boot_id(),
    }
}

/// The running kernel's boot id: another one means that no process of before is left.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

fn memory_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    total_memory_kib(&text).unwrap_or(0) / 1024
}

fn total_memory_kib(meminfo: &str) -> Option<u64> {
    let rest = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// MiB of the file system of the state folder, not what is free at the moment. The controller only keeps it: root disks take what their guests
/// write, so that neither their sizes nor what is free now would say how much more may be placed here.
fn disk_mib(path: &Path) -> u64 {
    nix::sys::statvfs::statvfs(path).map_or(0, |fs| (fs.blocks() * fs.fragment_size()) >> 20)
}

async fn check_kvm(vmm: &Path) -> KvmCheck {
    let none = |detail: String| KvmCheck { class: KvmClass::None, detail };
    let command = tokio::process::Command::new(vmm)
        .arg("--check-kvm")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = match tokio::time::timeout(KVM_CHECK_TIMEOUT, command).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => return none(format!("{} --check-kvm could not be run: {error}", vmm.display())),
        Err(_) => return none(format!("{} --check-kvm did not end within {KVM_CHECK_TIMEOUT:?}", vmm.display())),
    };
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        none(format!(
            "{} --check-kvm ended with {} and no answer that can be read: {error}",
            vmm.display(),
            output.status
        ))
    })
}

async fn ask_netd(socket: &Path) -> Result<CapabilitiesReply, String> {
    let mut client = mallee_netd::api::client(socket);
    let said = match tokio::time::timeout(NETD_TIMEOUT, client.capabilities(CapabilitiesRequest {})).await {
        Ok(Ok(reply)) => return Ok(reply.into_inner()),
        Ok(Err(status)) => status.message().to_owned(),
        Err(_) => format!("nothing within {NETD_TIMEOUT:?}"),
    };
    Err(format!("netd does not answer on {}: {said}", socket.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn total_memory_is_read_from_meminfo() {
        assert_eq!(total_memory_kib("MemTotal:       24683520 kB\nMemFree: 1 kB\n"), Some(24_683_520));
        assert_eq!(total_memory_kib("nothing"), None);
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_means_no_kvm_and_says_which() {
        let check = check_kvm(Path::new("/nonexistent/vmm")).await;
        assert_eq!(check.class, KvmClass::None);
        assert!(check.detail.contains("/nonexistent/vmm"), "{}", check.detail);
    }
}
