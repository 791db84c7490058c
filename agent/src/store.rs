//! The state folder: where everything lies, and how a file is replaced so that a crash leaves the
//! old one or the new one and nothing else.
//!
//! ```text
//! STATE/agent.lock            held while an agent runs here
//! STATE/desired.pb            the last desired state (protobuf), so that a node converges alone
//! STATE/metadata.key          secret behind the metadata service's tokens
//! STATE/images/<sha256>       verified image parts; images/partial/ holds what is being fetched
//! STATE/instances/i-…/        one instance, see `instance::folder`
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use prost::Message;

use crate::api::DesiredNode;
use crate::error::{AtPath, Error, Result};

/// The agent's folder, held by this agent alone for as long as the value lives.
#[derive(Debug)]
pub struct StateDir {
    root: PathBuf,
    /// The lock goes when the descriptor is closed, so also when the agent is killed. VMMs do not
    /// inherit it (`instance::confine` closes everything but their own lock).
    _lock: Option<Flock<File>>,
}

impl StateDir {
    /// Makes the folder if it is missing and takes it for this process.
    ///
    /// # Errors
    /// [`Error::StateInUse`] when another agent holds it.
    pub fn take(root: &Path) -> Result<Self> {
        let mut state = Self::look(root)?;
        for folder in [state.root.clone(), state.images(), state.images().join("partial"), state.instances()] {
            fs::DirBuilder::new().recursive(true).mode(0o711).create(&folder).at(folder)?;
        }
        let path = state.root.join("agent.lock");
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path).at(&path)?;
        let lock =
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| Error::StateInUse(state.root.clone()))?;
        state._lock = Some(lock);
        Ok(state)
    }

    /// Paths only, for reading beside a running agent (`mallee-agent show`).
    pub fn look(root: &Path) -> Result<Self> {
        let root = std::path::absolute(root).at(root)?;
        Ok(Self { root, _lock: None })
    }

    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    pub fn instances(&self) -> PathBuf {
        self.root.join("instances")
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    fn desired(&self) -> PathBuf {
        self.root.join("desired.pb")
    }

    /// The state that was last stored; `None` when none was, or it cannot be read (then the agent
    /// waits for the controller and touches nothing: it must not take an unreadable file for an
    /// empty node).
    pub fn load_desired(&self) -> Option<DesiredNode> {
        let path = self.desired();
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "the stored desired state cannot be read; waiting for the controller");
                return None;
            }
        };
        DesiredNode::decode(bytes.as_slice())
            .inspect_err(|error| tracing::error!(path = %path.display(), %error, "the stored desired state is damaged; waiting for the controller"))
            .ok()
    }

    /// Stores the desired state. It holds user data, which may be secret: mode 0600.
    pub fn save_desired(&self, desired: &DesiredNode) -> Result<()> {
        let path = self.desired();
        replace(&path, &desired.encode_to_vec(), 0o600).at(&path)
    }

    /// The secret behind metadata tokens, made at the first start. It outlives the agent, so that a
    /// guest's token stays good when the agent is restarted.
    pub fn metadata_key(&self) -> Result<[u8; 32]> {
        let path = self.root.join("metadata.key");
        if let Ok(bytes) = fs::read(&path)
            && let Ok(key) = <[u8; 32]>::try_from(bytes.as_slice())
        {
            return Ok(key);
        }
        let key: [u8; 32] = rand::random();
        replace(&path, &key, 0o600).at(&path)?;
        Ok(key)
    }
}

/// Replaces `path` by `bytes`: written beside it, synced, renamed, and the folder synced, so that
/// after a crash of the machine there is the whole old or the whole new file.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let folder = path.parent().ok_or_else(|| io::Error::other("a file to replace must lie in a folder"))?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let beside = folder.join(name);
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&beside)?;
    file.write_all(bytes)?;
    file.sync_data()?;
    fs::rename(&beside, path)?;
    sync_folder(folder)
}

/// Makes the names in `folder` last.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_is_refused_until_the_first_is_gone() {
        let root = tempfile::tempdir().unwrap();
        let first = StateDir::take(root.path()).unwrap();
        assert!(matches!(StateDir::take(root.path()), Err(Error::StateInUse(_))));
        drop(first);
        StateDir::take(root.path()).unwrap();
    }

    #[test]
    fn desired_state_comes_back_and_a_damaged_one_is_not_an_empty_one() {
        let root = tempfile::tempdir().unwrap();
        let state = StateDir::take(root.path()).unwrap();
        assert!(state.load_desired().is_none());
        let desired = DesiredNode { generation: 7, region: "mallee-1".into(), ..Default::default() };
        state.save_desired(&desired).unwrap();
        assert_eq!(state.load_desired(), Some(desired));
        fs::write(state.desired(), b"\xff\xff\xff").unwrap();
        assert_eq!(state.load_desired(), None);
    }

    #[test]
    fn the_metadata_key_stays() {
        let root = tempfile::tempdir().unwrap();
        let state = StateDir::take(root.path()).unwrap();
        assert_eq!(state.metadata_key().unwrap(), state.metadata_key().unwrap());
    }
}
