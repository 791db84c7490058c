//! Objects: their rows, and what the rest of the controller may ask of them.
//!
//! [`pin`], [`unpin`] and [`blob_path`] are the seam to EC2's images: an image's parts are
//! objects at the time of registration, and blobs named by their digest from then on.

use std::collections::BTreeMap;
use std::path::PathBuf;

use s3s::{S3Result, s3_error};
use serde::{Deserialize, Serialize};
use sqlx::sqlite::SqliteRow;
use sqlx::{Row as _, SqliteConnection};

use super::buckets;
use super::checksum::Checksum;
use super::conditions::{Conditions, Version};
use super::files::DataId;
use super::now_ns;
use super::receive::Received;
use super::store::{Result, Store, StoreError};

/// Headers that are stored with an object and given back with it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Headers {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_control: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_disposition: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_encoding: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_language: Option<String>,
    /// As an HTTP date.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<String>,
}

/// `x-amz-meta-…` without the prefix.
pub type UserMetadata = BTreeMap<String, String>;

/// What is to be stored beside the bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Description {
    pub headers: Headers,
    pub metadata: UserMetadata,
}

/// One object as its row has it.
#[derive(Debug, Clone)]
pub struct Object {
    pub bucket: String,
    pub key: String,
    pub data: DataId,
    pub size: u64,
    /// Without quotes.
    pub etag: String,
    pub sha256: String,
    pub modified_ns: i64,
    pub description: Description,
    pub checksum: Option<Checksum>,
    /// Sizes of the parts of a multipart upload; empty for a single PUT.
    pub parts: Vec<u64>,
}

impl Object {
    /// A new object of bytes that were just received by one PUT.
    pub fn of(bucket: &str, key: &str, received: &Received, description: Description) -> Object {
        Object {
            bucket: bucket.to_owned(),
            key: key.to_owned(),
            data: received.data.clone(),
            size: received.size,
            etag: hex::encode(received.md5),
            sha256: received.sha256.clone(),
            modified_ns: now_ns(),
            description,
            checksum: Some(received.checksum.clone()),
            parts: Vec::new(),
        }
    }

    pub fn version(&self) -> Version<'_> {
        Version { etag: &self.etag, modified_ns: self.modified_ns, size: self.size }
    }
}

const COLUMNS: &str = "bucket, key, data, size, etag, sha256, modified_ns, headers, metadata, checksums, parts";

pub(super) fn read(row: &SqliteRow) -> Result<Object> {
    Ok(Object {
        bucket: row.try_get("bucket")?,
        key: row.try_get("key")?,
        data: DataId(row.try_get("data")?),
        size: row.try_get::<i64, _>("size")? as u64,
        etag: row.try_get("etag")?,
        sha256: row.try_get("sha256")?,
        modified_ns: row.try_get("modified_ns")?,
        description: Description {
            headers: serde_json::from_str(row.try_get("headers")?)?,
            metadata: serde_json::from_str(row.try_get("metadata")?)?,
        },
        checksum: serde_json::from_str(row.try_get("checksums")?)?,
        parts: serde_json::from_str(row.try_get("parts")?)?,
    })
}

/// The object's row, if there is one.
pub(super) async fn row(connection: &mut SqliteConnection, bucket: &str, key: &str) -> Result<Option<Object>> {
    let query = format!("SELECT {COLUMNS} FROM s3_objects WHERE bucket = ? AND key = ?");
    let row = sqlx::query(sqlx::AssertSqlSafe(query)).bind(bucket).bind(key).fetch_optional(connection).await?;
    row.map(|row| read(&row)).transpose()
}

/// At most `limit` rows whose key is at least `low` and begins with `prefix`, in order of their keys.
pub(super) async fn rows_from(
    connection: &mut SqliteConnection,
    bucket: &str,
    prefix: &str,
    low: &str,
    limit: i64,
) -> Result<Vec<Object>> {
    let end = super::listing::successor(prefix);
    let bound = if end.is_some() { "AND key < ?" } else { "" };
    let query = format!("SELECT {COLUMNS} FROM s3_objects WHERE bucket = ? AND key >= ? {bound} ORDER BY key LIMIT ?");
    let mut query = sqlx::query(sqlx::AssertSqlSafe(query)).bind(bucket).bind(low);
    if let Some(end) = &end {
        query = query.bind(end);
    }
    query.bind(limit).fetch_all(connection).await?.iter().map(read).collect()
}

/// Puts the row in place of an older one; the older one's file is returned, to be removed after the
/// commit.
pub(super) async fn replace(
    connection: &mut SqliteConnection,
    object: &Object,
    conditions: &Conditions,
) -> Result<Option<DataId>> {
    let old = row(connection, &object.bucket, &object.key).await?;
    conditions.check_write(old.as_ref().map(Object::version))?;
    let query = format!("INSERT OR REPLACE INTO s3_objects ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)");
    sqlx::query(sqlx::AssertSqlSafe(query))
        .bind(&object.bucket)
        .bind(&object.key)
        .bind(&object.data.0)
        .bind(object.size as i64)
        .bind(&object.etag)
        .bind(&object.sha256)
        .bind(object.modified_ns)
        .bind(serde_json::to_string(&object.description.headers)?)
        .bind(serde_json::to_string(&object.description.metadata)?)
        .bind(serde_json::to_string(&object.checksum)?)
        .bind(serde_json::to_string(&object.parts)?)
        .execute(connection)
        .await?;
    Ok(old.map(|old| old.data))
}

