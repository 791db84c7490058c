//! Which path and method is which [`Call`]. Paths, bodies and refusals are Firecracker's.
//!
//! A new route is a line of [`ROUTES`]; the OpenAPI document is made from it (`openapi`).

use super::table::{self, Parsed, Route, route};
use super::{Call, Reply, devices};
use crate::api::{
    ActionRequest, Balloon, BalloonStatisticsUpdate, BalloonUpdate, BootSource, Console, ConsoleSize, Drive,
    DriveUpdate, Entropy, Identity, Logger, MachineConfig, MachineConfigPatch, Metrics, NetworkInterface,
    NetworkInterfaceUpdate, Serial, SnapshotCreate, SnapshotLoad, Version, VmConfig, VmStateUpdate, Vsock,
};
use crate::builder::{MAX_VCPUS, queue_pairs};
use crate::memory::{MAX_MIB, MIN_MIB};
use crate::metrics;

#[cfg(test)]
use super::openapi::PrometheusText;
#[cfg(test)]
use crate::api::{BalloonStatistics, InstanceInfo};

/// All that is served.
pub const ROUTES: &[Route] = &[
    route!("GET" "/" "What VM this is, and its state." => InstanceInfo, |_| Ok(Call::DescribeInstance)),
    route!("GET" "/version" "The monitor's version." => Version, |_| read(|_| Reply::json(&version()))),
    route!("PATCH" "/vm" "Pauses or resumes the VM; after the start." (VmStateUpdate),
        |_, update: VmStateUpdate| Ok(Call::SetState(update.state))),
    route!("PUT" "/snapshot/create" "Saves the VM, which must be paused." (SnapshotCreate), |_, request| Ok(Call::Save(request))),
    route!("PUT" "/snapshot/load" "Loads a VM that was saved, in the place of a configuration and a start." (SnapshotLoad),
        |_, request| Ok(Call::Load(request))),
    route!("GET" "/vm/config" "The whole configuration." => VmConfig, |_| read(Reply::json)),
    route!("GET" "/machine-config" "vCPUs and memory." => MachineConfig,
        |_| read(|config| Reply::json(&config.machine_config))),
    route!("PUT" "/machine-config" "Replaces vCPUs and memory; before the start." (MachineConfig), put_machine_config),
    route!("PATCH" "/machine-config" "Changes vCPUs or memory; before the start." (MachineConfigPatch), patch_machine_config),
    route!("PUT" "/boot-source" "Kernel, initrd, command line; before the start." (BootSource),
        |_, source| configure(move |config| config.boot_source = Some(source))),
    route!("PUT" "/drives/{drive_id}" "Adds or replaces a drive; before the start." (Drive), put_drive),
    route!("PATCH" "/drives/{drive_id}" "Changes a drive's file, its size or its limits; after the start." (DriveUpdate),
        devices::patch_drive),
    route!("PUT" "/network-interfaces/{iface_id}" "Adds or replaces a network interface; before the start."
        (NetworkInterface), put_interface),
    route!("PATCH" "/network-interfaces/{iface_id}" "Changes an interface's limits; after the start."
        (NetworkInterfaceUpdate), devices::patch_interface),
    route!("PUT" "/entropy" "Adds the entropy device; before the start." (Entropy),
        |_, entropy| configure(move |config| config.entropy = Some(entropy))),
    route!("PUT" "/vsock" "Adds the vsock device; before the start." (Vsock),
        |_, vsock| configure(move |config| config.vsock = Some(vsock))),
    route!("GET" "/balloon" "The balloon device." => Balloon, |_| read(devices::balloon)),
    route!("PUT" "/balloon" "Adds the balloon device; before the start." (Balloon),
        |_, balloon| configure(move |config| config.balloon = Some(balloon))),
    route!("PATCH" "/balloon" "Changes the balloon's target; after the start." (BalloonUpdate), devices::patch_balloon),
    route!("GET" "/balloon/statistics" "What the guest says of its memory; after the start." => BalloonStatistics,
        |_| devices::statistics()),
    route!("PATCH" "/balloon/statistics" "Changes how often the guest is asked; after the start." (BalloonStatisticsUpdate),
        devices::patch_statistics),
    route!("PUT" "/console" "Our own: adds a virtio console; before the start." (Console),
        |_, console| configure(move |config| config.console = Some(console))),
    route!("PATCH" "/console" "Our own: tells the guest its console's size; after the start." (ConsoleSize),
        devices::patch_console),
    route!("PUT" "/serial" "Where the serial port's output goes; before the start." (Serial),
        |_, serial| configure(move |config| config.serial = Some(serial))),
    route!("PUT" "/mallee/identity" "Our own: UUID and serial of the firmware tables; before the start." (Identity),
        |_, identity| configure(move |config| config.identity = Some(identity))),
    route!("GET" "/metrics" "Our own: all counters since the start, for Prometheus." => PrometheusText,
        |_| read(|_| Reply::prometheus(metrics::prometheus_text()))),
    route!("PUT" "/metrics" "Where lines of metrics are written; before the start, once." (Metrics),
        |_, metrics| Ok(Call::ConfigureMetrics(metrics))),
    route!("PUT" "/logger" "Where the log goes and what is in it; before the start." (Logger),
        |_, logger| Ok(Call::ConfigureLogger(logger))),
    route!("PUT" "/actions" "Starts the VM, flushes metrics, presses keys or the power button." (ActionRequest),
        |_, request: ActionRequest| Ok(Call::Act(request.action_type))),
];

