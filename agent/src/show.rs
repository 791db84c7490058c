//! `mallee-agent show`: what the state folder holds, for people. Works with and without an agent.

use std::fs;
use std::path::Path;

use crate::error::Result;
use crate::ids::Digest;
use crate::instance::folder::Folder;
use crate::instance::vmm_process::VmmProcess;
use crate::node::found_on_disk;
use crate::store::StateDir;

/// Prints instances and images.
pub fn show(state: &Path) -> Result<()> {
    let state = StateDir::look(state)?;
    match state.load_desired() {
        Some(desired) => println!("desired: generation {}, {} instances", desired.generation, desired.instances.len()),
        None => println!("desired: nothing yet"),
    }
    println!("instance                  pid     uid starts reboots  at rest because");
    for (id, record) in found_on_disk(&state.instances()) {
        let pid = match VmmProcess::find(&Folder::of(&state.instances(), &id)) {
            Ok(Some(process)) => process.pid().to_string(),
            Ok(None) => "-".to_owned(),
            Err(_) => "?".to_owned(),
        };
        match record {
            Some(record) => {
                let rest = record.rest.map(|rest| rest.reason).unwrap_or_default();
                println!("{id:<21} {pid:>7} {:>7} {:>6} {:>7}  {rest}", record.uid, record.starts, record.reboots);
            }
            None => println!("{id:<21} {pid:>7} no record: a left-over, the agent removes it"),
        }
    }
    for (folder, what) in [(state.images(), "image"), (state.images().join("partial"), "being fetched")] {
        for (digest, size) in digests_in(&folder) {
            println!("{what} {digest} {} KiB", size >> 10);
        }
    }
    Ok(())
}

fn digests_in(folder: &Path) -> Vec<(Digest, u64)> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.metadata().ok()?.len())))
        .collect()
}
