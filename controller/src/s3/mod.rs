//! The object store: S3's interface over plain files and the state database.
//!
//! A request passes through, in this order: [`gate`] (what the protocol library leaves to us:
//! signed headers, bodies, Signature Version 2), the library `s3s` (protocol and signature),
//! [`service`] (each operation, in S3's terms), and [`store`] (files and rows, in ours). Bytes are
//! taken in by [`receive`] and lie in [`files`].
//!
//! What may not happen here: an object that is half of one and half of another, a row whose file is
//! not durable, bytes that were not compared with the checksum that came with them.

pub mod buckets;
pub mod checksum;
pub mod conditions;
pub mod files;
pub mod gate;
pub mod listing;
pub mod objects;
pub mod receive;
pub mod service;
pub mod store;
pub mod uploads;

pub use crate::clock::now as now_ns;

/// An error with a code of S3's that the protocol library does not list.
pub(crate) fn error_with_code(
    code: &'static str,
    status: http::StatusCode,
    message: impl Into<String>,
) -> s3s::S3Error {
    let mut error = s3s::S3Error::with_message(s3s::S3ErrorCode::Custom(code.into()), message.into());
    error.set_status_code(status);
    error
}

#[cfg(test)]
pub(crate) mod testing {
    //! A state database and a store in a folder that goes with them.

    use std::ops::Deref;

    use super::objects::{Description, Object};
    use super::store::Store;
    use crate::state::Database;

    /// Something and the temporary folder that it lives in.
    pub struct Held<T> {
        value: T,
        _folder: tempfile::TempDir,
    }

    impl<T> Deref for Held<T> {
        type Target = T;
        fn deref(&self) -> &T {
            &self.value
        }
    }

    pub async fn database() -> Held<Database> {
        let folder = tempfile::tempdir().unwrap();
        Held { value: Database::open(folder.path()).await.unwrap(), _folder: folder }
    }

    pub const ACCOUNT: &str = "123456789012";

    /// A store with one bucket and an empty object under each key.
    pub async fn store_with(bucket: &str, keys: &[String]) -> Held<Store> {
        let folder = tempfile::tempdir().unwrap();
        let database = Database::open(folder.path()).await.unwrap();
        let store = Store::open(folder.path(), database).await.unwrap();
        let mut transaction = store.db.begin().await.unwrap();
        sqlx::query("INSERT INTO accounts (id, name, created_ns) VALUES (?, 'test', 0)")
            .bind(ACCOUNT)
            .execute(&mut *transaction)
            .await
            .unwrap();
        transaction.commit().await.unwrap();
        store.create_bucket(ACCOUNT, bucket).await.unwrap();
        for key in keys {
            put_empty(&store, bucket, key).await;
        }
        Held { value: store, _folder: folder }
    }

    pub async fn put_empty(store: &Store, bucket: &str, key: &str) {
        let received = super::receive::Writer::new(&store.files, super::checksum::Algorithm::Crc32)
            .and_then(|writer| writer.end().keep(&store.files))
            .unwrap();
        let object = Object::of(bucket, key, &received, Description::default());
        store.put_object(ACCOUNT, object, Default::default()).await.unwrap();
    }

    /// A bucket with rows and no files behind them: for what reads rows alone.
    pub async fn add_rows(store: &Store, bucket: &str, keys: &[String]) {
        store.create_bucket(ACCOUNT, bucket).await.unwrap();
        let mut transaction = store.db.begin().await.unwrap();
        for key in keys {
            sqlx::query(
                "INSERT INTO s3_objects (bucket, key, data, size, etag, sha256, modified_ns, headers, metadata, checksums, parts) \
                 VALUES (?, ?, ?, 0, '', '', 0, '{}', '{}', 'null', '[]')",
            )
            .bind(bucket)
            .bind(key)
            .bind(uuid::Uuid::new_v4().to_string())
            .execute(&mut *transaction)
            .await
            .unwrap();
        }
        transaction.commit().await.unwrap();
    }
}
