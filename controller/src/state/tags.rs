//! Tags: a key and a value on anything that has an id.

use std::collections::HashMap;

use sqlx::SqliteConnection;

use crate::error::Result;

/// One row of `tags`.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct Tag {
    pub resource_id: String,
    pub resource_type: String,
    pub key: String,
    pub value: String,
}

/// Sets a tag; an older value of the same key is replaced.
pub async fn set(connection: &mut SqliteConnection, account: &str, tag: &Tag) -> Result<()> {
    sqlx::query(
        "INSERT INTO tags (account_id, resource_id, resource_type, key, value) VALUES (?, ?, ?, ?, ?) \
         ON CONFLICT (resource_id, key) DO UPDATE SET value = excluded.value",
    )
    .bind(account)
    .bind(&tag.resource_id)
    .bind(&tag.resource_type)
    .bind(&tag.key)
    .bind(&tag.value)
    .execute(connection)
    .await?;
    Ok(())
}

/// How many tags a resource has.
pub async fn count(connection: &mut SqliteConnection, resource: &str) -> Result<i64> {
    Ok(sqlx::query_scalar("SELECT count(*) FROM tags WHERE resource_id = ?")
        .bind(resource)
        .fetch_one(connection)
        .await?)
}

/// The account's tags, by resource and key.
pub async fn of_account(connection: &mut SqliteConnection, account: &str) -> Result<Vec<Tag>> {
    Ok(sqlx::query_as(
        "SELECT resource_id, resource_type, key, value FROM tags WHERE account_id = ? ORDER BY resource_id, key",
    )
    .bind(account)
    .fetch_all(connection)
    .await?)
}

/// The same by resource.
pub async fn by_resource(connection: &mut SqliteConnection, account: &str) -> Result<HashMap<String, Vec<Tag>>> {
    let mut by_resource: HashMap<String, Vec<Tag>> = HashMap::new();
    for tag in of_account(connection, account).await? {
        by_resource.entry(tag.resource_id.clone()).or_default().push(tag);
    }
    Ok(by_resource)
}

/// Takes one tag off, or only when it has that value.
pub async fn remove(
    connection: &mut SqliteConnection,
    account: &str,
    resource: &str,
    key: &str,
    value: Option<&str>,
) -> Result<()> {
    sqlx::query(
        "DELETE FROM tags WHERE account_id = ?1 AND resource_id = ?2 AND key = ?3 AND value = ifnull(?4, value)",
    )
    .bind(account)
    .bind(resource)
    .bind(key)
    .bind(value)
    .execute(connection)
    .await?;
    Ok(())
}

/// Takes all of a resource's tags off: it is gone, or its owner asked for it.
pub async fn remove_all(connection: &mut SqliteConnection, account: &str, resource: &str) -> Result<()> {
    sqlx::query("DELETE FROM tags WHERE account_id = ? AND resource_id = ?")
        .bind(account)
        .bind(resource)
        .execute(connection)
        .await?;
    Ok(())
}
