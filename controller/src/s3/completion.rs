//! The completion of a multipart upload: its parts become an object.
//!
//! The parts are written one after another into a new file (hashing the whole on the way), and then,
//! in one transaction, that file is the object and the upload is forgotten. Killed before the commit,
//! the upload is as it was and can be completed again; killed after it, the parts' files are orphans
//! and are swept.
//!
//! This may take longer than a client waits, so it goes on when nobody waits any more, there is one
//! join of an upload at a time, and a completed upload is remembered for a day: whoever asks again
//! with the same parts is told what he did not hear. What keeps clients waiting is
//! [`super::keepalive`].

use std::collections::HashMap;
use std::fs::File;
use std::io::Read as _;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use md5::{Digest as _, Md5};
use s3s::{S3Error, S3ErrorCode, S3Result, s3_error};
use sqlx::{Row as _, SqliteConnection};
use tokio::sync::OwnedMutexGuard;

use super::checksum::{Algorithm, Checksum};
use super::conditions::Conditions;
use super::files::DataId;
use super::now_ns;
use super::objects::{Object, replace, row};
use super::receive::{Writer, Written, write};
use super::store::{Result, Store};
use super::uploads::{Part, Upload, find, forget, no_such_upload, parts_of};

/// S3 User Guide, "Amazon S3 multipart upload limits".
const SMALLEST_PART: u64 = 5 << 20;
const LARGEST_OBJECT: u64 = 5 << 40;
/// How long a completed upload is remembered.
const REMEMBERED_NS: i64 = 24 * 3600 * 1_000_000_000;

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

/// What the client is told of the object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completed {
    pub bucket: String,
    pub key: String,
    /// Without quotes.
    pub etag: String,
    pub checksum: Option<Checksum>,
}

/// The uploads that are being completed, by their ids.
#[derive(Debug, Clone, Default)]
pub struct Joins(Arc<Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>>);

impl Joins {
    /// Waits until no other completes this upload.
    pub async fn alone(&self, id: &str) -> OwnedMutexGuard<()> {
        let lock = {
            // A panic while the lock was held leaves whole entries.
            let mut joins = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            joins.retain(|_, lock| lock.strong_count() > 0);
            joins.get(id).and_then(Weak::upgrade).unwrap_or_else(|| {
                let lock = Arc::default();
                joins.insert(id.to_owned(), Arc::downgrade(&lock));
                lock
            })
        };
        lock.lock_owned().await
    }
}

/// Where an upload stands when its client completes it.
enum Stage {
    Completed(Completed),
    /// With the parts that the client chose.
    Open(Upload, Vec<Part>),
}

impl Store {
    /// Joins the claimed parts into the object; says again what became of them when that was done.
    pub async fn complete_upload(
        &self,
        account: &str,
        bucket: &str,
        key: &str,
        id: &str,
        claim: Claim,
    ) -> Result<Completed> {
        let (store, account) = (self.clone(), account.to_owned());
        let (bucket, key, id) = (bucket.to_owned(), key.to_owned(), id.to_owned());
        Store::to_the_end(async move {
            let _alone = store.joins.alone(&id).await;
            match store.stage(&account, &bucket, &key, &id, &claim).await? {
                Stage::Completed(completed) => Ok(completed),
                Stage::Open(upload, chosen) => store.complete(&account, &upload, chosen, &claim).await,
            }
        })
        .await
    }

    /// Refuses a claim that is known to be wrong before anything is joined.
    async fn stage(&self, account: &str, bucket: &str, key: &str, id: &str, claim: &Claim) -> Result<Stage> {
        let mut snapshot = self.db.snapshot().await?;
        let Some(upload) = find(&mut snapshot, account, bucket, key, id).await? else {
            let completed = completed(&mut snapshot, bucket, key, id).await?;
            let completed = completed.filter(|completed| completed.etag == joined_etag(&claim.parts));
            return Ok(Stage::Completed(completed.ok_or_else(no_such_upload)?));
        };
        let chosen = choose(&parts_of(&mut snapshot, id).await?, &claim.parts)?;
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
        let old = row(&mut snapshot, bucket, key).await?;
        claim.conditions.check_write(old.as_ref().map(Object::version))?;
        Ok(Stage::Open(upload, chosen))
    }

