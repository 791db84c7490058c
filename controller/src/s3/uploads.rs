//! Multipart uploads: their rows, their parts, and the joining of parts into an object.
//!
//! Each part is a file of its own with a row. Completion writes the parts one after another into a
//! new file (hashing the whole on the way), and then, in one transaction, makes that file the object
//! and forgets the upload. Killed before the commit, the upload is as it was and can be completed
//! again; killed after it, the parts' files are orphans and are swept.

use std::fs::File;
use std::io::Read as _;

use md5::{Digest as _, Md5};
use s3s::{S3Error, S3ErrorCode, S3Result, s3_error};
use sqlx::sqlite::SqliteRow;
use sqlx::{Row as _, SqliteConnection};

use super::checksum::{Algorithm, Checksum};
use super::conditions::Conditions;
use super::files::DataId;
use super::objects::{Description, Object, replace};
use super::receive::{Received, Writer, Written, write};
use super::store::{Result, Store};
use super::{buckets, now_ns};

/// S3 User Guide, "Amazon S3 multipart upload limits".
pub const LAST_PART: i32 = 10_000;
const SMALLEST_PART: u64 = 5 << 20;
const LARGEST_OBJECT: u64 = 5 << 40;

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

/// One line of a client's list of parts.
#[derive(Debug, Clone)]
pub struct ClaimedPart {
    pub number: i32,
    pub etag: String,
    pub checksum: Option<(Algorithm, String)>,
}

/// What a client says of the whole when it completes an upload.
#[derive(Debug, Clone, Default)]
pub struct Claim {
    pub parts: Vec<ClaimedPart>,
    pub checksum: Option<(Algorithm, String)>,
    pub size: Option<u64>,
    pub conditions: Conditions,
}

fn no_such_upload() -> S3Error {
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
    buckets::open(connection, account, bucket).await?;
    let row = sqlx::query("SELECT * FROM s3_uploads WHERE id = ? AND bucket = ? AND key = ?")
        .bind(id)
        .bind(bucket)
        .bind(key)
        .fetch_optional(connection)
        .await?
        .ok_or_else(no_such_upload)?;
    read_upload(&row)
}

async fn parts_of(connection: &mut SqliteConnection, id: &str) -> Result<Vec<Part>> {
    let rows = sqlx::query("SELECT * FROM s3_parts WHERE upload_id = ? ORDER BY number")
        .bind(id)
        .fetch_all(connection)
        .await?;
    rows.iter().map(read_part).collect()
}

