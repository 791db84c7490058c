//! What is left to a process in which a guest has taken over a thread: as little as can be.
//!
//! * `seccomp` gives every kind of thread a filter of system calls, installed by default; `rules` is what they say. Whatever is in no rule ends the process.
//!
//! The order of a start: what the configuration names is opened and the VM built with all rights; each thread
//! takes its filter as its first act, and the main thread when the vCPUs have been started, before it handles anything that a guest has
//! caused.

mod seccomp;

pub use seccomp::{ThreadKind, enter, give_up_new_privileges, turn_on};
