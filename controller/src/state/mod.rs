//! The state of the cloud: one SQLite file, and typed questions to it.
//!
//! **Every mutating call is one transaction** ([`Database::begin`]): a controller killed at any
//! instruction leaves either all of a call or nothing of it. There is one writing connection, so a
//! transaction that has begun never meets another writer, and "read, decide, write" is safe without
//! retries. Reads go to a pool of their own and see the last committed state.
//!
//! **Secrets lie in it in clear** (an HMAC needs them so): the file is its owner's alone, whatever the folder around it allows ([`keep_private`]).
//!
//! `synchronous=FULL` with a write-ahead log: what was answered to a caller survives the loss of power.

use std::fs;
use std::io;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};

use crate::error::{Error, Result};

pub mod addresses;
pub mod images;
pub mod instances;
pub mod key_pairs;
pub mod lifecycle;
pub mod network;
pub mod nodes;
pub mod prefix_lists;
pub mod security_groups;
pub mod segments;
pub mod tags;
pub mod tokens;
pub mod vpcs;

/// A transaction that may write.
pub type Tx = sqlx::Transaction<'static, sqlx::Sqlite>;

/// The open state database; cheap to clone.
#[derive(Clone, Debug)]
pub struct Database {
    reading: SqlitePool,
    writing: SqlitePool,
}

/// The file's name in the state folder.
const FILE: &str = "state.db";

impl Database {
    /// Opens `<state>/state.db`, makes it when it is not there, and brings its schema up to date.
    pub async fn open(state_dir: &Path) -> Result<Database> {
        let file = state_dir.join(FILE);
        keep_private(&file)?;
        let options = SqliteConnectOptions::new()
            .filename(file)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(10));
        let writing = SqlitePoolOptions::new().max_connections(1).connect_with(options.clone()).await?;
        sqlx::migrate!("./migrations").run(&writing).await?;
        let reading = SqlitePoolOptions::new().max_connections(8).connect_with(options.read_only(true)).await?;
        Ok(Database { reading, writing })
    }

    /// Connections for reading; each statement sees the last committed state.
    pub fn pool(&self) -> &SqlitePool {
        &self.reading
    }

    /// Begins a transaction that may write. Waits while another one is under way. Dropped without
    /// `commit`, it leaves nothing.
    pub async fn begin(&self) -> Result<Tx> {
        Ok(self.writing.begin_with("BEGIN IMMEDIATE").await?)
    }

    /// Begins a transaction that only reads: all its statements see one moment.
    pub async fn snapshot(&self) -> Result<Tx> {
        Ok(self.reading.begin().await?)
    }
}

/// Makes the database's file when it is not there, and takes from it what group and others may do. SQLite makes the log beside it and the log's
/// index with the file's own mode (`findCreateFileMode` in its `os_unix.c`); those that a killed process left are seen to here.
pub(crate) fn keep_private(database: &Path) -> Result<()> {
    let failed = |source| Error::File { what: "close to others", path: database.to_owned(), source };
    let private = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o600));
    fs::OpenOptions::new().append(true).create(true).mode(0o600).open(database).map_err(failed)?;
    private(database).map_err(failed)?;
    for suffix in ["-wal", "-shm"] {
        let mut beside = database.as_os_str().to_owned();
        beside.push(suffix);
        match private(Path::new(&beside)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
    }
    Ok(())
}
