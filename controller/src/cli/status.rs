//! `mallee status`.

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::record::{self, Process};
use super::{CliError, Result, State, print_json, said};
use crate::admin::api;
use crate::nodes::NodeSummary;

#[derive(Debug, Args)]
pub struct Status {
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    state: State,
}

/// Everything that `status` knows. Nodes and instances are empty while the controller is away.
#[derive(Debug, Serialize)]
struct Shown {
    endpoint: String,
    region: String,
    processes: Vec<Process>,
    nodes: Vec<NodeSummary>,
    instances: Vec<api::InstanceSummary>,
    /// Why the controller could not be asked; empty when it was.
    controller_error: String,
}

impl Status {
    pub async fn run(self) -> Result<ExitCode> {
        let processes = record::processes(&self.state.dir);
        let asked: Result<api::Status> = self.state.admin().get(api::STATUS).await;
        let shown = match asked {
            Ok(status) => Shown {
                endpoint: status.endpoint,
                region: status.region,
                processes,
                nodes: status.nodes,
                instances: status.instances,
                controller_error: String::new(),
            },
            Err(error @ CliError::NoCloud { .. }) if processes.iter().all(|process| process.pid == 0) => {
                return Err(error);
            }
            Err(error) => Shown {
                endpoint: String::new(),
                region: String::new(),
                processes,
                nodes: Vec::new(),
                instances: Vec::new(),
                controller_error: error.to_string(),
            },
        };
        if self.json {
            print_json(&shown)?;
        } else {
            print(&shown);
        }
        if shown.controller_error.is_empty() { Ok(ExitCode::SUCCESS) } else { said(shown.controller_error) }
    }
}

fn print(shown: &Shown) {
    if !shown.endpoint.is_empty() {
        println!("cloud {} at {}\n", shown.region, shown.endpoint);
    }
    println!("{:<12}  {:>8}  {:>8}  log", "process", "pid", "restarts");
    for process in &shown.processes {
        let pid = if process.pid == 0 { "away".to_owned() } else { process.pid.to_string() };
        println!("{:<12}  {pid:>8}  {:>8}  {}", process.name, process.restarts, process.log.display());
    }
    println!();
    print_nodes(&shown.nodes);
    println!();
    println!("{:<20}  {:<13}  {:<10}  {:<15}  {:<15}  node", "instance", "state", "type", "private", "public");
    for one in &shown.instances {
        let (id, state, kind) = (&one.id, &one.state, &one.instance_type);
        println!("{id:<20}  {state:<13}  {kind:<10}  {:<15}  {:<15}  {}", one.private_ip, one.public_ip, one.node);
    }
}

pub(super) fn print_nodes(nodes: &[NodeSummary]) {
    println!(
        "{:<12}  {:<12}  {:<9}  {:<9}  {:>4}  {:>8}  {:>9}",
        "node", "zone", "agent", "KVM", "CPUs", "MiB", "instances"
    );
    for node in nodes {
        let attends = if node.connected { "attends" } else { "away" };
        println!(
            "{:<12}  {:<12}  {attends:<9}  {:<9}  {:>4}  {:>8}  {:>9}",
            node.name, node.zone, node.kvm, node.cpus, node.memory_mib, node.instances
        );
    }
}
