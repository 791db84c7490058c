//! A public side for machines that have none of their own: a bridge that stands for the outside, and
//! nodes joined to it by a veth (a network namespace) or a tap (a virtual machine).
//!
//! Everything made here is in the link group [`GROUP`]; only links of that group are removed. A
//! namespace is made as `ip netns` does it, so that `ip netns exec NAME` works on it.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use futures::TryStreamExt;
use ipnet::Ipv4Net;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::{Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use crate::cli::Outside;
use crate::desired::LinkName;
use crate::error::{Error, Result};
use crate::links::{Links, TapOptions, create_tap};

/// The link group of what is made here: "outs" in ASCII.
const GROUP: u32 = u32::from_be_bytes(*b"outs");
/// Where `ip netns` keeps namespaces by name.
const NAMESPACES: &str = "/run/netns";

pub async fn run(command: Outside) -> Result<()> {
    let links = Links::connect()?;
    match command {
        Outside::Up { bridge, address, namespace, namespace_address, uplink_name } => {
            bridge_up(&links, &bridge, address).await?;
            if let Some((namespace, own)) = namespace.zip(namespace_address) {
                join_namespace(&links, &bridge, &namespace, &uplink_name, own, address.addr()).await?;
            }
            Ok(())
        }
        Outside::Tap { bridge, name, owner } => add_tap(&links, &bridge, &name, owner).await,
        Outside::Down { bridge, namespace } => down(&links, &bridge, namespace.as_ref()).await,
    }
}

async fn bridge_up(links: &Links, bridge: &LinkName, address: Ipv4Net) -> Result<()> {
    let handle = links.handle();
    if find_own(links, bridge).await?.is_none() {
        let message = LinkBridge::new(bridge.as_str()).link_group(GROUP).mcast_snooping(false).forward_delay(0).build();
        let made = handle.link().add(message).execute().await;
        made.map_err(Error::link(format!("making the bridge {bridge}")))?;
    }
    let index = index(links, bridge).await?;
    let set = handle.address().add(index, address.addr().into(), address.prefix_len()).replace();
    set.execute().await.map_err(Error::link(format!("giving {address} to {bridge}")))?;
    set_up(handle, index, bridge).await
}

async fn add_tap(links: &Links, bridge: &LinkName, name: &LinkName, owner: u32) -> Result<()> {
    let handle = links.handle();
    let controller = own_bridge(links, bridge).await?;
    if find_own(links, name).await?.is_none() {
        let mark = async {
            let message = LinkUnspec::new_with_index(index(links, name).await?).link_group(GROUP).build();
            handle.link().set(message).execute().await.map_err(Error::link(format!("marking {name}")))
        };
        create_tap(name, TapOptions { owner, multi_queue: false }, mark).await?;
    }
    let index = index(links, name).await?;
    join(handle, index, controller, name).await?;
    set_up(handle, index, name).await
}

/// Makes the namespace, and joins it to the bridge with a veth whose far end is the node's uplink.
async fn join_namespace(
    links: &Links,
    bridge: &LinkName,
    namespace: &LinkName,
    uplink: &LinkName,
    address: Ipv4Net,
    gateway: Ipv4Addr,
) -> Result<()> {
    let handle = links.handle();
    let controller = own_bridge(links, bridge).await?;
    let path = make_namespace(namespace)?;
    let near = near_end(namespace)?;
    if find_own(links, &near).await?.is_none() {
        let far = File::open(&path).map_err(Error::io(format!("opening {}", path.display())))?;
        let message = LinkVeth::new(near.as_str(), uplink.as_str()).link_group(GROUP).build();
        let message = with_peer_in(message, &far);
        let made = handle.link().add(message).execute().await;
        made.map_err(Error::link(format!("joining the namespace {namespace} to {bridge}")))?;
    }
    let index = index(links, &near).await?;
    join(handle, index, controller, &near).await?;
    set_up(handle, index, &near).await?;
    let uplink = uplink.clone();
    in_namespace(path, move || configure_uplink(uplink, address, gateway)).await
}

/// Puts the veth's peer into the namespace as it is made.
fn with_peer_in(mut message: LinkMessage, namespace: &File) -> LinkMessage {
    use netlink_packet_route::link::{InfoData, InfoVeth, LinkInfo};
    for attribute in &mut message.attributes {
        let LinkAttribute::LinkInfo(infos) = attribute else { continue };
        for info in infos {
            if let LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))) = info {
                peer.attributes.push(LinkAttribute::NetNsFd(namespace.as_raw_fd()));
            }
        }
    }
    message
}

/// Runs inside of the namespace: addresses and the default route.
async fn configure_uplink(uplink: LinkName, address: Ipv4Net, gateway: Ipv4Addr) -> Result<()> {
    let links = Links::connect()?;
    let handle = links.handle();
    let loopback = index(&links, &"lo".parse().map_err(Error::Internal)?).await?;
    set_up(handle, loopback, &uplink).await?;
    let index = index(&links, &uplink).await?;
    let set = handle.address().add(index, address.addr().into(), address.prefix_len()).replace();
    set.execute().await.map_err(Error::link(format!("giving {address} to {uplink}")))?;
    set_up(handle, index, &uplink).await?;
    let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).output_interface(index).build();
    let set = handle.route().add(route).replace().execute().await;
    set.map_err(Error::link(format!("routing by {gateway}")))
}

