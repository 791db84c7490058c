//! `mallee`: the operator's command.
//!
//! [`up`] runs a whole cloud on this machine: it starts controller, netd and agent, each a process of
//! its own, and watches them ([`supervise`]). Everything else talks to the running controller over
//! its admin socket ([`client`]) or looks at this machine ([`doctor`]). A subcommand that is not
//! built in, `mallee X`, is the program `mallee-X` beside this one.
//!
//! What may not happen here: a decision that belongs to the controller (the command line only asks),
//! a process that is started twice, an error without words that say what to do.

mod accounts;
mod client;
mod doctor;
mod down;
mod env;
mod namespace;
mod net;
mod node;
mod outside;
mod progress;
mod record;
mod routes;
mod status;
mod supervise;
mod trace;
mod up;
mod waterfall;

use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// Where a cloud lives when it is told nothing else.
const DEFAULT_STATE: &str = "/var/lib/mallee";

#[derive(Debug, Parser)]
#[command(
    name = "mallee",
    version,
    about = "A small cloud for bare-metal labs that answers to EC2's and S3's own tools"
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

/// The folder that a cloud lives in.
#[derive(Debug, Clone, Args)]
struct State {
    /// Folder that holds everything the cloud has to remember
    #[arg(long = "state", env = "MALLEE_STATE", default_value = DEFAULT_STATE, value_name = "DIR")]
    dir: PathBuf,
}

impl State {
    fn admin(&self) -> client::Admin {
        client::Admin::new(self.dir.join(crate::admin::SOCKET))
    }
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Start a cloud on this machine: controller, netd and agent
    Up(Box<up::Up>),
    /// End the cloud on this machine: its instances, processes and network
    Down(down::Down),
    /// Show processes, nodes and instances
    Status(status::Status),
    /// Say what this machine can do, and what is in the way
    Doctor(doctor::Doctor),
    /// Show where the time of a request or of an instance's launch went
    Trace(trace::Trace),
    /// Print the lines that point aws and boto3 at this cloud
    Env(env::Env),
    /// Accounts
    Account {
        #[command(subcommand)]
        verb: accounts::Account,
    },
    /// Access keys
    Key {
        #[command(subcommand)]
        verb: accounts::Key,
    },
    /// This node's network
    Net {
        #[command(subcommand)]
        verb: net::Net,
    },
    /// Nodes
    Node {
        #[command(subcommand)]
        verb: node::Node,
    },
    #[command(external_subcommand)]
    Other(Vec<OsString>),
}

/// What went wrong, in words for the operator.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error("{0}")]
    Said(String),
    #[error("{what} {path}: {source}")]
    File { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error("no cloud answers at {socket} ({source}); start one with `mallee up`, or name its folder with --state")]
    NoCloud { socket: PathBuf, source: std::io::Error },
    #[error("{0}: {1}")]
    System(&'static str, std::io::Error),
}

type Result<T> = std::result::Result<T, CliError>;

fn said<T>(words: impl Into<String>) -> Result<T> {
    Err(CliError::Said(words.into()))
}

/// Parses the command line and carries it out.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    log_to_stderr();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("mallee: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(carry_out(cli.verb)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("mallee: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn carry_out(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Up(up) => up.run().await,
        Verb::Down(down) => down.run().await,
        Verb::Status(status) => status.run().await,
        Verb::Doctor(doctor) => doctor.run().await,
        Verb::Trace(trace) => trace.run().await,
        Verb::Env(env) => env.run().await,
        Verb::Account { verb } => verb.run().await,
        Verb::Key { verb } => verb.run().await,
        Verb::Net { verb } => verb.run().await,
        Verb::Node { verb } => verb.run().await,
        Verb::Other(words) => other_program(&words),
    }
}

/// Becomes `mallee-X` for `mallee X`.
fn other_program(words: &[OsString]) -> Result<ExitCode> {
    let Some((name, rest)) = words.split_first() else { return said("no subcommand") };
    let name = name.to_string_lossy();
    let well_formed = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    let path = program(&format!("mallee-{name}"));
    match path {
        Ok(path) if well_formed => {
            let error = std::process::Command::new(&path).args(rest).exec();
            Err(CliError::File { what: "cannot execute", path, source: error })
        }
        _ => said(format!(
            "there is no subcommand {name:?}, nor a program mallee-{name} beside this one; see `mallee --help`"
        )),
    }
}

/// A program of ours, found beside this one.
fn program(name: &str) -> Result<PathBuf> {
    let own =
        std::env::current_exe().map_err(|error| CliError::System("cannot find this program's own path", error))?;
    // A program that was replaced while it ran reads as "… (deleted)"; its folder is still right.
    let path = own.parent().unwrap_or(Path::new("/")).join(name);
    if path.is_file() {
        Ok(path)
    } else {
        said(format!("the program {name} is not beside mallee, in {}", path.display()))
    }
}

fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn,mallee_controller=info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
}

/// Prints a value as JSON.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|error| CliError::Said(error.to_string()))?;
    println!("{text}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = other_program(&["no-such-verb".into()]).unwrap_err();
        assert!(error.to_string().contains("mallee-no-such-verb"));
    }
}
