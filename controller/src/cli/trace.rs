//! `mallee trace ID`.

use std::process::ExitCode;

use clap::Args;

use super::client::segment;
use super::{Result, State, print_json, waterfall};
use crate::admin::api;

#[derive(Debug, Args)]
pub struct Trace {
    /// An instance's id (i-…) or a request's id
    id: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    state: State,
}

impl Trace {
    pub async fn run(self) -> Result<ExitCode> {
        let trace: crate::traces::Trace =
            self.state.admin().get(&format!("{}/{}", api::TRACES, segment(&self.id))).await?;
        if self.json {
            print_json(&trace)?;
        } else {
            print!("{}", waterfall::draw(&trace, waterfall::width_of_terminal()));
        }
        Ok(ExitCode::SUCCESS)
    }
}
