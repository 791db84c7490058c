//! The numbers of subnets' segments: VLANs' and VXLANs'.

use std::collections::{HashMap, HashSet};
use std::ops::RangeInclusive;

use sqlx::SqliteConnection;

use super::network;
use crate::error::Result;
use crate::ids::SubnetId;

/// Every subnet's number of that kind.
pub async fn numbers(connection: &mut SqliteConnection, kind: &str) -> Result<HashMap<SubnetId, u32>> {
    let rows: Vec<(SubnetId, u32)> = sqlx::query_as("SELECT subnet_id, number FROM segments WHERE kind = ?")
        .bind(kind)
        .fetch_all(connection)
        .await?;
    Ok(rows.into_iter().collect())
}

/// Gives a number out of `range` to each subnet that has none of that kind, the lowest free one, for as long as there are any. Every
/// subnet's number afterwards.
pub async fn allocate(
    connection: &mut SqliteConnection,
    kind: &str,
    range: RangeInclusive<u32>,
) -> Result<HashMap<SubnetId, u32>> {
    let mut numbers = numbers(connection, kind).await?;
    let taken: HashSet<u32> = numbers.values().copied().collect();
    let mut free = range.filter(|number| !taken.contains(number));
    for subnet in network::subnets(connection).await? {
        if numbers.contains_key(&subnet.id) {
            continue;
        }
        let Some(number) = free.next() else { break };
        sqlx::query("INSERT INTO segments (subnet_id, kind, number) VALUES (?, ?, ?)")
            .bind(&subnet.id)
            .bind(kind)
            .bind(number)
            .execute(&mut *connection)
            .await?;
        numbers.insert(subnet.id, number);
    }
    Ok(numbers)
}
