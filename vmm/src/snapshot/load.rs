//! A request to load a snapshot, and what it changes of the configuration that was saved.

use std::path::{Path, PathBuf};

use super::memory;
use super::{PageSource, State};
use crate::api::{MemBackendType, Serial, SnapshotLoad, VmConfig};
use crate::error::{Error, Result};
use crate::memory::GuestMemory;

/// A snapshot that was read and fits the request. Nothing but its files has been looked at.
pub struct Loaded {
    pub state: State,
    /// As saved, with what the request puts in its place.
    pub config: VmConfig,
    memory: MemorySource,
}

/// Where a restored VM's memory comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemorySource {
    /// The memory file, mapped.
    File(PathBuf),
    /// A page server's socket.
    Server(PathBuf),
}

impl Loaded {
    pub fn read(request: &SnapshotLoad) -> Result<Self> {
        let memory = memory_source(request)?;
        let state = State::read(&request.snapshot_path)?;
        let mut config = state.config.clone();
        change(&mut config, request)?;
        Ok(Loaded { state, config, memory })
    }

    /// The VM's memory, and who has to be there as long as it is.
    pub fn map_memory(&self) -> Result<(GuestMemory, Option<PageSource>)> {
        let machine = &self.config.machine_config;
        let (mib, tracks_changes) = (machine.mem_size_mib, machine.track_dirty_pages);
        match &self.memory {
            MemorySource::File(path) => Ok((memory::map(path, mib, tracks_changes)?, None)),
            MemorySource::Server(path) => {
                let memory = crate::memory::map(&crate::memory::ram_ranges(mib)?, None, tracks_changes)?;
                let source = PageSource::connect(&memory, path).map_err(Error::file("page server", path))?;
                Ok((memory, Some(source)))
            }
        }
    }

    /// What is left of it when there is a VM.
    pub fn into_config(self) -> VmConfig {
        self.config
    }

    pub fn memory_path(&self) -> &Path {
        match &self.memory {
            MemorySource::File(path) | MemorySource::Server(path) => path,
        }
    }
}

fn memory_source(request: &SnapshotLoad) -> Result<MemorySource> {
    match (&request.mem_file_path, &request.mem_backend) {
        (Some(path), None) => Ok(MemorySource::File(path.clone())),
        (None, Some(backend)) => Ok(match backend.backend_type {
            MemBackendType::File => MemorySource::File(backend.backend_path.clone()),
            MemBackendType::Uffd => MemorySource::Server(backend.backend_path.clone()),
        }),
        _ => refused("give either mem_file_path or mem_backend".into()),
    }
}

fn change(config: &mut VmConfig, request: &SnapshotLoad) -> Result<()> {
    config.machine_config.track_dirty_pages = request.track_dirty_pages;
    for change in &request.network_overrides {
        let interfaces = &mut config.network_interfaces;
        let Some(interface) = interfaces.iter_mut().find(|it| it.iface_id == change.iface_id) else {
            return refused(format!("network_overrides: the snapshot has no interface {:?}", change.iface_id));
        };
        interface.host_dev_name.clone_from(&change.host_dev_name);
        if change.guest_mac.is_some() && interface.guest_mac.is_none() {
            // The driver has not accepted that the device has one.
            return refused(format!("guest_mac: interface {:?} was saved without one", change.iface_id));
        }
        if let Some(mac) = &change.guest_mac {
            interface.guest_mac = Some(mac.clone());
        }
    }
    for change in &request.drive_overrides {
        let Some(drive) = config.drives.iter_mut().find(|it| it.drive_id == change.drive_id) else {
            return refused(format!("drive_overrides: the snapshot has no drive {:?}", change.drive_id));
        };
        drive.path_on_host.clone_from(&change.path_on_host);
    }
    if let Some(change) = &request.vsock_override {
        let Some(vsock) = &mut config.vsock else {
            return refused("vsock_override: the snapshot has no vsock device".into());
        };
        vsock.uds_path.clone_from(&change.uds_path);
    }
    if let Some(path) = &request.console_path {
        let Some(console) = &mut config.console else {
            return refused("console_path: the snapshot has no virtio console".into());
        };
        console.path.clone_from(path);
    }
    if let Some(path) = &request.serial_out_path {
        config.serial.get_or_insert_with(Serial::default).serial_out_path.clone_from(path);
    }
    Ok(())
}

