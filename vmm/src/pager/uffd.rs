//! userfaultfd(2), as much of it as is needed to give a VM's memory its pages when they are touched.
//!
//! The descriptor is made by the monitor, for its own address space, and sent to the page server with a message that says what was mapped where
//! (Firecracker's format). Faults come from the kernel (KVM and system calls touch guest memory), so a descriptor for user faults alone would not do:
//! making one needs CAP_SYS_PTRACE, `vm.unprivileged_userfaultfd`, or access to `/dev/userfaultfd`.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use serde::{Deserialize, Serialize};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_val};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vmm_sys_util::{ioctl_io_nr, ioctl_iowr_nr};

use crate::error::check;

// include/uapi/linux/userfaultfd.h
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
const UFFD_EVENT_REMOVE: u8 = 0x15;
/// Bytes of one event: its kind, then, from byte 8 on, a fault's flags and address, or a removal's start and end.
const EVENT: usize = 32;

#[repr(C)]
#[derive(Default)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct Register {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct CopyPages {
    destination: u64,
    source: u64,
    length: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
#[derive(Default)]
struct ZeroPage {
    start: u64,
    length: u64,
    mode: u64,
    zeroed: i64,
}

ioctl_io_nr!(USERFAULTFD_IOC_NEW, 0xaa_u32, 0x00);
ioctl_iowr_nr!(UFFDIO_API, 0xaa_u32, 0x3f, Api);
ioctl_iowr_nr!(UFFDIO_REGISTER, 0xaa_u32, 0x00, Register);
ioctl_iowr_nr!(UFFDIO_COPY, 0xaa_u32, 0x03, CopyPages);
ioctl_iowr_nr!(UFFDIO_ZEROPAGE, 0xaa_u32, 0x04, ZeroPage);

/// What the kernel tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A page that is not there was touched at this address.
    Fault(u64),
    /// The pages from start to end were given back; who touches them again gets zeroes.
    Removed(u64, u64),
    Other,
}

/// One mapping of guest memory, as the monitor tells the page server (Firecracker's members).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// Where it is in the monitor's address space.
    pub base_host_virt_addr: u64,
    /// Bytes.
    pub size: usize,
    /// Where its content begins in the memory file.
    pub offset: u64,
    pub page_size: usize,
    /// Firecracker's older name of `page_size`, which is in bytes too.
    #[serde(default)]
    pub page_size_kib: usize,
}

/// A userfaultfd.
pub struct Uffd(OwnedFd);

impl Uffd {
    /// One for the address space of this process.
    pub fn new() -> io::Result<Self> {
        let fd = match Self::by_call() {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => Self::by_device()?,
            other => other?,
        };
        let mut api = Api { api: UFFD_API, features: UFFD_FEATURE_EVENT_REMOVE, ..Api::default() };
        // SAFETY: the kernel reads and writes one structure at the given address.
        check(unsafe { ioctl_with_mut_ref(&fd, UFFDIO_API(), &mut api) })?;
        Ok(Uffd(fd))
    }

    fn by_call() -> io::Result<OwnedFd> {
        // SAFETY: flags only; a descriptor that is returned is owned by nobody else.
        unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK);
            check(fd as libc::c_int)?;
            Ok(OwnedFd::from_raw_fd(fd as RawFd))
        }
    }

    fn by_device() -> io::Result<OwnedFd> {
        let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd")?;
        let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as libc::c_ulong;
        // SAFETY: flags only; a descriptor that is returned is owned by nobody else.
        unsafe {
            let fd = ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags);
            check(fd)?;
            Ok(OwnedFd::from_raw_fd(fd))
        }
    }

    /// From now on, who touches a page of this range that is not there waits for [`Self::copy`] or [`Self::zero`].
    pub fn register(&self, start: u64, length: u64) -> io::Result<()> {
        let mut register = Register { start, length, mode: UFFDIO_REGISTER_MODE_MISSING, ioctls: 0 };
        // SAFETY: the kernel reads and writes one structure at the given address.
        check(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_REGISTER(), &mut register) })
    }

    /// Fills whole pages, and lets go on who waits for them. One that is there already stays as it is, and ends the filling with `AlreadyExists`.
    pub fn copy(&self, destination: u64, source: &[u8]) -> io::Result<()> {
        let (source, length) = (source.as_ptr() as u64, source.len() as u64);
        let mut copy = CopyPages { destination, source, length, ..CopyPages::default() };
        // SAFETY: the kernel reads and writes one structure at the given address, and reads `source`, whose length it is told. It writes to
        // memory of the other process's that was registered for this.
        check(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_COPY(), &mut copy) })
    }

    /// The same with zeroes.
    pub fn zero(&self, start: u64, length: u64) -> io::Result<()> {
        let mut zero = ZeroPage { start, length, ..ZeroPage::default() };
        // SAFETY: the kernel reads and writes one structure at the given address.
        check(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_ZEROPAGE(), &mut zero) })
    }

    /// The next event, if there is one.
    pub fn next(&self) -> io::Result<Option<Event>> {
        let mut bytes = [0u8; EVENT];
        // SAFETY: the kernel writes at most the given length to `bytes`.
        let count = unsafe { libc::read(self.0.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len()) };
        if count < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) };
        }
        let word = |at: usize| bytes[at..at + 8].iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        Ok(Some(match bytes[0] {
            UFFD_EVENT_PAGEFAULT => Event::Fault(word(16)),
            UFFD_EVENT_REMOVE => Event::Removed(word(8), word(16)),
            _ => Event::Other,
        }))
    }

    /// Sends it, and what it is about, to the page server.
    pub fn send(&self, stream: &UnixStream, mappings: &[Mapping]) -> io::Result<()> {
        let text = serde_json::to_string(mappings)?;
        let sent = stream.send_with_fd(text.as_bytes(), self.0.as_raw_fd()).map_err(errno)?;
        if sent == text.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// What [`Self::send`] has sent.
    pub fn receive(stream: &UnixStream) -> io::Result<(Self, Vec<Mapping>)> {
        let mut text = [0; 4096];
        let (count, file) = stream.recv_with_fd(&mut text).map_err(errno)?;
        let file = file.ok_or_else(|| io::Error::other("the monitor has sent no descriptor"))?;
        Ok((Uffd(file.into()), serde_json::from_slice(&text[..count])?))
    }
}

impl AsRawFd for Uffd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn errno(error: vmm_sys_util::errno::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}
