//! The kernel's own counters of a tap: all that tells of frames which pass by this process (vhost-net).
//!
//! They are asked for over a routing netlink socket (rtnetlink(7), `RTM_GETSTATS`), made together with the tap in the tap's network namespace; it stays there when the
//! process goes to another. Such a socket could also tell of everybody else's interfaces, which a process that a guest has taken over must not hear. So a filter
//! that cannot be taken off again lets answers about this one tap through, and of these no more than the counters; and what changes something
//! needs a capability that the process has given up.

use std::ffi::CString;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Mutex;

use crate::bus::lock;
use crate::error::{Error, Result, check};
use crate::metrics::Elsewhere;

// include/uapi/linux/rtnetlink.h
const RTM_NEWSTATS: u16 = 92;
const RTM_GETSTATS: u16 = 94;
// include/uapi/linux/if_link.h
const IFLA_STATS_LINK_64: u16 = 1;
const FILTER_LINK_64: u32 = 1;

/// A question: `struct nlmsghdr` and `struct if_stats_msg`.
#[derive(Default)]
#[repr(C)]
struct Question {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
    family: u8,
    padding: [u8; 3],
    index: u32,
    filter: u32,
}

/// The answer as far as it is let through: what the question begins with, an attribute's head, and the first counters of `struct rtnl_link_stats64`.
#[derive(Default)]
#[repr(C)]
struct Answer {
    head: Question,
    attribute_length: u16,
    attribute: u16,
    rx_packets: u64,
    tx_packets: u64,
    rx_bytes: u64,
    tx_bytes: u64,
    rx_errors: u64,
    tx_errors: u64,
    rx_dropped: u64,
    tx_dropped: u64,
}

/// What the kernel has moved, as the guest names the directions: `rx` is what it gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Traffic {
    rx_frames: u64,
    rx_bytes: u64,
    /// It had no room for them.
    rx_dropped: u64,
    tx_frames: u64,
    tx_bytes: u64,
}

/// The counters of one tap, from when it was opened on.
#[derive(Debug)]
pub struct TapCounters {
    socket: OwnedFd,
    index: u32,
    before: Traffic,
    /// What was told last, for when nothing can be: a counter does not go back.
    last: Mutex<Traffic>,
}

impl TapCounters {
    /// Begins to count for the tap `name` of the process' network namespace, which must be there.
    pub fn open(name: &str) -> Result<Self> {
        Self::begin(name).map_err(Error::host("the tap's counters (rtnetlink)"))
    }

    fn begin(name: &str) -> io::Result<Self> {
        let name = CString::new(name)?;
        // SAFETY: the name is NUL-terminated.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        if index == 0 {
            return Err(io::Error::last_os_error());
        }
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: numbers only; a descriptor that is returned is owned by nobody else.
        let socket = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
        check(socket)?;
        // SAFETY: as above.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        hear_only_of(&socket, index)?;
        let mut counters = TapCounters { socket, index, before: Traffic::default(), last: Mutex::default() };
        counters.before = counters.ask()?;
        Ok(counters)
    }

    /// The kernel has put the answer into the socket when it has taken the question.
    fn ask(&self) -> io::Result<Traffic> {
        let question = Question {
            length: size_of::<Question>() as u32,
            kind: RTM_GETSTATS,
            flags: libc::NLM_F_REQUEST as u16,
            index: self.index,
            filter: FILTER_LINK_64,
            ..Question::default()
        };
        // SAFETY: the kernel reads a whole structure of integers without gaps.
        let sent =
            unsafe { libc::send(self.socket.as_raw_fd(), (&raw const question).cast(), size_of::<Question>(), 0) };
        check(sent)?;
        let mut answer = Answer::default();
        // SAFETY: the kernel writes at most the given size to a structure of integers.
        let length = unsafe { libc::recv(self.socket.as_raw_fd(), (&raw mut answer).cast(), size_of::<Answer>(), 0) };
        check(length)?;
        let is_whole = length as usize == size_of::<Answer>();
        if !is_whole || answer.head.kind != RTM_NEWSTATS || answer.attribute != IFLA_STATS_LINK_64 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // The host's stack transmits what the guest receives.
        Ok(Traffic {
            rx_frames: answer.tx_packets,
            rx_bytes: answer.tx_bytes,
            rx_dropped: answer.tx_dropped,
            tx_frames: answer.rx_packets,
            tx_bytes: answer.rx_bytes,
        })
    }

    fn traffic(&self) -> Traffic {
        let mut last = lock(&self.last);
        match self.ask() {
            Ok(now) => *last = now.since(&self.before),
            Err(error) => tracing::warn!(%error, "the tap's counters cannot be read"),
        }
        *last
    }
}

impl Elsewhere for TapCounters {
    /// Firecracker's names where it counts the same.
    fn counts(&self) -> Vec<(&'static str, u64)> {
        let traffic = self.traffic();
        vec![
            ("rx_bytes_count", traffic.rx_bytes),
            ("rx_count", traffic.rx_frames),
            ("rx_dropped_count", traffic.rx_dropped),
            ("tx_bytes_count", traffic.tx_bytes),
            ("tx_count", traffic.tx_frames),
        ]
    }
}

