//! The object store as the rest of the controller sees it: files, rows, and the rule that joins them.
//!
//! The rule: **a file is durable before a row names it, and a row is gone before its file goes.** So
//! a crash leaves whole objects and at most orphaned files, which [`Store::open`] sweeps away.

use std::collections::HashSet;
use std::path::Path;

use s3s::{S3Error, s3_error};
use sqlx::Row as _;

use super::files::{DataId, Files};
use crate::auth::Accounts;
use crate::state::Database;

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The caller's doing; carries S3's own code.
    #[error("{}", describe(.0))]
    Refused(S3Error),
    #[error(transparent)]
    State(#[from] crate::error::Error),
    #[error("the state database: {0}")]
    Database(#[from] sqlx::Error),
    #[error("the object store's files: {0}")]
    Disk(#[from] std::io::Error),
    #[error("the state database holds what this program never writes: {0}")]
    Corrupt(#[from] serde_json::Error),
}

impl From<S3Error> for StoreError {
    fn from(error: S3Error) -> StoreError {
        StoreError::Refused(error)
    }
}

impl From<StoreError> for S3Error {
    fn from(error: StoreError) -> S3Error {
        match error {
            StoreError::Refused(error) => error,
            StoreError::Disk(error) => super::receive::disk_error(error),
            other => {
                tracing::error!(error = %other, "object store");
                s3_error!(InternalError, "We encountered an internal error. Please try again.")
            }
        }
    }
}

/// Code and message, for callers outside of S3.
fn describe(error: &S3Error) -> String {
    match error.message() {
        Some(message) => format!("{}: {message}", error.code().as_str()),
        None => error.code().as_str().to_owned(),
    }
}

pub type Result<T> = std::result::Result<T, StoreError>;

/// The open object store.
#[derive(Debug, Clone)]
pub struct Store {
    pub(crate) files: Files,
    pub(crate) db: Database,
    pub(crate) accounts: Accounts,
}

impl Store {
    /// Opens the store below the state folder and removes what a crash has left.
    pub async fn open(state: &Path, db: Database) -> Result<Store> {
        let files = Files::open(state)?;
        let mut named = HashSet::new();
        for row in sqlx::query("SELECT data FROM s3_objects UNION ALL SELECT data FROM s3_parts").fetch_all(db.pool()).await? {
            named.insert(DataId(row.try_get("data")?));
        }
        let removed = files.sweep(&named)?;
        if removed > 0 {
            tracing::info!(removed, "removed files of uploads that were never finished");
        }
        Ok(Store { files, accounts: Accounts::new(db.clone()), db })
    }

    /// Runs `work` to its end even when the client goes away meanwhile: between a commit and the
    /// removal of the file that it replaced, nobody may stop.
    pub(crate) async fn to_the_end<T, F>(work: F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        match tokio::spawn(work).await {
            Ok(result) => result,
            Err(_) => Err(s3_error!(InternalError, "the request ended early").into()),
        }
    }
}
