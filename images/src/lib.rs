//! Bootable images: a kernel, an initial RAM file system, a root file system, and a manifest that says
//! what they are.
//!
//! This part owns how an image comes about and nothing of how it is used: registering it is an S3 upload and
//! `ec2 register-image`, which any client does, and no other part needs this one at run time.
//!
//! Data flows one way. A *recipe* ([`recipe::tiny`], [`recipe::probe`]) names Debian packages and programs of
//! ours. [`packages`] finds and fetches the packages with apt, [`guest_program`] has cargo build the
//! programs; [`kernel`] takes kernel and modules out of the kernel's package; [`tree`] is a file system in
//! memory, into which the recipe puts what is needed and no more ([`elf`] finds the libraries), and which
//! becomes a RAM file system ([`cpio`]) or a disk ([`ext4`]). [`manifest`] describes the result.
//!
//! The same inputs give the same bytes. Results are therefore kept ([`cache`]) under the digest of their
//! inputs: a second build copies files, and needs no network.
//!
//! What may not happen here: mounting, loop devices, chroots, or running anything out of a package.

pub mod cache;
pub mod cpio;
pub mod digest;
pub mod elf;
pub mod error;
pub mod ext4;
pub mod guest_program;
pub mod kernel;
pub mod manifest;
pub mod packages;
pub mod progress;
pub mod recipe;
pub mod sparse;
pub mod tree;

pub use error::Error;
