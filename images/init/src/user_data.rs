//! User data: a script that begins with `#!` is run as root, once in an instance's life.
//!
//! As in cloud-init, the note that it ran is written before it starts: a script that reboots the machine
//! must not do so again at every boot.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use crate::identity::{STATE, replace_file};
use crate::metadata::Metadata;
use crate::report::{self, Phase};
use crate::supervisor::Children;

const LOG: &str = "/var/log/user-data.log";
/// What of the script's output is kept in the log. The console gets all of it, and the host bounds that.
const LOG_LIMIT: usize = 16 << 20;

/// What is to be done with the user data.
#[derive(Debug, PartialEq, Eq)]
enum Plan<'a> {
    Nothing,
    Run(&'a [u8]),
    /// It did run, at this instance's first boot.
    Done,
    /// Something that this image has no use for.
    Unsupported(&'static str),
}

/// Runs the script if it is one and did not run yet, and returns when it has ended.
pub fn run(children: &Children, metadata: &Metadata) {
    let done = fs::read_to_string(done_file()).unwrap_or_default();
    let content = metadata.user_data.as_deref().unwrap_or_default();
    match plan(content, done.trim() == metadata.instance_id) {
        Plan::Nothing => report::reached(Phase::UserData, "none"),
        Plan::Done => report::line("the user data ran at this instance's first boot"),
        Plan::Unsupported(what) => {
            report::line(format_args!(
                "the user data is {what}, which this image does not process: \
                 give a script that begins with #!, or use an image with cloud-init"
            ));
            report::reached(Phase::UserData, "not run");
        }
        Plan::Run(script) => match run_script(children, script, &metadata.instance_id) {
            Ok(ended) => report::reached(Phase::UserData, format_args!("the script {ended}")),
            Err(error) => {
                report::line(format_args!("the user data cannot be run: {error}"));
                report::reached(Phase::UserData, "not run");
            }
        },
    }
}

fn done_file() -> PathBuf {
    Path::new(STATE).join("user-data.done")
}

fn plan(content: &[u8], done: bool) -> Plan<'_> {
    if content.iter().all(u8::is_ascii_whitespace) {
        return Plan::Nothing;
    }
    if content.starts_with(b"#!") {
        return if done { Plan::Done } else { Plan::Run(content) };
    }
    Plan::Unsupported(if content.starts_with(b"#cloud-config") {
        "a cloud-config"
    } else if content.starts_with(b"\x1f\x8b") {
        "compressed with gzip"
    } else if content.starts_with(b"Content-Type:") || content.starts_with(b"MIME-Version:") {
        "a MIME message"
    } else {
        "no script"
    })
}

fn run_script(children: &Children, script: &[u8], instance_id: &str) -> io::Result<crate::supervisor::Ended> {
    fs::create_dir_all(STATE)?;
    let path = Path::new(STATE).join("user-data");
    replace_file(&path, script, 0o700)?;
    replace_file(&done_file(), format!("{instance_id}\n").as_bytes(), 0o644)?;
    let (reader, writer) = io::pipe()?;
    let log = OpenOptions::new().create(true).append(true).open(LOG)?;
    // The pipe outlives the script if it leaves something running; nobody waits for that.
    thread::spawn(move || copy_output(reader, log));
    let mut command = Command::new(&path);
    command
        .env_clear()
        .env("PATH", crate::boot::PATH)
        .env("HOME", "/root")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer);
    children
        .run(command)
        .map_err(|error| io::Error::new(error.kind(), format!("{error} (is the program after #! in this image?)")))
}

/// To the console and, up to its bound, to the log.
fn copy_output(mut from: impl Read, mut log: File) {
    let mut buffer = [0u8; 4096];
    let mut logged = 0;
    let mut console = io::stdout();
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let chunk = &buffer[..length];
        let _ = console.write_all(chunk).and_then(|()| console.flush());
        if logged < LOG_LIMIT {
            let _ = log.write_all(chunk);
            logged += length;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_script_runs_once() {
        let script = b"#!/bin/sh\ntrue\n";
        assert_eq!(plan(script, false), Plan::Run(script));
        assert_eq!(plan(script, true), Plan::Done);
    }

    #[test]
    fn nothing_is_nothing() {
        assert_eq!(plan(b"", false), Plan::Nothing);
        assert_eq!(plan(b" \n", true), Plan::Nothing);
    }

    #[test]
    fn what_is_no_script_is_named() {
        assert_eq!(plan(b"#cloud-config\n", false), Plan::Unsupported("a cloud-config"));
        assert_eq!(plan(b"\x1f\x8b\x08", false), Plan::Unsupported("compressed with gzip"));
        assert_eq!(plan(b"MIME-Version: 1.0", false), Plan::Unsupported("a MIME message"));
        assert_eq!(plan(b"echo", true), Plan::Unsupported("no script"));
    }

    proptest! {
        #[test]
        fn only_a_script_is_ever_run(content in proptest::collection::vec(any::<u8>(), 0..64), done: bool) {
            if let Plan::Run(script) = plan(&content, done) {
                prop_assert!(script.starts_with(b"#!") && !done);
            }
        }
    }
}
