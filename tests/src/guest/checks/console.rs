//! `/dev/hvc0`: text both ways, and a size that changes while it is open.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use mallee_vmm::api::{Console, ConsoleKind, ConsoleSize};

use crate::guest::host::Host;
use crate::guest::link::Link;
use crate::guest::{Check, Outcome, expect, while_doing};

pub const CHECK: Check = Check {
    name: "console",
    configure: |config, folder| {
        config.console = Some(Console {
            kind: ConsoleKind::Socket,
            path: folder.join("console"),
            columns: Some(132),
            rows: Some(50),
            size_limit: None,
        });
    },
    guest: |_, link| guest(link),
    host,
};

/// Not an expectation: after that it will not happen.
const PATIENCE: Duration = Duration::from_secs(60);

fn guest(link: &mut Link) -> Outcome {
    let mut console =
        OpenOptions::new().read(true).write(true).open("/dev/hvc0").map_err(while_doing("opening /dev/hvc0"))?;
    wait_for_size(&console, (132, 50))?;
    console.write_all(b"from the guest\n").map_err(while_doing("writing"))?;
    let mut line = String::new();
    let mut reader = BufReader::new(console.try_clone().map_err(while_doing("/dev/hvc0"))?);
    reader.read_line(&mut line).map_err(while_doing("reading"))?;
    expect("what was typed", line.trim_end(), "typed on the host")?;
    link.say("resize")?;
    link.wait_for("resized")?;
    wait_for_size(&console, (100, 40))?;
    link.say("seen")?;
    Ok("text both ways, resized from 132x50 to 100x40".into())
}

/// The driver takes a size in a work item of its own, some time after its interrupt.
fn wait_for_size(console: &File, wanted: (u16, u16)) -> Result<(), String> {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end && size(console)? != wanted {
        std::thread::sleep(Duration::from_millis(20));
    }
    expect("columns and rows", size(console)?, wanted)
}

fn size(console: &File) -> Result<(u16, u16), String> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel writes one `winsize` at the given address.
    match unsafe { libc::ioctl(console.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) } {
        0 => Ok((size.ws_col, size.ws_row)),
        _ => Err(format!("the console's size: {}", std::io::Error::last_os_error())),
    }
}

fn host(host: &Host, link: &mut Link) -> Outcome {
    let mut console = UnixStream::connect(host.folder.join("console")).map_err(while_doing("the console's socket"))?;
    let mut reader = BufReader::new(console.try_clone().map_err(while_doing("the console"))?);
    let mut line = String::new();
    reader.read_line(&mut line).map_err(while_doing("reading"))?;
    expect("what the guest wrote", line.trim_end(), "from the guest")?;
    console.write_all(b"typed on the host\n").map_err(while_doing("typing"))?;
    link.wait_for("resize")?;
    let size = ConsoleSize { columns: 100, rows: 40 };
    host.client.patch("/console", &size).map_err(while_doing("PATCH /console"))?;
    link.say("resized")?;
    link.wait_for("seen")?;
    Ok(String::new())
}
