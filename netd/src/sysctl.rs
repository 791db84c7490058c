//! The kernel's network settings that netd needs, in its own network namespace.
//!
//! `/proc/sys/net` may be written by whoever has `CAP_NET_ADMIN` in the namespace.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use crate::bridging::Bridging;
use crate::desired::{LinkName, Network};
use crate::error::{Error, Result};

/// `br_netfilter`, where it is loaded, passes frames of every bridge through the rules for IPv4. netd asks for it bridge by bridge where
/// it needs it ([`Bridging`](crate::bridging::Bridging)) and turns it off otherwise, for its network namespace: where the
/// bridge itself knows connections, it would only cost time.
const BRIDGED_FRAMES: &str = "bridge/bridge-nf-call-iptables";

/// Conntrack sums up what it looks at and leaves the sum with the packet, as one that the kernel made itself. The flow table brings the packet on with that, which routing would have
/// taken off, and a device that hands packets to another part of the kernel (veth) makes it a wrong one: UDP then drops what is longer than 76 bytes, by a sum of which it
/// was told that it cannot err (`udp4_csum_init`). So where there is a fast path, nobody sums up on the way: the receiver does, and drops what is wrong.
const SUMS_OF_CONNTRACK: &str = "netfilter/nf_conntrack_checksum";

/// Memory in which fragments wait for the rest of their packets, in bytes, and for how long, in seconds (`Documentation/networking/ip-sysctl.rst`).
/// When it is full, the kernel takes no fragment of anybody's until some have waited in vain. By default it is 4 MiB, and the time 30 s: less than
/// one instance may send in that time. With these, an instance that sends as many fragments as it may
/// ([`Limits`](crate::limits::Limits)) has about 5 MB waiting, a twelfth.
const FRAGMENTS_MEMORY: u64 = 64 << 20;
const FRAGMENTS_WAIT: &str = "5";

/// How many neighbours the kernel may know, from which number on it forgets those that do not answer, in all network namespaces together. By default,
/// 1024 and 512: an instance that calls every address of a wide network on the public side has as many that never answer, for
/// three seconds each.
const NEIGHBOURS: [(&str, u64); 2] = [("gc_thresh3", 32_768), ("gc_thresh2", 16_384)];

/// One setting and the value it is to have.
struct Setting {
    path: PathBuf,
    value: Value,
    /// A kernel that lacks the file does not do what the setting would turn off.
    optional: bool,
}

