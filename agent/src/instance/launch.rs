//! The steps of a launch, in their order: image, disk, network, process.
//!
//! Each may be repeated and dropped at any point: what is there already is found and kept.

use std::io;
use std::path::PathBuf;

use futures::future::try_join_all;
use mallee_netd::api::{Interface, tap_name};
use tokio::sync::watch;
use tokio::task::block_in_place;

use super::events::SpanNames;
use super::folder::{Folder, ignore_missing};
use super::record::Record;
use super::vmm_process::{Launch, VmmProcess};
use super::{Services, disk, vmm_config};
use crate::api::{KvmClass, NodeFacts, Span};
use crate::clock::unix_ns;
use crate::images::{Cached, FetchError};
use crate::network;
use crate::store;
use crate::wanted::{Image, Machine, Wanted};

/// Why a step did not get done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Trouble {
    /// May go away by itself: tried again.
    #[error("{0}")]
    Passing(String),
    /// Stays until something else is wanted: the instance fails with this reason.
    #[error("{0}")]
    Lasting(String),
}

impl Trouble {
    /// The host's file system or kernel refused `what`.
    pub fn host(what: &str) -> impl Fn(io::Error) -> Self + '_ {
        move |error| Self::Passing(format!("{what}: {error}"))
    }
}

impl From<FetchError> for Trouble {
    fn from(error: FetchError) -> Self {
        // The code that EC2 has for an image that cannot be used (API reference, `StateReason`).
        if error.is_permanent() {
            Self::Lasting(format!("Client.InvalidSnapshot.NotFound: {error}"))
        } else {
            Self::Passing(error.to_string())
        }
    }
}

/// The image's files on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    pub root: Option<PathBuf>,
}

/// Waits until it is known what KVM can do here, and refuses an image that cannot run on it.
pub async fn check_kvm(facts: &watch::Receiver<Option<NodeFacts>>, image: &Image) -> Result<(), Trouble> {
    let mut facts = facts.clone();
    let known = facts.wait_for(Option::is_some).await;
    let Some(facts) = known.ok().and_then(|facts| facts.clone()) else {
        return Err(Trouble::Passing("the agent is ending".to_owned()));
    };
    match facts.kvm() {
        KvmClass::Hardware => Ok(()),
        KvmClass::Software if image.runs_on_software_kvm => Ok(()),
        KvmClass::Software => Err(Trouble::Lasting(format!(
            "Server.InternalError: image {} needs a processor's virtualization and node {} has software KVM only ({}); use another zone or an image made for it",
            image.id, facts.name, facts.kvm_detail
        ))),
        // A module that is loaded later changes this: the facts are asked for again.
        KvmClass::None | KvmClass::Unspecified => {
            Err(Trouble::Passing(format!("no VM can run on node {}: {}", facts.name, facts.kvm_detail)))
        }
    }
}

/// Brings the image's parts into the cache, all at the same time.
pub async fn fetch_image(services: &Services, names: &SpanNames, image: &Image) -> Result<Files, Trouble> {
    let fetches = image.parts().map(|(name, part)| async move {
        let cached = services.images.get(part).await?;
        let mut span = names.span("agent", &format!("image: fetch {name}"), cached.asked_unix_ns, cached.ready_unix_ns);
        span.attributes.insert("bytes".to_owned(), part.size.to_string());
        span.attributes.insert("cached".to_owned(), cached.hit.to_string());
        services.spans.push(span);
        Ok::<(&str, Cached), FetchError>((name, cached))
    });
    let mut parts = try_join_all(fetches).await?;
    let mut take = |name| {
        let place = parts.iter().position(|(found, _)| *found == name)?;
        Some(parts.swap_remove(place).1.path)
    };
    let kernel = take("kernel").ok_or_else(|| Trouble::Lasting("the image has no kernel".to_owned()))?;
    Ok(Files { kernel, initrd: take("initrd"), root: take("root") })
}

/// Makes the root disk, if the image has one.
pub fn make_disk(
    services: &Services,
    names: &SpanNames,
    folder: &Folder,
    machine: &Machine,
    files: &Files,
    uid: u32,
) -> Result<(), Trouble> {
    let Some(image) = &files.root else { return Ok(()) };
    let begun = unix_ns();
    let made = block_in_place(|| disk::make(image, &folder.disk(), machine.root_bytes, uid))
        .map_err(Trouble::host("the root disk could not be made"))?;
    let mut span = names.span("agent", "disk", begun, unix_ns());
    span.attributes.insert("how".to_owned(), made.as_str().to_owned());
    services.spans.push(span);
    Ok(())
}

