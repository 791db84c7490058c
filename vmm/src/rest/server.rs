//! HTTP/1.1 on the Unix socket: connections, requests in, answers out. The parser is `httparse`.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Call, Reply, routes};
use crate::confine::{self, ThreadKind};
use crate::error::{Error, Result};
use crate::metrics::PROCESS;

/// Firecracker's own limit of a request (51200 bytes).
const MAX_REQUEST: usize = 51_200;
const MAX_HEADERS: usize = 64;
/// A client that sends nothing for this long is cut off.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(60);

/// The thread that serves the socket, as the monitor sees it.
pub struct Server {
    calls: Receiver<(Call, Answer)>,
    event: EventFd,
}

/// Where the answer to a call goes.
pub struct Answer(Sender<Reply>);

impl Answer {
    pub fn send(self, reply: Reply) {
        // The connection may be gone; then nobody wants to know.
        let _ = self.0.send(reply);
    }
}

impl Server {
    /// Binds the socket, which must not exist, and starts the thread.
    pub fn start(path: &Path) -> Result<Self> {
        let listener = UnixListener::bind(path).map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => Error::BadConfiguration(format!(
                "API socket {} exists already: another VMM may be using it; remove it if not",
                path.display()
            )),
            _ => Error::file("API socket", path)(error),
        })?;
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::host("eventfd"))?;
        let wake = event.try_clone().map_err(Error::host("eventfd"))?;
        let (sender, calls) = channel();
        std::thread::Builder::new()
            .name("api".into())
            .spawn(move || serve(&listener, &Monitor { calls: sender, wake }))
            .map_err(Error::host("API thread"))?;
        Ok(Server { calls, event })
    }

    /// Becomes readable when there is a call.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    pub fn next(&self) -> Option<(Call, Answer)> {
        let _ = self.event.read();
        self.calls.try_recv().ok()
    }
}

/// The monitor, as the thread sees it.
struct Monitor {
    calls: Sender<(Call, Answer)>,
    wake: EventFd,
}

impl Monitor {
    fn ask(&self, call: Call) -> Reply {
        let (sender, receiver) = channel();
        let gone = || Reply::fault(500, "the VM is ending");
        if self.calls.send((call, Answer(sender))).is_err() || self.wake.write(1).is_err() {
            return gone();
        }
        receiver.recv().unwrap_or_else(|_| gone())
    }
}

fn serve(listener: &UnixListener, monitor: &Monitor) {
    confine::enter(ThreadKind::Api);
    for stream in listener.incoming() {
        let result = stream.and_then(|stream| serve_connection(stream, monitor));
        if let Err(error) = result {
            tracing::debug!(%error, "API connection ended");
        }
    }
}

fn serve_connection(mut stream: UnixStream, monitor: &Monitor) -> io::Result<()> {
    stream.set_read_timeout(Some(CLIENT_TIMEOUT))?;
    stream.set_write_timeout(Some(CLIENT_TIMEOUT))?;
    let mut buffer = Vec::new();
    loop {
        match read_request(&mut stream, &mut buffer)? {
            Incoming::Request(request) => {
                let reply = match routes::parse(&request.method, &request.path, &request.body) {
                    Ok(call) => monitor.ask(call),
                    Err(refusal) => refusal,
                };
                count(&request.method, &reply);
                write_reply(&mut stream, &reply)?;
                if request.close {
                    return Ok(());
                }
            }
            Incoming::Malformed(why) => return write_reply(&mut stream, &Reply::refused(why)),
            Incoming::End => return Ok(()),
        }
    }
}

fn count(method: &str, reply: &Reply) {
    match method {
        "GET" => PROCESS.get_requests.increment(),
        "PUT" => PROCESS.put_requests.increment(),
        "PATCH" => PROCESS.patch_requests.increment(),
        _ => {}
    }
    if reply.status >= 400 {
        PROCESS.failed_requests.increment();
    }
}

struct Request {
    method: String,
    path: String,
    body: Vec<u8>,
    close: bool,
}

enum Incoming {
    Request(Request),
    Malformed(String),
    End,
}

