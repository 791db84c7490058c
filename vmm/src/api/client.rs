//! A blocking client of the REST socket, for whoever drives a VM: `GET /` and `PUT /actions`, and any
//! other path with a body of its own.
//!
//! One connection a call and a deadline on each: a VMM that hangs does not hang its caller.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Action, ActionRequest, Fault, InstanceInfo};

/// An answer larger than this is not one of ours (bytes).
const MAX_ANSWER: u64 = 1 << 20;
const MAX_HEADERS: usize = 32;
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a call did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers at the socket: not there, refused, or silent until the deadline.
    #[error("the VMM at {}: {source}", socket.display())]
    Unreachable { socket: PathBuf, source: io::Error },
    /// The VMM understood the call and refused it.
    #[error("the VMM refused: {message}")]
    Refused { status: u16, message: String },
    /// What came back is not an answer of a VMM.
    #[error("the VMM's answer cannot be read: {0}")]
    Malformed(String),
}

/// Talks to one VMM.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    timeout: Duration,
}

impl Client {
    /// A client of the socket given to `--api-sock`. Nothing is connected yet.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Client { socket: socket.into(), timeout: DEFAULT_TIMEOUT }
    }

    /// Replaces the deadline for each read and write (10 s).
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Client { timeout, ..self }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// `GET /`.
    pub fn instance(&self) -> Result<InstanceInfo, ClientError> {
        self.get("/")
    }

    /// `PUT /actions`.
    pub fn act(&self, action: Action) -> Result<(), ClientError> {
        self.put("/actions", &ActionRequest { action_type: action })
    }

    /// `GET` of any path.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let body = self.call("GET", path, b"")?;
        serde_json::from_slice(&body).map_err(|error| ClientError::Malformed(error.to_string()))
    }

    /// `PATCH` of any path.
    pub fn patch<T: Serialize>(&self, path: &str, body: &T) -> Result<(), ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| ClientError::Malformed(error.to_string()))?;
        self.call("PATCH", path, &body).map(drop)
    }

    /// `PUT` to any path.
    pub fn put<T: Serialize>(&self, path: &str, body: &T) -> Result<(), ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| ClientError::Malformed(error.to_string()))?;
        self.call("PUT", path, &body).map(drop)
    }

    fn call(&self, method: &str, path: &str, body: &[u8]) -> Result<Vec<u8>, ClientError> {
        let answer = self
            .exchange(method, path, body)
            .map_err(|source| ClientError::Unreachable { socket: self.socket.clone(), source })?;
        let (status, body) = parse_answer(&answer)?;
        if (200..300).contains(&status) {
            return Ok(body.to_vec());
        }
        let message = match serde_json::from_slice::<Fault>(body) {
            Ok(fault) => fault.fault_message,
            Err(_) => String::from_utf8_lossy(body).into_owned(),
        };
        Err(ClientError::Refused { status, message })
    }

    fn exchange(&self, method: &str, path: &str, body: &[u8]) -> io::Result<Vec<u8>> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(self.timeout))?;
        stream.set_write_timeout(Some(self.timeout))?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(&[head.as_bytes(), body].concat())?;
        let mut answer = Vec::new();
        stream.take(MAX_ANSWER).read_to_end(&mut answer)?;
        Ok(answer)
    }
}

/// Status and body of an answer that the connection's end has ended.
fn parse_answer(answer: &[u8]) -> Result<(u16, &[u8]), ClientError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    match response.parse(answer) {
        Ok(httparse::Status::Complete(head)) => {
            let status = response.code.ok_or_else(|| ClientError::Malformed("no status".into()))?;
            Ok((status, &answer[head..]))
        }
        Ok(httparse::Status::Partial) => Err(ClientError::Malformed("it is cut off".into())),
        Err(error) => Err(ClientError::Malformed(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn against(answer: &'static str) -> (tempfile::TempDir, Client) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
        });
        let client = Client::new(path);
        (directory, client)
    }

    #[test]
    fn success_refusal_and_nonsense_are_told_apart() {
        let (_directory, client) = against("HTTP/1.1 204 No Content\r\n\r\n");
        client.act(Action::PowerButton).unwrap();
        let (_directory, client) = against("HTTP/1.1 400 Bad Request\r\n\r\n{\"fault_message\":\"no\"}");
        let error = client.act(Action::InstanceStart).unwrap_err();
        assert!(matches!(error, ClientError::Refused { status: 400, message } if message == "no"));
        let (_directory, client) = against("220 mail.example ESMTP\r\n");
        assert!(matches!(client.instance(), Err(ClientError::Malformed(_))));
        let nowhere = Client::new("/nonexistent/api.sock");
        assert!(matches!(nowhere.instance(), Err(ClientError::Unreachable { .. })));
    }
}
