//! The node's network a second time, in this process's own network namespace.
//!
//! Each interface of the node is a tap here, which this process holds: what leaves by it is read, and what is written comes in by it. The namespace goes with the
//! process, and everything in it.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::Ipv4Net;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, RouteMessageBuilder};

use super::packet::{End, Endpoints, Packet, Seen, Traffic};
use crate::api::{CapabilitiesReply, Interface, NodeNetwork, tap_name};
use crate::backend::{Backend, FastPath};
use crate::desired::{LinkName, MacAddress};
use crate::dns::Upstreams;
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::links::{Kernel, Links, NodeLinks, TapOptions, open_tap};
use crate::nft::Nftables;
use crate::off_thread::off_thread;
use crate::reconcile::Reconciler;
use crate::store::Store;

/// Bytes of `struct virtio_net_hdr`, which each frame on these taps begins with.
const VNET_HEADER: usize = 10;
/// Everything on the other side of the node's interfaces has this MAC.
const OUTSIDE_MAC: [u8; 6] = [2, 0x6d, 0x61, 0x6c, 0x6c, 1];
const UNDERLAY: &str = "underlay";
/// A packet that came nowhere for so long does not come.
const PATIENCE: Duration = Duration::from_millis(500);
/// For a port of a bridge to forward.
const PORTS_PATIENCE: Duration = Duration::from_secs(10);

pub struct Replica {
    /// Name as a person knows it, and the tap.
    ends: Vec<(String, File)>,
    uplink_mac: MacAddress,
    // The services of the network run for as long as it is there.
    _reconciler: Reconciler,
    _state: State,
}

/// The folder that the reconciler stores the network in, which goes at the end.
struct State(std::path::PathBuf);

impl Drop for State {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Replica {
    pub async fn make(network: &NodeNetwork, node: &CapabilitiesReply, asked: &Endpoints) -> Result<Self> {
        let links = Links::connect()?;
        let uplink = name(&node.uplink)?;
        let mut ends =
            vec![(format!("the public side ({uplink})"), outer(&links, &uplink, &node.uplink_address).await?)];
        let trunk = if node.trunk.is_empty() { None } else { Some(name(&node.trunk)?) };
        if let Some(trunk) = &trunk {
            ends.push((format!("other nodes, by the trunk ({trunk})"), outer(&links, trunk, "").await?));
        }
        let own_underlay = !node.underlay_address.is_empty()
            && !node.uplink_address.starts_with(&format!("{}/", node.underlay_address));
        let underlay = if own_underlay { Some(name(UNDERLAY)?) } else { None };
        if let Some(underlay) = &underlay {
            let address = format!("{}/32", node.underlay_address);
            ends.push(("other nodes, by a tunnel".to_owned(), outer(&links, underlay, &address).await?));
        }
        default_route(&links, &uplink).await?;

        let state = State(std::env::temp_dir().join(format!("mallee-trace-{:016x}", rand::random::<u64>())));
        let uplink_name = uplink.clone();
        let has_fast_path = node.capabilities.get("fast-path").is_some_and(String::is_empty);
        let fast_path = if has_fast_path { FastPath::Auto } else { FastPath::Off };
        let limits = Limits::default().settled();
        let backend = off_thread(move || Nftables::new(uplink_name, limits, fast_path)).await?;
        let kernel = Kernel::probe(&links, backend.bridging()).await?;
        let node_links = NodeLinks { uplink, trunk, underlay, kernel };
        let upstreams = Upstreams::Fixed(Vec::new());
        let (reconciler, _) = Reconciler::new(node_links, Arc::new(backend), Store::open(&state.0)?, upstreams);
        reconciler.apply(network.clone()).await?;
        let uplink_mac = links.site(reconciler.node_links()).await?.uplink.mac;
        let uplink_mac = uplink_mac.ok_or_else(|| Error::Internal("a tap without a MAC".into()))?;

        let mut taps: Vec<&Interface> = asked.receiver.iter().collect();
        if let End::Instance { interface: sender, .. } = &asked.from {
            taps.retain(|found| found.id != sender.id);
            taps.push(sender);
        }
        for interface in taps {
            let tap = name(&tap_name(&interface.id))?;
            let options = TapOptions { owner: interface.owner_uid, multi_queue: interface.queue_pairs > 1 };
            let file = open_tap(&tap, options).and_then(unblocked);
            ends.push((
                format!("{} ({})", interface.instance, interface.id),
                file.map_err(Error::io(format!("opening {tap}")))?,
            ));
            wait_for_port(&tap).await?;
        }
        Ok(Self { ends, uplink_mac, _reconciler: reconciler, _state: state })
    }

    pub fn what_to_send(&self, asked: &Endpoints, traffic: Traffic) -> Result<Packet> {
        let mac = |text: &str| text.parse::<MacAddress>().map(|mac| mac.octets()).map_err(Error::Question);
        let macs = match (&asked.from, &asked.to_mac) {
            (End::Instance { interface, .. }, Some(to)) => (mac(&interface.mac)?, mac(to)?),
            _ => (OUTSIDE_MAC, self.uplink_mac.octets()),
        };
        let address = |end: &End| end.address().map_err(Error::Question);
        let packet = Packet::new(macs, address(&asked.from)?, address(&asked.to)?, traffic);
        packet.map_err(Error::io("writing a packet"))
    }

