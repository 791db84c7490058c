//! Prefix lists: networks under one name that rules of security groups refer to, and the versions that a list has gone through.
//!
//! An entry's row has the first version that has the entry and the first one after it that has it no more. So a change writes
//! as many rows as it changes entries, and any version still kept can be read.

use std::collections::HashMap;

use sqlx::SqliteConnection;

use crate::error::Result;
use crate::ids::PrefixListId;

/// One row of `prefix_lists`.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct PrefixList {
    pub id: PrefixListId,
    pub account_id: String,
    pub name: String,
    pub address_family: Family,
    pub max_entries: i32,
    /// 1 when it is made.
    pub version: i64,
    pub state: State,
    pub state_message: Option<String>,
}

/// A network of a list.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct Entry {
    pub cidr: String,
    pub description: Option<String>,
}

/// Which networks a list has, in EC2's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::Type)]
pub enum Family {
    #[sqlx(rename = "IPv4")]
    Ipv4,
    #[sqlx(rename = "IPv6")]
    Ipv6,
}

/// Where EC2's states of a list end; those on the way there are never seen here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::Type)]
#[sqlx(rename_all = "kebab-case")]
pub enum State {
    CreateComplete,
    ModifyComplete,
    ModifyFailed,
    /// Of the answer to its deletion only.
    DeleteComplete,
}

/// The account's lists.
pub async fn of_account(connection: &mut SqliteConnection, account: &str) -> Result<Vec<PrefixList>> {
    Ok(sqlx::query_as("SELECT * FROM prefix_lists WHERE account_id = ? ORDER BY id")
        .bind(account)
        .fetch_all(connection)
        .await?)
}

