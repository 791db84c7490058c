//! `mallee node`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;

use super::client::segment;
use super::{CliError, Result, State, print_json};
use crate::admin::api;
use crate::nodes::NodeSummary;

#[derive(Debug, Subcommand)]
pub enum Node {
    /// Add a node and write the folder that its agent is started with; a node that is there already
    /// gets new credentials, its old ones are refused, and it is cut off if they are in use
    Add {
        /// Letters, digits and '-'
        name: String,
        /// The availability zone, for example mallee-1b
        #[arg(long)]
        zone: String,
        /// URL that the node dials, for example https://10.0.0.1:8751
        #[arg(long)]
        controller: String,
        /// Folder to write; copy it to the node
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        #[command(flatten)]
        state: State,
    },
    /// Remove a node on which there are no instances; its credentials are refused from then on
    #[command(visible_alias = "remove")]
    Rm {
        name: String,
        /// The machine is off and does not come back: its instances end with it, without their disks
        #[arg(long)]
        lost: bool,
        #[command(flatten)]
        state: State,
    },
    /// Show the nodes
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        state: State,
    },
}

impl Node {
    pub async fn run(self) -> Result<ExitCode> {
        match self {
            Node::Add { name, zone, controller, out, state } => {
                let out = std::path::absolute(&out).map_err(|source| CliError::File {
                    what: "cannot use",
                    path: out,
                    source,
                })?;
                let wanted = api::AddNode { name, zone, controller, out };
                let added: api::AddedNode = state.admin().post(api::NODES, &wanted).await?;
                println!("{}", added.out.display());
            }
            Node::Rm { name, lost, state } => {
                let path = format!("{}/{}?lost={lost}", api::NODES, segment(&name));
                let ended: Vec<String> = state.admin().delete(&path).await?;
                ended.iter().for_each(|instance| println!("{instance}"));
            }
            Node::List { json, state } => {
                let nodes: Vec<NodeSummary> = state.admin().get(api::NODES).await?;
                if json {
                    print_json(&nodes)?;
                } else {
                    super::status::print_nodes(&nodes);
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
