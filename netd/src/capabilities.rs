//! What this kernel and this netd can do, and what is missing where they cannot.

use std::collections::HashMap;
use std::fs::OpenOptions;

use crate::backend::Backend;
use crate::desired::Surroundings;
use crate::{conntrack, nft};

/// Name of each capability to why it is missing; an empty reason means that it is there.
pub fn detect(backend: &dyn Backend) -> HashMap<String, String> {
    let reason = |outcome: crate::error::Result<()>| match outcome {
        Ok(()) => String::new(),
        Err(error) => error.to_string(),
    };
    let mut capabilities = HashMap::from([
        ("local".into(), tun_device()),
        ("nftables".into(), reason(nft::probe())),
        ("conntrack".into(), reason(conntrack::probe())),
        ("security-groups".into(), String::new()),
        ("limits".into(), String::new()),
        ("fast-path".into(), String::new()),
    ]);
    // What the kernel lacks says more than that the backend does without it.
    for (name, reason) in backend.missing() {
        let told: &mut String = capabilities.entry(name.to_owned()).or_default();
        if told.is_empty() {
            *told = reason;
        }
    }
    capabilities
}

/// The same of the kinds of segments that reach other nodes.
pub fn of_trunks(around: &Surroundings) -> [(String, String); 2] {
    let missing = |reason: Option<&String>| reason.cloned().unwrap_or_default();
    [("vlan".into(), missing(around.trunk.as_ref().err())), ("vxlan".into(), missing(around.underlay.as_ref().err()))]
}

fn tun_device() -> String {
    match OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => String::new(),
        Err(error) => format!(
            "/dev/net/tun cannot be opened for reading and writing ({error}); load the module `tun` \
             (CONFIG_TUN) and let netd's user open the device"
        ),
    }
}