#[derive(Clone, Copy)]
enum Value {
    Exactly(&'static str),
    AtLeast(u64),
}

impl Value {
    /// What is to be written in place of what was found; none if that will do.
    fn unless(self, found: &str) -> Option<String> {
        match self {
            Self::Exactly(value) => (found != value).then(|| value.to_owned()),
            Self::AtLeast(least) => (found.parse::<u64>().ok()? < least).then(|| least.to_string()),
        }
    }
}

fn setting(path: String, value: &'static str) -> Setting {
    Setting { path: PathBuf::from("/proc/sys/net").join(path), value: Value::Exactly(value), optional: false }
}

/// A kernel that lacks the file, or has it for the first network namespace alone, is left as it is.
fn at_least(path: String, least: u64) -> Setting {
    Setting { path: PathBuf::from("/proc/sys/net").join(path), value: Value::AtLeast(least), optional: true }
}

fn optional(path: String, value: &'static str) -> Setting {
    Setting { optional: true, ..setting(path, value) }
}

/// Sets what the node as a whole needs and what each bridge needs. Returns whether anything changed.
pub fn apply(network: &Network, uplink: &LinkName, bridging: Bridging, fast_path: bool) -> Result<bool> {
    let mut settings = vec![
        setting("ipv4/ip_forward".into(), "1"),
        // A hairpin packet leaves by the interface it came in; no instance should be told to take
        // another way. The kernel takes the larger of this one and the bridge's own.
        setting("ipv4/conf/all/send_redirects".into(), "0"),
        // What the kernel itself answers, such as a ping of a gateway, is routed in the VPC of what it answers.
        setting("ipv4/fwmark_reflect".into(), "1"),
        // Answer ARP for elastic IPs at once: a proxy waits 0.8 s by default.
        setting(format!("ipv4/neigh/{uplink}/proxy_delay"), "0"),
        optional(BRIDGED_FRAMES.into(), "0"),
        at_least("ipv4/ipfrag_high_thresh".into(), FRAGMENTS_MEMORY),
        setting("ipv4/ipfrag_time".into(), FRAGMENTS_WAIT),
    ];
    settings.extend(fast_path.then(|| setting(SUMS_OF_CONNTRACK.into(), "0")));
    settings.extend(NEIGHBOURS.map(|(name, least)| at_least(format!("ipv4/neigh/default/{name}"), least)));
    for segment in network.segments.values() {
        settings.extend(bridge_settings(&segment.bridge));
        settings.extend(answering_for_neighbours(&segment.bridge, bridging == Bridging::Routed));
    }
    settings.extend(network.interfaces.values().map(|interface| no_ipv6_setting(&interface.tap)));
    settings.extend(network.trunks().map(|(_, trunk)| no_ipv6_setting(&trunk.port)));
    let mut changed = false;
    for setting in &settings {
        changed |= write(setting)?;
    }
    Ok(changed)
}

/// The settings of a bridge that was just made, before it is up.
pub fn quiet_bridge(bridge: &LinkName) -> Result<()> {
    bridge_settings(bridge).iter().try_for_each(|setting| write(setting).map(|_| ()))
}

/// Keeps IPv6 off a link: segments have none, and the node must not speak it to instances.
pub fn no_ipv6(link: &LinkName) -> Result<()> {
    write(&no_ipv6_setting(link)).map(|_| ())
}

fn no_ipv6_setting(link: &LinkName) -> Setting {
    optional(format!("ipv6/conf/{link}/disable_ipv6"), "1")
}

/// Where neighbours are routed, the gateway answers for each address of its segment but that of who asks, and at once: a proxy waits 0.8 s by default.
fn answering_for_neighbours(bridge: &LinkName, on: bool) -> Vec<Setting> {
    let mut settings = vec![setting(format!("ipv4/conf/{bridge}/proxy_arp_pvlan"), if on { "1" } else { "0" })];
    settings.extend(on.then(|| setting(format!("ipv4/neigh/{bridge}/proxy_delay"), "0")));
    settings
}

fn bridge_settings(bridge: &LinkName) -> [Setting; 5] {
    [
        setting(format!("ipv4/conf/{bridge}/send_redirects"), "0"),
        // Sources are checked by tap, MAC and address by the backend's rules, which is stricter, and knows of
        // instances that may send for others.
        setting(format!("ipv4/conf/{bridge}/rp_filter"), "0"),
        // Where the kernel does look for the way back to a source, let it look in the packet's VPC.
        setting(format!("ipv4/conf/{bridge}/src_valid_mark"), "1"),
        // Answer ARP for the addresses of this segment's gateway only, not for the node's others.
        setting(format!("ipv4/conf/{bridge}/arp_ignore"), "1"),
        no_ipv6_setting(bridge),
    ]
}

/// Writes the setting unless it has its value already.
fn write(setting: &Setting) -> Result<bool> {
    let path = setting.path.display();
    let found = match fs::read_to_string(&setting.path) {
        Ok(found) => found,
        Err(error) if setting.optional && error.kind() == ErrorKind::NotFound => return Ok(false),
        // The link goes, or is not there yet: the step that makes it writes the setting.
        Err(error) => return Err(Error::io(format!("reading {path}"))(error)),
    };
    let Some(value) = setting.value.unless(found.trim_end()) else { return Ok(false) };
    tracing::info!(setting = %path, from = found.trim_end(), to = value, "changing a kernel setting");
    fs::write(&setting.path, value).map_err(Error::io(format!("writing {path}")))?;
    Ok(true)
}
