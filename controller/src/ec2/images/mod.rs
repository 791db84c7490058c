//! Images: registered from the object store, described, deregistered.
//!
//! Registering takes the image over: each part is verified and then kept by the cloud under its
//! digest, so that the objects it came from may be changed or deleted. A part is kept for as long as
//! an image's row names it, and an image's row for as long as the image is registered or an instance
//! boots from it.

mod describe;
mod keep;
mod manifest;
mod register;

pub(super) use describe::describe_images;
pub use keep::tidy;
pub(super) use register::{deregister_image, register_image};
