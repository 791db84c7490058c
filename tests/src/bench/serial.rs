//! From starting a monitor's process to its guest's byte on the serial port.

use std::{
    io::Read,
    process::{Child, Command},
    sync::mpsc,
    time::{Duration, Instant},
};

use super::{error::BenchError, guest};

/// A monitor whose guest wrote nothing for this long will not: its KVM cannot run the guest.
const BOUND: Duration = Duration::from_secs(20);

/// A monitor whose guest wrote its byte; it is ended when this is dropped.
pub struct Started {
    pub child: Child,
    /// From before the process was made to the byte's arrival here.
    pub took: Duration,
}

impl Drop for Started {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Starts the monitor and waits for its guest's byte ([`guest::BYTE`]).
pub fn start(name: &str, command: &mut Command) -> Result<Started, BenchError> {
    let begun = Instant::now();
    let mut child = command.spawn().map_err(|source| BenchError::Start { monitor: name.to_owned(), source })?;
    // The pipe is read in another thread, so that a guest that never writes can be given up.
    let (tell, told) = mpsc::channel();
    if let Some(mut output) = child.stdout.take() {
        std::thread::spawn(move || {
            let _ = tell.send(until_the_guests(&mut output).map(|()| Instant::now()));
            // What else it writes is thrown away; a monitor must not stop on a full pipe.
            let _ = std::io::copy(&mut output, &mut std::io::sink());
        });
    }
    match told.recv_timeout(BOUND) {
        Ok(Ok(arrived)) => Ok(Started { child, took: arrived - begun }),
        Ok(Err(_)) | Err(_) => {
            end(&mut child);
            let mut said = String::new();
            if let Some(mut errors) = child.stderr.take() {
                let _ = errors.read_to_string(&mut said);
            }
            Err(BenchError::Silent { monitor: name.to_owned(), said: said.trim().to_owned() })
        }
    }
}

/// Reads over what the monitor says of itself (Firecracker does) to what its guest writes.
fn until_the_guests(output: &mut impl Read) -> std::io::Result<()> {
    let mut some = [0; 512];
    loop {
        match output.read(&mut some)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            length if some[..length].contains(&guest::BYTE) => return Ok(()),
            _ => {}
        }
    }
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}