/// Reads until `buffer` holds one request; what follows it stays in `buffer`.
fn read_request(stream: &mut UnixStream, buffer: &mut Vec<u8>) -> io::Result<Incoming> {
    let mut continued = false;
    loop {
        let head = match parse_head(buffer) {
            Ok(head) => head,
            Err(why) => return Ok(Incoming::Malformed(why)),
        };
        if let Some(head) = head {
            let length = head.head_length + head.body_length;
            if length > MAX_REQUEST {
                return Ok(Incoming::Malformed(format!("a request has at most {MAX_REQUEST} bytes")));
            }
            if buffer.len() >= length {
                let body = buffer[head.head_length..length].to_vec();
                buffer.drain(..length);
                return Ok(Incoming::Request(Request {
                    method: head.method,
                    path: head.path,
                    body,
                    close: head.close,
                }));
            }
            if head.expects_continue && !continued {
                continued = true;
                stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
            }
        }
        if buffer.len() >= MAX_REQUEST {
            return Ok(Incoming::Malformed(format!("a request has at most {MAX_REQUEST} bytes")));
        }
        let mut chunk = [0u8; 4096];
        match stream.read(&mut chunk)? {
            0 => return Ok(Incoming::End),
            count => buffer.extend_from_slice(&chunk[..count]),
        }
    }
}

struct Head {
    method: String,
    path: String,
    head_length: usize,
    body_length: usize,
    expects_continue: bool,
    close: bool,
}

/// `None` while the head is incomplete.
fn parse_head(buffer: &[u8]) -> std::result::Result<Option<Head>, String> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let head_length = match request.parse(buffer) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(format!("not an HTTP request: {error}")),
    };
    let header = |name: &str| {
        request
            .headers
            .iter()
            .find(|header| header.name.eq_ignore_ascii_case(name))
            .and_then(|header| std::str::from_utf8(header.value).ok())
    };
    if header("transfer-encoding").is_some() {
        return Err("Transfer-Encoding is not supported; send Content-Length".into());
    }
    let body_length = match header("content-length") {
        None => 0,
        Some(length) => {
            length.trim().parse::<u32>().map_err(|_| format!("Content-Length {length:?} is not a length"))? as usize
        }
    };
    Ok(Some(Head {
        method: request.method.unwrap_or_default().to_owned(),
        path: request.path.unwrap_or_default().to_owned(),
        head_length,
        body_length,
        expects_continue: header("expect").is_some_and(|v| v.eq_ignore_ascii_case("100-continue")),
        close: header("connection").is_some_and(|v| v.eq_ignore_ascii_case("close")),
    }))
}

/// What the first request in `bytes` asks for; `None` if it is not complete. For fuzz targets.
#[cfg(feature = "fuzzing")]
pub fn parse(bytes: &[u8]) -> Option<super::table::Parsed> {
    let head = parse_head(bytes).ok()??;
    let body = bytes.get(head.head_length..)?.get(..head.body_length)?;
    Some(routes::parse(&head.method, &head.path, body))
}

fn write_reply(stream: &mut UnixStream, reply: &Reply) -> io::Result<()> {
    let reason = match reply.status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        _ => "Internal Server Error",
    };
    let mut message = format!("HTTP/1.1 {} {reason}\r\nServer: mallee-vmm\r\n", reply.status);
    if let Some(body) = &reply.body {
        message += &format!("Content-Type: {}\r\nContent-Length: {}\r\n\r\n{body}", reply.content_type, body.len());
    } else {
        message += "\r\n";
    }
    stream.write_all(message.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_head_is_complete_only_with_its_empty_line() {
        let request = b"PUT /actions HTTP/1.1\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n";
        assert!(parse_head(&request[..request.len() - 1]).unwrap().is_none());
        let head = parse_head(request).unwrap().unwrap();
        assert_eq!((head.method.as_str(), head.path.as_str()), ("PUT", "/actions"));
        assert_eq!((head.head_length, head.body_length), (request.len(), 5));
        assert!(head.expects_continue);
    }

    #[test]
    fn chunked_bodies_and_false_lengths_are_refused() {
        for header in ["Transfer-Encoding: chunked", "Content-Length: -1", "Content-Length: 99999999999"] {
            let request = format!("PUT / HTTP/1.1\r\n{header}\r\n\r\n");
            assert!(parse_head(request.as_bytes()).is_err(), "{header}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic_the_parser(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_head(&bytes);
        }
    }
}
