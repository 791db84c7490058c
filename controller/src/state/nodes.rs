//! Nodes as the database keeps them: where they are, what they said of themselves, and the number of
//! their desired state.
//!
//! A removed node keeps its row until no terminated instance is shown any more that was on it ([`forget_removed`]); to everybody it is gone at
//! once.

use sqlx::SqliteConnection;

use super::network;
use crate::clock;
use crate::error::{Error, Result};
use crate::nodes::Facts;

/// One row of `nodes`.
#[derive(Debug, Clone)]
pub struct Node {
    pub name: String,
    pub zone: String,
    pub generation: i64,
    /// `None`: the node never attended.
    pub facts: Option<Facts>,
    pub last_seen_ns: Option<i64>,
}

#[derive(sqlx::FromRow)]
struct Row {
    name: String,
    zone: String,
    generation: i64,
    facts: Option<String>,
    last_seen_ns: Option<i64>,
}

impl TryFrom<Row> for Node {
    type Error = Error;
    fn try_from(row: Row) -> Result<Node> {
        let facts = row
            .facts
            .map(|json| serde_json::from_str(&json).map_err(|e| Error::Corrupt(format!("facts of {}: {e}", row.name))))
            .transpose()?;
        Ok(Node { name: row.name, zone: row.zone, generation: row.generation, facts, last_seen_ns: row.last_seen_ns })
    }
}

/// Adds a node; its zone and the zone's default subnet, which is returned, are there from now on. A node that is there keeps its
/// instances; it may not change its zone while it has any.
pub async fn add(connection: &mut SqliteConnection, name: &str, zone: &str) -> Result<network::Subnet> {
    let home = network::ensure_zone(connection, zone).await?;
    if let Some(node) = find(connection, name).await?
        && node.zone != zone
    {
        let (instances,): (i64,) = sqlx::query_as("SELECT count(*) FROM instances WHERE node = ?")
            .bind(name)
            .fetch_one(&mut *connection)
            .await?;
        if instances > 0 {
            return Err(Error::Node(format!(
                "node {name} has {instances} instances in zone {}: terminate them before it moves to {zone}",
                node.zone
            )));
        }
    }
    sqlx::query(
        "INSERT INTO nodes (name, zone, added_ns) VALUES (?, ?, ?) \
         ON CONFLICT (name) DO UPDATE SET zone = excluded.zone, removed_ns = NULL",
    )
    .bind(name)
    .bind(zone)
    .bind(clock::now())
    .execute(connection)
    .await?;
    Ok(home)
}

/// By name.
pub async fn all(connection: &mut SqliteConnection) -> Result<Vec<Node>> {
    let rows: Vec<Row> = sqlx::query_as(
        "SELECT name, zone, generation, facts, last_seen_ns FROM nodes WHERE removed_ns IS NULL ORDER BY name",
    )
    .fetch_all(connection)
    .await?;
    rows.into_iter().map(Node::try_from).collect()
}

pub async fn find(connection: &mut SqliteConnection, name: &str) -> Result<Option<Node>> {
    let row: Option<Row> = sqlx::query_as(
        "SELECT name, zone, generation, facts, last_seen_ns FROM nodes WHERE name = ? AND removed_ns IS NULL",
    )
    .bind(name)
    .fetch_optional(connection)
    .await?;
    row.map(Node::try_from).transpose()
}

/// Makes the certificate of this serial the node's only one.
pub async fn set_credentials(connection: &mut SqliteConnection, name: &str, zone: &str, serial: &str) -> Result<()> {
    sqlx::query("INSERT OR REPLACE INTO node_credentials (name, zone, serial, created_ns) VALUES (?, ?, ?, ?)")
        .bind(name)
        .bind(zone)
        .bind(serial)
        .bind(clock::now())
        .execute(connection)
        .await?;
    Ok(())
}

/// Removes a node on which nothing is, with its credentials and what it said of itself: another machine may get its name.
pub async fn remove(connection: &mut SqliteConnection, name: &str) -> Result<()> {
    sqlx::query("DELETE FROM node_credentials WHERE name = ?").bind(name).execute(&mut *connection).await?;
    sqlx::query("UPDATE nodes SET removed_ns = ?, facts = NULL, last_seen_ns = NULL WHERE name = ?")
        .bind(clock::now())
        .bind(name)
        .execute(&mut *connection)
        .await?;
    forget_removed(connection).await
}

/// Forgets removed nodes that nothing names any more.
pub async fn forget_removed(connection: &mut SqliteConnection) -> Result<()> {
    sqlx::query("DELETE FROM nodes WHERE removed_ns IS NOT NULL AND name NOT IN (SELECT node FROM instances)")
        .execute(connection)
        .await?;
    Ok(())
}

/// Gives the node's desired state its next number, in the transaction that changes it.
///
/// Numbers are never below the time in milliseconds, so that a node that was joined to a cloud whose
/// state was lost and made anew takes the new cloud's states for newer ones.
pub async fn touch(connection: &mut SqliteConnection, name: &str) -> Result<i64> {
    let (generation,): (i64,) =
        sqlx::query_as("UPDATE nodes SET generation = max(generation + 1, ?) WHERE name = ? RETURNING generation")
            .bind(clock::now() / 1_000_000)
            .bind(name)
            .fetch_one(connection)
            .await?;
    Ok(generation)
}

/// The same for every node but these; their names.
pub async fn touch_others(connection: &mut SqliteConnection, but: &[&str]) -> Result<Vec<String>> {
    let names: Vec<(String,)> =
        sqlx::query_as("SELECT name FROM nodes WHERE removed_ns IS NULL").fetch_all(&mut *connection).await?;
    let others: Vec<String> =
        names.into_iter().map(|(name,)| name).filter(|name| !but.contains(&name.as_str())).collect();
    for name in &others {
        touch(connection, name).await?;
    }
    Ok(others)
}

pub async fn set_facts(connection: &mut SqliteConnection, name: &str, facts: &Facts) -> Result<()> {
    let json = serde_json::to_string(facts).map_err(|e| Error::Corrupt(e.to_string()))?;
    sqlx::query("UPDATE nodes SET facts = ?, last_seen_ns = ? WHERE name = ?")
        .bind(json)
        .bind(clock::now())
        .bind(name)
        .execute(connection)
        .await?;
    Ok(())
}

/// The node's stream was open until now.
pub async fn seen(connection: &mut SqliteConnection, name: &str) -> Result<()> {
    sqlx::query("UPDATE nodes SET last_seen_ns = ? WHERE name = ?")
        .bind(clock::now())
        .bind(name)
        .execute(connection)
        .await?;
    Ok(())
}
