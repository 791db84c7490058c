//! `mallee net`: this node's network, as its netd has it.
//!
//! `mallee-netd` draws and traces; here it is only found and called.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use clap::{Args, Subcommand};

use super::{CliError, Result, State, program, record};

#[derive(Debug, Subcommand)]
pub enum Net {
    /// Draw this node's network: VPCs, subnets, instances, elastic IPs, and what was counted
    Show {
        #[command(flatten)]
        netd: Netd,
    },
    /// Tell which rules let a new connection's first packet pass or drop it, and as what it arrives
    Trace {
        /// An instance of this node (i-…, eni-…, private address or elastic IP), or an address outside
        #[arg(value_name = "SRC")]
        from: String,
        /// The same, of any node
        #[arg(value_name = "DST")]
        to: String,
        /// `PORT` or `tcp PORT`, `udp PORT`, `icmp`
        #[arg(value_name = "[PROTO] PORT", required = true, num_args = 1..=2)]
        traffic: Vec<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        netd: Netd,
    },
}

/// Which netd is asked.
#[derive(Debug, Args)]
pub struct Netd {
    /// Where netd listens; without it, that of the cloud in the state folder, or else a node's usual one
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    #[command(flatten)]
    state: State,
}

impl Netd {
    fn socket(&self) -> PathBuf {
        let of_cloud = record::netd_socket(&self.state.dir);
        match &self.socket {
            Some(socket) => socket.clone(),
            None if of_cloud.exists() => of_cloud,
            None => mallee_netd::api::DEFAULT_SOCKET.into(),
        }
    }
}

impl Net {
    pub async fn run(self) -> Result<ExitCode> {
        let (verb, netd, rest): (&str, Netd, Vec<OsString>) = match self {
            Self::Show { netd } => ("show", netd, Vec::new()),
            Self::Trace { from, to, traffic, json, netd } => {
                let flags = if json { vec![OsString::from("--json")] } else { Vec::new() };
                let words = [from, to].into_iter().chain(traffic).map(OsString::from);
                ("trace", netd, flags.into_iter().chain(words).collect())
            }
        };
        let done = Command::new(program("mallee-netd")?)
            .arg(verb)
            .arg("--socket")
            .arg(netd.socket())
            .args(rest)
            .env("MALLEE_LOG", "warn")
            .status()
            .map_err(|error| CliError::System("cannot run mallee-netd", error))?;
        // It has said why.
        Ok(if done.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