/// Understands a request, or says what is wrong with it.
pub fn parse(method: &str, path: &str, body: &[u8]) -> Parsed {
    table::parse(ROUTES, method, path, body)
}

fn read(of: impl FnOnce(&VmConfig) -> Reply + Send + 'static) -> Parsed {
    Ok(Call::Configuration(Box::new(of)))
}

/// A change that cannot be refused.
fn configure(change: impl FnOnce(&mut VmConfig) + Send + 'static) -> Parsed {
    try_configure(move |config| {
        change(config);
        Reply::done()
    })
}

fn try_configure(change: impl FnOnce(&mut VmConfig) -> Reply + Send + 'static) -> Parsed {
    Ok(Call::Configure(Box::new(change)))
}

fn version() -> Version {
    Version { firecracker_version: env!("CARGO_PKG_VERSION").into() }
}

fn put_machine_config(_: &[&str], machine: MachineConfig) -> Parsed {
    check_machine_config(&machine)?;
    configure(move |config| config.machine_config = machine)
}

fn patch_machine_config(_: &[&str], patch: MachineConfigPatch) -> Parsed {
    try_configure(move |config| {
        let present = &config.machine_config;
        let machine = MachineConfig {
            vcpu_count: patch.vcpu_count.unwrap_or(present.vcpu_count),
            mem_size_mib: patch.mem_size_mib.unwrap_or(present.mem_size_mib),
            smt: patch.smt.unwrap_or(present.smt),
            track_dirty_pages: patch.track_dirty_pages.unwrap_or(present.track_dirty_pages),
        };
        if let Err(refusal) = check_machine_config(&machine) {
            return refusal;
        }
        config.machine_config = machine;
        Reply::done()
    })
}

fn check_machine_config(machine: &MachineConfig) -> Result<(), Reply> {
    if !(1..=MAX_VCPUS).contains(&machine.vcpu_count) {
        return Err(Reply::refused(format!("The vCPU number is invalid! It must be between 1 and {MAX_VCPUS}.")));
    }
    if !(MIN_MIB..=MAX_MIB).contains(&machine.mem_size_mib) {
        return Err(Reply::refused(format!(
            "The memory size (MiB) is invalid. It must be between {MIN_MIB} and {MAX_MIB}."
        )));
    }
    if machine.smt {
        return Err(Reply::refused("Enabling simultaneous multithreading is not supported."));
    }
    Ok(())
}

fn put_drive(names: &[&str], drive: Drive) -> Parsed {
    refuse_other_id(names, &drive.drive_id)?;
    try_configure(move |config| {
        let another_root = config.drives.iter().any(|other| other.is_root_device && other.drive_id != drive.drive_id);
        if drive.is_root_device && another_root {
            return Reply::refused("A root block device already exists!");
        }
        config.drives.retain(|other| other.drive_id != drive.drive_id);
        config.drives.push(drive);
        Reply::done()
    })
}

