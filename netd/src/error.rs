//! What can go wrong in netd, and what a caller is told of it.

use std::io;
use std::path::PathBuf;

use crate::desired::InvalidNetwork;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Every failure that leaves netd.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The desired network cannot be; the running one was left alone.
    #[error("the desired network is refused, the running one stays: {0}")]
    Invalid(#[from] InvalidNetwork),

    #[error(
        "generation {given} is older than {applied}, the last one applied; the running network stays. \
         If the controller's state was restored from an older backup, let it hand over a generation \
         above {applied}, or stop netd, delete {}, and start netd again", state.display()
    )]
    OlderGeneration { given: u64, applied: u64, state: PathBuf },

    #[error(
        "the change is made for generation {base} and would lead to {given}, but generation {applied} is in force; \
         hand over the whole network"
    )]
    OtherBase { base: u64, given: u64, applied: u64 },

    /// A request over rtnetlink (links, addresses, routes, neighbours).
    #[error("{doing}: {source}")]
    Link { doing: String, source: rtnetlink::Error },

    /// A request to nf_tables or conntrack.
    #[error("{doing}: {source}{}", hint(source))]
    Netfilter { doing: String, source: io::Error },

    /// What a backend cannot do here, and what to do about it.
    #[error("{0}")]
    Backend(String),

    #[error("{doing}: {source}{}", hint(source))]
    Io { doing: String, source: io::Error },

    #[error("the uplink `{0}` is not there; give netd the interface of the public side with --uplink")]
    NoUplink(String),

    #[error("the link `{name}` exists and is not netd's; rename or remove it")]
    ForeignLink { name: String },

    /// The kernel has each VLAN of an interface, and each VXLAN, once.
    #[error("{0} belongs to a link that is not netd's; remove that link, or give the segment another number")]
    WireTaken(String),

    /// A netd that was asked for what it has.
    #[error("asking the netd at {}: {problem}", socket.display())]
    Asking { socket: PathBuf, problem: String },

    /// A trace that makes no sense in this network.
    #[error("{0}")]
    Question(String),

    #[error("{0}")]
    Internal(String),
}

impl Error {
    /// Wraps an I/O error with what was being done.
    pub fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }

    pub fn netfilter(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Netfilter { doing, source }
    }

    pub fn link(doing: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Link { doing, source }
    }
}

/// What an administrator can do about the commonest of kernel errors.
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            " (netd needs CAP_NET_ADMIN, CAP_NET_RAW and CAP_NET_BIND_SERVICE in this network namespace)"
        }
        Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT | libc::EPROTONOSUPPORT) => {
            " (this kernel lacks it; see `capabilities`)"
        }
        _ => "",
    }
}

impl From<Error> for tonic::Status {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::Invalid(_) => Self::invalid_argument(message),
            Error::OlderGeneration { .. } | Error::NoUplink(_) | Error::ForeignLink { .. } | Error::WireTaken(_) => {
                Self::failed_precondition(message)
            }
            Error::OtherBase { .. } => Self::aborted(message),
            _ => Self::internal(message),
        }
    }
}
