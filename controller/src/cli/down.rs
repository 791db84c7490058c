//! `mallee down`: the end of the cloud on this machine.
//!
//! Instances are terminated (through the controller, so that each node clears up after them), the
//! processes are ended, and what `mallee up` made on this machine is removed: namespace, bridge,
//! rules. Buckets, images, accounts and addresses stay in the state folder unless `--purge` is
//! given. Every step is done also when the one before it could not be, and all of it can be repeated.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::client::Admin;
use super::progress::Step;
use super::record::{self, PROGRAMS, Started, Surroundings};
use super::supervise::{self, GRACE};
use super::{CliError, Result, State, namespace, outside, said};
use crate::admin::api;

#[derive(Debug, Args)]
pub struct Down {
    #[command(flatten)]
    state: State,
    /// Remove the state folder too: buckets, images, accounts
    #[arg(long)]
    purge: bool,
    /// How long the nodes may take to clear up after their instances, in seconds
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    wait: u64,
}

impl Down {
    pub async fn run(self) -> Result<ExitCode> {
        let Ok(state) = std::fs::canonicalize(&self.state.dir) else {
            eprintln!("there is no cloud in {}", self.state.dir.display());
            return Ok(ExitCode::SUCCESS);
        };
        let mut wrong: Vec<String> = Vec::new();
        let admin = Admin::new(state.join(crate::admin::SOCKET));
        if let Err(error) = end_instances(&admin, Duration::from_secs(self.wait)).await
            && !matches!(error, CliError::NoCloud { .. })
        {
            wrong.push(error.to_string());
        }
        end_processes(&state).await;
        let made: Surroundings = record::read(&state, "up").unwrap_or_default();
        end_machines(&state, &made);
        if let Err(error) = remove_surroundings(&made).await {
            wrong.push(error.to_string());
        } else {
            record::forget(&state, "up");
        }
        if self.purge && wrong.is_empty() {
            purge(&state)?;
        }
        if wrong.is_empty() { Ok(ExitCode::SUCCESS) } else { said(wrong.join("\n")) }
    }
}

/// Terminates every instance and waits until the nodes that attend have cleared up after theirs.
pub async fn end_instances(admin: &Admin, patience: Duration) -> Result<()> {
    let ended: api::EndedInstances = admin.post(api::END_INSTANCES, &()).await?;
    if !ended.refused.is_empty() {
        return said(format!("these instances could not be terminated: {}", ended.refused.join(" ")));
    }
    let until = Instant::now() + patience;
    let step = Step::begin("instances");
    loop {
        let status: api::Status = admin.get(api::STATUS).await?;
        let attends = |name: &str| status.nodes.iter().any(|node| node.connected && node.name == name);
        let left: Vec<&str> =
            status.instances.iter().filter(|one| attends(&one.node)).map(|one| one.id.as_str()).collect();
        if left.is_empty() {
            step.end(&format!("{} terminated", ended.terminated.len()));
            return Ok(());
        }
        if Instant::now() > until {
            step.fail();
            return said(format!("not cleared up after {} s: {}", patience.as_secs(), left.join(" ")));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Ends `mallee up`, which ends its processes; then whatever an earlier one has left.
async fn end_processes(state: &Path) {
    if let Some(pid) = record::holder(state).filter(|pid| *pid > 0) {
        let step = Step::begin("processes");
        // Gone in between is as good.
        let _ = kill(Pid::from_raw(pid as i32), Signal::SIGTERM);
        let until = Instant::now() + GRACE * (PROGRAMS.len() as u32 + 1);
        while record::holder(state).is_some() && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        if record::holder(state) == Some(pid) {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
        step.end("");
    }
    for name in PROGRAMS.iter().rev() {
        if let Some(started) = record::read::<Started>(state, name).filter(Started::alive) {
            let ending = tokio::task::spawn_blocking(move || supervise::end_now(&started));
            let _ = ending.await;
        }
        record::forget(state, name);
    }
}

/// Ends VMMs that outlived their agent: in the node's namespace, or with a file of ours.
fn end_machines(state: &Path, made: &Surroundings) {
    let own_network = made.namespace.as_deref().and_then(|name| namespace::identity(&namespace::path(name)));
    for pid in vmms() {
        let in_namespace = own_network.is_some() && namespace::of_process(pid) == own_network;
        let in_state = [format!("/proc/{pid}/root"), format!("/proc/{pid}/cwd")]
            .iter()
            .any(|link| std::fs::read_link(link).is_ok_and(|path| path.starts_with(state)));
        let named = std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| {
            line.split(|b| *b == 0).any(|word| Path::new(&*String::from_utf8_lossy(word)).starts_with(state))
        });
        if in_namespace || in_state || named {
            tracing::warn!(pid, "a VMM outlived its agent and is killed");
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
    }
}

/// Ids of the processes that execute `mallee-vmm`.
fn vmms() -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            program.file_name().is_some_and(|name| name.to_string_lossy().starts_with("mallee-vmm"))
        })
        .collect()
}

async fn remove_surroundings(made: &Surroundings) -> Result<()> {
    if let Some(bridge) = &made.bridge {
        let step = Step::begin("network");
        outside::down(bridge, made.namespace.as_deref()).await?;
        step.end("");
    }
    if made.uplink.is_some() {
        outside::clean().await?;
    }
    Ok(())
}

/// Removes the state folder, if it is one, with what is mounted in it.
fn purge(state: &Path) -> Result<()> {
    if !state.join("state.db").is_file() && !state.join("run").is_dir() {
        return said(format!("{} does not look like a cloud's folder and is left alone", state.display()));
    }
    for mount in mounts_below(state) {
        nix::mount::umount2(&mount, nix::mount::MntFlags::MNT_DETACH).map_err(|errno| CliError::File {
            what: "cannot unmount",
            path: mount,
            source: errno.into(),
        })?;
    }
    std::fs::remove_dir_all(state).map_err(|source| CliError::File {
        what: "cannot remove",
        path: state.to_owned(),
        source,
    })
}

/// Mount points below a folder, the innermost first.
fn mounts_below(folder: &Path) -> Vec<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut mounts: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        // The table writes a blank as \040 (`fstab(5)`).
        .map(|path| PathBuf::from(path.replace("\\040", " ")))
        .filter(|path| path.starts_with(folder))
        .collect();
    mounts.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
    mounts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_clouds_folder_is_purged() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("precious"), "").unwrap();
        assert!(purge(folder.path()).is_err());
        assert!(folder.path().join("precious").exists());
        std::fs::write(folder.path().join("state.db"), "").unwrap();
        purge(folder.path()).unwrap();
        assert!(!folder.path().exists());
    }
}