impl Store {
    /// The object, if `account` may read it.
    pub async fn object(&self, account: &str, bucket: &str, key: &str) -> Result<Object> {
        let mut snapshot = self.db.snapshot().await?;
        buckets::open(&mut snapshot, account, bucket).await?;
        row(&mut snapshot, bucket, key)
            .await?
            .ok_or_else(|| s3_error!(NoSuchKey, "The key {key:?} does not exist in the bucket {bucket:?}.").into())
    }

    /// Opens the object's bytes. Its row may be replaced, and the file unlinked, between the two
    /// steps: then the new row is read.
    pub async fn open_object(&self, account: &str, bucket: &str, key: &str) -> Result<(Object, tokio::fs::File)> {
        let mut last = None;
        for _ in 0..8 {
            let object = self.object(account, bucket, key).await?;
            match tokio::fs::File::open(self.files.path(&object.data)).await {
                Ok(file) => return Ok((object, file)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => last = Some(error),
                Err(error) => return Err(error.into()),
            }
        }
        Err(last.unwrap_or_else(|| std::io::Error::other("the object changes too fast to be read")).into())
    }

    /// Makes received bytes the object, if the conditions hold; else nothing is left of them.
    pub async fn put_object(&self, account: &str, object: Object, conditions: Conditions) -> Result<Object> {
        let (store, account) = (self.clone(), account.to_owned());
        Store::to_the_end(async move {
            let outcome = async {
                let mut transaction = store.db.begin().await?;
                buckets::open(&mut transaction, &account, &object.bucket).await?;
                let old = replace(&mut transaction, &object, &conditions).await?;
                transaction.commit().await?;
                Ok(old)
            }
            .await;
            match outcome {
                Ok(old) => {
                    store.files.remove(old).await;
                    Ok(object)
                }
                Err(error) => {
                    store.files.remove([object.data]).await;
                    Err(error)
                }
            }
        })
        .await
    }

    /// Removes objects, each if its conditions hold; a key that is not there is no error. For each in
    /// turn, whether it is gone.
    pub async fn delete_objects(
        &self,
        account: &str,
        bucket: &str,
        wanted: Vec<(String, Conditions)>,
    ) -> Result<Vec<S3Result<()>>> {
        let (store, account, bucket) = (self.clone(), account.to_owned(), bucket.to_owned());
        Store::to_the_end(async move {
            let mut transaction = store.db.begin().await?;
            buckets::open(&mut transaction, &account, &bucket).await?;
            let (mut outcomes, mut removed) = (Vec::new(), Vec::new());
            for (key, conditions) in &wanted {
                let old = row(&mut transaction, &bucket, key).await?;
                let outcome = conditions.check_write(old.as_ref().map(Object::version));
                if outcome.is_ok()
                    && let Some(old) = old
                {
                    sqlx::query("DELETE FROM s3_objects WHERE bucket = ? AND key = ?")
                        .bind(&bucket)
                        .bind(key)
                        .execute(&mut *transaction)
                        .await?;
                    removed.push(old.data);
                }
                outcomes.push(outcome);
            }
            transaction.commit().await?;
            store.files.remove(removed).await;
            Ok(outcomes)
        })
        .await
    }
}

/// Bytes kept under their digest.
#[derive(Debug, Clone)]
pub struct Blob {
    pub sha256: String,
    pub size: u64,
    pub path: PathBuf,
}

/// Keeps the bytes of an object that `account` may read as a blob: deleting or overwriting the
/// object does not touch it. Pinning twice is no error.
pub async fn pin(store: &Store, account: &str, bucket: &str, key: &str) -> Result<Blob> {
    for _ in 0..8 {
        let object = store.object(account, bucket, key).await?;
        let (files, data, sha256) = (store.files.clone(), object.data, object.sha256.clone());
        match on_a_thread(move || files.pin(&data, &sha256)).await {
            Ok(path) => return Ok(Blob { sha256: object.sha256, size: object.size, path }),
            // Overwritten in between: pin what is there now.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(StoreError::Disk(std::io::Error::other("the object changes too fast to be kept")))
}

/// Lets a blob go. One that is not there is no error.
pub async fn unpin(store: &Store, sha256: &str) -> Result<()> {
    let (files, sha256) = (store.files.clone(), sha256.to_owned());
    Ok(on_a_thread(move || files.unpin(&sha256)).await?)
}

async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(std::io::Error::other(error)))
}

/// Where the blob with this digest lies.
pub fn blob_path(store: &Store, sha256: &str) -> Option<PathBuf> {
    store.files.blob(sha256)
}
