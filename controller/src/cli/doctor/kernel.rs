//! What the kernel's network can do, tried in a network namespace that goes with its thread.

use std::ffi::CString;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd};

use nix::sched::{CloneFlags, unshare};

use super::Finding;

/// Name of the interfaces that are made and go again.
const TRIAL: &str = "mtrial0";

/// Tries namespaces, taps, bridges and nftables.
pub fn network() -> Vec<Finding> {
    let trial = std::thread::Builder::new().name("network trial".into()).spawn(in_namespace);
    match trial.map(std::thread::JoinHandle::join) {
        Ok(Ok(findings)) => findings,
        _ => vec![Finding::bad("namespaces", "the trial ended early", "run it again; report this if it happens again")],
    }
}

fn in_namespace() -> Vec<Finding> {
    if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
        let advice = "run as root on a kernel with CONFIG_NET_NS; in a container, give it CAP_SYS_ADMIN";
        return vec![Finding::bad("namespaces", format!("a network namespace cannot be made: {errno}"), advice)];
    }
    let mut findings = vec![Finding::good("namespaces", "a network namespace can be made")];
    findings.push(judge(
        "taps",
        "a tap can be made",
        try_tap(),
        "modprobe tun; see that /dev/net/tun is there and may be opened",
    ));
    findings.push(judge("bridges", "a bridge can be made", try_bridge(), "modprobe bridge"));
    findings.push(packet_filter(try_nftables(), has_x_tables()));
    findings
}

/// netd does with x_tables where nothing else is there, and then lacks some.
fn packet_filter(nftables: io::Result<()>, x_tables: bool) -> Finding {
    const SUBJECT: &str = "nftables";
    let advice = "modprobe nf_tables; a kernel with CONFIG_NF_TABLES";
    match nftables {
        Ok(()) => Finding::good(SUBJECT, "nftables answers"),
        Err(error) if x_tables => Finding::less(
            SUBJECT,
            format!(
                "{error}; netd takes iptables here, without segments between nodes and some limits (netd/README.md, Backends)"
            ),
            advice,
        ),
        Err(error) => Finding::bad(
            SUBJECT,
            error.to_string(),
            format!("{advice}; or, for netd's other backend, install iptables (iptables-legacy-restore)"),
        ),
    }
}

/// Whether the program is here by which netd writes x_tables.
fn has_x_tables() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.into_iter().any(|folder| folder.join("iptables-legacy-restore").exists())
}

fn judge(subject: &'static str, good: &str, tried: io::Result<()>, advice: &str) -> Finding {
    match tried {
        Ok(()) => Finding::good(subject, good),
        Err(error) => Finding::bad(subject, error.to_string(), advice),
    }
}

/// The tap goes when its descriptor is closed.
fn try_tap() -> io::Result<()> {
    let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: `ifreq` is plain data for which zeros are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(TRIAL.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq` at the given address, which is that of a live one.
    check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
}

/// The bridge goes with the namespace.
fn try_bridge() -> io::Result<()> {
    /// `linux/sockios.h`.
    const SIOCBRADDBR: libc::Ioctl = 0x89a0;
    let socket = socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    let name = CString::new(TRIAL).map_err(io::Error::other)?;
    // SAFETY: SIOCBRADDBR reads a NUL-terminated name of at most IFNAMSIZ bytes, which `name` is.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCBRADDBR, name.as_ptr()) })
}

/// Asks for the generation of the rule set; the smallest question that nftables answers.
fn try_nftables() -> io::Result<()> {
    let socket = socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_NETFILTER)?;
    let request = generation_request();
    // SAFETY: the kernel reads `request.len()` bytes from a live buffer.
    let sent = unsafe { libc::send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
    check(i32::try_from(sent).unwrap_or(-1))?;
    let timeout = libc::timeval { tv_sec: 2, tv_usec: 0 };
    // SAFETY: SO_RCVTIMEO reads one `timeval` of the given size at the given, live address.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const timeout).cast(),
            size_of::<libc::timeval>() as libc::socklen_t,
        )
    })?;
    let mut reply = [0_u8; 4096];
    // SAFETY: the kernel writes at most `reply.len()` bytes into a live buffer.
    let got = unsafe { libc::recv(socket.as_raw_fd(), reply.as_mut_ptr().cast(), reply.len(), 0) };
    check(i32::try_from(got).unwrap_or(-1))?;
    read_reply(&reply[..got as usize])
}

/// A netlink header and a netfilter header (`linux/netfilter/nfnetlink.h`).
fn generation_request() -> [u8; 20] {
    const NFT_MSG_GETGEN: u16 = 16;
    let kind = ((libc::NFNL_SUBSYS_NFTABLES as u16) << 8) | NFT_MSG_GETGEN;
    let mut request = [0; 20];
    request[0..4].copy_from_slice(&20_u32.to_ne_bytes());
    request[4..6].copy_from_slice(&kind.to_ne_bytes());
    request[6..8].copy_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
    request
}

fn read_reply(reply: &[u8]) -> io::Result<()> {
    let too_short = || io::Error::other("nftables answered too little");
    let kind = reply.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes).ok_or_else(too_short)?;
    if kind != libc::NLMSG_ERROR as u16 {
        return Ok(());
    }
    let code = reply.get(16..20).and_then(|b| b.try_into().ok()).map(i32::from_ne_bytes).ok_or_else(too_short)?;
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) }
}

fn socket(family: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: socket takes three integers and touches no memory of ours.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    check(fd)?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn one_of_two_packet_filters_will_do() {
        let lacking = || Err(io::Error::from_raw_os_error(libc::EPROTONOSUPPORT));
        assert_eq!(packet_filter(Ok(()), false).level, Level::Good);
        assert_eq!(packet_filter(lacking(), true).level, Level::Less);
        let neither = packet_filter(lacking(), false);
        assert_eq!(neither.level, Level::Bad);
        assert!(neither.advice.contains("iptables-legacy-restore"));
    }

    #[test]
    fn replies_are_read() {
        let mut reply = [0_u8; 36];
        reply[4..6].copy_from_slice(&(libc::NLMSG_ERROR as u16).to_ne_bytes());
        reply[16..20].copy_from_slice(&(-libc::EOPNOTSUPP).to_ne_bytes());
        assert_eq!(read_reply(&reply).unwrap_err().raw_os_error(), Some(libc::EOPNOTSUPP));
        reply[4..6].copy_from_slice(&0xa0f_u16.to_ne_bytes());
        assert!(read_reply(&reply).is_ok());
        assert!(read_reply(&reply[..5]).is_err());
    }
}
