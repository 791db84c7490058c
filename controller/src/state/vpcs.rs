//! VPCs that belong to an account, with their subnets: what an account sees, made and deleted.
//!
//! What is deleted keeps its row until no terminated instance is shown any more that was in it ([`forget_deleted`]); to
//! everybody it is gone at once.

use ipnet::Ipv4Net;
use sqlx::SqliteConnection;

use super::network::{self, Subnet, Vpc};
use crate::clock;
use crate::error::Result;
use crate::ids::{SubnetId, VpcId};

/// The VPCs that the account sees: the cloud's default one, and its own.
pub async fn of_account(connection: &mut SqliteConnection, account: &str) -> Result<Vec<Vpc>> {
    Ok(sqlx::query_as(
        "SELECT * FROM vpcs WHERE (account_id IS NULL OR account_id = ?) AND deleted_ns IS NULL ORDER BY id",
    )
    .bind(account)
    .fetch_all(connection)
    .await?)
}

/// Every VPC of the cloud.
pub async fn all(connection: &mut SqliteConnection) -> Result<Vec<Vpc>> {
    Ok(sqlx::query_as("SELECT * FROM vpcs WHERE deleted_ns IS NULL ORDER BY id").fetch_all(connection).await?)
}

/// The subnets of the VPCs that the account sees, by zone.
pub async fn subnets_of_account(connection: &mut SqliteConnection, account: &str) -> Result<Vec<Subnet>> {
    Ok(sqlx::query_as(
        "SELECT subnets.* FROM subnets JOIN vpcs ON vpcs.id = vpc_id \
         WHERE (account_id IS NULL OR account_id = ?) AND subnets.deleted_ns IS NULL ORDER BY zone, subnets.id",
    )
    .bind(account)
    .fetch_all(connection)
    .await?)
}

/// Makes a VPC of the account's own.
pub async fn insert(connection: &mut SqliteConnection, account: &str, cidr: Ipv4Net) -> Result<Vpc> {
    let vpc =
        Vpc { id: VpcId::random(), account_id: Some(account.to_owned()), dns_hostnames: false, cidr: cidr.to_string() };
    sqlx::query("INSERT INTO vpcs (id, cidr, account_id, dns_hostnames) VALUES (?, ?, ?, ?)")
        .bind(&vpc.id)
        .bind(&vpc.cidr)
        .bind(&vpc.account_id)
        .bind(vpc.dns_hostnames)
        .execute(connection)
        .await?;
    Ok(vpc)
}

pub async fn set_dns_hostnames(connection: &mut SqliteConnection, id: &VpcId, on: bool) -> Result<()> {
    sqlx::query("UPDATE vpcs SET dns_hostnames = ? WHERE id = ?").bind(on).bind(id).execute(connection).await?;
    Ok(())
}

/// Deletes a VPC in which nothing is.
pub async fn delete(connection: &mut SqliteConnection, id: &VpcId) -> Result<()> {
    sqlx::query("UPDATE vpcs SET deleted_ns = ? WHERE id = ?")
        .bind(clock::now())
        .bind(id)
        .execute(&mut *connection)
        .await?;
    forget_deleted(connection).await
}

/// Makes a subnet of a VPC, in a zone that there is.
pub async fn insert_subnet(
    connection: &mut SqliteConnection,
    vpc: &VpcId,
    zone: &str,
    cidr: Ipv4Net,
) -> Result<Subnet> {
    let subnet = Subnet {
        id: SubnetId::random(),
        vpc_id: vpc.clone(),
        zone: zone.to_owned(),
        is_default: false,
        cidr: cidr.to_string(),
    };
    network::insert_subnet(connection, &subnet).await?;
    Ok(subnet)
}

/// Deletes a subnet in which nothing is. Its segment's numbers are free for others.
pub async fn delete_subnet(connection: &mut SqliteConnection, id: &SubnetId) -> Result<()> {
    sqlx::query("DELETE FROM segments WHERE subnet_id = ?").bind(id).execute(&mut *connection).await?;
    sqlx::query("UPDATE subnets SET deleted_ns = ? WHERE id = ?")
        .bind(clock::now())
        .bind(id)
        .execute(&mut *connection)
        .await?;
    forget_deleted(connection).await
}

