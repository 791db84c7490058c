//! Buckets: their rows, and who may use them.
//!
//! A bucket belongs to one account and only that account may use it; other accounts are denied
//! whatever they ask of it. Names are shared by the whole cloud, as S3's are by the whole world.

use s3s::s3_error;
use sqlx::{Row as _, SqliteConnection};

use super::now_ns;
use super::store::{Result, Store};

/// Buckets that one account may have (S3's own default quota was 100 for long).
const LIMIT: i64 = 1000;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    pub name: String,
    /// Account number.
    pub owner: String,
    pub created_ns: i64,
}

/// The bucket, if `account` may use it.
pub async fn open(connection: &mut SqliteConnection, account: &str, name: &str) -> Result<Bucket> {
    let bucket =
        find(connection, name).await?.ok_or_else(|| s3_error!(NoSuchBucket, "The bucket {name:?} does not exist."))?;
    if bucket.owner != account {
        return Err(s3_error!(AccessDenied, "The bucket {name:?} belongs to another account.").into());
    }
    Ok(bucket)
}

async fn find(connection: &mut SqliteConnection, name: &str) -> Result<Option<Bucket>> {
    let row = sqlx::query("SELECT name, owner, created_ns FROM s3_buckets WHERE name = ?")
        .bind(name)
        .fetch_optional(connection)
        .await?;
    Ok(row.map(|row| read(&row)).transpose()?)
}

fn read(row: &sqlx::sqlite::SqliteRow) -> std::result::Result<Bucket, sqlx::Error> {
    Ok(Bucket { name: row.try_get("name")?, owner: row.try_get("owner")?, created_ns: row.try_get("created_ns")? })
}

impl Store {
    /// The bucket, if `account` may use it.
    pub async fn bucket(&self, account: &str, name: &str) -> Result<Bucket> {
        open(&mut *self.db.pool().acquire().await?, account, name).await
    }

    pub async fn create_bucket(&self, account: &str, name: &str) -> Result<()> {
        let mut transaction = self.db.begin().await?;
        if let Some(bucket) = find(&mut transaction, name).await? {
            return Err(if bucket.owner == account {
                s3_error!(BucketAlreadyOwnedByYou, "You have the bucket {name:?} already.").into()
            } else {
                s3_error!(
                    BucketAlreadyExists,
                    "The bucket name {name:?} is taken by another account; choose another name."
                )
                .into()
            });
        }
        let row = sqlx::query("SELECT count(*) AS n FROM s3_buckets WHERE owner = ?")
            .bind(account)
            .fetch_one(&mut *transaction)
            .await?;
        if row.try_get::<i64, _>("n")? >= LIMIT {
            return Err(s3_error!(TooManyBuckets, "You have {LIMIT} buckets, which is the limit.").into());
        }
        sqlx::query("INSERT INTO s3_buckets (name, owner, created_ns) VALUES (?, ?, ?)")
            .bind(name)
            .bind(account)
            .bind(now_ns())
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(())
    }

    /// Removes an empty bucket. Uploads under way count as content: their parts hold bytes.
    pub async fn delete_bucket(&self, account: &str, name: &str) -> Result<()> {
        let mut transaction = self.db.begin().await?;
        open(&mut transaction, account, name).await?;
        for (table, what) in
            [("s3_objects", "objects"), ("s3_uploads", "multipart uploads that are neither completed nor aborted")]
        {
            let query = format!("SELECT 1 FROM {table} WHERE bucket = ? LIMIT 1");
            if sqlx::query(sqlx::AssertSqlSafe(query)).bind(name).fetch_optional(&mut *transaction).await?.is_some() {
                return Err(s3_error!(BucketNotEmpty, "The bucket {name:?} still has {what}.").into());
            }
        }
        sqlx::query("DELETE FROM s3_buckets WHERE name = ?").bind(name).execute(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(())
    }

    /// The account's buckets, by name.
    pub async fn buckets(&self, account: &str) -> Result<Vec<Bucket>> {
        let rows = sqlx::query("SELECT name, owner, created_ns FROM s3_buckets WHERE owner = ? ORDER BY name")
            .bind(account)
            .fetch_all(self.db.pool())
            .await?;
        rows.iter().map(|row| Ok(read(row)?)).collect()
    }
}
