//! `mallee env`: the lines that point a shell at this cloud.

use std::process::ExitCode;

use clap::Args;

use super::{Result, State};
use crate::admin::api;

#[derive(Debug, Args)]
pub struct Env {
    #[command(flatten)]
    state: State,
}

impl Env {
    pub async fn run(self) -> Result<ExitCode> {
        let environment: api::Environment = self.state.admin().get(api::ENVIRONMENT).await?;
        print!("{}", lines(&environment));
        Ok(ExitCode::SUCCESS)
    }
}

/// Both names of the region: boto3 reads the second one only.
fn lines(environment: &api::Environment) -> String {
    let api::Environment { endpoint, region, access_key, secret_key } = environment;
    format!(
        "export AWS_ENDPOINT_URL='{endpoint}'\n\
         export AWS_ACCESS_KEY_ID='{access_key}'\n\
         export AWS_SECRET_ACCESS_KEY='{secret_key}'\n\
         export AWS_REGION='{region}'\n\
         export AWS_DEFAULT_REGION='{region}'\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_can_read_it() {
        let environment = api::Environment {
            endpoint: "http://127.0.0.1:8750".into(),
            region: "mallee-1".into(),
            access_key: "AKIA".into(),
            secret_key: "a/b+c".into(),
        };
        for line in lines(&environment).lines() {
            let (name, value) = line.strip_prefix("export ").unwrap().split_once('=').unwrap();
            assert!(name.starts_with("AWS_") && value.starts_with('\'') && value.ends_with('\''), "{line}");
        }
    }
}
