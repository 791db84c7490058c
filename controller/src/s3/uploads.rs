//! Multipart uploads: their rows and their parts. What makes an object of them is [`super::completion`].
//!
//! Each part is a file of its own with a row.

use s3s::{S3Error, s3_error};
use sqlx::sqlite::SqliteRow;
use sqlx::{Row as _, SqliteConnection};

use super::checksum::{Algorithm, Checksum};
use super::files::DataId;
use super::objects::Description;
use super::receive::Received;
use super::store::{Result, Store};
use super::{buckets, now_ns};

/// S3 User Guide, "Amazon S3 multipart upload limits".
pub const LAST_PART: i32 = 10_000;

#[derive(Debug, Clone)]
pub struct Upload {
    pub id: String,
    pub bucket: String,
    pub key: String,
    pub initiated_ns: i64,
    pub description: Description,
    /// What the client asked for, if anything.
    pub algorithm: Option<Algorithm>,
    pub full_object: bool,
}

#[derive(Debug, Clone)]
pub struct Part {
    pub number: i32,
    pub data: DataId,
    pub size: u64,
    pub etag: String,
    pub modified_ns: i64,
    pub checksum: Option<Checksum>,
}

pub(super) fn no_such_upload() -> S3Error {
    s3_error!(NoSuchUpload, "The specified upload does not exist. It may have been completed or aborted.")
}

fn read_upload(row: &SqliteRow) -> Result<Upload> {
    let algorithm: Option<String> = row.try_get("algorithm")?;
    Ok(Upload {
        id: row.try_get("id")?,
        bucket: row.try_get("bucket")?,
        key: row.try_get("key")?,
        initiated_ns: row.try_get("initiated_ns")?,
        description: Description {
            headers: serde_json::from_str(row.try_get("headers")?)?,
            metadata: serde_json::from_str(row.try_get("metadata")?)?,
        },
        algorithm: algorithm.as_deref().map(Algorithm::parse).transpose()?,
        full_object: row.try_get("full_object")?,
    })
}

fn read_part(row: &SqliteRow) -> Result<Part> {
    Ok(Part {
        number: row.try_get("number")?,
        data: DataId(row.try_get("data")?),
        size: row.try_get::<i64, _>("size")? as u64,
        etag: row.try_get("etag")?,
        modified_ns: row.try_get("modified_ns")?,
        checksum: serde_json::from_str(row.try_get("checksums")?)?,
    })
}

/// The upload, if it is one of this bucket and key and `account` may use them.
async fn open(connection: &mut SqliteConnection, account: &str, bucket: &str, key: &str, id: &str) -> Result<Upload> {
    let upload = find(connection, account, bucket, key, id).await?;
    Ok(upload.ok_or_else(no_such_upload)?)
}

/// The upload of this bucket and key, which `account` may use, if there is one.
pub(super) async fn find(
    connection: &mut SqliteConnection,
    account: &str,
    bucket: &str,
    key: &str,
    id: &str,
) -> Result<Option<Upload>> {
    buckets::open(connection, account, bucket).await?;
    let row = sqlx::query("SELECT * FROM s3_uploads WHERE id = ? AND bucket = ? AND key = ?")
        .bind(id)
        .bind(bucket)
        .bind(key)
        .fetch_optional(connection)
        .await?;
    row.map(|row| read_upload(&row)).transpose()
}

pub(super) async fn parts_of(connection: &mut SqliteConnection, id: &str) -> Result<Vec<Part>> {
    let rows = sqlx::query("SELECT * FROM s3_parts WHERE upload_id = ? ORDER BY number")
        .bind(id)
        .fetch_all(connection)
        .await?;
    rows.iter().map(read_part).collect()
}

/// Forgets the upload and its parts.
pub(super) async fn forget(connection: &mut SqliteConnection, id: &str) -> Result<()> {
    sqlx::query("DELETE FROM s3_parts WHERE upload_id = ?").bind(id).execute(&mut *connection).await?;
    sqlx::query("DELETE FROM s3_uploads WHERE id = ?").bind(id).execute(connection).await?;
    Ok(())
}

