//! Client tokens: a call that is sent twice is carried out once.
//!
//! The token is written in the transaction of the call itself, so there is no moment at which the
//! call is done and its token is not known.

use sqlx::SqliteConnection;

use crate::clock;
use crate::error::Result;

/// What an earlier call with the token was and made.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct Earlier {
    /// SHA-256 of the call's other parameters.
    pub fingerprint: String,
    pub resource: String,
}

pub async fn find(
    connection: &mut SqliteConnection,
    account: &str,
    operation: &str,
    token: &str,
) -> Result<Option<Earlier>> {
    Ok(sqlx::query_as(
        "SELECT fingerprint, resource FROM client_tokens WHERE account_id = ? AND operation = ? AND token = ?",
    )
    .bind(account)
    .bind(operation)
    .bind(token)
    .fetch_optional(connection)
    .await?)
}

pub async fn insert(
    connection: &mut SqliteConnection,
    account: &str,
    operation: &str,
    token: &str,
    call: &Earlier,
) -> Result<()> {
    sqlx::query(
        "INSERT INTO client_tokens (account_id, operation, token, fingerprint, resource, created_ns) \
         VALUES (?, ?, ?, ?, ?, ?)",
    )
    .bind(account)
    .bind(operation)
    .bind(token)
    .bind(&call.fingerprint)
    .bind(&call.resource)
    .bind(clock::now())
    .execute(connection)
    .await?;
    Ok(())
}

/// Forgets tokens of before `before` whose instances or prefix lists are gone: a token lives as long as
/// what it made, and a day at least.
pub async fn forget_old(connection: &mut SqliteConnection, before: i64) -> Result<()> {
    sqlx::query(
        "DELETE FROM client_tokens WHERE created_ns < ? \
         AND resource NOT IN (SELECT reservation_id FROM instances) \
         AND resource NOT IN (SELECT id FROM prefix_lists)",
    )
    .bind(before)
    .execute(connection)
    .await?;
    Ok(())
}
