//! A distribution's kernel, unmodified: the ELF image inside its `vmlinuz`, and the modules that a guest
//! needs before it has a disk.

pub mod modules;
pub mod payload;
