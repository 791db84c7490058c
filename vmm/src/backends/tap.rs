//! The tap behind a virtio-net device, or one queue of it.
//!
//! Every frame is preceded by a virtio-net header (`IFF_VNET_HDR`), which is what lets segmentation and
//! checksums pass through unfinished: the guest hands over 64 KiB at once, and the host's stack or the
//! next guest finishes the work, or never has to.
//!
//! A tap with several queues (`IFF_MULTI_QUEUE`) is opened once for each. The kernel keeps a flow on the queue on which it last left; a queue
//! that is detached gets no frames until it is attached again. Whoever makes a tap for others to open must make it for
//! several queues, if they will open several: netd does so for an interface with `queue_pairs`, `ip tuntap` with `multi_queue`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use vmm_sys_util::ioctl::{ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::ioctl_iow_nr;

use crate::error::{Error, Result, check};

// include/uapi/linux/if_tun.h
ioctl_iow_nr!(TUNSETIFF, b'T' as u32, 202, libc::c_int);
ioctl_iow_nr!(TUNSETOFFLOAD, b'T' as u32, 208, libc::c_uint);
ioctl_iow_nr!(TUNSETVNETHDRSZ, b'T' as u32, 216, libc::c_int);
ioctl_iow_nr!(TUNSETQUEUE, b'T' as u32, 217, libc::c_int);

const IFF_ATTACH_QUEUE: libc::c_short = 0x0200;
const IFF_DETACH_QUEUE: libc::c_short = 0x0400;
const TUN_F_CSUM: u32 = 0x01;
const TUN_F_TSO4: u32 = 0x02;
const TUN_F_TSO6: u32 = 0x04;
const TUN_F_TSO_ECN: u32 = 0x08;
const TUN_F_USO4: u32 = 0x20;
const TUN_F_USO6: u32 = 0x40;

/// Bytes of the header before each frame: `struct virtio_net_hdr_v1`, which always has `num_buffers`.
pub const HEADER: usize = 12;

/// What the guest can take unfinished from us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    pub checksum: bool,
    pub tso4: bool,
    pub tso6: bool,
    pub ecn: bool,
    pub uso: bool,
}

impl Offloads {
    const ALL: Offloads = Offloads { checksum: true, tso4: true, tso6: true, ecn: true, uso: true };

    /// As `TUNSETOFFLOAD` wants it; it refuses segmentation without checksums.
    fn flags(self) -> u32 {
        if !self.checksum {
            return 0;
        }
        let segmentation = self.tso4 || self.tso6;
        [
            (true, TUN_F_CSUM),
            (self.tso4, TUN_F_TSO4),
            (self.tso6, TUN_F_TSO6),
            (self.ecn && segmentation, TUN_F_TSO_ECN),
            (self.uso, TUN_F_USO4 | TUN_F_USO6),
        ]
        .into_iter()
        .filter_map(|(on, flag)| on.then_some(flag))
        .fold(0, |flags, flag| flags | flag)
    }
}

/// A tap that is open, or one of its queues.
pub struct Tap {
    file: File,
    /// Whether the host's kernel knows UDP segmentation on taps (since Linux 6.2).
    has_uso: bool,
    is_attached: bool,
}

impl Tap {
    /// Attaches to `queues` queues of the tap `name`. One that does not exist is made, for the life of this process, if the caller
    /// has the right to.
    pub fn open(name: &str, queues: u16) -> Result<Vec<Self>> {
        (0..queues).map(|_| Self::open_one(name, queues > 1)).collect()
    }

    fn open_one(name: &str, is_one_of_several: bool) -> Result<Self> {
        let device = Path::new("/dev/net/tun");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(device)
            .map_err(|source| Error::Host { what: "open /dev/net/tun", source })?;
        connect(&file, name, is_one_of_several)?;
        // SAFETY: the kernel reads one int at the given address.
        let sized = unsafe { ioctl_with_ref(&file, TUNSETVNETHDRSZ(), &(HEADER as libc::c_int)) };
        check(sized).map_err(|source| Error::Host { what: "TUNSETVNETHDRSZ", source })?;
        let mut tap = Tap { file, has_uso: true, is_attached: true };
        tap.has_uso = tap.set_offloads(Offloads::ALL).is_ok();
        tap.set_offloads(Offloads::default()).map_err(|source| Error::Host { what: "TUNSETOFFLOAD", source })?;
        Ok(tap)
    }

