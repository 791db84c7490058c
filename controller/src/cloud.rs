//! What every handler shares: the open database, the nodes at hand, the object store.

use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;

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
}

impl Deref for Cloud {
    type Target = Shared;
    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl Cloud {
    /// Opens the cloud that lives in the configured folder; makes it when there is none.
    pub async fn open(mut config: Config) -> Result<Cloud> {
        let file_error = |what, path: &PathBuf, source| Error::File { what, path: path.clone(), source };
        std::fs::create_dir_all(&config.state_dir).map_err(|e| file_error("create", &config.state_dir, e))?;
        config.state_dir =
            std::fs::canonicalize(&config.state_dir).map_err(|e| file_error("open", &config.state_dir, e))?;
        let state_dir = config.state_dir.clone();

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
        })))
    }
}
