//! The crate's one error type.
//!
//! Two kinds matter to whoever started the VMM: what *they* gave cannot be used (exit status 2, trying
//! again is pointless) and the *host* failed (exit status 1, another try or another node may do).
//! [`Error::reason`] is where that line is drawn.

use std::io;
use std::path::{Path, PathBuf};

use crate::api::ExitReason;

/// Why a VM could not be configured, built or kept running.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration, a kernel or a disk image cannot be used as it is.
    #[error("{0}")]
    BadConfiguration(String),
    /// A file named in the configuration cannot be opened or read.
    #[error("{what} {}: {source}", path.display())]
    File { what: &'static str, path: PathBuf, source: io::Error },
    /// A call to KVM failed.
    #[error("KVM: {call}: {source}")]
    Kvm { call: &'static str, source: kvm_ioctls::Error },
    /// A tap cannot be had. Taps are made, given away and taken by others while a VM is started: the
    /// same configuration may do a moment later.
    #[error("tap {name}: {why}")]
    Tap { name: String, why: String },
    /// Something else of the host failed.
    #[error("{what}: {source}")]
    Host { what: &'static str, source: io::Error },
    /// Guest memory could not be allocated or written while the VM was being built.
    #[error("guest memory: {0}")]
    Memory(String),
}

pub type Result<T> = std::result::Result<T, Error>;

/// The outcome of a call to the C library that says by a number below zero that it has failed, and by `errno` why.
pub fn check<T: Default + PartialOrd>(result: T) -> io::Result<()> {
    if result < T::default() { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Error {
    /// What the exit event says, and with it the exit status.
    pub fn reason(&self) -> ExitReason {
        match self {
            Error::BadConfiguration(_) | Error::File { .. } => ExitReason::BadConfiguration,
            Error::Kvm { .. } | Error::Tap { .. } | Error::Host { .. } | Error::Memory(_) => ExitReason::HostFailure,
        }
    }

    /// For `map_err` on a KVM call.
    pub fn kvm(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
        move |source| Error::Kvm { call, source }
    }

    /// For `map_err` on a call to the host's kernel.
    pub fn host(what: &'static str) -> impl Fn(io::Error) -> Error {
        move |source| Error::Host { what, source }
    }

    /// For `map_err` on the opening or reading of a file that the configuration names.
    pub fn file(what: &'static str, path: &Path) -> impl Fn(io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::File { what, path: path.clone(), source }
    }
}
