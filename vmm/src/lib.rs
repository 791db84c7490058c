//! A minimal virtual machine monitor.

pub mod api;
