//! The main thread: it waits for requests of the REST socket, signals, console input and the end of
//! the guest, and is the only one that changes the VM's configuration or state.

use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::api::{Action, EventKind, ExitReason, InstanceInfo, Metrics, SnapshotLoad, VmConfig, VmState};
use crate::builder;
use crate::bus::lock;
use crate::confine::{self, ThreadKind};
use crate::error::{Error, Result};
use crate::events::{self, Events};
use crate::gdb;
use crate::kick;
use crate::log::Log;
use crate::metrics::{self, PROCESS};
use crate::rest::{Call, Reply, Server};
use crate::snapshot;
use crate::snapshot::load::Loaded;
use crate::vcpu::ExitSignal;
use crate::vm::{RunningVm, set_duration};

/// Message of the exit event after SIGINT.
pub const INTERRUPTED: &str = "SIGINT";
const TERMINATED: &str = "SIGTERM";
const NOT_BEFORE_START: &str = "The requested operation is not supported before starting the microVM.";
const NOT_AFTER_CONFIGURATION: &str = "Loading a microVM snapshot is not possible after configuring the microVM.";
const NOT_AFTER_START: &str = "The requested operation is not supported after starting the microVM.";

/// What an event of the epoll set is about.
#[repr(u64)]
#[derive(Clone, Copy)]
enum Source {
    Exit,
    Signal,
    Requests,
    SerialTimer,
    StandardInput,
    MetricsTimer,
    Activations,
    PageServer,
}

const SOURCES: [Source; 8] = [
    Source::Exit,
    Source::Signal,
    Source::Requests,
    Source::SerialTimer,
    Source::StandardInput,
    Source::MetricsTimer,
    Source::Activations,
    Source::PageServer,
];

enum State {
    /// Collects its configuration.
    NotStarted,
    Running(RunningVm),
}

pub struct Monitor {
    id: String,
    config: VmConfig,
    state: State,
    events: Arc<Events>,
    exit: Arc<ExitSignal>,
    epoll: Epoll,
    signals: OwnedFd,
    server: Option<Server>,
    log: Log,
    metrics: Option<metrics::Sink>,
    /// The VM was started, and this thread is not under its filter yet: what it starts would be, too.
    is_confinement_due: bool,
}

impl Monitor {
    /// To be called before any thread exists: signals are blocked here, for all of them.
    pub fn new(id: String, events: Arc<Events>, log: Log) -> Result<Self> {
        kick::install_handler()?;
        let monitor = Monitor {
            id,
            config: VmConfig::default(),
            state: State::NotStarted,
            events,
            exit: Arc::new(ExitSignal::new()?),
            epoll: Epoll::new().map_err(Error::host("epoll"))?,
            signals: block_signals().map_err(Error::host("signalfd"))?,
            server: None,
            log,
            metrics: None,
            is_confinement_due: false,
        };
        monitor.watch(monitor.exit.event().as_raw_fd(), Source::Exit)?;
        monitor.watch(monitor.signals.as_raw_fd(), Source::Signal)?;
        Ok(monitor)
    }

    /// Builds the VM and starts it.
    pub fn start(&mut self, config: VmConfig) -> Result<()> {
        self.open_logs(&config)?;
        let vm = builder::build(&config, &self.events)?;
        confine::jail::leave_host()?;
        let built = events::now(EventKind::VmBuilt);
        let first_run = events::now(EventKind::FirstRun);
        metrics::first_run();
        let running = vm.start(&self.exit)?;
        // Written when the guest runs already: its first instruction does not wait for a disk.
        self.events.write(&built);
        self.events.write(&first_run);
        self.take_up(running, config)
    }

    /// Makes the VM of a snapshot, and has it go on if `request` says so.
    pub fn load(&mut self, request: &SnapshotLoad) -> Result<()> {
        self.restore(Loaded::read(request)?, request.resume_vm)
    }

    /// The same with a snapshot that was read already.
    pub fn restore(&mut self, snapshot: Loaded, resume: bool) -> Result<()> {
        let start = Instant::now();
        let vm = builder::restore(&snapshot, &self.events)?;
        confine::jail::leave_host()?;
        self.events.emit(EventKind::VmBuilt);
        let running = vm.start_paused(&self.exit)?;
        let mut config = snapshot.into_config();
        // What was read and taken apart is some ten pages, which every clone would keep.
        // SAFETY: gives free memory back and touches no other.
        unsafe { libc::malloc_trim(0) };
        (config.logger, config.metrics) = (self.config.logger.take(), self.config.metrics.take());
        self.take_up(running, config)?;
        set_duration(&PROCESS.restore_us, start);
        if let (State::Running(vm), true) = (&mut self.state, resume) {
            metrics::first_run();
            vm.resume();
            self.events.emit(EventKind::FirstRun);
        }
        Ok(())
    }

