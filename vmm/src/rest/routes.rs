//! Which path and method is which [`Call`]. Paths, bodies and refusals are Firecracker's.

use serde::de::DeserializeOwned;

use super::{Call, Reply};
use crate::api::{Action, BootSource, Drive, Entropy, Identity, MachineConfig, NetworkInterface, Serial, VmConfig};
use crate::builder::MAX_VCPUS;
use crate::memory::{MAX_MIB, MIN_MIB};
use crate::metrics;

type Parsed = Result<Call, Reply>;

/// Understands a request, or says what is wrong with it.
pub fn parse(method: &str, path: &str, body: &[u8]) -> Parsed {
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    match (method, segments.as_slice()) {
        ("GET", []) => Ok(Call::DescribeInstance),
        ("GET", ["version"]) => {
            Ok(read(|_| Reply::json(&serde_json::json!({ "firecracker_version": env!("CARGO_PKG_VERSION") }))))
        }
        ("GET", ["vm", "config"]) => Ok(read(Reply::json)),
        ("GET", ["machine-config"]) => Ok(read(|config| Reply::json(&config.machine_config))),
        ("PUT", ["machine-config"]) => put_machine_config(body),
        ("PATCH", ["machine-config"]) => patch_machine_config(body),
        ("PUT", ["boot-source"]) => {
            let source: BootSource = json(body)?;
            Ok(configure(move |config| {
                config.boot_source = Some(source);
                Reply::done()
            }))
        }
        ("PUT", ["drives", id]) => put_drive(id, body),
        ("PUT", ["network-interfaces", id]) => put_interface(id, body),
        ("PUT", ["entropy"]) => {
            let entropy: Entropy = json(body)?;
            Ok(configure(move |config| {
                config.entropy = Some(entropy);
                Reply::done()
            }))
        }
        ("PUT", ["serial"]) => {
            let serial: Serial = json(body)?;
            Ok(configure(move |config| {
                config.serial = Some(serial);
                Reply::done()
            }))
        }
        ("PUT", ["mallee", "identity"]) => {
            let identity: Identity = json(body)?;
            Ok(configure(move |config| {
                config.identity = Some(identity);
                Reply::done()
            }))
        }
        ("GET", ["metrics"]) => Ok(read(|_| Reply::prometheus(metrics::prometheus_text()))),
        ("PUT", ["metrics"]) => json(body).map(Call::ConfigureMetrics),
        ("PUT", ["logger"]) => json(body).map(Call::ConfigureLogger),
        ("PUT", ["actions"]) => json::<Action>(body).map(Call::Act),
        ("GET" | "PUT" | "PATCH", _) => {
            Err(Reply::refused(format!("Invalid request method and/or path: {method} {path}.")))
        }
        _ => Err(Reply::refused(format!("Unsupported HTTP method: {method}."))),
    }
}

fn read(of: impl FnOnce(&VmConfig) -> Reply + Send + 'static) -> Call {
    Call::Configuration(Box::new(of))
}

fn configure(change: impl FnOnce(&mut VmConfig) -> Reply + Send + 'static) -> Call {
    Call::Configure(Box::new(change))
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Reply> {
    serde_json::from_slice(body).map_err(|error| {
        Reply::refused(format!("An error occurred when deserializing the json body of a request: {error}."))
    })
}

fn put_machine_config(body: &[u8]) -> Parsed {
    let machine: MachineConfig = json(body)?;
    check_machine_config(&machine)?;
    Ok(configure(move |config| {
        config.machine_config = machine;
        Reply::done()
    }))
}

/// Members of `PATCH /machine-config`: those given replace the present ones.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct MachineConfigPatch {
    vcpu_count: Option<u8>,
    mem_size_mib: Option<u64>,
    smt: Option<bool>,
    track_dirty_pages: Option<bool>,
}

fn patch_machine_config(body: &[u8]) -> Parsed {
    let patch: MachineConfigPatch = json(body)?;
    Ok(configure(move |config| {
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
    }))
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

fn put_drive(id: &str, body: &[u8]) -> Parsed {
    let drive: Drive = json(body)?;
    if drive.drive_id != id {
        return Err(Reply::refused("The id from the path does not match the id from the body!"));
    }
    Ok(configure(move |config| {
        let another_root = config.drives.iter().any(|other| other.is_root_device && other.drive_id != drive.drive_id);
        if drive.is_root_device && another_root {
            return Reply::refused("A root block device already exists!");
        }
        config.drives.retain(|other| other.drive_id != drive.drive_id);
        config.drives.push(drive);
        Reply::done()
    }))
}

fn put_interface(id: &str, body: &[u8]) -> Parsed {
    let interface: NetworkInterface = json(body)?;
    if interface.iface_id != id {
        return Err(Reply::refused("The id from the path does not match the id from the body!"));
    }
    Ok(configure(move |config| {
        config.network_interfaces.retain(|other| other.iface_id != interface.iface_id);
        config.network_interfaces.push(interface);
        Reply::done()
    }))
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
            ("PUT", "/actions", r#"{"action_type":"Explode"}"#),
            ("GET", "/nowhere", ""),
            ("DELETE", "/actions", ""),
        ] {
            let refusal = parse(method, path, body.as_bytes()).err().expect("refused");
            assert_eq!(refusal.status, 400);
            assert!(refusal.body.unwrap().contains("fault_message"));
        }
    }
}