fn refused<T>(why: String) -> Result<T> {
    Err(Error::BadConfiguration(why))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{DriveOverride, MemBackend, NetworkOverride, VsockOverride};

    fn config() -> VmConfig {
        serde_json::from_str(
            r#"{
                "drives": [{ "drive_id": "root", "path_on_host": "/a", "is_root_device": true }],
                "network-interfaces": [
                    { "iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:00:00:00:01" },
                    { "iface_id": "eth1", "host_dev_name": "tap1" }
                ],
                "vsock": { "guest_cid": 3, "uds_path": "/v" },
                "console": { "kind": "pty", "path": "/c" }
            }"#,
        )
        .unwrap()
    }

    fn network(id: &str, mac: Option<&str>) -> NetworkOverride {
        NetworkOverride { iface_id: id.into(), host_dev_name: "tap9".into(), guest_mac: mac.map(str::to_owned) }
    }

    #[test]
    fn a_clone_gets_what_the_request_names_and_keeps_the_rest() {
        let mut changed = config();
        let request = SnapshotLoad {
            network_overrides: vec![network("eth0", Some("06:00:00:00:00:02")), network("eth1", None)],
            drive_overrides: vec![DriveOverride { drive_id: "root".into(), path_on_host: "/b".into() }],
            vsock_override: Some(VsockOverride { uds_path: "/w".into() }),
            serial_out_path: Some("/s".into()),
            console_path: Some("/d".into()),
            track_dirty_pages: true,
            ..SnapshotLoad::default()
        };
        change(&mut changed, &request).unwrap();
        let mut expected = config();
        expected.machine_config.track_dirty_pages = true;
        expected.drives[0].path_on_host = "/b".into();
        expected.network_interfaces[0].host_dev_name = "tap9".into();
        expected.network_interfaces[0].guest_mac = Some("06:00:00:00:00:02".into());
        expected.network_interfaces[1].host_dev_name = "tap9".into();
        expected.vsock.as_mut().unwrap().uds_path = "/w".into();
        expected.console.as_mut().unwrap().path = "/d".into();
        expected.serial = Some(Serial { serial_out_path: "/s".into(), size_limit: None });
        assert_eq!(changed, expected);
    }

    #[test]
    fn what_the_snapshot_does_not_have_cannot_be_replaced() {
        let requests = [
            SnapshotLoad { network_overrides: vec![network("eth2", None)], ..SnapshotLoad::default() },
            SnapshotLoad {
                network_overrides: vec![network("eth1", Some("06:00:00:00:00:02"))],
                ..SnapshotLoad::default()
            },
            SnapshotLoad {
                drive_overrides: vec![DriveOverride { drive_id: "data".into(), path_on_host: "/b".into() }],
                ..SnapshotLoad::default()
            },
        ];
        for request in requests {
            assert!(change(&mut config(), &request).is_err(), "{request:?}");
        }
        let request =
            SnapshotLoad { vsock_override: Some(VsockOverride { uds_path: "/w".into() }), ..SnapshotLoad::default() };
        assert!(change(&mut VmConfig::default(), &request).is_err());
    }

    #[test]
    fn memory_comes_from_one_file() {
        let backend = |backend_type| Some(MemBackend { backend_type, backend_path: "/m".into() });
        let request = |path: Option<&str>, mem_backend| SnapshotLoad {
            mem_file_path: path.map(PathBuf::from),
            mem_backend,
            ..SnapshotLoad::default()
        };
        let source = |path, backend| memory_source(&request(path, backend)).ok();
        let (file, server) = (|path: &str| Some(MemorySource::File(path.into())), MemorySource::Server("/m".into()));
        assert_eq!(source(None, backend(MemBackendType::File)), file("/m"));
        assert_eq!(source(None, backend(MemBackendType::Uffd)), Some(server));
        assert_eq!(source(Some("/n"), None), file("/n"));
        assert_eq!(source(None, None), None);
        assert_eq!(source(Some("/n"), backend(MemBackendType::File)), None);
    }
}
