//! Parsers of what comes from outside the guest: kernel files, snapshots and API requests.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::PathBuf;

use vm_memory::GuestAddress;

use crate::api::{BootProtocol, VmConfig};
use crate::boot;
use crate::memory;
use crate::rest::{self, Call};

/// Bytes of guest memory that a kernel may be loaded into.
const MEMORY: usize = 32 << 20;

/// Loads the bytes as a kernel, by the protocol that the first bit chooses.
pub fn kernel(bytes: &[u8]) {
    let Some((first, image)) = bytes.split_first() else { return };
    let protocol = if first & 1 == 0 { BootProtocol::Linux } else { BootProtocol::Pvh };
    let mut file = memory_file();
    file.write_all(image).unwrap();
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let memory = memory::map(&[(GuestAddress(0), MEMORY)], None, false).unwrap();
    let _ = boot::kernel::load(&memory, &path, protocol);
}

/// Reads the bytes as a VM's saved state: as they are, and as the sections of a file whose checksum is right. The first byte says how many
/// sections there are.
pub fn snapshot(bytes: &[u8]) {
    if let Some((count, sections)) = bytes.split_first() {
        crate::snapshot::parse(sections, (*count).into());
    }
}

/// Takes the bytes for what a client sent, and does what it asks for to the configuration of a VM that is not started.
pub fn request(bytes: &[u8]) {
    let Some(Ok(call)) = rest::parse(bytes) else { return };
    let mut config = VmConfig::default();
    match call {
        Call::Configuration(read) => drop(read(&config)),
        Call::Configure(change) => drop(change(&mut config)),
        _ => {}
    }
}

/// An empty file without a name.
pub(super) fn memory_file() -> File {
    // SAFETY: the name is a NUL-terminated constant.
    let descriptor = unsafe { libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(descriptor >= 0, "memfd_create: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor was just made, and nobody else knows it.
    unsafe { File::from_raw_fd(descriptor) }
}