async fn down(links: &Links, bridge: &LinkName, namespace: Option<&LinkName>) -> Result<()> {
    let handle = links.handle();
    if let Some(namespace) = namespace {
        delete_own(links, &near_end(namespace)?).await?;
        remove_namespace(namespace)?;
    }
    let Some(found) = find_own(links, bridge).await? else { return Ok(()) };
    let mut all = handle.link().get().execute();
    let mut ports = Vec::new();
    while let Some(link) = all.try_next().await.map_err(Error::link("listing links"))? {
        let of_bridge = link.attributes.contains(&LinkAttribute::Controller(found.header.index));
        if of_bridge && is_own(&link) {
            ports.push(link.header.index);
        }
    }
    for index in ports.into_iter().chain([found.header.index]) {
        let deleted = handle.link().del(index).execute().await;
        deleted.map_err(Error::link(format!("removing {bridge} and its ports")))?;
    }
    Ok(())
}

/// Name of the veth's end on the bridge: "ve" and as much of the namespace's name as fits.
fn near_end(namespace: &LinkName) -> Result<LinkName> {
    let tail: String = namespace.as_str().chars().take(13).collect();
    format!("ve{tail}").parse().map_err(Error::Internal)
}

fn is_own(link: &LinkMessage) -> bool {
    link.attributes.contains(&LinkAttribute::Group(GROUP))
}

/// The link called `name` if it was made here; an error if it is somebody else's.
async fn find_own(links: &Links, name: &LinkName) -> Result<Option<LinkMessage>> {
    let Some(index) = links.index_of(name).await? else { return Ok(None) };
    let mut found = links.handle().link().get().match_index(index).execute();
    match found.try_next().await.map_err(Error::link(format!("looking at {name}")))? {
        Some(link) if is_own(&link) => Ok(Some(link)),
        Some(_) => Err(Error::ForeignLink { name: name.to_string() }),
        None => Ok(None),
    }
}

async fn own_bridge(links: &Links, bridge: &LinkName) -> Result<u32> {
    match find_own(links, bridge).await? {
        Some(link) => Ok(link.header.index),
        None => Err(Error::Internal(format!("there is no bridge {bridge}; run `outside up` first"))),
    }
}

async fn delete_own(links: &Links, name: &LinkName) -> Result<()> {
    match find_own(links, name).await? {
        Some(link) => {
            let deleted = links.handle().link().del(link.header.index).execute().await;
            deleted.map_err(Error::link(format!("removing {name}")))
        }
        None => Ok(()),
    }
}

async fn index(links: &Links, name: &LinkName) -> Result<u32> {
    let found = links.index_of(name).await?;
    found.ok_or_else(|| Error::Internal(format!("the link {name} is not there")))
}

async fn set_up(handle: &Handle, index: u32, name: &LinkName) -> Result<()> {
    let message = LinkMessageBuilder::<LinkUnspec>::default().index(index).up().build();
    let set = handle.link().set(message).execute().await;
    set.map_err(Error::link(format!("setting {name} up")))
}

async fn join(handle: &Handle, index: u32, controller: u32, name: &LinkName) -> Result<()> {
    let message = LinkUnspec::new_with_index(index).controller(controller).build();
    let set = handle.link().set(message).execute().await;
    set.map_err(Error::link(format!("making {name} a port")))
}

/// Makes a named namespace unless it is there; returns its file.
fn make_namespace(name: &LinkName) -> Result<PathBuf> {
    let path = Path::new(NAMESPACES).join(name.as_str());
    let doing = || format!("making the network namespace {name}");
    let nix_error = |error: nix::Error| Error::io(doing())(error.into());
    // `ip netns` makes the folder a mount of its own, which nobody ever takes away again. That serves
    // mount namespaces which share nothing with the host's, and there is none of ours.
    fs::create_dir_all(NAMESPACES).map_err(Error::io(doing()))?;
    if is_namespace(&path) {
        return Ok(path);
    }
    File::create(&path).map_err(Error::io(doing()))?;
    // A thread of its own, whose namespace is left behind in the mount.
    let target = path.clone();
    let made = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        let own = Path::new("/proc/thread-self/ns/net");
        mount(Some(own), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
    });
    match made.join() {
        Ok(outcome) => outcome.map_err(nix_error)?,
        Err(_) => return Err(Error::Internal(format!("{} panicked", doing()))),
    }
    Ok(path)
}

/// True when a namespace is mounted on the file: a leftover file is on the folder's own device.
fn is_namespace(path: &Path) -> bool {
    nix::sys::statfs::statfs(path).is_ok_and(|found| found.filesystem_type() == nix::sys::statfs::NSFS_MAGIC)
}

fn remove_namespace(name: &LinkName) -> Result<()> {
    let path = Path::new(NAMESPACES).join(name.as_str());
    let doing = || format!("removing the network namespace {name}");
    if !path.exists() {
        return Ok(());
    }
    if is_namespace(&path) {
        umount2(&path, MntFlags::MNT_DETACH).map_err(|error| Error::io(doing())(error.into()))?;
    }
    fs::remove_file(&path).map_err(Error::io(doing()))
}

/// Runs `work` on a thread of its own that is in the namespace.
async fn in_namespace<F>(path: PathBuf, work: impl FnOnce() -> F + Send + 'static) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    let doing = format!("entering {}", path.display());
    let ran = tokio::task::spawn_blocking(move || {
        std::thread::spawn(move || {
            let file = File::open(&path).map_err(Error::io(doing.clone()))?;
            setns(&file, CloneFlags::CLONE_NEWNET).map_err(|error| Error::io(doing.clone())(error.into()))?;
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::io(doing))?;
            runtime.block_on(work())
        })
        .join()
    });
    match ran.await {
        Ok(Ok(outcome)) => outcome,
        _ => Err(Error::Internal("configuring the namespace's uplink panicked".into())),
    }
}
