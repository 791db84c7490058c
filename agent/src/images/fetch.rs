//! One download: from the controller into `images/partial/<digest>`, checked, then renamed.
//!
//! The partial file survives a crash or a lost connection, and the next try goes on from its end.
//! It is never trusted: what it holds is hashed again first, and the digest of the whole decides.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;

use futures::StreamExt;
use futures::stream::BoxStream;
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest as _, Sha256};
use tokio::task::block_in_place;
use tonic::codec::CompressionEncoding;
use tonic::transport::Channel;

use crate::api::FetchBlobRequest;
use crate::api::node_client::NodeClient;
use crate::ids::Digest;
use crate::store::sync_folder;
use crate::wanted::Part;

/// Why a part is not here.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FetchError {
    #[error(
        "image part {wanted} does not match its digest: the bytes that arrived have {got}; upload and register the image again"
    )]
    WrongDigest { wanted: Digest, got: Digest },
    #[error("image part {digest} is {got} bytes long and should be {wanted}; upload and register the image again")]
    WrongSize { digest: Digest, wanted: u64, got: u64 },
    #[error("image part {0} is not in the cloud's store any more; upload and register the image again")]
    Missing(Digest),
    #[error("image part {digest} could not be fetched (will be tried again): {reason}")]
    Source { digest: Digest, reason: String },
    #[error("image part {digest} could not be stored on the node: {reason}")]
    Disk { digest: Digest, reason: String },
}

impl FetchError {
    /// True when trying again cannot help.
    pub fn is_permanent(&self) -> bool {
        matches!(self, Self::WrongDigest { .. } | Self::WrongSize { .. } | Self::Missing(_))
    }
}

/// What a source has to say when it has no bytes.
#[derive(Debug)]
pub enum SourceError {
    Missing,
    Interrupted(String),
}

/// Where parts come from.
pub trait BlobSource: Send + Sync + 'static {
    /// The part's bytes from `offset` on.
    fn read(&self, digest: &Digest, offset: u64) -> BoxStream<'static, Result<Vec<u8>, SourceError>>;
}

/// The controller's `FetchBlob`.
#[derive(Debug, Clone)]
pub struct ControllerBlobs(pub Channel);

impl BlobSource for ControllerBlobs {
    fn read(&self, digest: &Digest, offset: u64) -> BoxStream<'static, Result<Vec<u8>, SourceError>> {
        let mut client = NodeClient::new(self.0.clone()).accept_compressed(CompressionEncoding::Zstd);
        let request = FetchBlobRequest { sha256: digest.to_string(), offset };
        let chunks = async move { client.fetch_blob(request).await.map(tonic::Response::into_inner) };
        futures::stream::once(chunks)
            .flat_map(|opened| match opened {
                Ok(chunks) => chunks.map(|chunk| chunk.map(|chunk| chunk.data).map_err(from_status)).boxed(),
                Err(status) => futures::stream::iter([Err(from_status(status))]).boxed(),
            })
            .boxed()
    }
}

fn from_status(status: tonic::Status) -> SourceError {
    match status.code() {
        tonic::Code::NotFound => SourceError::Missing,
        _ => SourceError::Interrupted(crate::credentials::chain(&status)),
    }
}

/// Brings `part` to `target`, by way of `partial`.
pub async fn fetch(source: &dyn BlobSource, part: &Part, partial: &Path, target: &Path) -> Result<(), FetchError> {
    let disk = |error: io::Error| FetchError::Disk { digest: part.sha256.clone(), reason: error.to_string() };
    let mut download = block_in_place(|| Download::resume(partial)).map_err(disk)?;
    if download.length > part.size {
        // Whatever this is, it is not the beginning of the part.
        download.restart().map_err(disk)?;
    }
    let resumed = download.length > 0;
    match receive(source, part, &mut download).await {
        // The beginning that lay here may have been the wrong part of it (a disk fault, a crash of
        // the machine that lost pages): once more from the start before anybody is blamed.
        Err(FetchError::WrongDigest { .. }) if resumed => {
            download.restart().map_err(disk)?;
            receive(source, part, &mut download).await
        }
        result => result,
    }
    .inspect_err(|error| {
        if error.is_permanent() {
            let _ = fs::remove_file(partial);
        }
    })?;
    block_in_place(|| download.finish(partial, target)).map_err(disk)
}

async fn receive(source: &dyn BlobSource, part: &Part, download: &mut Download) -> Result<(), FetchError> {
    let digest = &part.sha256;
    if download.length < part.size {
        let mut chunks = source.read(digest, download.length);
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|error| match error {
                SourceError::Missing => FetchError::Missing(digest.clone()),
                SourceError::Interrupted(reason) => FetchError::Source { digest: digest.clone(), reason },
            })?;
            if download.length + chunk.len() as u64 > part.size {
                let got = download.length + chunk.len() as u64;
                return Err(FetchError::WrongSize { digest: digest.clone(), wanted: part.size, got });
            }
            // Hashing a chunk takes milliseconds; `block_in_place` keeps the other tasks going.
            block_in_place(|| download.append(&chunk))
                .map_err(|error| FetchError::Disk { digest: digest.clone(), reason: error.to_string() })?;
        }
    }
    if download.length < part.size {
        // A stream that ends early without an error: an interruption to us. Should the source really
        // have no more, the size that was registered is wrong, and each try says the same.
        let reason = format!("the stream ended after {} of {} bytes", download.length, part.size);
        return Err(FetchError::Source { digest: digest.clone(), reason });
    }
    let got = Digest::of(download.hasher.clone());
    if got != *digest {
        return Err(FetchError::WrongDigest { wanted: digest.clone(), got });
    }
    Ok(())
}

/// The partial file, and the hash of what it holds so far.
struct Download {
    /// Locked: a download that was given up may still be writing its last chunk.
    file: Flock<File>,
    hasher: Sha256,
    length: u64,
}

impl Download {
    fn resume(partial: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).append(true).create(true).open(partial)?;
        let file = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| io::Error::from(errno))?;
        let mut download = Self { file, hasher: Sha256::new(), length: 0 };
        let mut buffer = vec![0; 1 << 20];
        loop {
            match download.file.read(&mut buffer)? {
                0 => return Ok(download),
                count => {
                    download.hasher.update(&buffer[..count]);
                    download.length += count as u64;
                }
            }
        }
    }

    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.hasher = Sha256::new();
        self.length = 0;
        Ok(())
    }

    fn append(&mut self, chunk: &[u8]) -> io::Result<()> {
        self.file.write_all(chunk)?;
        self.hasher.update(chunk);
        self.length += chunk.len() as u64;
        Ok(())
    }

    fn finish(self, partial: &Path, target: &Path) -> io::Result<()> {
        use std::os::unix::fs::PermissionsExt;
        self.file.sync_all()?;
        // VMMs read it under their own user ids; nobody writes it.
        self.file.set_permissions(fs::Permissions::from_mode(0o444))?;
        fs::rename(partial, target)?;
        sync_folder(target.parent().unwrap_or(Path::new("/")))
    }
}
