//! Loading the initial RAM file system's kernel modules.
//!
//! Which ones, and in which order, was found out when the image was built (each module names those it
//! depends on); it is written in three lists. `core` is what the two others need; `disk` what the root file
//! system needs; `rest` what is needed only later, and is loaded by a second thread while the disk is found and
//! mounted.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::report;

/// Where the image builder puts modules and lists.
pub const FOLDER: &str = "/modules";

/// Loads the modules named in `list` (one file name a line), in order. One that cannot be loaded is
/// told on the console and does not stop the others: the boot may do without it.
pub fn load_list(list: &str) {
    let folder = Path::new(FOLDER);
    let names = match fs::read_to_string(folder.join(list)) {
        Ok(names) => names,
        Err(error) => {
            report::line(format_args!("no list of kernel modules {FOLDER}/{list}: {error}"));
            return;
        }
    };
    for name in names.lines().map(str::trim).filter(|name| !name.is_empty()) {
        if let Err(error) = load(&folder.join(name)) {
            report::line(format_args!("kernel module {name} cannot be loaded: {error}"));
        }
    }
}

fn load(path: &Path) -> std::io::Result<()> {
    let file = File::open(path)?;
    // SAFETY: the descriptor is open for the whole call, the parameter string is a C string, and the
    // kernel only reads from both.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    if result == 0 {
        return Ok(());
    }
    match std::io::Error::last_os_error() {
        // One that is there already is what was wanted.
        error if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        error => Err(error),
    }
}
