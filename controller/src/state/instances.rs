//! Instances as the database keeps them.

use std::net::Ipv4Addr;

use sqlx::SqliteConnection;

use super::lifecycle::{Change, InstanceState, Life, ShutdownBehavior};
use crate::clock;
use crate::error::{Error, Result};
use crate::ids::{AttachmentId, ImageId, InstanceId, InterfaceId, ReservationId, SecurityGroupId, SubnetId, VolumeId};

/// One row of `instances`; the columns are explained in the migration.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct Instance {
    pub id: InstanceId,
    pub account_id: String,
    pub reservation_id: ReservationId,
    pub launch_index: i32,
    pub client_token: Option<String>,
    pub image_id: ImageId,
    pub instance_type: String,
    pub vcpus: i64,
    pub memory_mib: i64,
    pub root_bytes: i64,
    pub volume_id: VolumeId,
    pub key_name: Option<String>,
    pub public_key: Option<String>,
    pub user_data: Option<Vec<u8>>,
    pub shutdown_behavior: ShutdownBehavior,
    pub node: String,
    pub subnet_id: SubnetId,
    #[sqlx(json)]
    pub security_groups: Vec<SecurityGroupId>,
    #[sqlx(try_from = "String")]
    pub private_ip: PrivateIp,
    pub interface_id: InterfaceId,
    pub attachment_id: AttachmentId,
    pub mac: String,
    pub state: InstanceState,
    pub ran: bool,
    pub reboots: i64,
    pub generation: i64,
    pub state_code: Option<String>,
    pub state_message: Option<String>,
    pub transition: String,
    pub leased: bool,
    pub launched_ns: i64,
    pub changed_ns: i64,
    pub trace: String,
    pub created_trace: String,
    /// What it sends has its own address. A new instance's is on.
    pub source_dest_check: bool,
    /// Further private addresses of its interface.
    #[sqlx(json)]
    pub secondary_ips: Vec<Ipv4Addr>,
}

/// A private address out of the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrivateIp(pub Ipv4Addr);

impl TryFrom<String> for PrivateIp {
    type Error = std::net::AddrParseError;
    fn try_from(text: String) -> std::result::Result<PrivateIp, Self::Error> {
        text.parse().map(PrivateIp)
    }
}

impl Instance {
    pub fn life(&self) -> Life {
        Life { state: self.state, ran: self.ran, behavior: self.shutdown_behavior }
    }

    /// The host's part of its private name.
    pub fn short_name(&self) -> String {
        short_name(self.private_ip.0)
    }

    /// Its private addresses, the primary one first.
    pub fn addresses(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        std::iter::once(self.private_ip.0).chain(self.secondary_ips.iter().copied())
    }
}

/// The host's part of the private name that follows from an address: `ip-172-31-0-4`.
pub fn short_name(address: Ipv4Addr) -> String {
    let [a, b, c, d] = address.octets();
    format!("ip-{a}-{b}-{c}-{d}")
}

/// A MAC of our own: locally administered, unicast, five random bytes.
pub fn random_mac() -> String {
    let tail: [u8; 5] = rand::random();
    let digits: Vec<String> = tail.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("02:{}", digits.join(":"))
}

