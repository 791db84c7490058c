//! Making a persistent tap.
//!
//! rtnetlink cannot make taps: the kernel offers that through `/dev/net/tun` only
//! (`Documentation/networking/tuntap.rst`). The tap is made, given to its owner and to netd's link
//! group, and only then made persistent: a crash before that leaves nothing, since the kernel removes
//! a tap that is not persistent when its descriptor closes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

use crate::desired::LinkName;
use crate::error::{Error, Result};

const TUN_DEVICE: &str = "/dev/net/tun";

// `include/uapi/linux/if_tun.h`
nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF, libc::ifreq);
nix::ioctl_write_int_bad!(tun_set_persist, nix::request_code_write!(b'T', 203, size_of::<libc::c_int>()));
nix::ioctl_write_int_bad!(tun_set_owner, nix::request_code_write!(b'T', 204, size_of::<libc::c_int>()));

/// How a tap is to be made.
#[derive(Debug, Clone, Copy)]
pub struct TapOptions {
    /// The user that may open it.
    pub owner: u32,
    /// More than one queue pair.
    pub multi_queue: bool,
}

/// Makes the tap. `mark` is run while the tap is there but would still go with a crash.
pub async fn create<F: Future<Output = Result<()>>>(name: &LinkName, options: TapOptions, mark: F) -> Result<()> {
    let device = open(name, options).map_err(Error::io(format!("making the tap {name}")))?;
    mark.await?;
    // SAFETY: the descriptor is open; the argument is a flag.
    let kept = unsafe { tun_set_persist(device.as_raw_fd(), 1) };
    kept.map_err(io::Error::from).map_err(Error::io(format!("keeping the tap {name}")))?;
    Ok(())
}

/// Opens the tap and gives it its owner. One that is not there is made, and goes when the descriptor closes.
pub fn open(name: &LinkName, options: TapOptions) -> io::Result<File> {
    let device = OpenOptions::new().read(true).write(true).open(TUN_DEVICE)?;
    let fd = device.as_raw_fd();
    let request = interface_request(name, options.multi_queue);
    // SAFETY: `fd` is an open descriptor and `request` a filled-in `ifreq` that outlives the call.
    unsafe { tun_set_iff(fd, &request) }?;
    // SAFETY: `fd` is open; the kernel takes the user id as the argument itself.
    unsafe { tun_set_owner(fd, options.owner as libc::c_int) }?;
    Ok(device)
}

fn interface_request(name: &LinkName, multi_queue: bool) -> libc::ifreq {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if multi_queue {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(name.padded()) {
        *to = from as libc::c_char;
    }
    libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags as libc::c_short } }
}
