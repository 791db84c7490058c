//! The configuration that an instance's VMM starts with, and where things lie in its jail.

use mallee_netd::api::tap_name;
use mallee_vmm::api::{
    BootSource, Drive, DriveFormat, Entropy, Identity, MachineConfig, NetworkInterface, Serial, VmConfig,
};

use super::confine::Binding;
use super::folder::{Folder, events_name};
use super::launch::Files;
use crate::ids::InstanceId;
use crate::wanted::Machine;

const KERNEL: &str = "/image/kernel";
const INITRD: &str = "/image/initrd";
const CONFIG: &str = "/vmm.json";
const VM: &str = "/vm";

/// Bytes of console kept per file; EC2 shows the newest 64 KiB (GetConsoleOutput).
const CONSOLE_LIMIT: u64 = 1 << 20;

/// What goes into `vmm.json`.
#[allow(clippy::needless_update, reason = "what a VMM offers grows; an agent states what it wants of it")]
pub fn configuration(id: &InstanceId, machine: &Machine, interface: &str, mac: &str) -> VmConfig {
    let image = &machine.image;
    VmConfig {
        machine_config: MachineConfig {
            vcpu_count: machine.vcpus,
            mem_size_mib: machine.memory_mib,
            ..MachineConfig::default()
        },
        boot_source: Some(BootSource {
            kernel_image_path: KERNEL.into(),
            initrd_path: image.initrd.as_ref().map(|_| INITRD.into()),
            boot_args: (!image.cmdline.is_empty()).then(|| image.cmdline.clone()),
            ..BootSource::default()
        }),
        drives: image.root.iter().map(|_| root_drive()).collect(),
        network_interfaces: vec![NetworkInterface {
            iface_id: "eth0".to_owned(),
            host_dev_name: tap_name(interface),
            guest_mac: Some(mac.to_owned()),
            ..NetworkInterface::default()
        }],
        entropy: Some(Entropy::default()),
        serial: Some(Serial { serial_out_path: format!("{VM}/console").into(), size_limit: Some(CONSOLE_LIMIT) }),
        identity: Some(Identity { uuid: id.platform_uuid(), serial: id.platform_uuid() }),
        ..VmConfig::default()
    }
}

#[allow(clippy::needless_update, reason = "what a VMM offers grows; an agent states what it wants of it")]
fn root_drive() -> Drive {
    Drive {
        drive_id: "root".to_owned(),
        path_on_host: format!("{VM}/disk").into(),
        is_root_device: true,
        format: DriveFormat::Raw,
        ..Drive::default()
    }
}

/// The program's arguments for the instance's `start`-th start.
pub fn arguments(id: &InstanceId, start: u64) -> Vec<String> {
    let events = format!("{VM}/{}", events_name(start));
    let socket = format!("{VM}/api.sock");
    ["--id", id.as_str(), "--api-sock", &socket, "--config-file", CONFIG, "--events-path", &events]
        .map(str::to_owned)
        .to_vec()
}

/// What of the host the VMM sees.
pub fn bindings(folder: &Folder, files: &Files) -> Vec<Binding> {
    let read_only = |host: &std::path::Path, inside| Binding { host: host.to_owned(), inside, writable: false };
    let mut bindings = vec![
        Binding { host: folder.vm(), inside: VM, writable: true },
        read_only(&folder.config(), CONFIG),
        read_only(&files.kernel, KERNEL),
    ];
    bindings.extend(files.initrd.as_deref().map(|initrd| read_only(initrd, INITRD)));
    bindings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wanted;

    #[test]
    fn what_is_written_is_what_the_vmm_reads() {
        let (id, wanted) = wanted::parse(&wanted::tests::desired()).unwrap();
        let config = configuration(&id, &wanted.machine, &wanted.interface, "02:00:00:00:00:01");
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<VmConfig>(&json).unwrap(), config);
        assert_eq!(config.network_interfaces[0].host_dev_name, "tp456789abcdef0");
        let identity = config.identity.unwrap();
        assert!(identity.uuid.starts_with("ec2") && identity.uuid == identity.serial);
        assert!(config.boot_source.unwrap().initrd_path.is_none());
        assert_eq!(config.drives.len(), 1);
    }
}
