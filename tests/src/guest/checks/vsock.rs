//! Streams in both directions, larger than any buffer on the way, with each direction ended on its own.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use crate::guest::host::Host;
use crate::guest::link::{self, Link};
use crate::guest::{Check, Outcome, expect, while_doing};

pub const CHECK: Check = Check { name: "vsock", configure: |_, _| {}, guest: |_, link| guest(link), host };

/// Where the guest listens, where the host does, and where nobody does.
const GUEST_PORT: u32 = 52;
const HOST_PORT: u32 = 53;
const NO_PORT: u32 = 54;
const LENGTH: usize = 2 << 20;

fn pattern() -> Vec<u8> {
    (0..LENGTH as u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn guest(link: &mut Link) -> Outcome {
    let listener = link::listen(GUEST_PORT).map_err(while_doing("listening"))?;
    link.say("listening")?;
    let stream = link::accept(&listener).map_err(while_doing("accepting"))?;
    echo(stream).map_err(while_doing("the host's stream"))?;
    link.wait_for("echoed")?;
    let stream = link::stream(HOST_PORT).map_err(while_doing("connecting to the host"))?;
    send_and_compare(stream)?;
    match link::stream(NO_PORT) {
        Ok(_) => return Err("a port without a listener accepts".into()),
        Err(error) => expect("the refusal", error.raw_os_error(), Some(libc::ECONNRESET))?,
    }
    Ok(format!("{} MiB there and back, asked for by either side", LENGTH >> 20))
}

/// Sends back what comes, until it ends.
fn echo(mut stream: File) -> std::io::Result<()> {
    let mut bytes = vec![0; 64 << 10];
    loop {
        match stream.read(&mut bytes)? {
            0 => return link::end(&stream),
            count => stream.write_all(&bytes[..count])?,
        }
    }
}

fn send_and_compare(mut stream: File) -> Result<(), String> {
    let mut writer = stream.try_clone().map_err(while_doing("the stream"))?;
    let sender = std::thread::spawn(move || writer.write_all(&pattern()).and_then(|()| link::end(&writer)));
    let mut seen = Vec::new();
    stream.read_to_end(&mut seen).map_err(while_doing("reading"))?;
    sender.join().map_err(|_| "the sender panicked")?.map_err(while_doing("sending"))?;
    expect("what came back", seen == pattern(), true)
}

fn host(host: &Host, link: &mut Link) -> Outcome {
    let listener =
        UnixListener::bind(host.folder.join(format!("vsock_{HOST_PORT}"))).map_err(while_doing("listening"))?;
    link.wait_for("listening")?;
    let mut stream = UnixStream::connect(host.vsock_path()).map_err(while_doing("the device's socket"))?;
    stream.write_all(format!("CONNECT {GUEST_PORT}\n").as_bytes()).map_err(while_doing("asking for a port"))?;
    let mut reader = BufReader::new(stream.try_clone().map_err(while_doing("the stream"))?);
    let mut line = String::new();
    reader.read_line(&mut line).map_err(while_doing("the answer"))?;
    expect("the answer", line.starts_with("OK "), true)?;
    let mut writer = stream.try_clone().map_err(while_doing("the stream"))?;
    let sender =
        std::thread::spawn(move || writer.write_all(&pattern()).and_then(|()| writer.shutdown(Shutdown::Write)));
    let mut seen = Vec::new();
    reader.read_to_end(&mut seen).map_err(while_doing("reading"))?;
    sender.join().map_err(|_| "the sender panicked")?.map_err(while_doing("sending"))?;
    expect("what came back", seen == pattern(), true)?;
    link.say("echoed")?;
    echo_one(&listener).map_err(while_doing("the guest's stream"))?;
    Ok(String::new())
}

fn echo_one(listener: &UnixListener) -> std::io::Result<()> {
    let (mut stream, _) = listener.accept()?;
    let mut bytes = vec![0; 64 << 10];
    loop {
        match stream.read(&mut bytes)? {
            0 => return stream.shutdown(Shutdown::Write),
            count => stream.write_all(&bytes[..count])?,
        }
    }
}
