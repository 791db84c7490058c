//! A lab's folder: where everything of it lies, so that a later program finds it again.
//!
//! ```text
//! LAB/lock                      locked while nodes are started or ended; makes the folder a lab's
//! LAB/programs-HASH.cpio        our programs as nodes get them
//! LAB/NODE/machine.json         what the node is made of
//! LAB/NODE/process.json         the QEMU that is it: process id and start time
//! LAB/NODE/initrd               what it boots; holds its credentials
//! LAB/NODE/state.img            its disk, which outlives a reboot
//! LAB/NODE/console.log          everything it ever wrote to its console
//! LAB/NODE/SERVICE.log          what netd and agent log
//! LAB/NODE/control*.sock        where commands go in
//! ```

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::fcntl::{Flock, FlockArg};

use super::{
    error::{LabError, OnPath},
    machine::Machine,
    process::Process,
};

/// A lab by its folder; it need not exist yet.
#[derive(Debug, Clone)]
pub struct Lab {
    pub folder: PathBuf,
}

/// One node's folder in a lab.
#[derive(Debug, Clone)]
pub struct Node {
    pub name: String,
    pub folder: PathBuf,
}

impl Lab {
    const LOCK: &str = "lock";

    /// Makes the folder, or takes it when it is a lab's already. Its path is made absolute: the nodes'
    /// taps are named after it.
    pub fn at(folder: &Path) -> Result<Lab, LabError> {
        fs::create_dir_all(folder).on("making", folder)?;
        let folder = folder.canonicalize().on("resolving", folder)?;
        let lock = folder.join(Self::LOCK);
        // `down` removes the whole folder: nobody's own files may lie in it.
        let empty = fs::read_dir(&folder).on("reading", &folder)?.next().is_none();
        if !empty && !lock.is_file() {
            return Err(LabError::Invalid {
                what: format!("the lab's folder {}", folder.display()),
                reason: "other files lie in it; name an empty or a new one".into(),
            });
        }
        let open = File::options().create(true).append(true).open(&lock);
        open.on("making", &lock)?;
        Ok(Lab { folder })
    }

    /// The lab in a folder that may not be there, or not be a lab's.
    pub fn existing(folder: &Path) -> Option<Lab> {
        let folder = folder.canonicalize().ok()?;
        folder.join(Self::LOCK).is_file().then_some(Lab { folder })
    }

    /// Keeps others from starting and ending nodes until it is dropped.
    pub fn lock(&self) -> Result<Flock<File>, LabError> {
        let path = self.folder.join(Self::LOCK);
        let file = File::options().append(true).open(&path).on("opening", &path)?;
        let lock =
            Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into()).on("locking", &path)?;
        // Whoever held it may have removed the lab.
        fs::metadata(&path).on("looking at", &path)?;
        Ok(lock)
    }

    /// Ends every node and removes the lab.
    pub fn remove(&self) -> Result<Vec<String>, LabError> {
        let _lock = self.lock()?;
        let nodes = self.nodes();
        for node in &nodes {
            node.stop()?;
        }
        fs::remove_dir_all(&self.folder).on("removing", &self.folder)?;
        Ok(nodes.into_iter().map(|node| node.name).collect())
    }

    /// Every node, by name; also one whose making was broken off.
    pub fn nodes(&self) -> Vec<Node> {
        let mut nodes: Vec<Node> = fs::read_dir(&self.folder)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.path().is_dir() && !entry.file_name().to_string_lossy().starts_with('.'))
            .map(|entry| self.node(&entry.file_name().to_string_lossy()))
            .collect();
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        nodes
    }

    pub fn node(&self, name: &str) -> Node {
        Node { name: name.to_owned(), folder: self.folder.join(name) }
    }

    /// A node that must be there.
    pub fn known(&self, name: &str) -> Result<Node, LabError> {
        let nodes = self.nodes();
        nodes.iter().find(|node| node.name == name).cloned().ok_or_else(|| {
            let known: Vec<_> = nodes.iter().map(|node| node.name.as_str()).collect();
            LabError::NoSuchNode {
                node: name.to_owned(),
                lab: self.folder.clone(),
                known: if known.is_empty() { "none".into() } else { known.join(", ") },
            }
        })
    }
}

impl Node {
    const MACHINE: &str = "machine.json";
    const PROCESS: &str = "process.json";

    pub fn console_log(&self) -> PathBuf {
        self.folder.join("console.log")
    }

    /// Where the node's credentials for the controller lie on the host.
    pub fn credentials(&self) -> PathBuf {
        self.folder.join("credentials")
    }

    pub fn process_file(&self) -> PathBuf {
        self.folder.join(Self::PROCESS)
    }

    pub fn process(&self) -> Option<Process> {
        Process::read(&self.process_file())
    }

    pub fn is_running(&self) -> bool {
        self.process().is_some_and(|process| process.is_alive())
    }

    pub fn machine(&self) -> Result<Machine, LabError> {
        let path = self.folder.join(Self::MACHINE);
        let text = fs::read(&path).on("reading", &path)?;
        serde_json::from_slice(&text)
            .map_err(|e| LabError::Invalid { what: path.display().to_string(), reason: e.to_string() })
    }

    pub fn save_machine(&self, machine: &Machine) -> Result<(), LabError> {
        let path = self.folder.join(Self::MACHINE);
        let text = serde_json::to_vec_pretty(machine).map_err(std::io::Error::other).on("writing", &path)?;
        fs::write(&path, text).on("writing", &path)
    }

    /// Pulls the plug and forgets the node: its machine, its disk, its logs.
    pub fn remove(&self) -> Result<(), LabError> {
        self.stop()?;
        fs::remove_dir_all(&self.folder).on("removing", &self.folder)
    }

    /// Pulls the plug; what the node wrote to its disk stays.
    pub fn stop(&self) -> Result<(), LabError> {
        if let Some(process) = self.process() {
            process
                .end(Duration::from_secs(5))
                .map_err(std::io::Error::from)
                .on("ending the machine of", &self.folder)?;
        }
        Ok(())
    }

    /// The last lines of the console.
    pub fn console_tail(&self, lines: usize) -> String {
        let text = fs::read(self.console_log()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let all: Vec<_> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}
