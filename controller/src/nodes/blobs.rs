//! The bytes of image parts, on their way to a node.

use std::io::SeekFrom;
use std::pin::Pin;

use futures::{Stream, StreamExt as _};
use mallee_agent::api;
use tokio::io::AsyncSeekExt as _;
use tokio_util::io::ReaderStream;
use tonic::Status;

use crate::Cloud;

/// Bytes of one message: large enough to cost little, well below gRPC's 4 MiB.
const CHUNK: usize = 256 * 1024;

pub(super) type Chunks = Pin<Box<dyn Stream<Item = Result<api::BlobChunk, Status>> + Send>>;

/// The part with this digest, from an offset on. The node checks the digest itself.
pub(super) async fn fetch(cloud: &Cloud, wanted: api::FetchBlobRequest) -> Result<Chunks, Status> {
    let digest = &wanted.sha256;
    // The digest names a file: nothing but a digest may.
    if digest.len() != 64 || !digest.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
        return Err(Status::invalid_argument("a digest is 64 lower-case hexadecimal digits"));
    }
    let path = crate::s3::objects::blob_path(&cloud.s3, digest)
        .ok_or_else(|| Status::not_found(format!("no image has a part with the digest {digest}")))?;
    let unreadable = |error: std::io::Error| Status::internal(format!("part {digest}: {error}"));
    let mut file = tokio::fs::File::open(&path).await.map_err(unreadable)?;
    file.seek(SeekFrom::Start(wanted.offset)).await.map_err(unreadable)?;
    let chunks = ReaderStream::with_capacity(file, CHUNK).map(move |read| match read {
        Ok(data) => Ok(api::BlobChunk { data: data.into() }),
        Err(error) => Err(Status::internal(format!("reading an image part: {error}"))),
    });
    Ok(Box::pin(chunks))
}
