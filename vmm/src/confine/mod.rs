//! What is left to a process in which a guest has taken over a thread: as little as can be.
//!
//! * `seccomp` gives every kind of thread a filter of system calls, installed by default; `rules` is what they say. Whatever is in no rule ends the process.
//! * `jail` takes the process, where it is asked to, into a root and namespaces of its own, and its rights away. What it does not need to know of this
//!   program is in `api::jail`, which the agent uses too.
//!
//! The order of a start: the jail is entered; what the configuration names is opened and the VM built with all rights; the host is left; each thread
//! takes its filter as its first act, and the main thread when the vCPUs have been started, before it handles anything that a guest has
//! caused.

pub mod jail;
mod seccomp;

pub use seccomp::{ThreadKind, enter, give_up_new_privileges, turn_on};