    async fn complete(&self, account: &str, upload: &Upload, chosen: Vec<Part>, claim: &Claim) -> Result<Completed> {
        let written = self.join(&chosen, upload.algorithm.unwrap_or(Algorithm::Crc64Nvme)).await?;
        let checksum = whole_checksum(upload, &chosen, &written)?;
        compare(claim, checksum.as_ref())?;
        let files = self.files.clone();
        let received = tokio::task::spawn_blocking(move || written.keep(&files))
            .await
            .map_err(|_| s3_error!(InternalError, "the writer of the object ended early"))??;
        let object = Object {
            etag: joined_etag(&claim.parts),
            checksum,
            parts: chosen.iter().map(|part| part.size).collect(),
            ..Object::of(&upload.bucket, &upload.key, &received, upload.description.clone())
        };
        match self.commit_upload(account, upload, &object, &claim.conditions).await {
            Ok(gone) => {
                self.files.remove(gone).await;
                let Object { bucket, key, etag, checksum, .. } = object;
                Ok(Completed { bucket, key, etag, checksum })
            }
            Err(error) => {
                self.files.remove([object.data]).await;
                Err(error)
            }
        }
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

    /// One transaction: the object is there, the upload is gone and remembered. Returns the files that go.
    async fn commit_upload(
        &self,
        account: &str,
        upload: &Upload,
        object: &Object,
        conditions: &Conditions,
    ) -> Result<Vec<DataId>> {
        let mut transaction = self.db.begin().await?;
        let there = find(&mut transaction, account, &upload.bucket, &upload.key, &upload.id).await?;
        there.ok_or_else(no_such_upload)?;
        let mut gone: Vec<DataId> =
            parts_of(&mut transaction, &upload.id).await?.into_iter().map(|part| part.data).collect();
        gone.extend(replace(&mut transaction, object, conditions).await?);
        forget(&mut transaction, &upload.id).await?;
        remember(&mut transaction, upload, object).await?;
        forget_completed(&mut transaction, now_ns() - REMEMBERED_NS).await?;
        transaction.commit().await?;
        Ok(gone)
    }
}

async fn remember(connection: &mut SqliteConnection, upload: &Upload, object: &Object) -> Result<()> {
    sqlx::query(
        "INSERT INTO s3_completed (upload_id, bucket, key, etag, checksums, completed_ns) VALUES (?, ?, ?, ?, ?, ?)",
    )
    .bind(&upload.id)
    .bind(&upload.bucket)
    .bind(&upload.key)
    .bind(&object.etag)
    .bind(serde_json::to_string(&object.checksum)?)
    .bind(now_ns())
    .execute(connection)
    .await?;
    Ok(())
}

/// Forgets the uploads that were completed before a time. With each that is completed: there are
/// then never more than those of a day and what a quiet time has left.
async fn forget_completed(connection: &mut SqliteConnection, before_ns: i64) -> Result<()> {
    sqlx::query("DELETE FROM s3_completed WHERE completed_ns < ?").bind(before_ns).execute(connection).await?;
    Ok(())
}

async fn completed(connection: &mut SqliteConnection, bucket: &str, key: &str, id: &str) -> Result<Option<Completed>> {
    let row = sqlx::query("SELECT * FROM s3_completed WHERE upload_id = ? AND bucket = ? AND key = ?")
        .bind(id)
        .bind(bucket)
        .bind(key)
        .fetch_optional(connection)
        .await?;
    row.map(|row| {
        Ok(Completed {
            bucket: row.try_get("bucket")?,
            key: row.try_get("key")?,
            etag: row.try_get("etag")?,
            checksum: serde_json::from_str(row.try_get("checksums")?)?,
        })
    })
    .transpose()
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
fn joined_etag(parts: &[ClaimedPart]) -> String {
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
    use crate::s3::objects::Description;
    use crate::s3::store::StoreError;
    use crate::s3::testing::{ACCOUNT, received, store_with};

    fn part(number: i32, size: u64) -> Part {
        let etag = hex::encode(Md5::digest(number.to_be_bytes()));
        Part { number, data: DataId(number.to_string()), size, etag, modified_ns: 0, checksum: None }
    }

    fn claim(part: &Part) -> ClaimedPart {
        ClaimedPart { number: part.number, etag: part.etag.clone(), checksum: None }
    }

    fn wrong(stored: &[Part], claimed: &[ClaimedPart]) -> Option<String> {
        choose(stored, claimed).err().map(|error| error.code().as_str().to_owned())
    }

    #[test]
    fn the_clients_list_is_checked() {
        let (a, b) = (part(1, SMALLEST_PART), part(2, 1));
        let stored = [a.clone(), b.clone()];
        assert_eq!(wrong(&stored, &[claim(&a), claim(&b)]), None);
        assert_eq!(wrong(&stored, &[claim(&b)]), None);
        assert_eq!(wrong(&stored, &[]).as_deref(), Some("MalformedXML"));
        assert_eq!(wrong(&stored, &[claim(&b), claim(&a)]).as_deref(), Some("InvalidPartOrder"));
        assert_eq!(wrong(&stored, &[claim(&a), claim(&a)]).as_deref(), Some("InvalidPartOrder"));
        assert_eq!(wrong(&stored, &[claim(&part(3, 1))]).as_deref(), Some("InvalidPart"));
        let wrong_tag = ClaimedPart { etag: "0".into(), ..claim(&a) };
        assert_eq!(wrong(&stored, &[wrong_tag]).as_deref(), Some("InvalidPart"));
        let small = [part(1, SMALLEST_PART - 1), b.clone()];
        assert_eq!(wrong(&small, &[claim(&small[0]), claim(&b)]).as_deref(), Some("EntityTooSmall"));
    }

    #[test]
    fn the_entity_tag_is_the_digest_of_digests() {
        let parts = [part(1, 1), part(2, 1)];
        let mut both = hex::decode(&parts[0].etag).unwrap();
        both.extend(hex::decode(&parts[1].etag).unwrap());
        assert_eq!(
            joined_etag(&[claim(&parts[0]), claim(&parts[1])]),
            format!("{}-2", hex::encode(Md5::digest(&both)))
        );
    }

    fn code<T: std::fmt::Debug>(result: Result<T>) -> String {
        match result {
            Err(StoreError::Refused(error)) => error.code().as_str().to_owned(),
            other => format!("{other:?}"),
        }
    }

    /// An upload of two parts to the key `k`, and what its client says when it completes it.
    async fn uploaded(store: &Store) -> (String, Claim) {
        let upload = store.create_upload(ACCOUNT, "bucket", "k", Description::default(), None, true).await.unwrap();
        let mut parts = Vec::new();
        for (number, bytes) in [(1, vec![7; SMALLEST_PART as usize]), (2, b"the rest".to_vec())] {
            let part = store.put_part(ACCOUNT, &upload, number, received(store, &bytes)).await.unwrap();
            parts.push(claim(&part));
        }
        (upload.id, Claim { parts, ..Claim::default() })
    }

    #[tokio::test]
    async fn whoever_did_not_hear_of_the_completion_is_told_again() {
        let store = store_with("bucket", &[]).await;
        let (id, claim) = uploaded(&store).await;
        let complete = |claim: &Claim| store.complete_upload(ACCOUNT, "bucket", "k", &id, claim.clone());
        // At the same time, as of a client that has lost patience; and afterwards.
        let (first, second) = futures::join!(complete(&claim), complete(&claim));
        let first = first.unwrap();
        assert_eq!((second.unwrap(), complete(&claim).await.unwrap()), (first.clone(), first.clone()));
        assert_eq!(store.files.count(), 1);
        assert_eq!(store.object(ACCOUNT, "bucket", "k").await.unwrap().etag, first.etag);
        let other = Claim { parts: claim.parts[..1].to_vec(), ..claim.clone() };
        assert_eq!(code(complete(&other).await), "NoSuchUpload");
        assert_eq!(code(store.complete_upload(ACCOUNT, "bucket", "k2", &id, claim.clone()).await), "NoSuchUpload");
        assert_eq!(
            code(store.complete_upload("000000000000", "bucket", "k", &id, claim.clone()).await),
            "AccessDenied"
        );

        let mut transaction = store.db.begin().await.unwrap();
        let all = now_ns() + 1;
        forget_completed(&mut transaction, all).await.unwrap();
        transaction.commit().await.unwrap();
        assert_eq!(code(complete(&claim).await), "NoSuchUpload");
    }

    #[tokio::test]
    async fn a_completion_that_may_not_overwrite_keeps_the_upload() {
        let store = store_with("bucket", &["k".to_owned()]).await;
        let (id, claim) = uploaded(&store).await;
        let conditions = Conditions { if_none_match: Some(s3s::dto::ETagCondition::Any), ..Conditions::default() };
        let refused = Claim { conditions, ..claim.clone() };
        let outcome = store.complete_upload(ACCOUNT, "bucket", "k", &id, refused).await;
        assert_eq!(code(outcome), "PreconditionFailed");
        store.complete_upload(ACCOUNT, "bucket", "k", &id, claim).await.unwrap();
    }
}
