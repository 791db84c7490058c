//! The node: makes one machine equal to what the controller wants of it.
//!
//! **What it owns.** The node's instances: the process of each VMM and the jail around it, root
//! disks, the image cache, console logs, the metadata service on 169.254.169.254, and the
//! measurements of how an instance came up.
//!
//! **What it may not do.** Decide where an instance goes (the controller does), touch a tap, a
//! bridge or a rule (netd does), or look into a guest (the VMM does).
//!
//! **How data flows.** [`session`] dials the controller and receives the whole [`api::DesiredNode`]
//! each time it changes. [`node`] stores it, hands the network to [`network`] (which hands it to netd,
//! whole or as the elastic IPs that changed) and the description of each instance to that instance's own task in [`instance`]. A task
//! compares what is wanted with what is there, does one step, and compares again; it writes what it
//! sees on the [`board`], and the session sends the board to the controller. Nothing depends on
//! a difference: an agent that was killed reads its folder, finds the VMMs that live on without it,
//! and is where it was.
//!
//! Reading order: [`node`], [`instance::state`] (the decisions), [`instance::task`] (the steps),
//! [`instance::confine`] (the jail).

pub mod api;

#[cfg(feature = "daemon")]
mod board;
#[cfg(feature = "daemon")]
mod cgroup;
#[cfg(feature = "daemon")]
pub mod cli;
#[cfg(feature = "daemon")]
mod clock;
#[cfg(feature = "daemon")]
mod console;
#[cfg(feature = "daemon")]
mod credentials;
#[cfg(feature = "daemon")]
mod error;
#[cfg(feature = "daemon")]
mod facts;
#[cfg(feature = "daemon")]
mod ids;
#[cfg(feature = "daemon")]
mod images;
#[cfg(feature = "daemon")]
mod instance;
#[cfg(feature = "daemon")]
mod metadata;
#[cfg(feature = "daemon")]
mod network;
#[cfg(feature = "daemon")]
mod news;
#[cfg(feature = "daemon")]
mod node;
#[cfg(feature = "daemon")]
mod session;
#[cfg(feature = "daemon")]
mod show;
#[cfg(feature = "daemon")]
mod spans;
#[cfg(feature = "daemon")]
mod store;
#[cfg(feature = "daemon")]
mod wait;
#[cfg(feature = "daemon")]
mod wanted;
