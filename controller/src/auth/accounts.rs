//! Accounts and their access keys, in the state database.
//!
//! The first start makes the account `admin` and one key. An account's number never changes and is
//! never used again; a key can be removed at any time and the next request with it is refused.

use std::fmt;

use rand::Rng as _;
use serde::{Deserialize, Serialize};
use sqlx::Row as _;

use crate::state::Database;

/// The account that the first start makes.
pub const ADMIN: &str = "admin";

/// Longest name of an account, in bytes.
const NAME_LIMIT: usize = 64;

/// An account as the operator sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// Twelve decimal digits.
    pub id: String,
    pub name: String,
    /// Ids of its keys; the secrets are not here.
    pub keys: Vec<String>,
}

/// An access key with its secret.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessKey {
    /// `AKIA` and sixteen characters of the alphabet of RFC 4648 base 32.
    pub id: String,
    /// Forty characters.
    pub secret: String,
    pub account_id: String,
}

impl fmt::Debug for AccessKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccessKey").field("id", &self.id).field("account_id", &self.account_id).finish_non_exhaustive()
    }
}

/// Why an account or a key could not be made, found or removed.
#[derive(Debug, thiserror::Error)]
pub enum AccountError {
    #[error(
        "an account's name is 1 to {NAME_LIMIT} letters, digits, '-', '_' or '.', and begins with a letter; got {0:?}"
    )]
    BadName(String),
    #[error("there is an account {0:?} already; `mallee key add {0}` makes another key for it")]
    NameTaken(String),
    #[error("there is no account {0:?}; `mallee account list` shows those there are")]
    NoSuchAccount(String),
    #[error("there is no access key {0:?}; `mallee account list` shows those there are")]
    NoSuchKey(String),
    #[error(transparent)]
    State(#[from] crate::error::Error),
    #[error("the state database: {0}")]
    Database(#[from] sqlx::Error),
}

/// The accounts of this cloud. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Accounts {
    db: Database,
}

impl Accounts {
    pub fn new(db: Database) -> Accounts {
        Accounts { db }
    }

    /// The administrator's key, made together with the account when there is none yet.
    ///
    /// The oldest key is returned, so that a restart hands out the same one; when the operator has
    /// removed every key of the account, none is made behind his back.
    pub async fn ensure_admin(&self) -> Result<Option<AccessKey>, AccountError> {
        match self.add(ADMIN).await {
            Ok((_, key)) => Ok(Some(key)),
            Err(AccountError::NameTaken(_)) => self.oldest_key(ADMIN).await,
            Err(error) => Err(error),
        }
    }

    /// Makes an account and its first key.
    pub async fn add(&self, name: &str) -> Result<(Account, AccessKey), AccountError> {
        check_name(name)?;
        let mut transaction = self.db.begin().await?;
        let taken =
            sqlx::query("SELECT 1 FROM accounts WHERE name = ?").bind(name).fetch_optional(&mut *transaction).await?;
        if taken.is_some() {
            return Err(AccountError::NameTaken(name.to_owned()));
        }
        let id = new_account_id();
        sqlx::query("INSERT INTO accounts (id, name, created_ns) VALUES (?, ?, ?)")
            .bind(&id)
            .bind(name)
            .bind(crate::s3::now_ns())
            .execute(&mut *transaction)
            .await?;
        let key = new_key(&id);
        insert_key(&mut transaction, &key).await?;
        transaction.commit().await?;
        Ok((Account { id, name: name.to_owned(), keys: vec![key.id.clone()] }, key))
    }

    /// Every account, by name.
    pub async fn list(&self) -> Result<Vec<Account>, AccountError> {
        let rows = sqlx::query(
            "SELECT a.id, a.name, k.id AS key_id FROM accounts a LEFT JOIN access_keys k ON k.account_id = a.id \
             ORDER BY a.name, k.created_ns, k.id",
        )
        .fetch_all(self.db.pool())
        .await?;
        let mut accounts: Vec<Account> = Vec::new();
        for row in rows {
            let id: String = row.try_get("id")?;
            if accounts.last().is_none_or(|last| last.id != id) {
                accounts.push(Account { id, name: row.try_get("name")?, keys: Vec::new() });
            }
            if let (Some(key), Some(account)) = (row.try_get::<Option<String>, _>("key_id")?, accounts.last_mut()) {
                account.keys.push(key);
            }
        }
        Ok(accounts)
    }

    /// Makes another key for the account with this name or number.
    pub async fn add_key(&self, account: &str) -> Result<AccessKey, AccountError> {
        let row = sqlx::query("SELECT id FROM accounts WHERE name = ? OR id = ?")
            .bind(account)
            .bind(account)
            .fetch_optional(self.db.pool())
            .await?
            .ok_or_else(|| AccountError::NoSuchAccount(account.to_owned()))?;
        let key = new_key(&row.try_get::<String, _>("id")?);
        let mut transaction = self.db.begin().await?;
        insert_key(&mut transaction, &key).await?;
        transaction.commit().await?;
        Ok(key)
    }

