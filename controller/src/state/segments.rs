//! The numbers of subnets' segments: VLANs' and VXLANs'.

use std::collections::{HashMap, HashSet};
use std::ops::RangeInclusive;

use sqlx::SqliteConnection;

use super::network;
use crate::error::{Error, Result};
use crate::ids::SubnetId;

/// Every subnet's number of that kind.
pub async fn numbers(connection: &mut SqliteConnection, kind: &str) -> Result<HashMap<SubnetId, u32>> {
    let rows: Vec<(SubnetId, u32)> = sqlx::query_as("SELECT subnet_id, number FROM segments WHERE kind = ?")
        .bind(kind)
        .fetch_all(connection)
        .await?;
    Ok(rows.into_iter().collect())
}

/// Gives a number out of `range` to each subnet that has none of that kind; the lowest free one.
pub async fn allocate(connection: &mut SqliteConnection, kind: &str, range: RangeInclusive<u32>) -> Result<()> {
    let numbers = numbers(connection, kind).await?;
    let mut taken: HashSet<u32> = numbers.values().copied().collect();
    for subnet in network::subnets(connection).await? {
        if numbers.contains_key(&subnet.id) {
            continue;
        }
        let number = range.clone().find(|number| !taken.contains(number)).ok_or_else(|| {
            Error::Node(format!(
                "no {kind} number of {}-{} is left for {}: start the controller with a larger range (--segments)",
                range.start(),
                range.end(),
                subnet.id
            ))
        })?;
        taken.insert(number);
        sqlx::query("INSERT INTO segments (subnet_id, kind, number) VALUES (?, ?, ?)")
            .bind(&subnet.id)
            .bind(kind)
            .bind(number)
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}
