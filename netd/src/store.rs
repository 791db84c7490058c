//! The desired network on disk, so that a node's network is back before its controller is.
//!
//! Written before the kernel is changed: after a crash in the middle, the start applies the newer
//! network again. One file, replaced as a whole: written beside, fsynced, renamed, folder fsynced.
//!
//! Beside it lies a journal of changes of elastic IPs, for each of which the whole would be too much to write. A change is for the generation that it is based on, so
//! what is left in the journal of an older network is told from what belongs to the newer one, and the order in which the two files reach the disk
//! means nothing. What a crash cut off at its end was not yet answered for.
//!
//! Nothing may be added behind a record that is not whole, or that was not answered for: it would not be read. So after a start, and after a change that could not be stored,
//! the whole comes first (`State::stored` in `reconcile.rs`). To load writes nothing: a node whose disk is full or read-only has its network all the same.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use prost::Message;

use crate::api::{ElasticIpChange, NodeNetwork};
use crate::error::{Error, Result};

const FILE: &str = "desired.pb";
const TEMPORARY: &str = "desired.pb.new";
const DAMAGED: &str = "desired.pb.damaged";
const JOURNAL: &str = "desired.pb.changes";
/// Bytes of journal from which on the whole is written anew: some ten thousand changes.
const JOURNAL_MOST: u64 = 1 << 20;

#[derive(Debug, Clone)]
pub struct Store {
    folder: PathBuf,
}

impl Store {
    /// The store in `folder`, which is made if it is not there.
    pub fn open(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).map_err(Error::io(format!("making {}", folder.display())))?;
        Ok(Self { folder: folder.to_owned() })
    }

    pub fn path(&self) -> PathBuf {
        self.folder.join(FILE)
    }

    /// The network that was saved last with the changes that were made to it, or none. A file that cannot be read as one is put aside: the
    /// kernel keeps what it has until the controller hands over the network again.
    pub fn load(&self) -> Result<Option<NodeNetwork>> {
        let path = self.path();
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(format!("reading {}", path.display()))(error)),
        };
        match decode(&bytes) {
            Some(network) => self.with_journal(network).map(Some),
            None => {
                let aside = self.folder.join(DAMAGED);
                let put_aside = fs::rename(&path, &aside);
                tracing::error!(file = %path.display(), aside = %aside.display(), ?put_aside, "the stored network is damaged");
                Ok(None)
            }
        }
    }

    pub fn save(&self, network: &NodeNetwork) -> Result<()> {
        let doing = || format!("writing {}", self.path().display());
        self.replace(&encode(network)).map_err(Error::io(doing()))?;
        match fs::remove_file(self.journal()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("emptying the journal")(error)),
            _ => Ok(()),
        }
    }

    /// Adds a change, which leads from its base to a later generation. It outlives netd from now on, and a crash of the machine once
    /// [`Appended::settle`] has returned. After an error of either the whole must be saved before anything is added.
    pub fn append(&self, change: &ElasticIpChange) -> Result<Appended> {
        debug_assert!(change.generation > change.base);
        let path = self.journal();
        let append = || -> io::Result<Appended> {
            let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
            file.write_all(&change.encode_length_delimited_to_vec())?;
            Ok(Appended { file })
        };
        append().map_err(Error::io(format!("writing {}", path.display())))
    }

    fn journal(&self) -> PathBuf {
        self.folder.join(JOURNAL)
    }

    fn with_journal(&self, network: NodeNetwork) -> Result<NodeNetwork> {
        let bytes = match fs::read(self.journal()) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(network),
            Err(error) => return Err(Error::io(format!("reading {}", self.journal().display()))(error)),
        };
        Ok(replay(network, &bytes))
    }

    fn replace(&self, bytes: &[u8]) -> io::Result<()> {
        let temporary = self.folder.join(TEMPORARY);
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, self.path())?;
        File::open(&self.folder)?.sync_all()
    }
}

/// A change that was written and may not be on the disk yet.
pub struct Appended {
    file: File,
}

impl Appended {
    /// Waits until it is on the disk. Returns whether the journal is so long that it is time to save the whole.
    pub fn settle(self) -> Result<bool> {
        let settle = || -> io::Result<bool> {
            self.file.sync_data()?;
            Ok(self.file.metadata()?.len() > JOURNAL_MOST)
        };
        settle().map_err(Error::io("writing the journal of changes"))
    }
}

/// Makes the changes that belong to the network, up to the first that cannot be read.
fn replay(mut network: NodeNetwork, mut journal: &[u8]) -> NodeNetwork {
    let elastic_ips = std::mem::take(&mut network.elastic_ips);
    let mut by_address: BTreeMap<_, _> = elastic_ips.into_iter().map(|e| (e.public_ip.clone(), e)).collect();
    while !journal.is_empty() {
        let Ok(change) = ElasticIpChange::decode_length_delimited(&mut journal) else { break };
        if change.base == network.generation && change.generation > change.base {
            network.generation = change.generation;
            change.release.iter().for_each(|public| drop(by_address.remove(public)));
            by_address.extend(change.associate.into_iter().map(|e| (e.public_ip.clone(), e)));
        }
    }
    network.elastic_ips = by_address.into_values().collect();
    network
}

