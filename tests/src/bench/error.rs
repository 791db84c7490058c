//! What can go wrong while measuring.

use std::{io, path::PathBuf};

use crate::lab::LabError;

#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error(transparent)]
    Program(#[from] LabError),
    #[error("{action} {path}: {source}")]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot start {monitor}: {source}")]
    Start { monitor: String, source: io::Error },
    #[error("{monitor} ended before its guest wrote to the serial port: {said}")]
    Silent { monitor: String, said: String },
    #[error("{monitor}'s memory cannot be read: {reason}")]
    Memory { monitor: String, reason: String },
    #[error("the floor cannot run: {0}")]
    Floor(String),
}
