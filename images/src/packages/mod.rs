//! Debian packages: found with `apt-cache`, fetched with `apt-get download`, unpacked with `dpkg-deb`.
//!
//! apt is used as any user may use it: nothing is installed, and nothing of the system changes. Its index says
//! which version there is and what digest the file has; the file is kept under that digest.

mod fetch;
mod index;
mod unpack;

pub use fetch::fetch;
pub use index::{Index, Package};
pub use unpack::Unpacked;

use std::io;
use std::process::{Command, Output};

use crate::error::Error;

/// Runs a program of Debian's package `package` and hands back what it printed.
fn run(command: &mut Command, package: &'static str) -> Result<Output, Error> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.env("LC_ALL", "C").output().map_err(|source: io::Error| Error::NoProgram { program, package, source })
}

/// The same, and a status other than 0 is an error.
pub(crate) fn run_well(command: &mut Command, package: &'static str) -> Result<Output, Error> {
    let output = run(command, package)?;
    if output.status.success() {
        return Ok(output);
    }
    Err(Error::Failed {
        program: command.get_program().to_string_lossy().into_owned(),
        status: output.status,
        output: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}
