//! `mallee-bench`: the monitor beside its peers. See [`mallee_tests::bench`].

use std::{
    collections::BTreeMap,
    io::Write,
    path::{Path, PathBuf},
    process::{Command as Process, ExitCode, Stdio},
    time::Duration,
};

use clap::{Parser, Subcommand};
use mallee_tests::{
    bench::{
        BenchError, disk, echo,
        facts::Facts,
        floor, guest, memory,
        monitors::{self, FLOOR, MEMORY_MIB, Monitor, OURS},
        net,
        record::{Record, Series},
        run::{self, Guest},
        serial,
        snapshot::Saved,
        up,
    },
    guest::{disk_bench, init, net_bench},
    lab::programs::Places,
};

#[derive(Parser)]
#[command(name = "mallee-bench", version, about = "Measures mallee-vmm beside its peers")]
struct Command {
    /// Folder for the results, one JSON file a benchmark.
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
    /// Runs of each monitor.
    #[arg(long, default_value_t = 30)]
    runs: usize,
    /// Folder with our programs; by default where this one lies.
    #[arg(long, env = "MALLEE_BIN")]
    programs: Option<PathBuf>,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Subcommand)]
enum Verb {
    /// Run the smallest guest with KVM calls alone and print its byte.
    #[command(hide = true)]
    Floor {
        /// With KVM's interrupt controllers.
        #[arg(long)]
        interrupt_chip: bool,
    },
    /// Restore a snapshot: time, rate, memory of a clone.
    Snapshot,
    /// How long a small Linux guest takes to be up. To be run where KVM runs Linux, with the files that `mallee-guest build` makes.
    Up {
        #[arg(long)]
        files: PathBuf,
    },
    /// Requests a second on a virtio disk. To be run where that is.
    Disk {
        #[arg(long)]
        files: PathBuf,
    },
    /// What a virtio network interface moves. To be run where that is, as root.
    Net {
        #[arg(long)]
        files: PathBuf,
    },
    /// What a virtio network interface moves, with the probe in Linux's place. To be run as root, on any KVM.
    Echo {
        /// The probe's ELF image.
        #[arg(long)]
        probe: PathBuf,
    },
}

