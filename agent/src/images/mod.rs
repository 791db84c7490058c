//! Image parts on this node, by digest.
//!
//! A part is fetched once however many instances want it, lies under its SHA-256 only when all of
//! its bytes were checked, and is removed when no instance needs it and the cache is over its bound.
//! [`cache`] knows what is there, [`fetch`] how one part gets there.

pub mod cache;
mod fetch;

pub use cache::{Cached, ImageCache};
pub use fetch::{ControllerBlobs, FetchError};
