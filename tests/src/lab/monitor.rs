//! QEMU's own control socket (QMP), for what cannot be asked of the node itself: pulling its plug.

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    time::Duration,
};

use serde_json::{Value, json};

use super::{
    channel::connect,
    error::{LabError, OnPath},
};

/// File name of the socket in the node's folder.
pub const SOCKET: &str = "monitor.sock";

/// Executes one command without arguments, for example `system_reset`.
pub fn execute(folder: &Path, command: &str) -> Result<(), LabError> {
    let stream = connect(folder, SOCKET)?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).on("reading", folder)?;
    let mut lines = BufReader::new(&stream).lines();
    for command in ["qmp_capabilities", command] {
        (&stream)
            .write_all(format!("{}\n", json!({ "execute": command })).as_bytes())
            .on("writing to the monitor of", folder)?;
        let answer = answer(&mut lines).on("reading from the monitor of", folder)?;
        if let Some(problem) = answer.get("error") {
            return Err(LabError::Channel {
                node: folder.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                reason: format!("its monitor refuses {command}: {problem}"),
            });
        }
    }
    Ok(())
}

/// The next answer; the greeting and events in between are skipped.
fn answer(lines: &mut impl Iterator<Item = std::io::Result<String>>) -> std::io::Result<Value> {
    for line in lines {
        let value: Value = serde_json::from_str(&line?)?;
        if value.get("return").is_some() || value.get("error").is_some() {
            return Ok(value);
        }
    }
    Err(std::io::ErrorKind::UnexpectedEof.into())
}
