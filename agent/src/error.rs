//! What can keep the agent from starting. What goes wrong later stays with the instance that it
//! concerns ([`crate::instance::launch::Trouble`]); only the end of a part that all of them need ends the agent.

use std::io;
use std::path::PathBuf;

/// Why the agent, or one of its subcommands, gave up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: {source}")]
    File { path: PathBuf, source: io::Error },

    #[error(
        "another agent (process {holder}) uses the state folder {state}: stop it first, or give this one its own with --state"
    )]
    StateInUse { state: PathBuf, holder: i32 },

    #[error("the agent must run as root: it gives each VMM a user id, a mount namespace and a cgroup of its own")]
    NotRoot,

    #[error("{path}: {reason}; write the folder again with `mallee node add`")]
    Credentials { path: PathBuf, reason: String },

    #[error(
        "--uid-range {0:?}: it should be FIRST-LAST, both between 1000 and 4294967293, the first not above the last"
    )]
    UidRange(String),

    #[error("the asynchronous runtime: {0}")]
    Runtime(io::Error),

    #[error("a part of the agent ended: {0}")]
    PartEnded(String),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Puts the path into a file's error, where only the caller knows it.
pub trait AtPath<T> {
    fn at(self, path: impl Into<PathBuf>) -> Result<T>;
}

impl<T> AtPath<T> for io::Result<T> {
    fn at(self, path: impl Into<PathBuf>) -> Result<T> {
        self.map_err(|source| Error::File { path: path.into(), source })
    }
}
