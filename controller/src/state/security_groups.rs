//! Security groups: for now each account's default one, which instances are members of.

use sqlx::SqliteConnection;

use super::network;
use crate::error::Result;
use crate::ids::{SecurityGroupId, VpcId};

/// One row of `security_groups`.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct SecurityGroup {
    pub id: SecurityGroupId,
    pub account_id: String,
    pub vpc_id: VpcId,
    pub name: String,
    pub description: String,
}

pub const DEFAULT_NAME: &str = "default";

/// The account's groups. An account that was never seen has none yet: see [`ensure_default`].
pub async fn of_account(connection: &mut SqliteConnection, account: &str) -> Result<Vec<SecurityGroup>> {
    Ok(sqlx::query_as("SELECT * FROM security_groups WHERE account_id = ? ORDER BY name, id")
        .bind(account)
        .fetch_all(connection)
        .await?)
}

/// The account's default group in the default VPC; made when it is first asked for.
pub async fn ensure_default(connection: &mut SqliteConnection, account: &str) -> Result<SecurityGroup> {
    let vpc = network::default_vpc(connection).await?;
    let group = SecurityGroup {
        id: SecurityGroupId::random(),
        account_id: account.to_owned(),
        vpc_id: vpc.id,
        name: DEFAULT_NAME.to_owned(),
        description: "default VPC security group".to_owned(),
    };
    sqlx::query(
        "INSERT INTO security_groups (id, account_id, vpc_id, name, description) VALUES (?, ?, ?, ?, ?) \
         ON CONFLICT DO NOTHING",
    )
    .bind(&group.id)
    .bind(&group.account_id)
    .bind(&group.vpc_id)
    .bind(&group.name)
    .bind(&group.description)
    .execute(&mut *connection)
    .await?;
    Ok(sqlx::query_as("SELECT * FROM security_groups WHERE account_id = ? AND vpc_id = ? AND name = ?")
        .bind(account)
        .bind(&group.vpc_id)
        .bind(DEFAULT_NAME)
        .fetch_one(connection)
        .await?)
}
