//! The node.

pub mod api;