    /// From now on there is this VM.
    fn take_up(&mut self, running: RunningVm, config: VmConfig) -> Result<()> {
        gdb::serve(&running, &self.exit)?;
        self.watch(running.activations.event().as_raw_fd(), Source::Activations)?;
        self.watch(lock(&running.bus.serial).timer_fd(), Source::SerialTimer)?;
        if let Some(pages) = &running.pages {
            self.watch(pages.fd(), Source::PageServer)?;
        }
        if config.serial.is_none() {
            self.watch_standard_input();
        }
        self.config = config;
        self.state = State::Running(running);
        self.is_confinement_due = true;
        Ok(())
    }

    /// Serves the REST API on a Unix socket at `path`.
    pub fn serve(&mut self, path: &Path) -> Result<()> {
        let server = Server::start(path)?;
        self.watch(server.event().as_raw_fd(), Source::Requests)?;
        self.server = Some(server);
        Ok(())
    }

    /// Waits until the VM ends, and stops it in order.
    pub fn run(mut self) -> Result<(ExitReason, String)> {
        let verdict = self.wait()?;
        self.flush_metrics();
        if let State::Running(vm) = self.state {
            vm.stop();
        }
        Ok(verdict)
    }

    fn wait(&mut self) -> Result<(ExitReason, String)> {
        let mut ready = [EpollEvent::default(); SOURCES.len()];
        loop {
            if std::mem::take(&mut self.is_confinement_due) {
                confine::enter(ThreadKind::Monitor);
            }
            let count = match self.epoll.wait(-1, &mut ready) {
                Ok(count) => count,
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
                Err(error) => {
                    return Err(Error::Host { what: "epoll", source: error });
                }
            };
            for event in &ready[..count] {
                let Some(source) = SOURCES.get(event.data() as usize) else {
                    continue;
                };
                if let Some(verdict) = self.handle(*source) {
                    return Ok(verdict);
                }
            }
        }
    }

    fn handle(&mut self, source: Source) -> Option<(ExitReason, String)> {
        match source {
            Source::Exit => return self.exit.verdict(),
            Source::Signal => return self.read_signal(),
            Source::Requests => self.answer_requests(),
            Source::SerialTimer => {
                if let State::Running(vm) = &self.state {
                    lock(&vm.bus.serial).flush();
                }
            }
            Source::StandardInput => self.forward_input(),
            Source::Activations => {
                if let State::Running(vm) = &self.state {
                    vm.activate_devices();
                }
            }
            Source::PageServer => {
                return Some((ExitReason::HostFailure, "the page server of the memory has ended".into()));
            }
            Source::MetricsTimer => {
                if let Some(sink) = &mut self.metrics {
                    sink.tick();
                }
            }
        }
        None
    }

    fn answer_requests(&mut self) {
        while let Some((call, answer)) = self.server.as_ref().and_then(Server::next) {
            answer.send(self.answer(call));
        }
    }

    fn answer(&mut self, call: Call) -> Reply {
        match call {
            Call::DescribeInstance => Reply::json(&self.describe()),
            Call::Configuration(read) => read(&self.config),
            Call::Configure(change) => match &self.state {
                State::NotStarted => change(&mut self.config),
                State::Running(_) => Reply::refused(NOT_AFTER_START),
            },
            Call::Change(change) => match &self.state {
                State::NotStarted => Reply::refused(NOT_BEFORE_START),
                State::Running(vm) => change(vm, &mut self.config),
            },
            Call::SetState(wanted) => match &mut self.state {
                State::NotStarted => Reply::refused(NOT_BEFORE_START),
                State::Running(vm) => set_state(vm, wanted),
            },
            Call::Save(request) => match &self.state {
                State::NotStarted => Reply::refused(NOT_BEFORE_START),
                State::Running(vm) => Reply::from_result(snapshot::create(vm, &self.config, &request)),
            },
            Call::Load(request) => match &self.state {
                State::NotStarted if self.is_configured() => Reply::refused(NOT_AFTER_CONFIGURATION),
                State::NotStarted => Reply::from_result(self.load(&request)),
                State::Running(_) => Reply::refused(NOT_AFTER_START),
            },
            Call::Act(action) => self.act(action),
            Call::ConfigureMetrics(_) | Call::ConfigureLogger(_) if matches!(self.state, State::Running(_)) => {
                Reply::refused(NOT_AFTER_START)
            }
            Call::ConfigureMetrics(_) if self.metrics.is_some() => Reply::refused("The metrics have a path already."),
            Call::ConfigureMetrics(metrics) => {
                let reply = Reply::from_result(self.open_metrics(&metrics));
                self.config.metrics = Some(metrics);
                reply
            }
            Call::ConfigureLogger(logger) => {
                let reply = Reply::from_result(self.log.configure(&logger));
                self.config.logger = Some(logger);
                reply
            }
        }
    }

    /// Anything but where to log.
    fn is_configured(&self) -> bool {
        let VmConfig { logger, metrics, .. } = self.config.clone();
        self.config != VmConfig { logger, metrics, ..VmConfig::default() }
    }

