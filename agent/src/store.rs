//! The state folder: where everything lies, and how a file is replaced so that a crash leaves the
//! old one or the new one and nothing else.
//!
//! ```text
//! STATE/agent.lock            held while an agent runs here
//! STATE/desired.pb            the last desired state (its SHA-256, then protobuf), so that a node converges alone
//! STATE/metadata.key          secret behind the metadata service's tokens
//! STATE/images/<sha256>       verified image parts; images/partial/ holds what is being fetched
//! STATE/instances/i-…/        one instance, see `instance::folder`
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use prost::Message;
use sha2::{Digest, Sha256};

use crate::api::DesiredNode;
use crate::error::{AtPath, Error, Result};

/// The agent's folder, held by this agent alone for as long as the value lives.
#[derive(Debug)]
pub struct StateDir {
    root: PathBuf,
    /// Locked by [`lock_for_this_process`]. Nobody else in this process may open the file: the lock
    /// goes with the first descriptor of it that is closed.
    _lock: Option<File>,
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
        if let Some(holder) = lock_for_this_process(&file).at(&path)? {
            return Err(Error::StateInUse { state: state.root.clone(), holder });
        }
        state._lock = Some(file);
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

    /// The state that was last stored; `None` when none was, or when the file is not what was stored. Then the agent
    /// waits for the controller and touches nothing: what is taken for an empty node loses every disk.
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
        let desired = decode(&bytes);
        if desired.is_none() {
            tracing::error!(path = %path.display(), "the stored desired state is damaged, or of an agent that wrote no digest; waiting for the controller");
        }
        desired
    }

    /// Stores the desired state. It holds user data, which may be secret: mode 0600.
    pub fn save_desired(&self, desired: &DesiredNode) -> Result<()> {
        let path = self.desired();
        replace(&path, &encode(desired), 0o600).at(&path)
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

/// The message behind its digest: an empty file, or a message cut short, would often decode as fewer instances.
fn encode(desired: &DesiredNode) -> Vec<u8> {
    let message = desired.encode_to_vec();
    [Sha256::digest(&message).as_slice(), &message].concat()
}

fn decode(bytes: &[u8]) -> Option<DesiredNode> {
    let (digest, message) = bytes.split_at_checked(Sha256::output_size())?;
    (Sha256::digest(message).as_slice() == digest).then(|| DesiredNode::decode(message).ok())?
}

/// Locks the whole file for this process and for it alone; else the id of the process that has it.
///
/// This is a record lock (fcntl_locking(2)), which is the one kind that a forked child does not
/// inherit. An agent that is killed may leave a child between `fork` and `exec`, which becomes a VMM
/// and keeps every descriptor until then: a flock(2) would be held by it, and the next agent, started
/// at once, would be turned away by nobody.
fn lock_for_this_process(file: &File) -> io::Result<Option<libc::pid_t>> {
    let wanted = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    loop {
        match fcntl(file, FcntlArg::F_SETLK(&wanted)) {
            Ok(_) => return Ok(None),
            Err(Errno::EACCES | Errno::EAGAIN) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut held = wanted;
        fcntl(file, FcntlArg::F_GETLK(&mut held))?;
        if held.l_type != libc::F_UNLCK as libc::c_short {
            return Ok(Some(held.l_pid));
        }
        // Its holder ended between the two calls: once more.
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

    /// A child of this process that runs `then` and waits to be killed. It may only make system calls.
    fn fork_and(then: impl FnOnce()) -> nix::unistd::Pid {
        // SAFETY: the child makes system calls, allocates nothing, and never returns.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Parent { child } => child,
            nix::unistd::ForkResult::Child => {
                then();
                loop {
                    nix::unistd::pause();
                }
            }
        }
    }

    fn kill(pid: nix::unistd::Pid) {
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        let _ = nix::sys::wait::waitpid(pid, None);
    }

    #[test]
    fn a_second_agent_is_refused_until_the_first_is_gone_whatever_children_it_left() {
        let root = tempfile::tempdir().unwrap();
        drop(StateDir::take(root.path()).unwrap());
        let file = OpenOptions::new().write(true).open(root.path().join("agent.lock")).unwrap();
        let (mut said, say) = std::io::pipe().unwrap();
        // An agent that has forked a child, which is not a VMM yet and has all its descriptors.
        let agent = fork_and(|| {
            let locked = matches!(lock_for_this_process(&file), Ok(None));
            let child = fork_and(|| ());
            let words = [i32::from(locked).to_ne_bytes(), child.as_raw().to_ne_bytes()];
            let _ = nix::unistd::write(&say, words.as_flattened());
        });
        let mut words = [[0; 4]; 2];
        std::io::Read::read_exact(&mut said, words.as_flattened_mut()).unwrap();
        assert_eq!(i32::from_ne_bytes(words[0]), 1);
        let child = nix::unistd::Pid::from_raw(i32::from_ne_bytes(words[1]));
        let refused = StateDir::take(root.path());
        assert!(matches!(refused, Err(Error::StateInUse { holder, .. }) if holder == agent.as_raw()), "{refused:?}");
        kill(agent);
        let taken = StateDir::take(root.path());
        kill(child);
        taken.unwrap();
    }

    #[test]
    fn desired_state_comes_back_and_a_damaged_one_is_not_one_of_fewer_instances() {
        let root = tempfile::tempdir().unwrap();
        let state = StateDir::take(root.path()).unwrap();
        assert!(state.load_desired().is_none());
        let desired = DesiredNode { generation: 7, region: "mallee-1".into(), ..Default::default() };
        state.save_desired(&desired).unwrap();
        let whole = fs::read(state.desired()).unwrap();
        let is_read = |bytes: &[u8]| {
            fs::write(state.desired(), bytes).unwrap();
            state.load_desired()
        };
        for length in 0..whole.len() {
            assert_eq!(is_read(&whole[..length]), None, "the first {length} bytes");
            assert_eq!(
                is_read(&[&whole[..length], &vec![0; whole.len() - length]].concat()),
                None,
                "{length} bytes, then zeros"
            );
        }
        assert_eq!(is_read(&[whole.as_slice(), b"\x00"].concat()), None, "one byte more");
        assert_eq!(is_read(&desired.encode_to_vec()), None, "without a digest");
        assert_eq!(is_read(&whole), Some(desired));
    }

    #[test]
    fn the_metadata_key_stays() {
        let root = tempfile::tempdir().unwrap();
        let state = StateDir::take(root.path()).unwrap();
        assert_eq!(state.metadata_key().unwrap(), state.metadata_key().unwrap());
    }
}
