//! The monitor's side of a page server: memory whose pages somebody else gives (`pager`).

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::{GuestMemory, PAGE};
use crate::pager::{Mapping, Uffd};

/// The connection to the page server of a VM's memory. While this is there, a page that nobody gives is waited for; without the descriptor it
/// would be read as zeroes.
pub struct PageSource {
    _uffd: Uffd,
    stream: UnixStream,
}

impl PageSource {
    /// Hands `memory`, of which nothing has been touched yet, to the server at `socket`.
    pub fn connect(memory: &GuestMemory, socket: &Path) -> io::Result<Self> {
        let uffd = Uffd::new()?;
        let mut mappings = Vec::new();
        let mut offset = 0;
        for region in memory.iter() {
            let (start, size) = (region.as_ptr() as u64, region.len() as usize);
            uffd.register(start, region.len())?;
            mappings.push(Mapping { base_host_virt_addr: start, size, offset, page_size: PAGE, page_size_kib: PAGE });
            offset += region.len();
        }
        let stream = UnixStream::connect(socket)?;
        uffd.send(&stream, &mappings)?;
        Ok(PageSource { _uffd: uffd, stream })
    }

    /// Becomes readable when the server has ended: nothing else comes from there.
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}