fn put_interface(names: &[&str], interface: NetworkInterface) -> Parsed {
    refuse_other_id(names, &interface.iface_id)?;
    queue_pairs(&interface).map_err(|error| Reply::refused(error.to_string()))?;
    configure(move |config| {
        config.network_interfaces.retain(|other| other.iface_id != interface.iface_id);
        config.network_interfaces.push(interface);
    })
}

pub(super) fn refuse_other_id(names: &[&str], id: &str) -> Result<(), Reply> {
    match names == [id] {
        true => Ok(()),
        false => Err(Reply::refused("The id from the path does not match the id from the body!")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(config: &mut VmConfig, method: &str, path: &str, body: &str) -> Reply {
        match parse(method, path, body.as_bytes()) {
            Ok(Call::Configure(change)) => change(config),
            Ok(Call::Configuration(of)) => of(config),
            Ok(_) => panic!("{method} {path} is not configuration"),
            Err(refusal) => refusal,
        }
    }

    #[test]
    fn what_was_put_is_what_is_got() {
        let mut config = VmConfig::default();
        let put = apply(&mut config, "PUT", "/machine-config", r#"{"vcpu_count":2,"mem_size_mib":256}"#);
        assert_eq!(put, Reply::done());
        let patch = apply(&mut config, "PATCH", "/machine-config", r#"{"mem_size_mib":512}"#);
        assert_eq!(patch, Reply::done());
        let got = apply(&mut config, "GET", "/machine-config", "");
        let expected = MachineConfig { vcpu_count: 2, mem_size_mib: 512, ..Default::default() };
        assert_eq!(serde_json::from_str::<MachineConfig>(&got.body.unwrap()).unwrap(), expected);
    }

    #[test]
    fn a_refusal_names_the_member_that_is_not_known() {
        let refusal = parse("PUT", "/entropy", br#"{"rate_limitter":{}}"#).err().unwrap();
        let fault: crate::api::Fault = serde_json::from_str(&refusal.body.unwrap()).unwrap();
        assert!(
            fault
                .fault_message
                .starts_with("An error occurred when deserializing the json body of a request: unknown field")
        );
        assert!(fault.fault_message.contains("`rate_limitter`"), "{}", fault.fault_message);
    }

    #[test]
    fn a_second_root_device_and_false_ids_are_refused() {
        let mut config = VmConfig::default();
        let drive = |id: &str| format!(r#"{{"drive_id":"{id}","path_on_host":"/x","is_root_device":true}}"#);
        assert_eq!(apply(&mut config, "PUT", "/drives/a", &drive("a")).status, 204);
        assert_eq!(apply(&mut config, "PUT", "/drives/a", &drive("a")).status, 204);
        assert_eq!(apply(&mut config, "PUT", "/drives/b", &drive("b")).status, 400);
        assert_eq!(apply(&mut config, "PUT", "/drives/c", &drive("b")).status, 400);
        assert_eq!(config.drives.len(), 1);
    }

    #[test]
    fn unknown_members_paths_and_methods_are_refused_with_a_fault() {
        for (method, path, body) in [
            ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":64,"turbo":true}"#),
            ("PUT", "/machine-config", r#"{"vcpu_count":33,"mem_size_mib":64}"#),
            ("PUT", "/network-interfaces/a", r#"{"iface_id":"a","host_dev_name":"t","queue_pairs":0}"#),
            ("PUT", "/network-interfaces/a", r#"{"iface_id":"a","host_dev_name":"t","queue_pairs":17}"#),
            (
                "PUT",
                "/network-interfaces/a",
                r#"{"iface_id":"a","host_dev_name":"t","vhost_net":true,"rx_rate_limiter":{}}"#,
            ),
            ("PUT", "/actions", r#"{"action_type":"Explode"}"#),
            ("PUT", "/actions", r#"{"action_type":"FlushMetrics","now":true}"#),
            ("PUT", "/actions", ""),
            ("GET", "/version", "{}"),
            ("PUT", "/drives", r#"{"drive_id":"a"}"#),
            ("PATCH", "/drives/a", r#"{"drive_id":"a","path_on_host":"/x","size":1048576}"#),
            ("GET", "/nowhere", ""),
            ("DELETE", "/actions", ""),
        ] {
            let refusal = parse(method, path, body.as_bytes()).err().expect("refused");
            assert_eq!(refusal.status, 400);
            assert!(refusal.body.unwrap().contains("fault_message"));
        }
    }
}
