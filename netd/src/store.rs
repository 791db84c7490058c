//! The desired network on disk, so that a node's network is back before its controller is.
//!
//! Written before the kernel is changed: after a crash in the middle, the start applies the newer
//! network again. One file, replaced as a whole: written beside, fsynced, renamed, folder fsynced.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use prost::Message;

use crate::api::NodeNetwork;
use crate::error::{Error, Result};

const FILE: &str = "desired.pb";
const TEMPORARY: &str = "desired.pb.new";
const DAMAGED: &str = "desired.pb.damaged";

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

    /// The network that was saved last, or none. A file that cannot be read as one is put aside: the
    /// kernel keeps what it has until the controller hands over the network again.
    pub fn load(&self) -> Result<Option<NodeNetwork>> {
        let path = self.path();
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(format!("reading {}", path.display()))(error)),
        };
        match decode(&bytes) {
            Some(network) => Ok(Some(network)),
            None => {
                let aside = self.folder.join(DAMAGED);
                tracing::error!(file = %aside.display(), "the stored network is damaged and was put aside");
                fs::rename(&path, &aside).map_err(Error::io(format!("renaming {}", path.display())))?;
                Ok(None)
            }
        }
    }

    pub fn save(&self, network: &NodeNetwork) -> Result<()> {
        let doing = || format!("writing {}", self.path().display());
        self.replace(&encode(network)).map_err(Error::io(doing()))
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
