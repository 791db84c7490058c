//! Instances of all accounts, as the operator sees and ends them.

use bytes::Bytes;
use sqlx::Row as _;

use super::api::{EndedInstances, InstanceSummary};
use crate::Cloud;
use crate::auth::Caller;

/// Instances that are not terminated, oldest first.
pub async fn list(cloud: &Cloud) -> Result<Vec<InstanceSummary>, crate::Error> {
    let rows = sqlx::query(
        "SELECT i.id, i.account_id, i.node, i.instance_type, i.state, i.private_ip, a.public_ip \
         FROM instances i LEFT JOIN addresses a ON a.instance_id = i.id \
         WHERE i.state <> 'terminated' ORDER BY i.launched_ns, i.id",
    )
    .fetch_all(cloud.db.pool())
    .await?;
    rows.iter()
        .map(|row| {
            Ok(InstanceSummary {
                id: row.try_get("id")?,
                account_id: row.try_get("account_id")?,
                node: row.try_get("node")?,
                instance_type: row.try_get("instance_type")?,
                state: row.try_get("state")?,
                private_ip: row.try_get("private_ip")?,
                public_ip: row.try_get::<Option<String>, _>("public_ip")?.unwrap_or_default(),
            })
        })
        .collect()
}

/// Terminates every instance, through the same call that its owner would make.
pub async fn end_all(cloud: &Cloud) -> Result<EndedInstances, crate::Error> {
    let mut ended = EndedInstances::default();
    for instance in list(cloud).await? {
        if instance.state == "shutting-down" {
            continue;
        }
        let caller = Caller {
            arn: format!("arn:aws:iam::{}:root", instance.account_id),
            account_id: instance.account_id,
            access_key: String::new(),
            request_id: uuid::Uuid::new_v4().to_string(),
        };
        let params = [("Action", "TerminateInstances"), ("Version", "2016-11-15"), ("InstanceId.1", &instance.id)];
        let params = params.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        let reply: http::Response<Bytes> = crate::ec2::handle(cloud, caller, params).await;
        if reply.status().is_success() {
            ended.terminated.push(instance.id);
        } else {
            ended.refused.push(instance.id);
        }
    }
    Ok(ended)
}
