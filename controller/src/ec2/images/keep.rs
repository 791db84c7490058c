//! Which blobs are kept: those that an image's row names.
//!
//! A blob is kept *before* the row that names it is written, and let go *after* the row is gone; the
//! lock keeps the one from coming between the two steps of the other. A crash in between leaves a
//! blob that no row names, which [`tidy`] removes at the next start.

use std::path::Path;

use tokio::sync::{Mutex, MutexGuard};

use crate::Cloud;
use crate::clock;
use crate::error::{Error, Result};
use crate::s3::objects;
use crate::state::{images, instances, nodes, tokens, vpcs};

/// Held from the keeping of a blob to the commit of its row, and while blobs are let go.
static BLOBS: Mutex<()> = Mutex::const_new(());

pub(super) async fn lock() -> MutexGuard<'static, ()> {
    BLOBS.lock().await
}

/// Lets go of those blobs that no image names. The caller holds the lock.
pub(super) async fn let_go(cloud: &Cloud, digests: &[String], _locked: &MutexGuard<'static, ()>) -> Result<()> {
    for digest in digests {
        let mut snapshot = cloud.db.snapshot().await?;
        if !images::refer_to(&mut snapshot, digest).await? {
            objects::unpin(&cloud.s3, digest).await.map_err(|error| Error::Objects(error.to_string()))?;
        }
    }
    Ok(())
}

/// EC2 shows a terminated instance for about an hour.
const TERMINATED_SHOWN_NS: i64 = 3600 * 1_000_000_000;
/// A client token is good for a day at least.
const TOKEN_KEPT_NS: i64 = 24 * 3600 * 1_000_000_000;

/// Forgets what has been over for long enough: terminated instances; subnets and VPCs that were deleted, nodes that were removed and images that
/// were deregistered, once nothing shown was in them, on them or booted from them; old client tokens; blobs that no image names. At the start
/// and every minute.
pub async fn tidy(cloud: &Cloud) -> Result<()> {
    let locked = lock().await;
    let now = clock::now();
    let mut tx = cloud.db.begin().await?;
    instances::forget_terminated(&mut tx, now - TERMINATED_SHOWN_NS).await?;
    vpcs::forget_deleted(&mut tx).await?;
    nodes::forget_removed(&mut tx).await?;
    images::forget_unused(&mut tx).await?;
    tokens::forget_old(&mut tx, now - TOKEN_KEPT_NS).await?;
    tx.commit().await?;
    let digests = kept(&cloud.state_dir.join("blobs"))?;
    let_go(cloud, &digests, &locked).await
}

/// The digests of the blobs that are there.
fn kept(folder: &Path) -> Result<Vec<String>> {
    let error = |source| Error::File { what: "read", path: folder.to_owned(), source };
    let mut digests = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(error)? {
        digests.extend(entry.map_err(error)?.file_name().into_string().ok().filter(|name| name.len() == 64));
    }
    Ok(digests)
}
