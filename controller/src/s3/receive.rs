//! Takes a body in: from the network to a durable file, with every digest on the way.
//!
//! Hashing and writing happen on a thread of their own behind a short queue, so that a large upload
//! holds up no other request and memory stays bounded; there are only so many of these threads. When
//! the request is dropped (the client went away) the queue ends without its closing word, and the
//! file with it.

use std::io::Write as _;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use http::HeaderMap;
use md5::Md5;
use s3s::{S3Error, S3Result, TrailingHeaders, s3_error};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use super::checksum::{Algorithm, Checksum, Stated};
use super::files::{DataId, Files, Unfinished};

/// Largest object of one PUT, and largest part: 5 GiB (S3 User Guide, "Uploading objects").
pub const LARGEST_PUT: u64 = 5 << 30;

/// Chunks between the network and the disk.
const QUEUE: usize = 16;

/// Longest wait for others to have written their files.
const TURN: Duration = Duration::from_secs(30);

/// A file with all that is known of its bytes.
#[derive(Debug, Clone)]
pub struct Received {
    pub data: DataId,
    pub size: u64,
    pub md5: [u8; 16],
    /// Lower-case hexadecimal.
    pub sha256: String,
    pub checksum: Checksum,
}

enum Piece {
    Data(Bytes),
    End,
}

/// The digests of a stream of bytes and the file that they go to.
pub struct Writer {
    unfinished: Unfinished,
    size: u64,
    md5: Md5,
    sha256: Sha256,
    algorithm: Algorithm,
    hasher: s3s::checksum::ChecksumHasher,
}

impl Writer {
    pub fn new(files: &Files, algorithm: Algorithm) -> std::io::Result<Writer> {
        Ok(Writer {
            unfinished: files.create()?,
            size: 0,
            md5: Md5::new(),
            sha256: Sha256::new(),
            algorithm,
            hasher: algorithm.hasher(),
        })
    }

    pub fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.unfinished.file.write_all(bytes)?;
        self.size += bytes.len() as u64;
        self.md5.update(bytes);
        self.sha256.update(bytes);
        self.hasher.update(bytes);
        Ok(())
    }

    /// What was written, still without a lasting name; [`Written::keep`] gives it one.
    pub fn end(self) -> Written {
        Written {
            unfinished: self.unfinished,
            size: self.size,
            md5: self.md5.finalize().into(),
            sha256: hex::encode(self.sha256.finalize()),
            checksum: Checksum::finish(self.algorithm, self.hasher),
        }
    }
}

/// All bytes are written and hashed; dropped here, the file is gone.
pub struct Written {
    unfinished: Unfinished,
    pub size: u64,
    pub md5: [u8; 16],
    pub sha256: String,
    pub checksum: Checksum,
}

impl Written {
    /// Makes the file durable under a lasting name.
    pub fn keep(self, files: &Files) -> std::io::Result<Received> {
        let data = files.finish(self.unfinished)?;
        Ok(Received { data, size: self.size, md5: self.md5, sha256: self.sha256, checksum: self.checksum })
    }
}

/// What a body should turn out to be.
pub struct Expected {
    pub stated: Stated,
    pub algorithm: Algorithm,
    /// Bytes, when the client said.
    pub length: Option<u64>,
}

/// Takes the whole body in and compares it with what the client stated of it. The file is durable
/// when this returns; whoever called then owns it and removes it if no row comes to name it.
pub async fn receive<S, E>(
    files: &Files,
    body: S,
    expected: Expected,
    trailers: Option<TrailingHeaders>,
) -> S3Result<Received>
where
    S: futures::Stream<Item = Result<Bytes, E>> + Send + Unpin,
    E: std::fmt::Display,
{
    if expected.length.is_some_and(|length| length > LARGEST_PUT) {
        return Err(s3_error!(
            EntityTooLarge,
            "Your proposed upload exceeds the maximum allowed size of 5 GiB; use a multipart upload."
        ));
    }
    let (sender, receiver) = mpsc::channel(QUEUE);
    let writing = write(files, {
        let (files, algorithm) = (files.clone(), expected.algorithm);
        move || write_pieces(&files, algorithm, receiver)
    })
    .await?;
    let outcome = forward(body, &sender, expected.length).await;
    if outcome.is_ok() {
        // The writer may have failed and gone; its own error is told below.
        let _ = sender.send(Piece::End).await;
    }
    drop(sender);
    let written = writing.await.map_err(|_| s3_error!(InternalError, "the writer of the object ended early"))?;
    outcome?;
    let written = written.map_err(disk_error)?.ok_or_else(|| s3_error!(IncompleteBody))?;

    let trailers: Option<HeaderMap> = trailers.and_then(|t| t.take());
    expected.stated.compare(&written.md5, &written.checksum, trailers.as_ref())?;
    let files = files.clone();
    tokio::task::spawn_blocking(move || written.keep(&files))
        .await
        .map_err(|_| s3_error!(InternalError, "the writer of the object ended early"))?
        .map_err(disk_error)
}

