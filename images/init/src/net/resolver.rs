//! `/etc/resolv.conf`, as the lease has it.

use std::fmt::Write;
use std::io;
use std::path::Path;

use super::dhcp::lease::Lease;
use crate::identity::replace_file;

pub fn write(lease: &Lease) -> io::Result<()> {
    replace_file(Path::new("/etc/resolv.conf"), text(lease).as_bytes(), 0o644)
}

fn text(lease: &Lease) -> String {
    let mut text = String::new();
    if let Some(domain) = &lease.domain {
        let _ = writeln!(text, "search {domain}");
    }
    for server in &lease.dns {
        let _ = writeln!(text, "nameserver {server}");
    }
    text
}