/// When a launch began: what is older is not news of it.
#[derive(Debug, Clone, Copy)]
pub struct Begin {
    pub unix_ns: u64,
    /// The network that was desired then ([`network::Desired::number`]).
    pub network: u64,
}

impl Begin {
    pub fn now(services: &Services) -> Self {
        Self { unix_ns: unix_ns(), network: services.desired_network.borrow().number }
    }
}

/// Waits until the network that netd has applied holds the instance's interface, with a tap that
/// `uid` may open. `waiting` is told, whenever it changes, what netd says.
///
/// A network of before `begin` does not count, though it may hold the interface: netd may be taking the
/// tap away at this moment, for a state in between in which the instance was not wanted.
pub async fn await_network(
    services: &Services,
    names: &SpanNames,
    wanted: &Wanted,
    uid: u32,
    begin: Begin,
    mut waiting: impl FnMut(&str),
) -> Result<Interface, Trouble> {
    let mut status = services.network.clone();
    loop {
        let now = status.borrow_and_update().clone();
        if let Some(applied) = now.applied.as_ref().filter(|applied| applied.number >= begin.network)
            && let Some(interface) =
                applied.network.interfaces.iter().find(|interface| interface.id == wanted.interface)
            && interface.owner_uid == uid
        {
            // A network that was there before is no part of this launch.
            if applied.done_unix_ns >= begin.unix_ns {
                services.spans.push(network_span(names, applied));
            }
            return Ok(interface.clone());
        }
        waiting(&now.error);
        if status.changed().await.is_err() {
            return Err(Trouble::Passing("the agent is ending".to_owned()));
        }
    }
}

fn network_span(names: &SpanNames, applied: &network::Applied) -> Span {
    let mut span = names.span("netd", "network: apply", applied.asked_unix_ns, applied.done_unix_ns);
    span.attributes.insert("netd_took_us".to_owned(), applied.took_us.to_string());
    span.attributes.insert("generation".to_owned(), applied.network.generation.to_string());
    span
}

/// Starts the VMM for the start that `record` is at.
pub fn start(
    services: &Services,
    names: &SpanNames,
    folder: &Folder,
    record: &Record,
    wanted: &Wanted,
    files: &Files,
    interface: &Interface,
) -> Result<VmmProcess, Trouble> {
    let begun = unix_ns();
    let machine = &wanted.machine;
    let id = &names.instance;
    let config = vmm_config::configuration(id, machine, &wanted.interface, &interface.mac);
    let bytes = serde_json::to_vec_pretty(&config).map_err(|error| Trouble::Lasting(error.to_string()))?;
    store::replace(&folder.config(), &bytes, 0o644).map_err(Trouble::host("vmm.json"))?;
    clear_leftovers(folder, record.starts).map_err(Trouble::host("what the last VMM left"))?;
    let cgroup = match &services.cgroups {
        Some(cgroups) => Some(cgroups.make(id, machine.vcpus, machine.memory_mib).map_err(Trouble::host("cgroup"))?),
        None => None,
    };
    let launch = Launch {
        folder,
        uid: record.uid,
        program: &services.settings.vmm,
        arguments: vmm_config::arguments(id, record.starts),
        bindings: vmm_config::bindings(folder, files),
        cgroup,
    };
    let process =
        block_in_place(|| VmmProcess::spawn(launch)).map_err(Trouble::host("the VMM could not be started"))?;
    tracing::info!(instance = %id, pid = process.pid(), start = record.starts, tap = tap_name(&wanted.interface), "VMM started");
    let mut span = names.span("agent", "spawn", begun, unix_ns());
    span.attributes.insert("pid".to_owned(), process.pid().to_string());
    services.spans.push(span);
    Ok(process)
}

/// A VMM that was killed leaves its socket, and each start its events.
fn clear_leftovers(folder: &Folder, start: u64) -> io::Result<()> {
    ignore_missing(std::fs::remove_file(folder.api_socket()))?;
    for entry in std::fs::read_dir(folder.vm())? {
        let entry = entry?;
        let name = entry.file_name();
        let is_old = name
            .to_str()
            .and_then(|name| name.strip_prefix("events-"))
            .is_some_and(|number| number.parse() != Ok(start));
        if is_old {
            ignore_missing(std::fs::remove_file(entry.path()))?;
        }
    }
    Ok(())
}