    /// Sends the packet from its end and returns where it came out, and as what.
    pub fn send_and_watch(&self, asked: &Endpoints, packet: &Packet) -> Result<Option<(String, Seen)>> {
        let from = match &asked.from {
            End::Instance { .. } => self.ends.last(),
            End::Address(_) => self.ends.first(),
        };
        let (_, from) = from.ok_or_else(|| Error::Internal("a replica without ends".into()))?;
        send(from, &packet.frame)?;
        let mut deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            for (name, tap) in &self.ends {
                for frame in frames(tap)? {
                    if let Some(seen) = packet.in_frame(&frame) {
                        return Ok(Some((name.clone(), seen)));
                    }
                    if let Some(reply) = arp_reply(&frame, self.uplink_mac.octets()) {
                        send(tap, &reply)?;
                        deadline = Instant::now() + PATIENCE;
                    }
                }
            }
            let mut ready: Vec<PollFd> =
                self.ends.iter().map(|(_, tap)| PollFd::new(tap.as_fd(), PollFlags::POLLIN)).collect();
            // Whatever it says, the next round looks.
            let _ = poll(&mut ready, PollTimeout::from(50_u8));
        }
        Ok(None)
    }
}

fn name(text: &str) -> Result<LinkName> {
    text.parse().map_err(Error::Internal)
}

fn unblocked(file: File) -> std::io::Result<File> {
    fcntl(&file, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(file)
}

/// One of the node's own interfaces, with its address.
async fn outer(links: &Links, name: &LinkName, address: &str) -> Result<File> {
    let made = open_tap(name, TapOptions { owner: 0, multi_queue: false }).and_then(unblocked);
    let file = made.map_err(Error::io(format!("making {name}")))?;
    let index = links.index_of(name).await?.ok_or_else(|| Error::Internal(format!("{name} is not there")))?;
    let handle = links.handle();
    if let Ok(net) = address.parse::<Ipv4Net>() {
        let given = handle.address().add(index, net.addr().into(), net.prefix_len()).execute().await;
        given.map_err(Error::link(format!("giving {net} to {name}")))?;
    }
    let up = LinkMessageBuilder::<LinkUnspec>::default().index(index).up().build();
    handle.link().set(up).execute().await.map_err(Error::link(format!("setting {name} up")))?;
    Ok(file)
}

/// Everybody outside is a neighbour: which router is the next makes no difference to rules.
async fn default_route(links: &Links, uplink: &LinkName) -> Result<()> {
    let index = links.index_of(uplink).await?.ok_or_else(|| Error::Internal(format!("{uplink} is not there")))?;
    let route = RouteMessageBuilder::<Ipv4Addr>::new().output_interface(index).build();
    links.handle().route().add(route).execute().await.map_err(Error::link("routing to the outside"))
}

/// A bridge's port forwards a moment after its tap was opened (`sysfs-class-net`, `brport/state`: 3).
async fn wait_for_port(tap: &LinkName) -> Result<()> {
    let deadline = Instant::now() + PORTS_PATIENCE;
    while !is_forwarding(tap).await? {
        if Instant::now() > deadline {
            return Err(Error::Internal(format!("the port {tap} does not forward")));
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

async fn is_forwarding(tap: &LinkName) -> Result<bool> {
    use futures::TryStreamExt;
    use netlink_packet_route::link::{BridgePortState, InfoBridgePort, InfoPortData, LinkAttribute, LinkInfo};
    let links = Links::connect()?;
    let mut found = links.handle().link().get().match_name(tap.to_string()).execute();
    let link = found.try_next().await.map_err(Error::link(format!("looking at {tap}")))?;
    let infos = link.into_iter().flat_map(|link| link.attributes).filter_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    let mut ports = infos.flatten().filter_map(|info| match info {
        LinkInfo::PortData(InfoPortData::BridgePort(port)) => Some(port),
        _ => None,
    });
    Ok(ports.any(|port| port.contains(&InfoBridgePort::State(BridgePortState::Forwarding))))
}

fn send(mut tap: &File, frame: &[u8]) -> Result<()> {
    tap.write_all(&[&[0; VNET_HEADER], frame].concat()).map_err(Error::io("sending a packet"))
}

/// What has come out.
fn frames(mut tap: &File) -> Result<Vec<Vec<u8>>> {
    let mut found = Vec::new();
    let mut buffer = vec![0; 65_536 + VNET_HEADER];
    loop {
        match tap.read(&mut buffer) {
            Ok(length) => found.extend(buffer.get(VNET_HEADER..length).map(<[u8]>::to_vec)),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(found),
            Err(error) => return Err(Error::io("reading what came out")(error)),
        }
    }
}

/// The outside's answer to the node's question who has an address (RFC 826); none to anything else.
fn arp_reply(frame: &[u8], node: [u8; 6]) -> Option<Vec<u8>> {
    let question = frame.get(12..22) == Some(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]) && frame.get(6..12) == Some(&node);
    let (sender, target) = (frame.get(22..32)?, frame.get(38..42)?);
    question.then(|| [&node[..], &OUTSIDE_MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2], &OUTSIDE_MAC, target, sender].concat())
}
