//! The one call that the agent makes to a running VMM: `PUT /actions`.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper_util::rt::TokioIo;
use mallee_vmm::api::{Action, ActionRequest, Fault};
use tokio::net::UnixStream;

use super::folder::Folder;

/// A VMM answers from memory; one that does not within this time hangs, and is dealt with by signals.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Bytes of an answer that are read: the other side may be a VMM that a guest took over.
const ANSWER_LIMIT: usize = 16 * 1024;

/// Asks the VMM of `folder` for `action`.
pub async fn act(folder: &Folder, action: Action) -> io::Result<()> {
    match tokio::time::timeout(TIMEOUT, put(folder, action)).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the VMM does not answer on its API socket")),
    }
}

async fn put(folder: &Folder, action: Action) -> io::Result<()> {
    let stream = connect(folder).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    let body = serde_json::to_vec(&ActionRequest { action_type: action }).map_err(io::Error::other)?;
    let request = Request::put("/actions")
        .header("host", "localhost")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(io::Error::other)?;
    let exchange = async {
        let answer = sender.send_request(request).await.map_err(io::Error::other)?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_LIMIT).collect().await.map_err(io::Error::other)?;
        if status.is_success() {
            return Ok(());
        }
        let fault = serde_json::from_slice::<Fault>(&body.to_bytes()).map(|fault| fault.fault_message);
        Err(io::Error::other(fault.unwrap_or_else(|_| format!("the VMM answered {status}"))))
    };
    tokio::select! {
        result = exchange => result,
        result = connection => {
            result.map_err(io::Error::other)?;
            Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the VMM hung up"))
        }
    }
}

/// Connects to what is a socket, and by way of its descriptor: no link is followed, and the path may
/// be longer than a socket address holds (108 bytes, unix(7)).
async fn connect(folder: &Folder) -> io::Result<UnixStream> {
    let socket =
        OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(folder.api_socket())?;
    if !socket.metadata()?.file_type().is_socket() {
        return Err(io::Error::other("the VMM's API socket is no socket"));
    }
    UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await
}
