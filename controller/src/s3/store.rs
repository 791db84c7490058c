//! The object store as the rest of the controller sees it: files, rows, and the rule that joins them.
//!
//! The rule: **a file is durable before a row names it, and a row is gone before its file goes.** So
//! a crash leaves whole objects and at most orphaned files, which [`Store::open`] sweeps away.

use std::collections::HashSet;
use std::path::Path;

use s3s::{S3Error, s3_error};
use sqlx::Row as _;

use super::completion::Joins;
use super::files::{DataId, Files};
use crate::auth::Accounts;
use crate::state::Database;

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The caller's doing; carries S3's own code.
    #[error("{}", describe(.0))]
    Refused(S3Error),
    #[error(transparent)]
    State(#[from] crate::error::Error),
    #[error("the state database: {0}")]
    Database(#[from] sqlx::Error),
    #[error("the object store's files: {0}")]
    Disk(#[from] std::io::Error),
    #[error("the state database holds what this program never writes: {0}")]
    Corrupt(#[from] serde_json::Error),
}

impl From<S3Error> for StoreError {
    fn from(error: S3Error) -> StoreError {
        StoreError::Refused(error)
    }
}

impl From<StoreError> for S3Error {
    fn from(error: StoreError) -> S3Error {
        match error {
            StoreError::Refused(error) => error,
            StoreError::Disk(error) => super::receive::disk_error(error),
            other => {
                tracing::error!(error = %other, "object store");
                s3_error!(InternalError, "We encountered an internal error. Please try again.")
            }
        }
    }
}

/// Code and message, for callers outside of S3.
fn describe(error: &S3Error) -> String {
    match error.message() {
        Some(message) => format!("{}: {message}", error.code().as_str()),
        None => error.code().as_str().to_owned(),
    }
}

pub type Result<T> = std::result::Result<T, StoreError>;

/// The open object store.
#[derive(Debug, Clone)]
pub struct Store {
    pub(crate) files: Files,
    pub(crate) db: Database,
    pub(crate) accounts: Accounts,
    pub(crate) joins: Joins,
}

impl Store {
    /// Opens the store below the state folder and removes what a crash has left.
    pub async fn open(state: &Path, db: Database) -> Result<Store> {
        let files = Files::open(state)?;
        let mut named = HashSet::new();
        for row in
            sqlx::query("SELECT data FROM s3_objects UNION ALL SELECT data FROM s3_parts").fetch_all(db.pool()).await?
        {
            named.insert(DataId(row.try_get("data")?));
        }
        let removed = files.sweep(&named)?;
        if removed > 0 {
            tracing::info!(removed, "removed files of uploads that were never finished");
        }
        Ok(Store { files, accounts: Accounts::new(db.clone()), joins: Joins::default(), db })
    }

    /// Runs `work` to its end even when the client goes away meanwhile: between a commit and the
    /// removal of the file that it replaced, nobody may stop.
    pub(crate) async fn to_the_end<T, F>(work: F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        match tokio::spawn(work).await {
            Ok(result) => result,
            Err(_) => Err(s3_error!(InternalError, "the request ended early").into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::s3::completion::{Claim, ClaimedPart};
    use crate::s3::conditions::Conditions;
    use crate::s3::objects::{Description, Object, blob_path, pin, unpin};
    use crate::s3::testing::{ACCOUNT, received, store_with};

    async fn put(store: &Store, key: &str, bytes: &[u8], conditions: Conditions) -> Result<Object> {
        let object = Object::of("bucket", key, &received(store, bytes), Description::default());
        store.put_object(ACCOUNT, object, conditions).await
    }

    /// Data files that are there and bytes of the object.
    async fn seen(store: &Store, key: &str) -> (usize, Option<Vec<u8>>) {
        let count = store.files.count();
        match store.object(ACCOUNT, "bucket", key).await {
            Ok(object) => (count, Some(std::fs::read(store.files.path(&object.data)).unwrap())),
            Err(_) => (count, None),
        }
    }

    #[tokio::test]
    async fn an_object_has_one_file_however_often_it_is_written() {
        let store = store_with("bucket", &[]).await;
        for bytes in [b"one", b"two"] {
            put(&store, "k", bytes, Conditions::default()).await.unwrap();
        }
        assert_eq!(seen(&store, "k").await, (1, Some(b"two".to_vec())));
        let keys = ["k", "never there"].map(|key| (key.to_owned(), Conditions::default()));
        store.delete_objects(ACCOUNT, "bucket", keys.to_vec()).await.unwrap();
        assert_eq!(seen(&store, "k").await, (0, None));
    }

    #[tokio::test]
    async fn a_refused_put_leaves_the_old_object_and_no_file() {
        let store = store_with("bucket", &[]).await;
        put(&store, "k", b"old", Conditions::default()).await.unwrap();
        let create_only = Conditions { if_none_match: Some(s3s::dto::ETagCondition::Any), ..Conditions::default() };
        assert!(put(&store, "k", b"new", create_only).await.is_err());
        let object = Object::of("no-bucket", "k", &received(&store, b"x"), Description::default());
        assert!(store.put_object(ACCOUNT, object, Conditions::default()).await.is_err());
        let object = Object::of("bucket", "k", &received(&store, b"x"), Description::default());
        assert!(store.put_object("000000000000", object, Conditions::default()).await.is_err());
        assert_eq!(seen(&store, "k").await, (1, Some(b"old".to_vec())));
    }

    #[tokio::test]
    async fn what_a_crash_leaves_is_swept_and_what_is_named_stays() {
        let store = store_with("bucket", &[]).await;
        put(&store, "k", b"kept", Conditions::default()).await.unwrap();
        let upload = store.create_upload(ACCOUNT, "bucket", "big", Description::default(), None, true).await.unwrap();
        store.put_part(ACCOUNT, &upload, 1, received(&store, b"part")).await.unwrap();
        // Killed after the file and before the row; killed in the middle of the file.
        received(&store, b"orphan");
        std::mem::forget(store.files.create().unwrap());
        let again = Store::open(store.files.state(), store.db.clone()).await.unwrap();
        assert_eq!(seen(&again, "k").await, (2, Some(b"kept".to_vec())));
        again.upload(ACCOUNT, "bucket", "big", &upload.id).await.unwrap();
    }

    #[tokio::test]
    async fn a_completed_upload_is_one_file_with_the_digest_of_the_whole() {
        let store = store_with("bucket", &[]).await;
        let upload = store.create_upload(ACCOUNT, "bucket", "k", Description::default(), None, true).await.unwrap();
        let (big, small) = (vec![7; 5 << 20], b"the rest".to_vec());
        let mut claim = Claim::default();
        for (number, bytes) in [(1, &small), (1, &big), (2, &small)] {
            let part = store.put_part(ACCOUNT, &upload, number, received(&store, bytes)).await.unwrap();
            claim.parts.retain(|claimed| claimed.number != number);
            claim.parts.push(ClaimedPart { number, etag: part.etag, checksum: None });
        }
        assert_eq!(store.files.count(), 2, "an overwritten part's file goes");
        store.complete_upload(ACCOUNT, "bucket", "k", &upload.id, claim).await.unwrap();
        let object = store.object(ACCOUNT, "bucket", "k").await.unwrap();
        let whole = [big, small].concat();
        use sha2::Digest as _;
        assert_eq!(object.sha256, hex::encode(sha2::Sha256::digest(&whole)));
        assert_eq!(seen(&store, "k").await, (1, Some(whole)));
    }

    #[tokio::test]
    async fn a_pinned_object_outlives_its_deletion() {
        let store = store_with("bucket", &[]).await;
        put(&store, "k", b"image", Conditions::default()).await.unwrap();
        assert!(pin(&store, "000000000000", "bucket", "k").await.is_err());
        let blob = pin(&store, ACCOUNT, "bucket", "k").await.unwrap();
        store.delete_objects(ACCOUNT, "bucket", vec![("k".into(), Conditions::default())]).await.unwrap();
        let again = Store::open(store.files.state(), store.db.clone()).await.unwrap();
        assert_eq!(std::fs::read(blob_path(&again, &blob.sha256).unwrap()).unwrap(), b"image");
        unpin(&again, &blob.sha256).await.unwrap();
        assert_eq!(blob_path(&again, &blob.sha256), None);
    }

    #[tokio::test]
    async fn a_bucket_with_content_stays() {
        let store = store_with("bucket", &["k".to_owned()]).await;
        let code = |result: Result<()>| match result {
            Err(StoreError::Refused(error)) => error.code().as_str().to_owned(),
            other => format!("{other:?}"),
        };
        assert_eq!(code(store.delete_bucket(ACCOUNT, "bucket").await), "BucketNotEmpty");
        assert_eq!(code(store.delete_bucket("000000000000", "bucket").await), "AccessDenied");
        store.delete_objects(ACCOUNT, "bucket", vec![("k".into(), Conditions::default())]).await.unwrap();
        store.delete_bucket(ACCOUNT, "bucket").await.unwrap();
        assert_eq!(code(store.delete_bucket(ACCOUNT, "bucket").await), "NoSuchBucket");
    }
}