    fn describe(&self) -> InstanceInfo {
        InstanceInfo {
            id: self.id.clone(),
            state: match &self.state {
                State::NotStarted => "Not started".into(),
                State::Running(vm) if vm.is_paused() => "Paused".into(),
                State::Running(_) => "Running".into(),
            },
            vmm_version: env!("CARGO_PKG_VERSION").into(),
            app_name: "mallee-vmm".into(),
        }
    }

    fn act(&mut self, action: Action) -> Reply {
        match (action, &self.state) {
            (Action::InstanceStart, State::NotStarted) => match self.start(self.config.clone()) {
                Ok(()) => Reply::done(),
                Err(error) => Reply::refused(error.to_string()),
            },
            (Action::InstanceStart, State::Running(_)) => Reply::refused("The microVM has already been started."),
            (Action::FlushMetrics, _) => match &mut self.metrics {
                Some(sink) => Reply::from_result(sink.flush().map_err(Error::host("metrics"))),
                None => Reply::refused("The metrics have no path; give one with PUT /metrics."),
            },
            (_, State::NotStarted) => Reply::refused("The microVM has not been started."),
            (Action::SendCtrlAltDel, State::Running(vm)) => match lock(&vm.bus.keyboard).ctrl_alt_del() {
                true => Reply::done(),
                false => Reply::refused("The guest does not read its keyboard."),
            },
            (Action::PowerButton, State::Running(vm)) => match vm.power_button.0.write(1) {
                Ok(()) => Reply::done(),
                Err(error) => Reply::refused(format!("power button: {error}")),
            },
        }
    }

    /// What a configuration file says of logs; through the socket it has been done already.
    fn open_logs(&mut self, config: &VmConfig) -> Result<()> {
        if let Some(logger) = config.logger.as_ref().filter(|logger| self.config.logger.as_ref() != Some(*logger)) {
            self.log.configure(logger)?;
        }
        match &config.metrics {
            Some(metrics) if self.metrics.is_none() => self.open_metrics(metrics),
            _ => Ok(()),
        }
    }

    fn open_metrics(&mut self, metrics: &Metrics) -> Result<()> {
        let sink = metrics::Sink::open(&metrics.metrics_path)?;
        self.watch(sink.timer_fd(), Source::MetricsTimer)?;
        self.metrics = Some(sink);
        Ok(())
    }

    /// The last line, when the VM ends.
    fn flush_metrics(&mut self) {
        if let Some(sink) = &mut self.metrics {
            let _ = sink.flush();
        }
    }

    fn watch(&self, fd: RawFd, source: Source) -> Result<()> {
        self.epoll
            .ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, source as u64))
            .map_err(Error::host("epoll"))
    }

    /// Standard input may be a file or closed, which cannot be waited for: then there is no input.
    fn watch_standard_input(&self) {
        if let Err(error) = self.watch(libc::STDIN_FILENO, Source::StandardInput) {
            tracing::debug!(%error, "no console input");
        }
    }

    fn stop_watching(&self, fd: RawFd) {
        let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
    }

    /// Gives the guest as much input as its FIFO takes. With a full FIFO the rest waits where it is; the
    /// epoll set is level-triggered, so this must not spin: it sleeps a little.
    fn forward_input(&mut self) {
        let State::Running(vm) = &self.state else {
            return;
        };
        let room = lock(&vm.bus.serial).input_room();
        if room == 0 {
            std::thread::sleep(std::time::Duration::from_millis(1));
            return;
        }
        let mut bytes = [0u8; 64];
        let limit = room.min(bytes.len());
        match std::io::stdin().lock().read(&mut bytes[..limit]) {
            Ok(0) => self.stop_watching(libc::STDIN_FILENO),
            Ok(count) => lock(&vm.bus.serial).input(&bytes[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => self.stop_watching(libc::STDIN_FILENO),
        }
    }

    fn read_signal(&mut self) -> Option<(ExitReason, String)> {
        // SAFETY: all zeroes is a valid `signalfd_siginfo`, a structure of integers.
        let mut info: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes at most the given size to `info`.
        let read = unsafe { libc::read(self.signals.as_raw_fd(), (&raw mut info).cast(), size_of_val(&info)) };
        if read != size_of_val(&info) as isize {
            return None;
        }
        let name = if info.ssi_signo == libc::SIGINT as u32 { INTERRUPTED } else { TERMINATED };
        Some((ExitReason::Signal, name.into()))
    }
}

fn set_state(vm: &mut RunningVm, wanted: VmState) -> Reply {
    match wanted {
        VmState::Paused => Reply::from_result(vm.pause()),
        VmState::Resumed => {
            vm.resume();
            Reply::done()
        }
    }
}

/// SIGTERM and SIGINT become readable from the returned descriptor.
fn block_signals() -> std::io::Result<OwnedFd> {
    // SAFETY: the set is initialised by `sigemptyset` before it is used, all pointers are to locals, and a
    // descriptor that `signalfd` returns is owned by nobody else.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        if libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}
