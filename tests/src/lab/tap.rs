//! The host's end of a node's network cable: a tap that is a port of a bridge.
//!
//! The tap is not persistent: it lives as long as the QEMU that holds it open, so a killed node
//! leaves none behind.

use std::{
    fs::{File, OpenOptions},
    os::fd::AsRawFd,
    process::Command,
};

use sha2::{Digest, Sha256};

use super::error::{LabError, OnPath, output_of};

nix::ioctl_write_int!(tun_set_iff, b'T', 202);

/// Name of the tap of `node`'s NIC number `nic`: short enough for the kernel (15 bytes), and
/// different for nodes of the same name in other labs.
pub fn name(node_folder: &std::path::Path, nic: usize) -> String {
    let mut hasher = Sha256::new();
    hasher.update(node_folder.as_os_str().as_encoded_bytes());
    format!("mlt{}n{nic}", hex::encode(&hasher.finalize()[..4]))
}

/// A MAC of our own for the node's NIC number `nic`, from the range QEMU's users take (52:54:00).
pub fn mac(node_folder: &std::path::Path, nic: usize) -> String {
    let mut hasher = Sha256::new();
    hasher.update(node_folder.as_os_str().as_encoded_bytes());
    hasher.update([nic as u8]);
    let digest = hasher.finalize();
    format!("52:54:00:{:02x}:{:02x}:{:02x}", digest[0], digest[1], digest[2])
}

/// Opens a tap and makes it a port of `bridge`. The file is inherited by what is executed next.
pub fn open(name: &str, bridge: &str) -> Result<File, LabError> {
    const DEVICE: &str = "/dev/net/tun";
    let file = OpenOptions::new().read(true).write(true).open(DEVICE).on("opening", DEVICE)?;
    // SAFETY: an `ifreq` of zeroes is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the descriptor is open, and TUNSETIFF reads and writes one `ifreq` at the address, which
    // outlives the call.
    unsafe { tun_set_iff(file.as_raw_fd(), &raw mut request as libc::c_ulong) }
        .map_err(std::io::Error::from)
        .on("making the tap", name)?;
    output_of(Command::new("ip").args(["link", "set", "dev", name, "master", bridge, "up"]))?;
    // SAFETY: the descriptor is open; clearing FD_CLOEXEC changes nothing else.
    let kept = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) };
    if kept < 0 {
        return Err(std::io::Error::last_os_error()).on("keeping the tap", name);
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn names_fit_the_kernel_and_differ() {
        let one = name(Path::new("/a/lab1"), 0);
        assert!(one.len() <= 15);
        assert_ne!(one, name(Path::new("/b/lab1"), 0));
        assert_ne!(one, name(Path::new("/a/lab1"), 1));
        assert_ne!(mac(Path::new("/a/lab1"), 0), mac(Path::new("/a/lab1"), 1));
    }
}