pub async fn insert(connection: &mut SqliteConnection, list: &PrefixList, entries: &[Entry]) -> Result<()> {
    sqlx::query(
        "INSERT INTO prefix_lists (id, account_id, name, address_family, max_entries, version, state) \
         VALUES (?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(&list.id)
    .bind(&list.account_id)
    .bind(&list.name)
    .bind(list.address_family)
    .bind(list.max_entries)
    .bind(list.version)
    .bind(list.state)
    .execute(&mut *connection)
    .await?;
    add(connection, &list.id, list.version, entries).await
}

/// Writes what of a list can change, its entries apart.
pub async fn update(connection: &mut SqliteConnection, list: &PrefixList) -> Result<()> {
    sqlx::query(
        "UPDATE prefix_lists SET name = ?, max_entries = ?, version = ?, state = ?, state_message = ? WHERE id = ?",
    )
    .bind(&list.name)
    .bind(list.max_entries)
    .bind(list.version)
    .bind(list.state)
    .bind(&list.state_message)
    .bind(&list.id)
    .execute(connection)
    .await?;
    Ok(())
}

/// Entries that the list has from `version` on.
pub async fn add(connection: &mut SqliteConnection, id: &PrefixListId, version: i64, entries: &[Entry]) -> Result<()> {
    for entry in entries {
        sqlx::query(
            "INSERT INTO prefix_list_entries (prefix_list_id, cidr, description, added_in) VALUES (?, ?, ?, ?)",
        )
        .bind(id)
        .bind(&entry.cidr)
        .bind(&entry.description)
        .bind(version)
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

/// Entries that the list has no more from `version` on.
pub async fn remove(
    connection: &mut SqliteConnection,
    id: &PrefixListId,
    version: i64,
    cidrs: &[String],
) -> Result<()> {
    for cidr in cidrs {
        sqlx::query(
            "UPDATE prefix_list_entries SET removed_in = ? \
             WHERE prefix_list_id = ? AND cidr = ? AND removed_in IS NULL",
        )
        .bind(version)
        .bind(id)
        .bind(cidr)
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

/// The entries that the list had in that version.
pub async fn entries(connection: &mut SqliteConnection, id: &PrefixListId, version: i64) -> Result<Vec<Entry>> {
    Ok(sqlx::query_as(
        "SELECT cidr, description FROM prefix_list_entries \
         WHERE prefix_list_id = ?1 AND added_in <= ?2 AND (removed_in IS NULL OR removed_in > ?2) ORDER BY cidr",
    )
    .bind(id)
    .bind(version)
    .fetch_all(connection)
    .await?)
}

/// Forgets entries that only versions before `oldest` had.
pub async fn forget_before(connection: &mut SqliteConnection, id: &PrefixListId, oldest: i64) -> Result<()> {
    sqlx::query("DELETE FROM prefix_list_entries WHERE prefix_list_id = ? AND removed_in <= ?")
        .bind(id)
        .bind(oldest)
        .execute(connection)
        .await?;
    Ok(())
}

/// Deletes a list that no rule names.
pub async fn delete(connection: &mut SqliteConnection, id: &PrefixListId) -> Result<()> {
    sqlx::query("DELETE FROM prefix_list_entries WHERE prefix_list_id = ?").bind(id).execute(&mut *connection).await?;
    sqlx::query("DELETE FROM prefix_lists WHERE id = ?").bind(id).execute(connection).await?;
    Ok(())
}

/// The networks of every IPv4 list of the cloud, as they are now; a list without any is there too.
pub async fn all_ipv4(connection: &mut SqliteConnection) -> Result<HashMap<PrefixListId, Vec<String>>> {
    let rows: Vec<(PrefixListId, Option<String>)> = sqlx::query_as(
        "SELECT list.id, entry.cidr FROM prefix_lists AS list LEFT JOIN prefix_list_entries AS entry \
         ON entry.prefix_list_id = list.id AND entry.removed_in IS NULL \
         WHERE list.address_family = ? ORDER BY list.id, entry.cidr",
    )
    .bind(Family::Ipv4)
    .fetch_all(connection)
    .await?;
    let mut lists: HashMap<PrefixListId, Vec<String>> = HashMap::new();
    for (id, cidr) in rows {
        lists.entry(id).or_default().extend(cidr);
    }
    Ok(lists)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Database;

    fn entry(cidr: &str) -> Entry {
        Entry { cidr: cidr.into(), description: None }
    }

    #[tokio::test]
    async fn every_version_has_its_own_entries_until_it_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let db = Database::open(folder.path()).await.unwrap();
        let mut tx = db.begin().await.unwrap();
        let list = PrefixList {
            id: PrefixListId::random(),
            account_id: "1".into(),
            name: "lab".into(),
            address_family: Family::Ipv4,
            max_entries: 5,
            version: 1,
            state: State::CreateComplete,
            state_message: None,
        };
        let (a, b) = (entry("10.0.0.0/8"), entry("192.0.2.0/24"));
        insert(&mut tx, &list, std::slice::from_ref(&a)).await.unwrap();
        add(&mut tx, &list.id, 2, std::slice::from_ref(&b)).await.unwrap();
        remove(&mut tx, &list.id, 3, std::slice::from_ref(&a.cidr)).await.unwrap();
        // What went and comes back is there twice, each for its own versions.
        add(&mut tx, &list.id, 4, std::slice::from_ref(&a)).await.unwrap();
        assert!(add(&mut tx, &list.id, 5, std::slice::from_ref(&a)).await.is_err(), "an entry is there once");
        let expected = [(1, vec![&a]), (2, vec![&a, &b]), (3, vec![&b]), (4, vec![&a, &b])];
        for (version, expected) in expected {
            let found = entries(&mut tx, &list.id, version).await.unwrap();
            assert_eq!(found.iter().collect::<Vec<_>>(), expected, "version {version}");
        }
        assert_eq!(all_ipv4(&mut tx).await.unwrap()[&list.id], ["10.0.0.0/8", "192.0.2.0/24"]);
        forget_before(&mut tx, &list.id, 3).await.unwrap();
        assert_eq!(entries(&mut tx, &list.id, 3).await.unwrap(), [b]);
        assert_eq!(entries(&mut tx, &list.id, 1).await.unwrap(), []);
        delete(&mut tx, &list.id).await.unwrap();
        assert!(all_ipv4(&mut tx).await.unwrap().is_empty());
    }
}