pub async fn insert(connection: &mut SqliteConnection, instance: &Instance) -> Result<()> {
    let groups = list(&instance.security_groups)?;
    sqlx::query(
        "INSERT INTO instances (id, account_id, reservation_id, launch_index, client_token, image_id, instance_type, \
         vcpus, memory_mib, root_bytes, volume_id, key_name, public_key, user_data, shutdown_behavior, node, subnet_id, \
         security_groups, private_ip, interface_id, attachment_id, mac, state, generation, launched_ns, changed_ns, \
         trace, created_trace, secondary_ips) \
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(&instance.id)
    .bind(&instance.account_id)
    .bind(&instance.reservation_id)
    .bind(instance.launch_index)
    .bind(&instance.client_token)
    .bind(&instance.image_id)
    .bind(&instance.instance_type)
    .bind(instance.vcpus)
    .bind(instance.memory_mib)
    .bind(instance.root_bytes)
    .bind(&instance.volume_id)
    .bind(&instance.key_name)
    .bind(&instance.public_key)
    .bind(&instance.user_data)
    .bind(instance.shutdown_behavior)
    .bind(&instance.node)
    .bind(&instance.subnet_id)
    .bind(groups)
    .bind(instance.private_ip.0.to_string())
    .bind(&instance.interface_id)
    .bind(&instance.attachment_id)
    .bind(&instance.mac)
    .bind(instance.state)
    .bind(instance.generation)
    .bind(instance.launched_ns)
    .bind(instance.changed_ns)
    .bind(&instance.trace)
    .bind(&instance.created_trace)
    .bind(list(&instance.secondary_ips)?)
    .execute(connection)
    .await?;
    Ok(())
}

/// Every instance of an account, by launch or last start, oldest first.
pub async fn of_account(connection: &mut SqliteConnection, account: &str) -> Result<Vec<Instance>> {
    Ok(sqlx::query_as(
        "SELECT * FROM instances WHERE account_id = ? ORDER BY launched_ns, reservation_id, launch_index",
    )
    .bind(account)
    .fetch_all(connection)
    .await?)
}

/// The account's instance of that id.
pub async fn find(connection: &mut SqliteConnection, account: &str, id: &InstanceId) -> Result<Option<Instance>> {
    Ok(sqlx::query_as("SELECT * FROM instances WHERE account_id = ? AND id = ?")
        .bind(account)
        .bind(id)
        .fetch_optional(connection)
        .await?)
}

/// The account's instance that the interface belongs to.
pub async fn by_interface(
    connection: &mut SqliteConnection,
    account: &str,
    id: &InterfaceId,
) -> Result<Option<Instance>> {
    Ok(sqlx::query_as("SELECT * FROM instances WHERE account_id = ? AND interface_id = ? AND state <> 'terminated'")
        .bind(account)
        .bind(id)
        .fetch_optional(connection)
        .await?)
}

/// Whoever holds addresses of the subnet.
pub async fn on_subnet(connection: &mut SqliteConnection, subnet: &SubnetId) -> Result<Vec<Instance>> {
    Ok(sqlx::query_as("SELECT * FROM instances WHERE subnet_id = ? AND state <> 'terminated'")
        .bind(subnet)
        .fetch_all(connection)
        .await?)
}

/// What is or should be on a node, terminated ones left out.
pub async fn on_node(connection: &mut SqliteConnection, node: &str) -> Result<Vec<Instance>> {
    Ok(sqlx::query_as("SELECT * FROM instances WHERE node = ? AND state <> 'terminated' ORDER BY launched_ns, id")
        .bind(node)
        .fetch_all(connection)
        .await?)
}

/// What is or should be on any other node, terminated ones left out.
pub async fn elsewhere(connection: &mut SqliteConnection, node: &str) -> Result<Vec<Instance>> {
    Ok(sqlx::query_as("SELECT * FROM instances WHERE node <> ? AND state <> 'terminated' ORDER BY launched_ns, id")
        .bind(node)
        .fetch_all(connection)
        .await?)
}

/// Writes a step of an instance's life. `generation` is the node's that first carries what the new
/// state wants.
pub async fn apply(connection: &mut SqliteConnection, id: &InstanceId, change: &Change, generation: i64) -> Result<()> {
    let now = clock::now();
    let (code, message) = match &change.reason {
        Some(reason) => (Some(reason.code), Some(reason.message.as_str())),
        None => (None, None),
    };
    let transition = change.reason.as_ref().map(|reason| transition_reason(reason.code, now)).unwrap_or_default();
    // A node's confirmation keeps the reason for which the step was begun.
    let confirms = matches!(change.to, InstanceState::Stopped | InstanceState::Terminated) && change.reason.is_none();
    // What stopped has run, also when it did so between two reports. (Nothing but a node's word makes an instance either.)
    let ran = matches!(change.to, InstanceState::Running | InstanceState::Stopped);
    sqlx::query(
        "UPDATE instances SET state = ?1, generation = ?2, changed_ns = ?3, ran = ran OR ?4, \
         leased = leased AND ?1 = 'running', \
         state_code = CASE WHEN ?5 THEN state_code ELSE ?6 END, \
         state_message = CASE WHEN ?5 THEN state_message ELSE ?7 END, \
         transition = CASE WHEN ?5 THEN transition ELSE ?8 END \
         WHERE id = ?9",
    )
    .bind(change.to)
    .bind(generation)
    .bind(now)
    .bind(ran)
    .bind(confirms)
    .bind(code)
    .bind(message)
    .bind(transition)
    .bind(id)
    .execute(connection)
    .await?;
    Ok(())
}

/// EC2's `StateTransitionReason`, for example `User initiated (2026-11-22 08:00:00 GMT)`.
fn transition_reason(code: &str, now: i64) -> String {
    let who = match code {
        "Client.UserInitiatedShutdown" => "User initiated",
        other => other,
    };
    let date = clock::date(now);
    let (time_h, time_m, time_s) = date.to_hms();
    format!("{who} ({} {time_h:02}:{time_m:02}:{time_s:02} GMT)", date.date())
}

/// A stopped instance is started: what follows is told under the request that asked for it.
pub async fn set_trace(connection: &mut SqliteConnection, id: &InstanceId, trace: &str) -> Result<()> {
    sqlx::query("UPDATE instances SET trace = ?, launched_ns = ? WHERE id = ?")
        .bind(trace)
        .bind(clock::now())
        .bind(id)
        .execute(connection)
        .await?;
    Ok(())
}

pub async fn set_source_dest_check(connection: &mut SqliteConnection, id: &InstanceId, on: bool) -> Result<()> {
    sqlx::query("UPDATE instances SET source_dest_check = ? WHERE id = ?")
        .bind(on)
        .bind(id)
        .execute(connection)
        .await?;
    Ok(())
}

/// As the columns `security_groups` and `secondary_ips` have them.
fn list<T: serde::Serialize>(items: &[T]) -> Result<String> {
    serde_json::to_string(items).map_err(|e| Error::Corrupt(e.to_string()))
}

/// Gives an instance's interface these secondary addresses and no others.
pub async fn set_secondary_ips(connection: &mut SqliteConnection, id: &InstanceId, ips: &[Ipv4Addr]) -> Result<()> {
    sqlx::query("UPDATE instances SET secondary_ips = ? WHERE id = ?")
        .bind(list(ips)?)
        .bind(id)
        .execute(connection)
        .await?;
    Ok(())
}

/// Puts an instance into these security groups and no others.
pub async fn set_groups(connection: &mut SqliteConnection, id: &InstanceId, groups: &[SecurityGroupId]) -> Result<()> {
    sqlx::query("UPDATE instances SET security_groups = ? WHERE id = ?")
        .bind(list(groups)?)
        .bind(id)
        .execute(connection)
        .await?;
    Ok(())
}

pub async fn count_reboot(connection: &mut SqliteConnection, id: &InstanceId, generation: i64) -> Result<()> {
    sqlx::query("UPDATE instances SET reboots = reboots + 1, generation = ? WHERE id = ?")
        .bind(generation)
        .bind(id)
        .execute(connection)
        .await?;
    Ok(())
}

/// The guest has its address.
pub async fn set_leased(connection: &mut SqliteConnection, id: &InstanceId) -> Result<()> {
    sqlx::query("UPDATE instances SET leased = 1 WHERE id = ?").bind(id).execute(connection).await?;
    Ok(())
}

/// Forgets instances that have been terminated since before `before` (EC2 shows them for about an hour), with their root volumes.
pub async fn forget_terminated(connection: &mut SqliteConnection, before: i64) -> Result<u64> {
    sqlx::query(
        "DELETE FROM tags WHERE resource_id IN \
         (SELECT id FROM instances WHERE state = 'terminated' AND changed_ns < ?1 \
          UNION ALL SELECT volume_id FROM instances WHERE state = 'terminated' AND changed_ns < ?1)",
    )
    .bind(before)
    .execute(&mut *connection)
    .await?;
    let gone = sqlx::query("DELETE FROM instances WHERE state = 'terminated' AND changed_ns < ?")
        .bind(before)
        .execute(connection)
        .await?;
    Ok(gone.rows_affected())
}