/// Begins `work` on a thread of its own when it is one of not too many that write files.
pub async fn write<T: Send + 'static>(
    files: &Files,
    work: impl FnOnce() -> T + Send + 'static,
) -> S3Result<tokio::task::JoinHandle<T>> {
    let turn = files.turn(TURN).await;
    let turn = turn.ok_or_else(|| s3_error!(SlowDown, "Too much is being written; reduce your request rate."))?;
    Ok(tokio::task::spawn_blocking(move || {
        let _turn = turn;
        work()
    }))
}

async fn forward<S, E>(mut body: S, sender: &mpsc::Sender<Piece>, length: Option<u64>) -> S3Result<()>
where
    S: futures::Stream<Item = Result<Bytes, E>> + Send + Unpin,
    E: std::fmt::Display,
{
    let mut received = 0_u64;
    while let Some(piece) = body.next().await {
        let piece = piece.map_err(|error| body_error(&error))?;
        received += piece.len() as u64;
        if received > length.unwrap_or(LARGEST_PUT) {
            return Err(s3_error!(EntityTooLarge, "The body is longer than the length that was stated for it."));
        }
        if sender.send(Piece::Data(piece)).await.is_err() {
            break;
        }
    }
    match length {
        Some(length) if received < length && !sender.is_closed() => Err(s3_error!(
            IncompleteBody,
            "You did not provide the number of bytes specified by the Content-Length: {received} of {length} came."
        )),
        _ => Ok(()),
    }
}

/// The writer's thread. `None`: the body ended without its closing word.
fn write_pieces(
    files: &Files,
    algorithm: Algorithm,
    mut receiver: mpsc::Receiver<Piece>,
) -> std::io::Result<Option<Written>> {
    let mut writer = Writer::new(files, algorithm)?;
    while let Some(piece) = receiver.blocking_recv() {
        match piece {
            Piece::Data(bytes) => writer.write(&bytes)?,
            Piece::End => return Ok(Some(writer.end())),
        }
    }
    Ok(None)
}

/// S3's code for a body that went wrong under way. The library's errors are private types; their
/// words are all that tells them apart.
fn body_error(error: &dyn std::fmt::Display) -> S3Error {
    let words = error.to_string();
    if words.contains("RequestTimeout") {
        return timed_out();
    }
    if words.contains("Sha256Mismatch") {
        return super::checksum::body_mismatch();
    }
    if words.contains("SignatureMismatch") {
        return s3_error!(SignatureDoesNotMatch, "The signature of a chunk of the body does not match its bytes.");
    }
    if words.contains("FormatError") || words.contains("TooLarge") || words.contains("TooMany") {
        return s3_error!(InvalidRequest, "The body is not well-formed aws-chunked encoding.");
    }
    s3_error!(IncompleteBody, "The body ended before it was whole: {words}")
}

/// The body, or more of it, did not come in time.
pub fn timed_out() -> S3Error {
    s3_error!(
        RequestTimeout,
        "Your socket connection to the server was not read from or written to within the timeout period."
    )
}

/// What a full or failing disk is to the client.
pub fn disk_error(error: std::io::Error) -> S3Error {
    tracing::error!(%error, "object store");
    if error.kind() == std::io::ErrorKind::StorageFull || error.kind() == std::io::ErrorKind::QuotaExceeded {
        let mut full =
            s3_error!(ServiceUnavailable, "The object store's disk is full; delete objects or give it more room.");
        full.set_status_code(http::StatusCode::INSUFFICIENT_STORAGE);
        return full;
    }
    s3_error!(InternalError, "The object store cannot write: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::s3::checksum::Stated;

    async fn take(pieces: Vec<Result<Bytes, std::io::Error>>, length: Option<u64>) -> (S3Result<Received>, usize) {
        let state = tempfile::tempdir().unwrap();
        let files = Files::open(state.path()).unwrap();
        let expected = Expected { stated: Stated::default(), algorithm: Algorithm::Crc32, length };
        let result = receive(&files, futures::stream::iter(pieces), expected, None).await;
        let temporary = std::fs::read_dir(state.path().join("s3/tmp")).unwrap().count();
        (result, temporary)
    }

    fn piece(text: &'static str) -> Result<Bytes, std::io::Error> {
        Ok(Bytes::from_static(text.as_bytes()))
    }

    #[tokio::test]
    async fn every_digest_is_of_the_whole() {
        let (received, _) = take(vec![piece("12345"), piece(""), piece("6789")], Some(9)).await;
        let received = received.unwrap();
        assert_eq!(received.size, 9);
        assert_eq!(hex::encode(received.md5), "25f9e794323b453885f5181f1b624d0b");
        assert_eq!(received.sha256, "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225");
        assert_eq!(received.checksum.value, "y/Q5Jg==");
    }

    #[tokio::test]
    async fn a_broken_or_short_or_long_body_leaves_no_file() {
        let broken = vec![piece("12"), Err(std::io::Error::other("reset"))];
        for (pieces, length, code) in [
            (broken, None, "IncompleteBody"),
            (vec![piece("12")], Some(3), "IncompleteBody"),
            (vec![piece("1234")], Some(3), "EntityTooLarge"),
            (vec![], Some(LARGEST_PUT + 1), "EntityTooLarge"),
        ] {
            let (received, temporary) = take(pieces, length).await;
            assert_eq!(received.unwrap_err().code().as_str(), code);
            assert_eq!(temporary, 0);
        }
    }
}
