//! The network of a node.

pub mod api;
