//! VPCs and their subnets as the database keeps them, the default ones, and which private addresses are free.
//!
//! The cloud has one default VPC, which every account sees as its own default one; in it a zone has one default subnet,
//! made when the zone's first node is added. Others belong to an account (`vpcs.rs`). As in EC2 the first four addresses of a subnet and its
//! last are reserved: network, gateway (+1), name server (+2), future use (+3), broadcast.

use std::collections::HashSet;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use sqlx::SqliteConnection;

use super::Database;
use crate::error::{Error, Result};
use crate::ids::{SubnetId, VpcId};

/// EC2's default subnets are /20: sixteen of them in the default VPC.
const SUBNET_PREFIX: u8 = 20;
/// Addresses at the start of a subnet that no instance gets.
const RESERVED: u32 = 4;

#[derive(Debug, Clone, sqlx::FromRow)]
pub struct Vpc {
    pub id: VpcId,
    /// Whose it is; `None`: the cloud's default one.
    pub account_id: Option<String>,
    /// EC2's attribute `enableDnsHostnames`.
    pub dns_hostnames: bool,
    pub(super) cidr: String,
}

#[derive(Debug, Clone, sqlx::FromRow)]
pub struct Subnet {
    pub id: SubnetId,
    pub vpc_id: VpcId,
    pub zone: String,
    /// Of its zone, in the default VPC.
    pub is_default: bool,
    pub(super) cidr: String,
}

impl Vpc {
    pub fn is_default(&self) -> bool {
        self.account_id.is_none()
    }

    pub fn cidr(&self) -> Result<Ipv4Net> {
        network(&self.cidr)
    }
}

impl Subnet {
    pub fn cidr(&self) -> Result<Ipv4Net> {
        network(&self.cidr)
    }

    /// The gateway's address: the network's plus one.
    pub fn gateway(&self) -> Result<Ipv4Addr> {
        Ok(Ipv4Addr::from(u32::from(self.cidr()?.network()) + 1))
    }

    /// Addresses that instances may have, in order.
    pub fn instance_addresses(&self) -> Result<impl Iterator<Item = Ipv4Addr> + use<>> {
        let cidr = self.cidr()?;
        let (first, last) = (u32::from(cidr.network()), u32::from(cidr.broadcast()));
        Ok((first + RESERVED..last).map(Ipv4Addr::from))
    }
}

fn network(text: &str) -> Result<Ipv4Net> {
    text.parse().map_err(|_| Error::Corrupt(format!("the network '{text}'")))
}

/// Makes the default VPC when the state is new. An existing one keeps its network.
pub async fn ensure_default_vpc(db: &Database, cidr: Ipv4Net) -> Result<()> {
    if cidr.prefix_len() > SUBNET_PREFIX || cidr.trunc() != cidr {
        return Err(Error::Config(format!(
            "the VPC's network {cidr} must be a network address with a prefix of at most /{SUBNET_PREFIX}: try 172.31.0.0/16"
        )));
    }
    let mut tx = db.begin().await?;
    if default_vpc(&mut tx).await.is_err() {
        sqlx::query("INSERT INTO vpcs (id, cidr, dns_hostnames) VALUES (?, ?, 1)")
            .bind(VpcId::random())
            .bind(cidr.to_string())
            .execute(&mut *tx)
            .await?;
    }
    Ok(tx.commit().await?)
}

pub async fn default_vpc(connection: &mut SqliteConnection) -> Result<Vpc> {
    Ok(sqlx::query_as("SELECT * FROM vpcs WHERE account_id IS NULL").fetch_one(connection).await?)
}

/// The zones that nodes were added to, by name.
pub async fn zones(connection: &mut SqliteConnection) -> Result<Vec<String>> {
    Ok(sqlx::query_scalar("SELECT name FROM zones ORDER BY name").fetch_all(connection).await?)
}

