//! The guest's end of a network interface: found by its Ethernet address, given an IPv4 address, by the kernel's classic requests (netdevice(7)).

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Where the kernel tells of interfaces.
pub const FOLDER: &str = "/sys/class/net";

/// Name of the interface with this Ethernet address (lower case).
pub fn find(mac: &str) -> Result<String, String> {
    let is_meant = |name: &String| {
        fs::read_to_string(format!("{FOLDER}/{name}/address")).is_ok_and(|address| address.trim() == mac)
    };
    let entries = fs::read_dir(FOLDER).map_err(|error| format!("{FOLDER}: {error}"))?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names.into_iter().find(is_meant).ok_or_else(|| format!("no interface has the address {mac}"))
}

/// Gives it `address` in a network of 256 addresses, and turns it on.
pub fn configure(name: &str, address: Ipv4Addr) -> io::Result<()> {
    let mut request = request(name);
    request.ifr_ifru.ifru_addr = socket_address(address);
    call(libc::SIOCSIFADDR, &mut request)?;
    request.ifr_ifru.ifru_netmask = socket_address(Ipv4Addr::new(255, 255, 255, 0));
    call(libc::SIOCSIFNETMASK, &mut request)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    call(libc::SIOCSIFFLAGS, &mut request)
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: all zeroes is a valid `ifreq`, a structure of integers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    // Port, then address.
    data[2..6].copy_from_slice(&address.octets().map(u8::cast_signed));
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}

fn call(what: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: the socket is open, and the kernel reads and writes one `ifreq` at the address.
    match unsafe { libc::ioctl(socket.as_raw_fd(), what, request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
