//! `mallee account` and `mallee key`.

use std::process::ExitCode;

use clap::Subcommand;

use super::client::segment;
use super::{Result, State, print_json};
use crate::admin::api;
use crate::auth::accounts::{AccessKey, Account as AccountRow};

#[derive(Debug, Subcommand)]
pub enum Account {
    /// Make an account and its first access key
    Add {
        /// Letters, digits, '-', '_' and '.'
        name: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        state: State,
    },
    /// Show the accounts and their keys, without secrets
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        state: State,
    },
}

impl Account {
    pub async fn run(self) -> Result<ExitCode> {
        match self {
            Account::Add { name, json, state } => {
                let added: api::AddedAccount = state.admin().post(api::ACCOUNTS, &api::AddAccount { name }).await?;
                if json {
                    print_json(&added)?;
                } else {
                    println!("# account {} ({})", added.name, added.account_id);
                    println!("export AWS_ACCESS_KEY_ID={}", added.access_key);
                    println!("export AWS_SECRET_ACCESS_KEY={}", added.secret_key);
                }
            }
            Account::List { json, state } => {
                let accounts: Vec<AccountRow> = state.admin().get(api::ACCOUNTS).await?;
                if json {
                    print_json(&accounts)?;
                } else {
                    for account in accounts {
                        println!("{:<12}  {:<20}  {}", account.id, account.name, account.keys.join(" "));
                    }
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

#[derive(Debug, Subcommand)]
pub enum Key {
    /// Make another access key for an account
    Add {
        /// The account's name or number
        account: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        state: State,
    },
    /// Remove an access key: requests signed with it are refused from then on
    Rm {
        /// The key's id, AKIA…
        id: String,
        #[command(flatten)]
        state: State,
    },
}

impl Key {
    pub async fn run(self) -> Result<ExitCode> {
        match self {
            Key::Add { account, json, state } => {
                let key: AccessKey = state.admin().post(api::KEYS, &api::AddKey { account }).await?;
                if json {
                    print_json(&key)?;
                } else {
                    println!("export AWS_ACCESS_KEY_ID={}", key.id);
                    println!("export AWS_SECRET_ACCESS_KEY={}", key.secret);
                }
            }
            Key::Rm { id, state } => state.admin().delete(&format!("{}/{}", api::KEYS, segment(&id))).await?,
        }
        Ok(ExitCode::SUCCESS)
    }
}
