//! Which kernel modules a node needs, and the order in which they load.
//!
//! Debian's packages carry no dependency list (it is made at installation), so what each module
//! depends on is read from the module itself: the `depends=` entry of its `.modinfo` section.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use object::{Object, ObjectSection};

use super::error::{LabError, OnPath};

/// What a node needs, by subject. What these depend on is found, not listed.
const WANTED: &[&str] = &[
    // the machine around the node: its disk, its NIC, its control ports, its randomness
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_net",
    "virtio_rng",
    // running VMs: the node loads the one for its processor
    "kvm_amd",
    "kvm_intel",
    "tun",
    "vhost_net",
    "vhost_vsock",
    // segments
    "bridge",
    "8021q",
    "vxlan",
    "veth",
    // NAT, elastic IPs, security groups
    "nf_tables",
    "nf_conntrack",
    "nf_conntrack_netlink",
    "nf_conntrack_bridge",
    "nft_ct",
    "nft_nat",
    "nft_chain_nat",
    "nft_masq",
    "nft_redir",
    "nft_reject_inet",
    "nft_reject_bridge",
    "nft_meta_bridge",
    "nft_connlimit",
    "nft_limit",
    "nft_objref",
    "nft_numgen",
    "nft_hash",
    "nft_fib_inet",
    "nft_log",
    "nf_flow_table_inet",
    "nft_flow_offload",
    // shaping
    "sch_ingress",
    "sch_htb",
    "sch_tbf",
    "act_police",
    "cls_u32",
];

/// Modules in loading order: each after all that it depends on.
pub fn in_loading_order(folder: &Path) -> Result<Vec<PathBuf>, LabError> {
    loading_order(folder, WANTED)
}

/// `wanted` and what they depend on, in loading order.
pub fn loading_order(folder: &Path, wanted: &[&str]) -> Result<Vec<PathBuf>, LabError> {
    let available = index(folder)?;
    let mut order =
        Order { available: &available, done: BTreeSet::new(), under_way: BTreeSet::new(), paths: Vec::new() };
    for name in wanted {
        order.add(name)?;
    }
    Ok(order.paths)
}

struct Order<'a> {
    available: &'a BTreeMap<String, PathBuf>,
    done: BTreeSet<String>,
    under_way: BTreeSet<String>,
    paths: Vec<PathBuf>,
}

impl Order<'_> {
    fn add(&mut self, name: &str) -> Result<(), LabError> {
        if self.done.contains(name) {
            return Ok(());
        }
        // Built into this kernel, or gone from it: the node says at boot what it misses.
        let Some(path) = self.available.get(name) else {
            return Ok(());
        };
        if !self.under_way.insert(name.to_owned()) {
            return Err(LabError::Module { module: name.to_owned(), reason: "depends on itself".into() });
        }
        for dependency in dependencies(path)? {
            self.add(&dependency)?;
        }
        self.done.insert(name.to_owned());
        self.paths.push(path.clone());
        Ok(())
    }
}

/// Every module below `folder`, by its name as the kernel spells it (`_`, never `-`).
fn index(folder: &Path) -> Result<BTreeMap<String, PathBuf>, LabError> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).on("reading", &folder)?.flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if let Some(name) = module_name(&path) {
                found.insert(name, path);
            }
        }
    }
    Ok(found)
}

fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?.strip_suffix(".ko")?;
    Some(name.replace('-', "_"))
}

fn dependencies(path: &Path) -> Result<Vec<String>, LabError> {
    let bytes = fs::read(path).on("reading", path)?;
    let refused = |reason: String| LabError::Module { module: path.display().to_string(), reason };
    let file = object::File::parse(&*bytes).map_err(|e| refused(e.to_string()))?;
    let section = file.section_by_name(".modinfo").ok_or_else(|| refused("has no .modinfo section".into()))?;
    let info = section.data().map_err(|e| refused(e.to_string()))?;
    Ok(parse_depends(info))
}

/// The names in the `depends=` entry of a `.modinfo` section (NUL-terminated `key=value` entries).
fn parse_depends(info: &[u8]) -> Vec<String> {
    info.split(|byte| *byte == 0)
        .filter_map(|entry| std::str::from_utf8(entry).ok()?.strip_prefix("depends="))
        .flat_map(|list| list.split(','))
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depends_are_read_and_spelt_as_the_kernel_does() {
        let info = b"license=GPL\0depends=virtio-ring,virtio\0name=x\0";
        assert_eq!(parse_depends(info), ["virtio_ring", "virtio"]);
        assert!(parse_depends(b"depends=\0license=GPL\0").is_empty());
    }

    #[test]
    fn a_module_comes_after_what_it_depends_on() {
        let folder = tempfile::tempdir().unwrap();
        // The order is tested on names alone: what a module depends on is the parser's test above.
        let available: BTreeMap<_, _> =
            [("a", "a.ko")].into_iter().map(|(name, file)| (name.to_owned(), folder.path().join(file))).collect();
        let mut order = Order {
            available: &available,
            done: BTreeSet::from(["a".to_owned()]),
            under_way: BTreeSet::new(),
            paths: Vec::new(),
        };
        order.add("a").unwrap();
        order.add("not-there").unwrap();
        assert!(order.paths.is_empty());
    }
}
