//! Public halves of key pairs. The private half of a pair made here is never kept.

use sqlx::SqliteConnection;

use crate::error::Result;
use crate::ids::KeyPairId;

/// One row of `key_pairs`.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct KeyPair {
    pub id: KeyPairId,
    pub account_id: String,
    pub name: String,
    pub key_type: String,
    /// OpenSSH's one-line form.
    pub public_key: String,
    pub fingerprint: String,
    pub created_ns: i64,
}

pub async fn of_account(connection: &mut SqliteConnection, account: &str) -> Result<Vec<KeyPair>> {
    Ok(sqlx::query_as("SELECT * FROM key_pairs WHERE account_id = ? ORDER BY name")
        .bind(account)
        .fetch_all(connection)
        .await?)
}

pub async fn by_name(connection: &mut SqliteConnection, account: &str, name: &str) -> Result<Option<KeyPair>> {
    Ok(sqlx::query_as("SELECT * FROM key_pairs WHERE account_id = ? AND name = ?")
        .bind(account)
        .bind(name)
        .fetch_optional(connection)
        .await?)
}

pub async fn insert(connection: &mut SqliteConnection, pair: &KeyPair) -> Result<()> {
    sqlx::query(
        "INSERT INTO key_pairs (id, account_id, name, key_type, public_key, fingerprint, created_ns) \
         VALUES (?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(&pair.id)
    .bind(&pair.account_id)
    .bind(&pair.name)
    .bind(&pair.key_type)
    .bind(&pair.public_key)
    .bind(&pair.fingerprint)
    .bind(pair.created_ns)
    .execute(connection)
    .await?;
    Ok(())
}

pub async fn delete(connection: &mut SqliteConnection, id: &KeyPairId) -> Result<()> {
    sqlx::query("DELETE FROM key_pairs WHERE id = ?").bind(id).execute(connection).await?;
    Ok(())
}
