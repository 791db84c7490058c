//! `mallee-lab`: bare-metal nodes out of QEMU, for a machine that has none. See [`mallee_tests::lab`].

use std::{
    io::{self, Read, Write},
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::{Args, Parser, Subcommand};
use mallee_tests::lab::{Lab, LabError, Node, Wanted, channel, machine, monitor, packages, programs::Places};

#[derive(Parser)]
#[command(name = "mallee-lab", version, about = "Bare-metal nodes made out of QEMU")]
struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Start nodes and wait until they are up.
    Up(Up),
    /// Fetch the packages that nodes are made of, so that a later `up` needs no network.
    Fetch,
    /// Run a command in a node; its output and its status come back.
    Run(Run),
    /// Show what a node wrote to its console.
    Console(Console),
    /// What nodes there are and how they are.
    Status(Where),
    /// Pull a node's plug and switch it on again; its disk stays.
    Reset(OneNode),
    /// End the nodes named, or all, and remove all that was made for them.
    Down(Down),
    #[command(hide = true)]
    ExecNode { folder: PathBuf, lock: i32 },
}

#[derive(Args)]
struct Where {
    /// Folder of the lab.
    #[arg(long = "lab", env = "MALLEE_LAB", default_value = "/var/lib/mallee-lab")]
    folder: PathBuf,
}

#[derive(Args)]
struct OneNode {
    #[command(flatten)]
    lab: Where,
    node: String,
}

#[derive(Args)]
struct Up {
    #[command(flatten)]
    lab: Where,
    #[command(flatten)]
    wanted: Wanted,
    /// Folder with the programs; by default where this program lies.
    #[arg(long, env = "MALLEE_BIN")]
    programs: Option<PathBuf>,
}

#[derive(Args)]
struct Run {
    #[command(flatten)]
    lab: Where,
    /// Pass standard input on (read to its end first).
    #[arg(short, long)]
    input: bool,
    node: String,
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

#[derive(Args)]
struct Console {
    #[command(flatten)]
    lab: Where,
    node: String,
    /// Go on showing what comes.
    #[arg(short, long)]
    follow: bool,
}

#[derive(Args)]
struct Down {
    #[command(flatten)]
    lab: Where,
    nodes: Vec<String>,
}

fn main() -> ExitCode {
    let done = match Command::parse().verb {
        Verb::Up(up) => up.execute(),
        Verb::Fetch => packages::fetch(&say).map(|set| println!("kernel {}", set.release)),
        Verb::Run(run) => return run.execute(),
        Verb::Console(console) => console.execute(),
        Verb::Status(place) => status(&place),
        Verb::Reset(one) => reset(&one),
        Verb::Down(down) => down.execute(),
        Verb::ExecNode { folder, lock } => machine::become_machine(&folder, lock).map(|never| match never {}),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mallee-lab: {error}");
            ExitCode::FAILURE
        }
    }
}

impl Up {
    fn execute(&self) -> Result<(), LabError> {
        let began = Instant::now();
        let lab = Lab::at(&self.lab.folder)?;
        let places = Places::new(self.programs.as_deref());
        let nodes = self.wanted.start(&lab, &places, &say)?;
        for node in nodes {
            let status = machine::wait_booted(&node, Duration::from_secs(90))?;
            println!(
                "{}: up after {:.1} s (kernel {}, {})",
                node.name,
                began.elapsed().as_secs_f64(),
                status.kernel,
                if status.kvm { "KVM" } else { "no KVM" }
            );
        }
        Ok(())
    }
}

impl Run {
    fn execute(&self) -> ExitCode {
        match self.run() {
            Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(255)),
            Err(error) => {
                eprintln!("mallee-lab: {error}");
                ExitCode::from(255)
            }
        }
    }

    fn run(&self) -> Result<i32, LabError> {
        let node = known(&self.lab, &self.node)?;
        let mut stdin = Vec::new();
        if self.input {
            io::stdin().lock().read_to_end(&mut stdin).map_err(|source| LabError::File {
                action: "reading",
                path: "standard input".into(),
                source,
            })?;
        }
        channel::run(&node.folder, &self.command, &stdin, &mut io::stdout(), &mut io::stderr())
    }
}

impl Console {
    fn execute(&self) -> Result<(), LabError> {
        let node = known(&self.lab, &self.node)?;
        let path = node.console_log();
        let failed = |source| LabError::File { action: "reading", path: path.clone(), source };
        let mut file = std::fs::File::open(&path).map_err(failed)?;
        loop {
            io::copy(&mut file, &mut io::stdout()).map_err(failed)?;
            let _ = io::stdout().flush();
            if !self.follow || !node.is_running() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Down {
    fn execute(&self) -> Result<(), LabError> {
        let Some(lab) = Lab::existing(&self.lab.folder) else {
            return Ok(());
        };
        let mut gone = Vec::new();
        if self.nodes.is_empty() {
            gone = lab.remove()?;
        } else {
            let _lock = lab.lock()?;
            for name in &self.nodes {
                lab.known(name)?.remove()?;
                gone.push(name.clone());
            }
        }
        gone.iter().for_each(|name| println!("{name}: gone"));
        Ok(())
    }
}

fn status(place: &Where) -> Result<(), LabError> {
    for node in Lab::existing(&place.folder).map(|lab| lab.nodes()).unwrap_or_default() {
        if !node.is_running() {
            println!("{}: off", node.name);
            continue;
        }
        match channel::status(&node.folder, Duration::from_secs(2)) {
            Ok(status) => {
                println!("{}: up, kernel {}, booted in {} ms", node.name, status.kernel, status.booted_ms);
                for service in status.services {
                    let pid = service.pid.map_or("down".to_owned(), |pid| format!("pid {pid}"));
                    println!("  {}: {pid}, started again {} times", service.name, service.restarts);
                }
            }
            Err(error) => println!("{}: on, but {error}", node.name),
        }
    }
    Ok(())
}

fn reset(one: &OneNode) -> Result<(), LabError> {
    let node = known(&one.lab, &one.node)?;
    monitor::execute(&node.folder, "system_reset")?;
    machine::wait_booted(&node, Duration::from_secs(90)).map(drop)
}

fn say(text: &str) {
    eprintln!("  {text}");
}

fn known(place: &Where, node: &str) -> Result<Node, LabError> {
    let lab = Lab::existing(&place.folder).ok_or_else(|| LabError::NoSuchNode {
        node: node.to_owned(),
        lab: place.folder.clone(),
        known: "none".into(),
    })?;
    lab.known(node)
}
