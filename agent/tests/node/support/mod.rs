//! What the tests of the whole agent share.
//!
//! The agent, netd and the VMM are the real programs, in a network namespace that the test makes; the
//! guests are a few real instructions; the controller is the real service with a test's will.

pub mod controller;
pub mod guest;
pub mod machine;