/// The zone's default subnet; made when the zone is new.
pub async fn ensure_zone(connection: &mut SqliteConnection, zone: &str) -> Result<Subnet> {
    let mut all = subnets(connection).await?;
    all.retain(|subnet| subnet.is_default);
    if let Some(subnet) = all.iter().find(|subnet| subnet.zone == zone) {
        return Ok(subnet.clone());
    }
    let vpc = default_vpc(connection).await?;
    let taken: HashSet<Ipv4Net> = all.iter().map(Subnet::cidr).collect::<Result<_>>()?;
    let cidr = vpc
        .cidr()?
        .subnets(SUBNET_PREFIX)
        .ok()
        .and_then(|mut subnets| subnets.find(|candidate| !taken.contains(candidate)))
        .ok_or_else(|| Error::Node(format!("no room for another zone's subnet in the VPC's network {}", vpc.cidr)))?;
    let subnet = Subnet {
        id: SubnetId::random(),
        vpc_id: vpc.id,
        zone: zone.to_owned(),
        is_default: true,
        cidr: cidr.to_string(),
    };
    sqlx::query("INSERT INTO zones (name) VALUES (?)").bind(zone).execute(&mut *connection).await?;
    insert_subnet(connection, &subnet).await?;
    Ok(subnet)
}

/// Every subnet of the cloud, by zone.
pub async fn subnets(connection: &mut SqliteConnection) -> Result<Vec<Subnet>> {
    Ok(sqlx::query_as("SELECT * FROM subnets WHERE deleted_ns IS NULL ORDER BY zone, id").fetch_all(connection).await?)
}

/// With those that were deleted while a terminated instance is shown that was in them.
pub async fn subnets_of_all_times(connection: &mut SqliteConnection) -> Result<Vec<Subnet>> {
    Ok(sqlx::query_as("SELECT * FROM subnets ORDER BY zone, id").fetch_all(connection).await?)
}

pub(super) async fn insert_subnet(connection: &mut SqliteConnection, subnet: &Subnet) -> Result<()> {
    sqlx::query("INSERT INTO subnets (id, vpc_id, zone, cidr, is_default) VALUES (?, ?, ?, ?, ?)")
        .bind(&subnet.id)
        .bind(&subnet.vpc_id)
        .bind(&subnet.zone)
        .bind(&subnet.cidr)
        .bind(subnet.is_default)
        .execute(connection)
        .await?;
    Ok(())
}

/// The private addresses that instances hold in a subnet.
pub async fn addresses_in_use(connection: &mut SqliteConnection, subnet: &SubnetId) -> Result<HashSet<Ipv4Addr>> {
    let rows: Vec<(String,)> = sqlx::query_as(
        "SELECT private_ip FROM instances WHERE subnet_id = ?1 AND state <> 'terminated' \
         UNION ALL SELECT secondary.value FROM instances, json_each(instances.secondary_ips) AS secondary \
         WHERE subnet_id = ?1 AND state <> 'terminated'",
    )
    .bind(subnet)
    .fetch_all(connection)
    .await?;
    rows.into_iter()
        .map(|(ip,)| ip.parse().map_err(|_| Error::Corrupt(format!("the private address '{ip}'"))))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_zone_gets_a_subnet_of_its_own_once() {
        let folder = tempfile::tempdir().unwrap();
        let db = Database::open(folder.path()).await.unwrap();
        ensure_default_vpc(&db, "172.31.0.0/16".parse().unwrap()).await.unwrap();
        let mut tx = db.begin().await.unwrap();
        let a = ensure_zone(&mut tx, "mallee-1a").await.unwrap();
        let b = ensure_zone(&mut tx, "mallee-1b").await.unwrap();
        assert_eq!(ensure_zone(&mut tx, "mallee-1a").await.unwrap().id, a.id);
        assert_eq!(a.cidr, "172.31.0.0/20");
        assert_eq!(b.cidr, "172.31.16.0/20");
        assert_eq!(b.gateway().unwrap(), Ipv4Addr::new(172, 31, 16, 1));
        let mut addresses = b.instance_addresses().unwrap();
        assert_eq!(addresses.next(), Some(Ipv4Addr::new(172, 31, 16, 4)));
        assert_eq!(addresses.last(), Some(Ipv4Addr::new(172, 31, 31, 254)));
    }
}
