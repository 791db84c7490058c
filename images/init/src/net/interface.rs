//! One network interface, configured by the kernel's classic requests (netdevice(7), rtentry).

use std::ffi::CString;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::dhcp::lease::Route;

/// ARPHRD_ETHER of linux/if_arp.h.
const HARDWARE_ETHERNET: &str = "1";

pub type Mac = [u8; 6];

pub struct Interface {
    name: String,
}

impl Interface {
    pub fn loopback() -> Self {
        Interface { name: "lo".into() }
    }

    /// The Ethernet interface with the lowest index.
    pub fn first_ethernet() -> Option<Self> {
        let entries = fs::read_dir("/sys/class/net").ok()?;
        entries
            .flatten()
            .filter(|entry| read(&entry.path(), "type").as_deref() == Some(HARDWARE_ETHERNET))
            .filter_map(|entry| {
                let index: u32 = read(&entry.path(), "ifindex")?.parse().ok()?;
                Some((index, entry.file_name().into_string().ok()?))
            })
            .min()
            .map(|(_, name)| Interface { name })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn index(&self) -> io::Result<i32> {
        let index = nix::net::if_::if_nametoindex(self.name.as_str())?;
        Ok(index.cast_signed())
    }

    pub fn mac(&self) -> io::Result<Mac> {
        let mut request = self.request();
        self.ioctl(libc::SIOCGIFHWADDR, &mut request)?;
        // SAFETY: after SIOCGIFHWADDR the union holds a hardware address.
        let data = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
        Ok(std::array::from_fn(|at| data[at].cast_unsigned()))
    }

    pub fn up(&self) -> io::Result<()> {
        let mut request = self.request();
        self.ioctl(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: after SIOCGIFFLAGS the union holds the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
        self.ioctl(libc::SIOCSIFFLAGS, &mut request)
    }

    pub fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        let mut request = self.request();
        request.ifr_ifru.ifru_mtu = libc::c_int::from(mtu);
        self.ioctl(libc::SIOCSIFMTU, &mut request)
    }

    /// Sets the interface's only address. Routes through an address that was there before go with it.
    pub fn set_address(&self, address: Ipv4Addr, netmask: Ipv4Addr) -> io::Result<()> {
        let mut request = self.request();
        request.ifr_ifru.ifru_addr = socket_address(address);
        self.ioctl(libc::SIOCSIFADDR, &mut request)?;
        let mut request = self.request();
        request.ifr_ifru.ifru_netmask = socket_address(netmask);
        self.ioctl(libc::SIOCSIFNETMASK, &mut request)
    }

    pub fn clear_address(&self) -> io::Result<()> {
        let mut request = self.request();
        request.ifr_ifru.ifru_addr = socket_address(Ipv4Addr::UNSPECIFIED);
        self.ioctl(libc::SIOCSIFADDR, &mut request)
    }

    pub fn add_route(&self, route: &Route) -> io::Result<()> {
        let device = CString::new(self.name.as_str())?;
        // SAFETY: rtentry is plain data, for which zeros are a valid "nothing said".
        let mut entry: libc::rtentry = unsafe { std::mem::zeroed() };
        entry.rt_dst = socket_address(route.destination.network());
        entry.rt_genmask = socket_address(route.destination.netmask());
        entry.rt_flags = libc::RTF_UP;
        if let Some(gateway) = route.gateway {
            entry.rt_gateway = socket_address(gateway);
            entry.rt_flags |= libc::RTF_GATEWAY;
        }
        entry.rt_dev = device.as_ptr().cast_mut();
        let socket = control_socket()?;
        // SAFETY: entry and the name behind rt_dev live through the call; the kernel only reads them.
        let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &raw const entry) };
        match result {
            0 => Ok(()),
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
                error => Err(error),
            },
        }
    }

    fn request(&self) -> libc::ifreq {
        // SAFETY: ifreq is plain data, for which zeros are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // The kernel's names have at most 15 bytes; the last one stays zero.
        for (to, from) in request.ifr_name.iter_mut().zip(self.name.bytes().take(libc::IFNAMSIZ - 1)) {
            *to = from.cast_signed();
        }
        request
    }

    fn ioctl(&self, number: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
        let socket = control_socket()?;
        // SAFETY: all requests used here read or write one ifreq, which lives through the call.
        match unsafe { libc::ioctl(socket.as_raw_fd(), number, request as *mut libc::ifreq) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn control_socket() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?)
}

fn read(folder: &Path, file: &str) -> Option<String> {
    Some(fs::read_to_string(folder.join(file)).ok()?.trim().to_owned())
}

/// A `sockaddr_in` in the clothes of a `sockaddr`, as these requests want it.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (to, from) in data[2..6].iter_mut().zip(address.octets()) {
        *to = from.cast_signed();
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}
