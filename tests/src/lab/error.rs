//! The one error type of the lab: each message says what was being done and, where there is
//! something to be done about it, what.

use std::{io, path::PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum LabError {
    #[error("{action} {path}: {source}")]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot run {program}: {source} (is its Debian package installed? see setup/packages)")]
    NoProgram { program: String, source: io::Error },
    #[error("{command} failed ({status}): {output}")]
    Command { command: String, status: String, output: String },
    #[error("Debian's packages: {0}")]
    Packages(String),
    #[error("kernel module {module}: {reason}")]
    Module { module: String, reason: String },
    #[error("{program} is in none of {places}; build it (make) or name its folder with --programs")]
    ProgramMissing { program: String, places: String },
    #[error("no node {node} in the lab {lab}; it has: {known}")]
    NoSuchNode { node: String, lab: PathBuf, known: String },
    #[error("node {node} runs already; end it first: mallee-lab down {node}")]
    Running { node: String },
    #[error("node {node} ended while booting; the end of its console:\n{console}")]
    Died { node: String, console: String },
    #[error("node {node} did not come up within {seconds} s; the end of its console:\n{console}")]
    Silent { node: String, seconds: u64, console: String },
    #[error("the channel to node {node} broke: {reason}")]
    Channel { node: String, reason: String },
    #[error("{what} is not valid: {reason}")]
    Invalid { what: String, reason: String },
}

/// Gives an [`io::Error`] the path it happened on.
pub(crate) trait OnPath<T> {
    fn on(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, LabError>;
}

impl<T> OnPath<T> for io::Result<T> {
    fn on(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, LabError> {
        self.map_err(|source| LabError::File { action, path: path.into(), source })
    }
}

/// Runs a command to its end and returns what it wrote to its standard output.
pub(crate) fn output_of(command: &mut std::process::Command) -> Result<String, LabError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(std::process::Stdio::null())
        .output()
        .map_err(|source| LabError::NoProgram { program, source })?;
    if !output.status.success() {
        let args: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
        return Err(LabError::Command {
            command: format!("{} {}", command.get_program().to_string_lossy(), args.join(" ")),
            status: output.status.to_string(),
            output: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
