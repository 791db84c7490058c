//! What is put into guest memory before the first instruction: kernel, initrd, command line, zero
//! page and firmware tables. Everything here runs once, on the main thread, and keeps nothing.

pub mod acpi;
pub mod image;
pub mod initrd;
pub mod kernel;
pub mod pvh;
pub mod reset_vector;
pub mod smbios;
pub mod zero_page;
