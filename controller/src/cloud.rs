//! What every handler shares: the open database, the nodes at hand, the object store.
//!
//! A state folder has one controller at a time. Each has its own idea of which files are still being written and of which nodes
//! attend, and sweeps the others when it begins. A lock that goes with its holder ([`lock`]) keeps a second one out; a killed controller leaves
//! none behind.

use std::fs::{self, File};
use std::ops::Deref;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::config::Config;
use crate::error::{Error, Result};
use crate::nodes::Nodes;
use crate::pki::Pki;
use crate::s3::store::Store;
use crate::state::Database;
use crate::traces::Traces;

/// A handle to the one cloud that this process serves; cheap to clone.
#[derive(Clone)]
pub struct Cloud(Arc<Shared>);

pub struct Shared {
    pub config: Config,
    /// Absolute.
    pub state_dir: PathBuf,
    pub region: String,
    pub db: Database,
    pub traces: Traces,
    pub nodes: Nodes,
    pub s3: Arc<Store>,
    pub pki: Arc<Pki>,
    /// Held for as long as anything here is.
    _lock: Flock<File>,
}

impl Deref for Cloud {
    type Target = Shared;
    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl Cloud {
    /// Opens the cloud that lives in the configured folder; makes it when there is none. [`Error::Config`] when another controller has it open.
    pub async fn open(mut config: Config) -> Result<Cloud> {
        let file_error = |what, path: &PathBuf, source| Error::File { what, path: path.clone(), source };
        let mut folder = fs::DirBuilder::new();
        folder.recursive(true).mode(0o700);
        folder.create(&config.state_dir).map_err(|e| file_error("create", &config.state_dir, e))?;
        config.state_dir = fs::canonicalize(&config.state_dir).map_err(|e| file_error("open", &config.state_dir, e))?;
        let state_dir = config.state_dir.clone();
        let lock = lock(&state_dir)?;

        let db = Database::open(&state_dir).await?;
        crate::state::network::ensure_default_vpc(&db, config.vpc_cidr).await?;
        let traces = Traces::open(&state_dir).await?;
        let s3 = Store::open(&state_dir, db.clone()).await.map_err(|e| Error::Objects(e.to_string()))?;
        let pki = Pki::open(&state_dir).map_err(|e| Error::Pki(e.to_string()))?;
        let region = config.region.clone();
        Ok(Cloud(Arc::new(Shared {
            config,
            state_dir,
            region,
            db,
            traces,
            nodes: Nodes::default(),
            s3: Arc::new(s3),
            pki: Arc::new(pki),
            _lock: lock,
        })))
    }
}

/// Takes the state folder for this process.
fn lock(state_dir: &Path) -> Result<Flock<File>> {
    let path = state_dir.join("lock");
    let open = fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = open.map_err(|source| Error::File { what: "open", path: path.clone(), source })?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => Error::Config(format!(
            "another controller has the state folder {} open: end it, or give another folder (--state)",
            state_dir.display()
        )),
        errno => Error::File { what: "lock", path, source: errno.into() },
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use clap::Parser as _;

    use super::*;

    async fn open(folder: &std::path::Path) -> Result<Cloud> {
        Cloud::open(Config::parse_from(["controller", "--state", folder.to_str().unwrap()])).await
    }

    #[tokio::test]
    async fn what_holds_secrets_in_clear_is_the_operators_alone() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("cloud");
        std::fs::create_dir(&folder).unwrap();
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755)).unwrap();
        let _cloud = open(&folder).await.unwrap();
        let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode();
        let mut seen = 0;
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            assert_eq!(mode(&path) & 0o077, 0, "{}", path.display());
            seen += usize::from(path.to_string_lossy().contains("state.db"));
        }
        assert_eq!(seen, 3, "the database, its log and the log's index");
        // A folder that is made is closed as well.
        let made = outer.path().join("made");
        let _other = open(&made).await.unwrap();
        assert_eq!(mode(&made) & 0o077, 0);
    }

    #[tokio::test]
    async fn a_state_folder_has_one_controller() {
        let folder = tempfile::tempdir().unwrap();
        let first = open(folder.path()).await.unwrap();
        let refused = open(folder.path()).await.err().unwrap().to_string();
        assert!(refused.contains("another controller"), "{refused}");
        drop(first);
        open(folder.path()).await.unwrap();
    }
}