impl Traffic {
    fn since(&self, before: &Traffic) -> Traffic {
        Traffic {
            rx_frames: self.rx_frames.wrapping_sub(before.rx_frames),
            rx_bytes: self.rx_bytes.wrapping_sub(before.rx_bytes),
            rx_dropped: self.rx_dropped.wrapping_sub(before.rx_dropped),
            tx_frames: self.tx_frames.wrapping_sub(before.tx_frames),
            tx_bytes: self.tx_bytes.wrapping_sub(before.tx_bytes),
        }
    }
}

/// Has the socket drop whatever is not an answer about the interface `index`, cut what is behind the counters (several answers may come in one piece), and keep that
/// filter for ever.
fn hear_only_of(socket: &OwnedFd, index: u32) -> io::Result<()> {
    let load = |size: u32, offset: usize| statement(libc::BPF_LD | size | libc::BPF_ABS, offset as u32);
    let unless = |value: u32, skipped: u8| libc::sock_filter {
        code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        jt: 0,
        jf: skipped,
        k: value,
    };
    // Loads are in network order, netlink is in the host's (Documentation/networking/filter.rst).
    let mut filter = [
        load(libc::BPF_H, offset_of!(Question, kind)),
        unless(u32::from(RTM_NEWSTATS.to_be()), 3),
        load(libc::BPF_W, offset_of!(Question, index)),
        unless(index.to_be(), 1),
        statement(libc::BPF_RET | libc::BPF_K, size_of::<Answer>() as u32),
        statement(libc::BPF_RET | libc::BPF_K, 0),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    set(socket, libc::SO_ATTACH_FILTER, &program)?;
    set(socket, libc::SO_LOCK_FILTER, &1)
}

fn statement(code: u32, value: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k: value }
}

fn set<T>(socket: &OwnedFd, option: libc::c_int, value: &T) -> io::Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel reads one value of the option's type, and of a program the statements, which the caller keeps.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, std::ptr::from_ref(value).cast(), length)
    };
    check(result)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::BorrowedFd;

    use super::*;
    use crate::backends::tap::{HEADER, Tap};

    /// Runs in a thread, which alone is in a network namespace of its own.
    fn in_a_network_of_its_own(test: impl FnOnce() + Send) {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // SAFETY: flags only.
                check(unsafe { libc::unshare(libc::CLONE_NEWNET) }).unwrap();
                test();
            });
        });
    }

    /// Turned on, so that frames are taken.
    fn tap(name: &str) -> Tap {
        let tap = Tap::open(name, 1).unwrap().remove(0);
        // SAFETY: all zeroes is a valid `ifreq`, a structure of integers.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        let any = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        // SAFETY: the kernel reads one `ifreq`.
        check(unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCSIFFLAGS, &request) }).unwrap();
        tap
    }

    fn send(tap: &Tap, length: usize) {
        // SAFETY: the tap is open as long as this is used.
        let fd = unsafe { BorrowedFd::borrow_raw(tap.fd()) };
        let frame = [vec![0; HEADER], vec![0xff; 12], vec![0; length - 12]].concat();
        std::fs::File::from(fd.try_clone_to_owned().unwrap()).write_all(&frame).unwrap();
    }

    #[test]
    fn what_a_guest_sends_is_counted_from_the_beginning_on() {
        in_a_network_of_its_own(|| {
            let tap = tap("counted");
            send(&tap, 1000);
            let counters = TapCounters::open("counted").unwrap();
            assert_eq!((counters.traffic().tx_frames, counters.traffic().tx_bytes), (0, 0));
            send(&tap, 100);
            send(&tap, 60);
            let counts = counters.counts();
            let of = |name| counts.iter().find(|(it, _)| *it == name).unwrap().1;
            assert_eq!((of("tx_count"), of("tx_bytes_count")), (2, 160));
            // The tap is gone, what it has counted is not.
            drop(tap);
            assert_eq!(counters.traffic().tx_bytes, 160);
        });
    }

    #[test]
    fn the_socket_hears_of_no_other_interface() {
        in_a_network_of_its_own(|| {
            let (_tap, _other) = (tap("counted"), tap("other"));
            let mut counters = TapCounters::open("counted").unwrap();
            let own = counters.index;
            // SAFETY: the name is NUL-terminated.
            counters.index = unsafe { libc::if_nametoindex(c"other".as_ptr()) };
            assert_eq!(counters.ask().unwrap_err().kind(), io::ErrorKind::WouldBlock);
            counters.index = own;
            counters.ask().unwrap();
            assert!(set(&counters.socket, libc::SO_DETACH_FILTER, &0).is_err());
        });
    }

    #[test]
    fn an_interface_that_is_not_there_is_an_error() {
        assert!(TapCounters::open("no-such-tap").is_err());
    }
}