/// The message behind its length: a protobuf message cut short would often still decode.
fn encode(network: &NodeNetwork) -> Vec<u8> {
    network.encode_length_delimited_to_vec()
}

fn decode(bytes: &[u8]) -> Option<NodeNetwork> {
    let mut rest = bytes;
    let network = NodeNetwork::decode_length_delimited(&mut rest).ok()?;
    // An empty file would decode as nothing at all.
    (rest.is_empty() && !bytes.is_empty()).then_some(network)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::ElasticIp;

    #[test]
    fn what_is_saved_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        assert_eq!(store.load().unwrap(), None);
        let network =
            NodeNetwork { generation: 7, public_pools: vec!["198.51.100.128/25".into()], ..Default::default() };
        store.save(&network).unwrap();
        assert_eq!(store.load().unwrap(), Some(network));
    }

    fn elastic(public: &str, private: &str) -> ElasticIp {
        ElasticIp { public_ip: public.into(), private_ip: private.into(), segment: "subnet-1".into() }
    }

    fn change(base: u64, associate: &[ElasticIp], release: &[&str]) -> ElasticIpChange {
        let release = release.iter().map(|public| (*public).to_owned()).collect();
        ElasticIpChange { base, generation: base + 1, associate: associate.to_vec(), release }
    }

    #[test]
    fn changes_are_a_part_of_what_is_loaded_wherever_the_journal_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let at = |generation, elastic_ips: &[ElasticIp]| NodeNetwork {
            generation,
            elastic_ips: elastic_ips.to_vec(),
            ..Default::default()
        };
        let (a, b, c) =
            (elastic("1.0.0.1", "10.0.0.1"), elastic("1.0.0.1", "10.0.0.2"), elastic("1.0.0.2", "10.0.0.1"));
        let states = [at(5, std::slice::from_ref(&a)), at(6, &[b.clone(), c.clone()]), at(7, std::slice::from_ref(&c))];
        let changes = [change(5, &[b, c], &[]), change(6, &[], &["1.0.0.1"])];
        let ends: Vec<usize> = changes
            .iter()
            .scan(0, |end, change| {
                *end += change.encode_length_delimited_to_vec().len();
                Some(*end)
            })
            .collect();
        for cut in 0..=ends[1] {
            store.save(&states[0]).unwrap();
            for change in &changes {
                store.append(change).unwrap().settle().unwrap();
            }
            OpenOptions::new().write(true).open(store.journal()).unwrap().set_len(cut as u64).unwrap();
            let whole = ends.iter().filter(|end| **end <= cut).count();
            assert_eq!(store.load().unwrap().as_ref(), Some(&states[whole]), "cut at {cut}");
            assert_eq!(store.load().unwrap().as_ref(), Some(&states[whole]), "loading changes nothing");
        }
    }

    #[test]
    fn a_network_is_loaded_where_nothing_can_be_written() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        store.save(&NodeNetwork { generation: 5, ..Default::default() }).unwrap();
        let after = change(5, &[elastic("1.0.0.1", "10.0.0.1")], &[]);
        store.append(&after).unwrap().settle().unwrap();
        // Root writes to a folder that is read-only, but no file where a folder is.
        for name in [TEMPORARY, DAMAGED] {
            fs::create_dir_all(folder.path().join(name).join("in the way")).unwrap();
        }
        let expected = NodeNetwork { generation: 6, elastic_ips: after.associate, ..Default::default() };
        assert_eq!(store.load().unwrap(), Some(expected));
        fs::write(store.path(), b"").unwrap();
        assert_eq!(store.load().unwrap(), None, "and a damaged one stays where it is");
    }

    #[test]
    fn changes_to_an_older_network_are_not_made_to_a_newer_one() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        store.append(&change(5, &[elastic("1.0.0.1", "10.0.0.1")], &[])).unwrap().settle().unwrap();
        let journal = fs::read(store.journal()).unwrap();
        let newer = NodeNetwork { generation: 6, ..Default::default() };
        store.save(&newer).unwrap();
        // As if the machine had crashed before it was emptied.
        fs::write(store.journal(), journal).unwrap();
        assert_eq!(store.load().unwrap(), Some(newer));
    }

    #[test]
    fn a_file_cut_short_at_any_byte_is_put_aside() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let whole = encode(&NodeNetwork {
            generation: 7,
            public_pools: vec!["198.51.100.128/25".into()],
            ..Default::default()
        });
        for length in 0..whole.len() {
            fs::write(store.path(), &whole[..length]).unwrap();
            assert_eq!(store.load().unwrap(), None, "{length} bytes");
            assert!(folder.path().join(DAMAGED).exists());
        }
    }
}