impl Store {
    pub async fn create_upload(
        &self,
        account: &str,
        bucket: &str,
        key: &str,
        description: Description,
        algorithm: Option<Algorithm>,
        full_object: bool,
    ) -> Result<Upload> {
        let upload = Upload {
            id: uuid::Uuid::new_v4().simple().to_string(),
            bucket: bucket.to_owned(),
            key: key.to_owned(),
            initiated_ns: now_ns(),
            description,
            algorithm,
            full_object,
        };
        let mut transaction = self.db.begin().await?;
        buckets::open(&mut transaction, account, bucket).await?;
        sqlx::query(
            "INSERT INTO s3_uploads (id, bucket, key, initiated_ns, headers, metadata, algorithm, full_object) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(&upload.id)
        .bind(&upload.bucket)
        .bind(&upload.key)
        .bind(upload.initiated_ns)
        .bind(serde_json::to_string(&upload.description.headers)?)
        .bind(serde_json::to_string(&upload.description.metadata)?)
        .bind(algorithm.map(Algorithm::name))
        .bind(full_object)
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(upload)
    }

    /// The upload and all of its parts.
    pub async fn upload(&self, account: &str, bucket: &str, key: &str, id: &str) -> Result<(Upload, Vec<Part>)> {
        let mut snapshot = self.db.snapshot().await?;
        let upload = open(&mut snapshot, account, bucket, key, id).await?;
        let parts = parts_of(&mut snapshot, id).await?;
        Ok((upload, parts))
    }

    /// The bucket's uploads under way, by key and id.
    pub async fn uploads(&self, account: &str, bucket: &str, prefix: &str) -> Result<Vec<Upload>> {
        let mut snapshot = self.db.snapshot().await?;
        buckets::open(&mut snapshot, account, bucket).await?;
        let rows = sqlx::query("SELECT * FROM s3_uploads WHERE bucket = ? AND key >= ? ORDER BY key, id")
            .bind(bucket)
            .bind(prefix)
            .fetch_all(&mut *snapshot)
            .await?;
        let uploads: Result<Vec<Upload>> = rows.iter().map(read_upload).collect();
        Ok(uploads?.into_iter().take_while(|upload| upload.key.starts_with(prefix)).collect())
    }

    /// Makes received bytes a part; an older part of the same number goes.
    pub async fn put_part(&self, account: &str, upload: &Upload, number: i32, received: Received) -> Result<Part> {
        let (store, account, upload) = (self.clone(), account.to_owned(), upload.clone());
        let part = Part {
            number,
            data: received.data,
            size: received.size,
            etag: hex::encode(received.md5),
            modified_ns: now_ns(),
            checksum: Some(received.checksum),
        };
        Store::to_the_end(async move {
            match store.insert_part(&account, &upload, &part).await {
                Ok(old) => {
                    store.files.remove(old).await;
                    Ok(part)
                }
                Err(error) => {
                    store.files.remove([part.data]).await;
                    Err(error)
                }
            }
        })
        .await
    }

    async fn insert_part(&self, account: &str, upload: &Upload, part: &Part) -> Result<Option<DataId>> {
        let mut transaction = self.db.begin().await?;
        open(&mut transaction, account, &upload.bucket, &upload.key, &upload.id).await?;
        let old = sqlx::query("SELECT data FROM s3_parts WHERE upload_id = ? AND number = ?")
            .bind(&upload.id)
            .bind(part.number)
            .fetch_optional(&mut *transaction)
            .await?;
        sqlx::query(
            "INSERT OR REPLACE INTO s3_parts (upload_id, number, data, size, etag, modified_ns, checksums) \
             VALUES (?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(&upload.id)
        .bind(part.number)
        .bind(&part.data.0)
        .bind(part.size as i64)
        .bind(&part.etag)
        .bind(part.modified_ns)
        .bind(serde_json::to_string(&part.checksum)?)
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(old.map(|row| row.try_get("data")).transpose()?.map(DataId))
    }

    /// Removes the upload and its parts.
    pub async fn abort_upload(&self, account: &str, bucket: &str, key: &str, id: &str) -> Result<()> {
        let (store, account) = (self.clone(), account.to_owned());
        let (bucket, key, id) = (bucket.to_owned(), key.to_owned(), id.to_owned());
        Store::to_the_end(async move {
            let mut transaction = store.db.begin().await?;
            open(&mut transaction, &account, &bucket, &key, &id).await?;
            let parts = parts_of(&mut transaction, &id).await?;
            forget(&mut transaction, &id).await?;
            transaction.commit().await?;
            store.files.remove(parts.into_iter().map(|part| part.data)).await;
            Ok(())
        })
        .await
    }
}
