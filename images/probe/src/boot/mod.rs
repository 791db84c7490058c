//! From the monitor's entry point to Rust in ring 3, and back for traps.

pub mod entry;
pub mod memory;
pub mod paging;
pub mod traps;
pub mod zero_page;
