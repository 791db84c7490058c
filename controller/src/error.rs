//! What can go wrong in the controller itself.
//!
//! What a *caller* did wrong is not here: that is [`crate::ec2::error::Ec2Error`], which knows EC2's
//! codes. An [`Error`] that reaches a caller becomes an `InternalError` with the request's id, and
//! its words go to the log.

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the state database: {0}")]
    Database(#[from] sqlx::Error),
    #[error("the state database's schema: {0}")]
    Migration(#[from] sqlx::migrate::MigrateError),
    #[error("{what} {path}: {source}")]
    File { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error("cannot listen on {address} for {what}: {source}")]
    Listen { what: &'static str, address: String, source: std::io::Error },
    #[error("the certificate authority: {0}")]
    Pki(String),
    #[error("the object store: {0}")]
    Objects(String),
    #[error("node names and zones: {0}")]
    Node(String),
    #[error("the nodes' service ended: {0}")]
    NodeService(#[from] tonic::transport::Error),
    #[error("the state database holds what this program never writes: {0}")]
    Corrupt(String),
    #[error("{0}")]
    Config(String),
}

pub type Result<T> = std::result::Result<T, Error>;