/// Forgets deleted subnets and VPCs that nothing names any more.
pub async fn forget_deleted(connection: &mut SqliteConnection) -> Result<()> {
    sqlx::query("DELETE FROM subnets WHERE deleted_ns IS NOT NULL AND id NOT IN (SELECT subnet_id FROM instances)")
        .execute(&mut *connection)
        .await?;
    sqlx::query("DELETE FROM vpcs WHERE deleted_ns IS NOT NULL AND id NOT IN (SELECT vpc_id FROM subnets)")
        .execute(connection)
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use sqlx::Connection as _;
    use sqlx::migrate::Migrator;

    use super::*;
    use crate::state::Database;

    /// The state of a cloud with one VPC, as it was when a zone was known by its subnet.
    const BEFORE: &str = "INSERT INTO vpcs (id, cidr) VALUES ('vpc-1', '172.31.0.0/16');
        INSERT INTO subnets (id, vpc_id, zone, cidr) VALUES ('subnet-1', 'vpc-1', 'a', '172.31.0.0/20');
        INSERT INTO segments (subnet_id, kind, number) VALUES ('subnet-1', 'vlan', 100);
        INSERT INTO nodes (name, zone, added_ns, generation) VALUES ('n1', 'a', 1, 7);
        INSERT INTO images (id, account_id, name, location, architecture, kernel_sha256, kernel_size, cmdline,
                            runs_on_software_kvm, created_ns) VALUES ('ami-1', '1', 'x', 'x', 'x', 'x', 1, '', 1, 1);
        INSERT INTO instances (id, account_id, reservation_id, launch_index, image_id, instance_type, vcpus, memory_mib,
                               root_bytes, volume_id, shutdown_behavior, node, subnet_id, security_groups, private_ip,
                               interface_id, attachment_id, mac, state, generation, launched_ns, changed_ns, trace,
                               created_trace)
            VALUES ('i-1', '1', 'r-1', 0, 'ami-1', 't3.nano', 1, 512, 0, 'vol-1', 'stop', 'n1', 'subnet-1', '[]',
                    '172.31.0.4', 'eni-1', 'eni-attach-1', '02:00:00:00:00:01', 'running', 7, 1, 1, 't', 't');";

    #[tokio::test]
    async fn a_cloud_of_before_keeps_its_zones_nodes_and_instances() {
        let folder = tempfile::tempdir().unwrap();
        let options = sqlx::sqlite::SqliteConnectOptions::new()
            .filename(folder.path().join("state.db"))
            .create_if_missing(true)
            .foreign_keys(true);
        let mut old = sqlx::SqliteConnection::connect_with(&options).await.unwrap();
        let migrations = sqlx::migrate!("./migrations").iter().filter(|one| one.version < 7).cloned().collect();
        Migrator::with_migrations(migrations).run(&mut old).await.unwrap();
        sqlx::raw_sql(BEFORE).execute(&mut old).await.unwrap();
        old.close().await.unwrap();

        let db = Database::open(folder.path()).await.unwrap();
        let mut tx = db.begin().await.unwrap();
        assert_eq!(network::default_vpc(&mut tx).await.unwrap().id.as_str(), "vpc-1");
        let subnet = network::ensure_zone(&mut tx, "a").await.unwrap();
        assert_eq!((subnet.id.as_str(), subnet.is_default), ("subnet-1", true));
        let node = crate::state::nodes::find(&mut tx, "n1").await.unwrap().unwrap();
        assert_eq!((node.zone.as_str(), node.generation), ("a", 7));
        assert_eq!(crate::state::instances::on_subnet(&mut tx, &subnet.id).await.unwrap().len(), 1);
        assert_eq!(crate::state::segments::numbers(&mut tx, "vlan").await.unwrap()[&subnet.id], 100);
        let broken: Vec<(String,)> =
            sqlx::query_as("SELECT \"table\" FROM pragma_foreign_key_check").fetch_all(&mut *tx).await.unwrap();
        assert_eq!(broken, []);
        // What names a subnet, a zone or a node keeps it from going, as before.
        for statement in ["DELETE FROM subnets", "DELETE FROM zones", "DELETE FROM nodes"] {
            let refused = sqlx::raw_sql(statement).execute(&mut *tx).await.unwrap_err();
            assert!(refused.to_string().contains("FOREIGN KEY"), "{statement}: {refused}");
        }
    }

    #[tokio::test]
    async fn an_account_sees_its_own_and_the_default_one() {
        let folder = tempfile::tempdir().unwrap();
        let db = Database::open(folder.path()).await.unwrap();
        let cidr: Ipv4Net = "172.31.0.0/16".parse().unwrap();
        network::ensure_default_vpc(&db, cidr).await.unwrap();
        let mut tx = db.begin().await.unwrap();
        network::ensure_zone(&mut tx, "a").await.unwrap();
        let (one, two) = (insert(&mut tx, "1", cidr).await.unwrap(), insert(&mut tx, "2", cidr).await.unwrap());
        let part: Ipv4Net = "172.31.0.0/20".parse().unwrap();
        let subnet = insert_subnet(&mut tx, &one.id, "a", part).await.unwrap();
        insert_subnet(&mut tx, &two.id, "a", part).await.unwrap();
        assert!(insert_subnet(&mut tx, &one.id, "a", part).await.is_err(), "a network is there once in a VPC");
        let seen = of_account(&mut tx, "1").await.unwrap();
        assert_eq!(seen.iter().filter(|vpc| vpc.is_default()).count(), 1);
        assert!(seen.len() == 2 && seen.iter().any(|vpc| vpc.id == one.id));
        let subnets = subnets_of_account(&mut tx, "1").await.unwrap();
        assert!(subnets.len() == 2 && subnets.iter().any(|other| other.id == subnet.id));

        delete_subnet(&mut tx, &subnet.id).await.unwrap();
        delete(&mut tx, &one.id).await.unwrap();
        assert_eq!(of_account(&mut tx, "1").await.unwrap().len(), 1);
        assert_eq!(subnets_of_account(&mut tx, "1").await.unwrap().len(), 1);
        assert_eq!(network::subnets(&mut tx).await.unwrap().len(), 2);
    }
}
