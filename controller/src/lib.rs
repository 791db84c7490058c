//! The controller: what a cloud's users and its operator talk to.
//!
//! **Owns**: accounts, the EC2, S3 and STS interfaces, the *desired* state of every node, the
//! choice of the node on which an instance runs, the traces of requests, the operator's command
//! `mallee`.
//!
//! **May not** touch a tap, a rule or a VM. It says what should be; the agents make it so and report
//! what is.
//!
//! **How data flows.** A request comes in at [`http`], which checks the signature ([`auth`]) and
//! tells the services apart. [`ec2`] reads it into a typed request that was generated from EC2's
//! published service model, carries it out in *one transaction* on the [`state`] database, and wakes
//! the node that it concerns. [`nodes`] computes that node's whole desired state from the database
//! and sends it down the stream that the agent keeps open; what the agent observes comes up the same
//! stream and is written back as instance states. Nothing about an instance lives in memory
//! alone: a controller that is killed and started again goes on from the database.

// One error enum for the crate's border, and EC2's own error with its code: both carry words.
#![allow(clippy::result_large_err)]

pub mod admin;
pub mod auth;
pub mod cli;
pub mod clock;
pub mod cloud;
pub mod config;
pub mod ec2;
pub mod error;
pub mod http;
pub mod ids;
mod networks;
pub mod nodes;
pub mod pki;
pub mod query;
pub mod run;
pub mod s3;
pub mod state;
pub mod sts;
pub mod traces;

pub use cloud::Cloud;
pub use config::Config;
pub use error::Error;