    /// Removes a key: the next request signed with it is refused.
    pub async fn remove_key(&self, id: &str) -> Result<(), AccountError> {
        let mut transaction = self.db.begin().await?;
        let done = sqlx::query("DELETE FROM access_keys WHERE id = ?").bind(id).execute(&mut *transaction).await?;
        transaction.commit().await?;
        if done.rows_affected() == 0 { Err(AccountError::NoSuchKey(id.to_owned())) } else { Ok(()) }
    }

    /// The key with this id, secret included.
    pub async fn key(&self, id: &str) -> Result<Option<AccessKey>, AccountError> {
        let row = sqlx::query("SELECT id, secret, account_id FROM access_keys WHERE id = ?")
            .bind(id)
            .fetch_optional(self.db.pool())
            .await?;
        Ok(row.map(|row| read_key(&row)).transpose()?)
    }

    /// The first key of the account with this name that is still there.
    pub async fn oldest_key(&self, name: &str) -> Result<Option<AccessKey>, AccountError> {
        let row = sqlx::query(
            "SELECT k.id, k.secret, k.account_id FROM access_keys k JOIN accounts a ON a.id = k.account_id \
             WHERE a.name = ? ORDER BY k.created_ns, k.id LIMIT 1",
        )
        .bind(name)
        .fetch_optional(self.db.pool())
        .await?;
        Ok(row.map(|row| read_key(&row)).transpose()?)
    }
}

fn read_key(row: &sqlx::sqlite::SqliteRow) -> Result<AccessKey, sqlx::Error> {
    Ok(AccessKey { id: row.try_get("id")?, secret: row.try_get("secret")?, account_id: row.try_get("account_id")? })
}

async fn insert_key(connection: &mut sqlx::SqliteConnection, key: &AccessKey) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO access_keys (id, account_id, secret, created_ns) VALUES (?, ?, ?, ?)")
        .bind(&key.id)
        .bind(&key.account_id)
        .bind(&key.secret)
        .bind(crate::s3::now_ns())
        .execute(connection)
        .await?;
    Ok(())
}

fn check_name(name: &str) -> Result<(), AccountError> {
    let well_formed = name.len() <= NAME_LIMIT
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if well_formed { Ok(()) } else { Err(AccountError::BadName(name.to_owned())) }
}

/// A random account number: twelve digits, the first not zero, so that it survives a spreadsheet.
fn new_account_id() -> String {
    rand::rng().random_range(100_000_000_000_u64..1_000_000_000_000).to_string()
}

fn new_key(account_id: &str) -> AccessKey {
    const ID: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    const SECRET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    AccessKey {
        id: format!("AKIA{}", random_text(ID, 16)),
        secret: random_text(SECRET, 40),
        account_id: account_id.to_owned(),
    }
}

/// `length` characters of `alphabet`, from the operating system's generator by way of a CSPRNG.
fn random_text(alphabet: &[u8], length: usize) -> String {
    let mut rng = rand::rng();
    (0..length).map(|_| char::from(alphabet[rng.random_range(0..alphabet.len())])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::s3::testing::{Held, database};

    /// The database's folder must outlive the accounts.
    async fn accounts() -> (Accounts, Held<Database>) {
        let database = database().await;
        (Accounts::new(database.clone()), database)
    }

    #[tokio::test]
    async fn the_first_start_makes_the_administrator_once() {
        let (accounts, _database) = accounts().await;
        let first = accounts.ensure_admin().await.unwrap().unwrap();
        let second = accounts.ensure_admin().await.unwrap().unwrap();
        assert_eq!(first, second);
        assert_eq!((first.id.len(), first.secret.len(), first.account_id.len()), (20, 40, 12));
        accounts.remove_key(&first.id).await.unwrap();
        assert_eq!(accounts.ensure_admin().await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_key_lives_until_it_is_removed() {
        let (accounts, _database) = accounts().await;
        let (account, first) = accounts.add("lab").await.unwrap();
        let second = accounts.add_key(&account.id).await.unwrap();
        assert_eq!(accounts.list().await.unwrap()[0].keys, [first.id.clone(), second.id.clone()]);
        accounts.remove_key(&first.id).await.unwrap();
        assert_eq!(accounts.key(&first.id).await.unwrap(), None);
        assert_eq!(accounts.key(&second.id).await.unwrap(), Some(second));
        assert!(matches!(accounts.remove_key(&first.id).await, Err(AccountError::NoSuchKey(_))));
    }

    #[tokio::test]
    async fn names_are_checked_and_unique() {
        let (accounts, _database) = accounts().await;
        accounts.add("lab").await.unwrap();
        assert!(matches!(accounts.add("lab").await, Err(AccountError::NameTaken(_))));
        for bad in ["", "1lab", "a b", "-x", &"x".repeat(65)] {
            assert!(matches!(accounts.add(bad).await, Err(AccountError::BadName(_))), "{bad:?}");
        }
    }

    #[test]
    fn a_secret_does_not_show_in_debug_output() {
        let key = new_key("123456789012");
        assert!(!format!("{key:?}").contains(&key.secret));
    }
}