    pub fn has_uso(&self) -> bool {
        self.has_uso
    }

    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Tells the host's stack what it may leave unfinished in frames for the guest. It holds for all queues of the tap.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        // SAFETY: the argument is a number, no memory is passed.
        but_for_stand_ins(check(unsafe { ioctl_with_val(&self.file, TUNSETOFFLOAD(), offloads.flags().into()) }))
    }

    /// Whether the queue, one of several, gets frames. Those that wait in one that is detached are lost.
    pub fn attach(&mut self, attached: bool) -> io::Result<()> {
        if self.is_attached == attached {
            return Ok(());
        }
        // SAFETY: all zeroes is a valid `ifreq`, a structure of integers.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = if attached { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
        // SAFETY: the kernel reads one `ifreq` at the given address.
        but_for_stand_ins(check(unsafe { ioctl_with_ref(&self.file, TUNSETQUEUE(), &request) }))?;
        self.is_attached = attached;
        Ok(())
    }

    /// For tests: any descriptor that reads and writes frames with their header.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn from_file(file: File) -> Self {
        Tap { file, has_uso: false, is_attached: true }
    }
}

/// What stands for a tap in tests knows none of its calls.
fn but_for_stand_ins(called: io::Result<()>) -> io::Result<()> {
    #[cfg(any(test, feature = "fuzzing"))]
    let called = called.or_else(|error| (error.raw_os_error() == Some(libc::ENOTTY)).then_some(()).ok_or(error));
    called
}

fn connect(file: &File, name: &str, is_one_of_several: bool) -> Result<()> {
    let mut request = interface_request(name)?;
    let single = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    let multi = single | libc::IFF_MULTI_QUEUE as libc::c_short;
    // A tap that was made for several queues is refused without that flag, and the other way round.
    let mut result = Ok(());
    let tried = [single, multi];
    for flags in &tried[usize::from(is_one_of_several)..] {
        request.ifr_ifru.ifru_flags = *flags;
        // SAFETY: the kernel reads and writes one `ifreq` at the given address.
        result = check(unsafe { ioctl_with_ref(file, TUNSETIFF(), &request) });
        match &result {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            _ => break,
        }
    }
    result.map_err(|error| {
        let why = match error.raw_os_error() {
            Some(libc::EBUSY) => "it is in use by another process".to_owned(),
            Some(libc::EPERM) => {
                "it does not exist or belongs to another user, and this process may not make one".to_owned()
            }
            Some(libc::EINVAL) if is_one_of_several => {
                "it was made for one queue, and the interface has several: make it with `multi_queue`".to_owned()
            }
            Some(libc::E2BIG) => "it has no more queues to give".to_owned(),
            _ => error.to_string(),
        };
        Error::Tap { name: name.to_owned(), why }
    })
}

fn interface_request(name: &str) -> Result<libc::ifreq> {
    // SAFETY: all zeroes is a valid `ifreq`, a structure of integers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays NUL.
    if name.is_empty() || name.len() >= request.ifr_name.len() || name.contains(['\0', '%']) {
        return Err(Error::BadConfiguration(format!(
            "host_dev_name {name:?} is not a name of a network interface (1 to 15 bytes, no '%')"
        )));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segmentation_is_asked_for_only_with_checksums() {
        assert_eq!(Offloads { checksum: false, ..Offloads::ALL }.flags(), 0);
        assert_eq!(Offloads::ALL.flags(), 0x6f);
        let only_uso = Offloads { checksum: true, uso: true, ecn: true, ..Default::default() };
        assert_eq!(only_uso.flags(), TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6);
    }

    #[test]
    fn names_that_the_kernel_would_take_for_something_else_are_refused() {
        for name in ["", "sixteen-bytes-xx", "tap%d", "a\0b"] {
            assert!(interface_request(name).is_err(), "{name:?}");
        }
        assert!(interface_request("fifteen-bytes-x").is_ok());
    }
}