/// Forgets the upload and its parts.
async fn forget(connection: &mut SqliteConnection, id: &str) -> Result<()> {
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

    /// Joins the claimed parts into the object.
    pub async fn complete_upload(
        &self,
        account: &str,
        bucket: &str,
        key: &str,
        id: &str,
        claim: Claim,
    ) -> Result<Object> {
        let (upload, parts) = self.upload(account, bucket, key, id).await?;
        let chosen = choose(&parts, &claim.parts)?;
        let size: u64 = chosen.iter().map(|part| part.size).sum();
        if claim.size.is_some_and(|stated| stated != size) {
            return Err(s3_error!(
                InvalidRequest,
                "The stated object size is not the sum of the parts' sizes, {size}."
            )
            .into());
        }
        if size > LARGEST_OBJECT {
            return Err(s3_error!(EntityTooLarge, "The object would be larger than 5 TiB.").into());
        }
        let (store, account) = (self.clone(), account.to_owned());
        Store::to_the_end(async move {
            let written = store.join(&chosen, upload.algorithm.unwrap_or(Algorithm::Crc64Nvme)).await?;
            let checksum = whole_checksum(&upload, &chosen, &written)?;
            compare(&claim, checksum.as_ref())?;
            let files = store.files.clone();
            let received = tokio::task::spawn_blocking(move || written.keep(&files))
                .await
                .map_err(|_| s3_error!(InternalError, "the writer of the object ended early"))??;
            let object = Object {
                etag: joined_etag(&chosen),
                checksum,
                parts: chosen.iter().map(|part| part.size).collect(),
                ..Object::of(&upload.bucket, &upload.key, &received, upload.description.clone())
            };
            match store.commit_upload(&account, &upload, &object, &claim.conditions).await {
                Ok(gone) => {
                    store.files.remove(gone).await;
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

    /// Writes the parts one after another into a new file.
    async fn join(&self, parts: &[Part], algorithm: Algorithm) -> Result<Written> {
        let (files, parts) = (self.files.clone(), parts.to_vec());
        let joining = write(&self.files, move || -> std::io::Result<Written> {
            let mut writer = Writer::new(&files, algorithm)?;
            let mut buffer = vec![0; 1 << 20];
            for part in &parts {
                let mut file = File::open(files.path(&part.data))?;
                loop {
                    match file.read(&mut buffer)? {
                        0 => break,
                        n => writer.write(&buffer[..n])?,
                    }
                }
            }
            Ok(writer.end())
        });
        match joining.await?.await {
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => {
                Err(s3_error!(InvalidPart, "A part was uploaded again while the upload was being completed.").into())
            }
            Ok(written) => Ok(written?),
            Err(_) => Err(s3_error!(InternalError, "the writer of the object ended early").into()),
        }
    }

    /// One transaction: the object is there, the upload is gone. Returns the files that go.
    async fn commit_upload(
        &self,
        account: &str,
        upload: &Upload,
        object: &Object,
        conditions: &Conditions,
    ) -> Result<Vec<DataId>> {
        let mut transaction = self.db.begin().await?;
        open(&mut transaction, account, &upload.bucket, &upload.key, &upload.id).await?;
        let mut gone: Vec<DataId> =
            parts_of(&mut transaction, &upload.id).await?.into_iter().map(|part| part.data).collect();
        gone.extend(replace(&mut transaction, object, conditions).await?);
        forget(&mut transaction, &upload.id).await?;
        transaction.commit().await?;
        Ok(gone)
    }
}

/// The stored parts that the client names, or what is wrong with its list.
fn choose(stored: &[Part], claimed: &[ClaimedPart]) -> S3Result<Vec<Part>> {
    if claimed.is_empty() {
        return Err(s3_error!(MalformedXML, "You must specify at least one part."));
    }
    if !claimed.is_sorted_by(|a, b| a.number < b.number) {
        return Err(s3_error!(InvalidPartOrder, "The list of parts was not in ascending order of part numbers."));
    }
    let mut chosen = Vec::with_capacity(claimed.len());
    for claim in claimed {
        let part =
            stored.iter().find(|part| part.number == claim.number && part.etag == claim.etag).ok_or_else(|| {
                s3_error!(
                    InvalidPart,
                    "Part {} was not uploaded, or its entity tag is not {:?}.",
                    claim.number,
                    claim.etag
                )
            })?;
        if let Some((algorithm, value)) = &claim.checksum
            && Checksum::of(part.checksum.as_ref(), *algorithm).is_some_and(|stored| stored != *value)
        {
            return Err(s3_error!(InvalidPart, "The {} of part {} is another one.", algorithm.name(), claim.number));
        }
        chosen.push(part.clone());
    }
    let all_but_last = &chosen[..chosen.len() - 1];
    if let Some(part) = all_but_last.iter().find(|part| part.size < SMALLEST_PART) {
        return Err(s3_error!(
            EntityTooSmall,
            "Part {} has {} bytes; every part but the last needs {SMALLEST_PART}.",
            part.number,
            part.size
        ));
    }
    Ok(chosen)
}

/// The checksum that the object gets: of its bytes, or of its parts' checksums.
fn whole_checksum(upload: &Upload, parts: &[Part], written: &Written) -> S3Result<Option<Checksum>> {
    match upload.algorithm {
        Some(algorithm) if !upload.full_object => {
            let sums: Option<Vec<Checksum>> = parts
                .iter()
                .map(|part| part.checksum.clone().filter(|checksum| checksum.algorithm == algorithm))
                .collect();
            let sums = sums.ok_or_else(|| {
                s3_error!(
                    InvalidRequest,
                    "The upload was created with {}; a part has no such checksum.",
                    algorithm.name()
                )
            })?;
            Ok(Some(Checksum::composite(algorithm, &sums)?))
        }
        _ => Ok(Some(written.checksum.clone())),
    }
}

/// A composite checksum may be stated with or without its count.
fn compare(claim: &Claim, actual: Option<&Checksum>) -> S3Result<()> {
    let Some((algorithm, stated)) = &claim.checksum else { return Ok(()) };
    let Some(actual) = actual.filter(|actual| actual.algorithm == *algorithm) else { return Ok(()) };
    let bare = actual.value.split('-').next().unwrap_or_default();
    if *stated == actual.value || stated == bare {
        return Ok(());
    }
    Err(S3Error::with_message(
        S3ErrorCode::BadDigest,
        format!("The {} you specified did not match the calculated checksum.", algorithm.name()),
    ))
}

/// MD5 of the parts' MD5s and their number, as S3's multipart entity tags are.
fn joined_etag(parts: &[Part]) -> String {
    let mut md5 = Md5::new();
    for part in parts {
        // Written by ourselves as hexadecimal; a part whose tag is not would only change this tag.
        md5.update(hex::decode(&part.etag).unwrap_or_default());
    }
    format!("{}-{}", hex::encode(md5.finalize()), parts.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(number: i32, size: u64) -> Part {
        let etag = hex::encode(Md5::digest(number.to_be_bytes()));
        Part { number, data: DataId(number.to_string()), size, etag, modified_ns: 0, checksum: None }
    }

    fn claim(part: &Part) -> ClaimedPart {
        ClaimedPart { number: part.number, etag: part.etag.clone(), checksum: None }
    }

    fn code(stored: &[Part], claimed: &[ClaimedPart]) -> Option<String> {
        choose(stored, claimed).err().map(|error| error.code().as_str().to_owned())
    }

    #[test]
    fn the_clients_list_is_checked() {
        let (a, b) = (part(1, SMALLEST_PART), part(2, 1));
        let stored = [a.clone(), b.clone()];
        assert_eq!(code(&stored, &[claim(&a), claim(&b)]), None);
        assert_eq!(code(&stored, &[claim(&b)]), None);
        assert_eq!(code(&stored, &[]).as_deref(), Some("MalformedXML"));
        assert_eq!(code(&stored, &[claim(&b), claim(&a)]).as_deref(), Some("InvalidPartOrder"));
        assert_eq!(code(&stored, &[claim(&a), claim(&a)]).as_deref(), Some("InvalidPartOrder"));
        assert_eq!(code(&stored, &[claim(&part(3, 1))]).as_deref(), Some("InvalidPart"));
        let wrong_tag = ClaimedPart { etag: "0".into(), ..claim(&a) };
        assert_eq!(code(&stored, &[wrong_tag]).as_deref(), Some("InvalidPart"));
        let small = [part(1, SMALLEST_PART - 1), b.clone()];
        assert_eq!(code(&small, &[claim(&small[0]), claim(&b)]).as_deref(), Some("EntityTooSmall"));
    }

    #[test]
    fn the_entity_tag_is_the_digest_of_digests() {
        let parts = [part(1, 1), part(2, 1)];
        let mut both = hex::decode(&parts[0].etag).unwrap();
        both.extend(hex::decode(&parts[1].etag).unwrap());
        assert_eq!(joined_etag(&parts), format!("{}-2", hex::encode(Md5::digest(&both))));
    }
}
