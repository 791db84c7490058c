//! The kernel's network settings that netd needs, in its own network namespace.
//!
//! `/proc/sys/net` may be written by whoever has `CAP_NET_ADMIN` in the namespace.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use crate::desired::{LinkName, Network};
use crate::error::{Error, Result};

/// `br_netfilter`, where it is loaded, passes frames of every bridge through the rules for IPv4. netd asks for it bridge by bridge where
/// it needs it ([`Bridging`](crate::bridging::Bridging)) and turns it off otherwise, for its network namespace: where the
/// bridge itself knows connections, it would only cost time.
const BRIDGED_FRAMES: &str = "bridge/bridge-nf-call-iptables";

/// One setting and the value it is to have.
struct Setting {
    path: PathBuf,
    value: &'static str,
    /// A kernel that lacks the file does not do what the setting would turn off.
    optional: bool,
}

fn setting(path: String, value: &'static str) -> Setting {
    Setting { path: PathBuf::from("/proc/sys/net").join(path), value, optional: false }
}

fn optional(path: String, value: &'static str) -> Setting {
    Setting { optional: true, ..setting(path, value) }
}

/// Sets what the node as a whole needs and what each bridge needs. Returns whether anything changed.
pub fn apply(network: &Network, uplink: &LinkName) -> Result<bool> {
    let mut settings = vec![
        setting("ipv4/ip_forward".into(), "1"),
        // A hairpin packet leaves by the interface it came in; no instance should be told to take
        // another way. The kernel takes the larger of this one and the bridge's own.
        setting("ipv4/conf/all/send_redirects".into(), "0"),
        // Answer ARP for elastic IPs at once: a proxy waits 0.8 s by default.
        setting(format!("ipv4/neigh/{uplink}/proxy_delay"), "0"),
        optional(BRIDGED_FRAMES.into(), "0"),
    ];
    for segment in network.segments.values() {
        settings.extend(bridge_settings(&segment.bridge));
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

fn bridge_settings(bridge: &LinkName) -> [Setting; 4] {
    [
        setting(format!("ipv4/conf/{bridge}/send_redirects"), "0"),
        // Sources are checked by tap, MAC and address in nftables, which is stricter, and knows of
        // instances that may send for others.
        setting(format!("ipv4/conf/{bridge}/rp_filter"), "0"),
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
    if found.trim_end() == setting.value {
        return Ok(false);
    }
    tracing::info!(setting = %path, from = found.trim_end(), to = setting.value, "changing a kernel setting");
    fs::write(&setting.path, setting.value).map_err(Error::io(format!("writing {path}")))?;
    Ok(true)
}
