//! Elastic IPs: who holds which, and for which instance each stands.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use sqlx::SqliteConnection;

use crate::clock;
use crate::error::{Error, Result};
use crate::ids::{AllocationId, AssociationId, InstanceId};

/// One row of `addresses`.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct Address {
    pub allocation_id: AllocationId,
    pub account_id: String,
    pub public_ip: String,
    pub association_id: Option<AssociationId>,
    pub instance_id: Option<InstanceId>,
    pub allocated_ns: i64,
}

/// The account's addresses, oldest first.
pub async fn of_account(connection: &mut SqliteConnection, account: &str) -> Result<Vec<Address>> {
    Ok(sqlx::query_as("SELECT * FROM addresses WHERE account_id = ? ORDER BY allocation_id")
        .bind(account)
        .fetch_all(connection)
        .await?)
}

/// Every address that somebody holds.
pub async fn held(connection: &mut SqliteConnection) -> Result<Vec<Ipv4Addr>> {
    let rows: Vec<(String,)> = sqlx::query_as("SELECT public_ip FROM addresses").fetch_all(connection).await?;
    rows.into_iter().map(|(ip,)| ip.parse().map_err(|_| Error::Corrupt(format!("the public address '{ip}'")))).collect()
}

/// The public addresses of a node's instances, by instance.
pub async fn on_node(connection: &mut SqliteConnection, node: &str) -> Result<HashMap<InstanceId, String>> {
    let rows: Vec<(InstanceId, String)> = sqlx::query_as(
        "SELECT a.instance_id, a.public_ip FROM addresses a JOIN instances i ON i.id = a.instance_id WHERE i.node = ?",
    )
    .bind(node)
    .fetch_all(connection)
    .await?;
    Ok(rows.into_iter().collect())
}

pub async fn insert(connection: &mut SqliteConnection, address: &Address) -> Result<()> {
    sqlx::query("INSERT INTO addresses (allocation_id, account_id, public_ip, allocated_ns) VALUES (?, ?, ?, ?)")
        .bind(&address.allocation_id)
        .bind(&address.account_id)
        .bind(&address.public_ip)
        .bind(clock::now())
        .execute(connection)
        .await?;
    Ok(())
}

pub async fn delete(connection: &mut SqliteConnection, id: &AllocationId) -> Result<()> {
    sqlx::query("DELETE FROM addresses WHERE allocation_id = ?").bind(id).execute(connection).await?;
    Ok(())
}

/// The address stands for the instance from now on. Whatever stood for the instance, and whatever the
/// address stood for, ends: an instance has one elastic IP at a time.
pub async fn associate(
    connection: &mut SqliteConnection,
    id: &AllocationId,
    instance: &InstanceId,
) -> Result<AssociationId> {
    release_instance(connection, instance).await?;
    let association = AssociationId::random();
    sqlx::query("UPDATE addresses SET association_id = ?, instance_id = ? WHERE allocation_id = ?")
        .bind(&association)
        .bind(instance)
        .bind(id)
        .execute(connection)
        .await?;
    Ok(association)
}

pub async fn disassociate(connection: &mut SqliteConnection, id: &AllocationId) -> Result<()> {
    sqlx::query("UPDATE addresses SET association_id = NULL, instance_id = NULL WHERE allocation_id = ?")
        .bind(id)
        .execute(connection)
        .await?;
    Ok(())
}

/// The instance has no elastic IP any more; its holder keeps the address.
pub async fn release_instance(connection: &mut SqliteConnection, instance: &InstanceId) -> Result<()> {
    sqlx::query("UPDATE addresses SET association_id = NULL, instance_id = NULL WHERE instance_id = ?")
        .bind(instance)
        .execute(connection)
        .await?;
    Ok(())
}
