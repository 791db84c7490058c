//! Elastic IPs: who holds which, and for which of an instance's private addresses each stands.

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
    /// One of the instance's.
    pub private_ip: Option<String>,
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

/// The elastic IPs of a node's instances, by instance.
pub async fn on_node(connection: &mut SqliteConnection, node: &str) -> Result<HashMap<InstanceId, Vec<Address>>> {
    let rows: Vec<Address> = sqlx::query_as(
        "SELECT a.* FROM addresses a JOIN instances i ON i.id = a.instance_id WHERE i.node = ? ORDER BY a.public_ip",
    )
    .bind(node)
    .fetch_all(connection)
    .await?;
    let mut by_instance: HashMap<InstanceId, Vec<Address>> = HashMap::new();
    for row in rows {
        if let Some(instance) = &row.instance_id {
            by_instance.entry(instance.clone()).or_default().push(row);
        }
    }
    Ok(by_instance)
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

/// The address stands for the instance's private one from now on. Whatever stood for that one, and whatever the
/// address stood for, ends: a private address has one elastic IP at a time.
pub async fn associate(
    connection: &mut SqliteConnection,
    id: &AllocationId,
    instance: &InstanceId,
    private_ip: Ipv4Addr,
) -> Result<AssociationId> {
    release_private(connection, instance, private_ip).await?;
    let association = AssociationId::random();
    sqlx::query("UPDATE addresses SET association_id = ?, instance_id = ?, private_ip = ? WHERE allocation_id = ?")
        .bind(&association)
        .bind(instance)
        .bind(private_ip.to_string())
        .bind(id)
        .execute(connection)
        .await?;
    Ok(association)
}

pub async fn disassociate(connection: &mut SqliteConnection, id: &AllocationId) -> Result<()> {
    sqlx::query(
        "UPDATE addresses SET association_id = NULL, instance_id = NULL, private_ip = NULL WHERE allocation_id = ?",
    )
    .bind(id)
    .execute(connection)
    .await?;
    Ok(())
}

/// Nothing stands for the private address any more; who held what did keeps it.
pub async fn release_private(
    connection: &mut SqliteConnection,
    instance: &InstanceId,
    private_ip: Ipv4Addr,
) -> Result<()> {
    sqlx::query(
        "UPDATE addresses SET association_id = NULL, instance_id = NULL, private_ip = NULL \
         WHERE instance_id = ? AND private_ip = ?",
    )
    .bind(instance)
    .bind(private_ip.to_string())
    .execute(connection)
    .await?;
    Ok(())
}

/// The private address is another instance's from now on, and what stands for it goes with it.
pub async fn follow(
    connection: &mut SqliteConnection,
    old: &InstanceId,
    private_ip: Ipv4Addr,
    new: &InstanceId,
) -> Result<()> {
    sqlx::query("UPDATE addresses SET instance_id = ? WHERE instance_id = ? AND private_ip = ?")
        .bind(new)
        .bind(old)
        .bind(private_ip.to_string())
        .execute(connection)
        .await?;
    Ok(())
}

/// The instance has no elastic IP any more; its holder keeps the address.
pub async fn release_instance(connection: &mut SqliteConnection, instance: &InstanceId) -> Result<()> {
    sqlx::query(
        "UPDATE addresses SET association_id = NULL, instance_id = NULL, private_ip = NULL WHERE instance_id = ?",
    )
    .bind(instance)
    .execute(connection)
    .await?;
    Ok(())
}