fn main() -> ExitCode {
    let command = Command::parse();
    let done = match &command.verb {
        Some(Verb::Floor { interrupt_chip }) => run_floor(*interrupt_chip),
        Some(Verb::Snapshot) => measure_snapshot(&command),
        Some(Verb::Up { files }) => measure_boots(&command, files),
        Some(Verb::Disk { files }) => measure_disks(&command, files),
        Some(Verb::Net { files }) => measure_networks(&command, files),
        Some(Verb::Echo { probe }) => measure_echoes(&command, probe),
        None => measure(&command),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mallee-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run_floor(interrupt_chip: bool) -> Result<(), BenchError> {
    floor::first_byte(MEMORY_MIB as usize, interrupt_chip, |byte| {
        let mut out = std::io::stdout();
        let _ = out.write_all(&[byte]).and_then(|()| out.flush());
        // The others are measured while they still run; so is this.
        loop {
            std::thread::park();
        }
    })
}

fn measure(command: &Command) -> Result<(), BenchError> {
    let places = Places::new(command.programs.as_deref());
    let facts = Facts::of_this_machine(&places);
    let at = |action, path: &Path| {
        let path = path.to_owned();
        move |source| BenchError::File { action, path, source }
    };
    let work = tempfile::tempdir().map_err(at("making a folder in", &std::env::temp_dir()))?;
    let kernel = work.path().join("guest.elf");
    std::fs::write(&kernel, guest::elf()).map_err(at("writing", &kernel))?;

    let mut runners: Vec<Runner> =
        monitors::present(&places, &kernel, work.path())?.into_iter().map(Runner::of_monitor).collect();
    runners.push(Runner::of_floor(&[])?);
    let mut left_out = leave_out_those_that_cannot(&mut runners);

    for _ in 0..command.runs {
        for runner in &mut runners {
            runner.run()?;
        }
    }
    let series =
        runners.iter().filter_map(|one| Series::of(&one.name, &one.version, "ms", one.took_ms.clone())).collect();
    let what = "From exec to the guest's first serial byte, 128 MiB, 1 vCPU, smallest ELF guest";
    let record = Record::new("first_serial_byte", what, facts.clone(), series, left_out.clone());
    record.print();
    record.write(&command.out)?;

    left_out.insert(FLOOR.to_owned(), "it is no monitor".to_owned());
    let mut series = Vec::new();
    for one in runners.iter().filter(|one| one.name != FLOOR) {
        series.extend(Series::of(&one.name, &one.version, "KiB", one.other_kib.clone()));
    }
    let what = "Resident memory beyond the guest's own, 128 MiB, 1 vCPU, smallest ELF guest";
    let record = Record::new("memory_overhead", what, facts, series, left_out);
    record.print();
    record.write(&command.out)
}

/// Clones that are started at once.
const CLONES: usize = 100;

fn measure_snapshot(command: &Command) -> Result<(), BenchError> {
    let places = Places::new(command.programs.as_deref());
    let facts = Facts::of_this_machine(&places);
    let program = places.find(OURS)?;
    let version = monitors::version(&program);
    let work = temporary_folder()?;
    let saved = Saved::new(&program, work.path(), false)?;
    let floor = Runner::of_floor(&["--interrupt-chip"])?;
    let (mut ours, mut floors) = (Vec::new(), Vec::new());
    for _ in 0..command.runs {
        ours.push(serial::start(OURS, &mut saved.command())?.took.as_secs_f64() * 1000.0);
        floors.push(serial::start(FLOOR, &mut (floor.command)())?.took.as_secs_f64() * 1000.0);
    }
    let series = [Series::of(OURS, &version, "ms", ours), Series::of(FLOOR, &floor.version, "ms", floors)];
    let what = "From exec to the first instructions of a restored guest, 128 MiB, 1 vCPU (floor: a new VM with interrupt chip)";
    finish(
        command,
        Record::new("restore", what, facts.clone(), series.into_iter().flatten().collect(), BTreeMap::new()),
    )?;

    let rates = (0..command.runs.min(5)).map(|_| saved.rate(CLONES)).collect::<Result<_, _>>()?;
    let series = Series::of(OURS, &version, "a second", rates).into_iter().collect();
    let what = "100 clones of one snapshot started at once, until each runs";
    finish(command, Record::new("clones", what, facts.clone(), series, BTreeMap::new()))?;

    let mut series = Vec::new();
    for (name, saved) in [(OURS, saved), ("mallee-vmm with network", Saved::new(&program, work.path(), true)?)] {
        let resident = saved.resident()?;
        let own = (resident.guest_private_kib + resident.other_private_kib) as f64;
        series.extend(Series::of(name, &version, "KiB", vec![own]));
    }
    let what = "Memory that a clone shares with nobody, 128 MiB, 1 vCPU";
    finish(command, Record::new("clone_memory", what, facts, series, BTreeMap::new()))
}

fn finish(command: &Command, record: Record) -> Result<(), BenchError> {
    record.print();
    record.write(&command.out)
}

/// How long each monitor that is here takes to a guest's first process.
fn measure_boots(command: &Command, files: &Path) -> Result<(), BenchError> {
    let places = Places::new(command.programs.as_deref());
    let work = temporary_folder()?;
    let guest = Guest::linux(files, "", work.path());
    let monitors = up::present(&places.find(OURS)?, &guest)?;
    let is_up = |line: &str| line.contains(init::MARK).then_some(());
    let counted = Counted::of(command, &places, &monitors, is_up);
    let what = "From exec to the first line of a small Linux guest's first process, 128 MiB, 1 vCPU";
    counted.tell("guest_up", what, "ms", |((), took)| took.as_secs_f64() * 1000.0)
}

/// What a guest counts on its disk, with each monitor that is here and each of its ways to the file.
fn measure_disks(command: &Command, files: &Path) -> Result<(), BenchError> {
    let places = Places::new(command.programs.as_deref());
    let work = temporary_folder()?;
    let guest = Guest::linux(files, disk_bench::WORD, work.path());
    disk::make_disk(&guest)?;
    let monitors = disk::present(&places.find(OURS)?, &guest)?;
    let counted = Counted::of(command, &places, &monitors, disk_bench::Rates::from_line);
    let each = "a second";
    counted.tell("disk_read", "Random reads of 4 KiB a second, one after the other", each, |(it, _)| it.read)?;
    counted.tell("disk_reads", "Random reads of 4 KiB a second, 16 threads", each, |(it, _)| it.reads)?;
    counted.tell("disk_flush", "Random writes of 4 KiB a second, each flushed", each, |(it, _)| it.flush)
}

/// What a guest moves over its network interface, with each monitor that is here, by its threads and by vhost-net.
fn measure_networks(command: &Command, files: &Path) -> Result<(), BenchError> {
    let places = Places::new(command.programs.as_deref());
    let work = temporary_folder()?;
    let guest = Guest::linux(files, net_bench::WORD, work.path());
    let monitors = net::present(&places.find(OURS)?, &guest)?;
    let _far = net::Far::start()?;
    let counted = Counted::of(command, &places, &monitors, net_bench::Rates::from_line);
    let mib = "MiB a second";
    counted.tell("net_to_host", "One TCP stream from the guest to the host, one pair of queues", mib, |(it, _)| {
        it.to_host
    })?;
    counted.tell("net_from_host", "One TCP stream from the host to the guest", mib, |(it, _)| it.from_host)?;
    counted
        .tell("net_packets", "UDP packets of 64 bytes from the guest to the host", "a second", |(it, _)| it.packets)?;
    counted.tell("net_round_trip", "A UDP packet from the guest and its answer", "µs", |(it, _)| it.round_trip)
}

/// What the probe's network interface moves, with each monitor whose devices it finds.
fn measure_echoes(command: &Command, probe: &Path) -> Result<(), BenchError> {
    echo::leave_network()?;
    let places = Places::new(command.programs.as_deref());
    let work = temporary_folder()?;
    let monitors = net::mmio(&places.find(OURS)?, &echo::guest(probe, work.path()))?;
    let _far = net::Far::new()?;
    let counted = Counted::by(command, &places, &monitors, |monitor| monitor.during(echo::measure));
    counted.tell("echo_round_trip", "A UDP packet of 64 bytes to the probe and its echo", "µs", |it| it.round_trip)?;
    counted.tell("echo_rate", "Echoes with 32 packets under way", "a second", |it| it.echoes)?;
    counted.tell("echo_taken", "UDP packets of 64 bytes that the probe takes", "a second", |it| it.taken)
}

fn temporary_folder() -> Result<tempfile::TempDir, BenchError> {
    let at = |source| BenchError::File { action: "making a folder in", path: std::env::temp_dir(), source };
    tempfile::tempdir().map_err(at)
}

/// What a guest has counted in alternating runs of some monitors.
struct Counted<'a, T> {
    command: &'a Command,
    facts: Facts,
    monitors: &'a [run::Monitor],
    /// Of each monitor.
    counted: Vec<Vec<T>>,
    left_out: BTreeMap<String, String>,
}

impl<'a, T> Counted<'a, (T, Duration)> {
    /// What guests say in a line, with how long each took to say so.
    fn of(
        command: &'a Command,
        places: &Places,
        monitors: &'a [run::Monitor],
        from_line: fn(&str) -> Option<T>,
    ) -> Self {
        Self::by(command, places, monitors, |monitor| monitor.run(from_line))
    }
}

impl<'a, T> Counted<'a, T> {
    fn by(
        command: &'a Command,
        places: &Places,
        monitors: &'a [run::Monitor],
        measure: impl Fn(&run::Monitor) -> Result<T, BenchError>,
    ) -> Self {
        let mut counted: Vec<Vec<T>> = monitors.iter().map(|_| Vec::new()).collect();
        let mut left_out = BTreeMap::new();
        for _ in 0..command.runs {
            for (monitor, counted) in monitors.iter().zip(&mut counted) {
                match measure(monitor) {
                    Ok(found) => counted.push(found),
                    Err(error) => drop(left_out.insert(monitor.name.clone(), error.to_string())),
                }
            }
        }
        Counted { command, facts: Facts::of_this_machine(places), monitors, counted, left_out }
    }

    /// Prints and writes one figure of what was counted.
    fn tell(
        &self,
        name: &'static str,
        what: &'static str,
        unit: &'static str,
        of: fn(&T) -> f64,
    ) -> Result<(), BenchError> {
        let series = self.monitors.iter().zip(&self.counted).filter_map(|(monitor, counted)| {
            Series::of(&monitor.name, &monitor.version, unit, counted.iter().map(of).collect())
        });
        finish(self.command, Record::new(name, what, self.facts.clone(), series.collect(), self.left_out.clone()))
    }
}

/// One monitor and what was measured of it so far.
struct Runner {
    name: String,
    version: String,
    command: Box<dyn Fn() -> Process>,
    took_ms: Vec<f64>,
    other_kib: Vec<f64>,
}

impl Runner {
    fn of_monitor(monitor: Monitor) -> Runner {
        Runner {
            name: monitor.name.to_owned(),
            version: monitor.version.clone(),
            command: Box::new(move || monitor.command()),
            took_ms: Vec::new(),
            other_kib: Vec::new(),
        }
    }

    /// `words` for the hidden verb.
    fn of_floor(words: &'static [&str]) -> Result<Runner, BenchError> {
        let own = std::env::current_exe().map_err(|source| BenchError::Start { monitor: FLOOR.into(), source })?;
        Ok(Runner {
            name: FLOOR.to_owned(),
            version: "KVM calls alone".to_owned(),
            command: Box::new(move || {
                let mut command = Process::new(&own);
                command.arg("floor").args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
                command
            }),
            took_ms: Vec::new(),
            other_kib: Vec::new(),
        })
    }

    fn run(&mut self) -> Result<(), BenchError> {
        let started = serial::start(&self.name, &mut (self.command)())?;
        self.took_ms.push(started.took.as_secs_f64() * 1000.0);
        if self.name != FLOOR {
            // Threads that come up beside the guest have come up by then.
            std::thread::sleep(Duration::from_millis(50));
            let resident = memory::resident(started.child.id(), MEMORY_MIB)
                .map_err(|reason| BenchError::Memory { monitor: self.name.clone(), reason })?;
            self.other_kib.push(resident.other_kib as f64);
        }
        Ok(())
    }
}

/// A first run of each, which also warms the caches; who fails it is taken from the list.
fn leave_out_those_that_cannot(runners: &mut Vec<Runner>) -> BTreeMap<String, String> {
    let mut left_out = BTreeMap::new();
    runners.retain_mut(|runner| match runner.run() {
        Ok(()) => {
            runner.took_ms.clear();
            runner.other_kib.clear();
            true
        }
        Err(error) => {
            left_out.insert(runner.name.clone(), error.to_string());
            false
        }
    });
    left_out
}
