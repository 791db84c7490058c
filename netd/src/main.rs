//! `mallee-netd`: see the library.

use std::process::ExitCode;

use clap::Parser;
use mallee_netd::cli::Cli;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("MALLEE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match mallee_netd::run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mallee-netd: {error}");
            ExitCode::FAILURE
        }
    }
}
