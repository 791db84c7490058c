//! Keeps one process of the cloud alive.
//!
//! A process is started in a group of its own, so that a Ctrl-C on the terminal reaches `mallee up`
//! alone, and it is not tied to `mallee up`'s life: killed, `mallee up` leaves its processes running,
//! and the next one takes them over when they are what it would start. A process that ends is
//! started again, after a pause that doubles each time it did not stay.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::record::{self, Started};
use super::{CliError, Result, namespace};

/// What goes into the logs when the operator says nothing. The S3 library calls every refusal of a
/// client's request an error; those are in our own log line of the request.
const LOG_FILTER: &str = "info,s3s=off,sqlx=warn";

const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A process that ran for this long is taken to have been well.
const STAYED: Duration = Duration::from_secs(30);
/// How long a process may take to end after SIGTERM.
pub const GRACE: Duration = Duration::from_secs(10);

/// What to run.
#[derive(Debug, Clone)]
pub struct Program {
    pub name: &'static str,
    pub path: PathBuf,
    pub arguments: Vec<OsString>,
    /// Network namespace to run in.
    pub namespace: Option<PathBuf>,
}

impl Program {
    fn command(&self) -> Vec<String> {
        let namespace = self.namespace.iter().map(|path| format!("netns={}", path.display()));
        let words = std::iter::once(self.path.as_os_str()).chain(self.arguments.iter().map(OsString::as_os_str));
        namespace.chain(words.map(|word| word.to_string_lossy().into_owned())).collect()
    }

    fn spawn(&self, state: &Path) -> Result<Child> {
        let log_error =
            |source| CliError::File { what: "cannot write", path: record::log_file(state, self.name), source };
        let log = record::open_log(state, self.name).map_err(log_error)?;
        let mut command = Command::new(&self.path);
        command
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(log_error)?)
            .stderr(log)
            .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| LOG_FILTER.to_owned()))
            // Their standard error is a file: no colours.
            .env("NO_COLOR", "1")
            .process_group(0);
        if let Some(path) = &self.namespace {
            namespace::enter(&mut command, path)?;
        }
        command.spawn().map_err(|source| CliError::File { what: "cannot execute", path: self.path.clone(), source })
    }
}

/// A process of ours, a child or one that was taken over.
struct Watched {
    started: Started,
    /// Readable when the process has ended.
    handle: AsyncFd<OwnedFd>,
    child: Option<Child>,
}

impl Watched {
    fn of(started: Started, child: Option<Child>) -> io::Result<Watched> {
        let pidfd = open_pidfd(started.pid)?;
        // SAFETY: the descriptor is open, is owned by the `AsyncFd` from here on, and an `OwnedFd`
        // always stands for the same one.
        let handle = unsafe { AsyncFd::register_with_interest(pidfd, tokio::io::Interest::READABLE) }?;
        Ok(Watched { started, handle, child })
    }

    /// Waits for the end; what it says is for the log.
    async fn ended(&mut self) -> String {
        if let Err(error) = self.handle.readable().await {
            return format!("cannot be watched: {error}");
        }
        match self.child.as_mut().map(Child::wait) {
            Some(Ok(status)) => status.to_string(),
            Some(Err(error)) => error.to_string(),
            None => "ended (it was not our child)".to_owned(),
        }
    }

    fn signal(&self, signal: Signal) {
        send_signal(self.handle.get_ref(), signal);
    }
}

/// Keeps a program running until it is told to stop.
pub struct Keeper {
    pub name: &'static str,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Keeper {
    /// Takes the recorded process over, or starts one. An error here is one of the first start.
    pub fn start(program: Program, state: &Path) -> Result<Keeper> {
        let first = take_over(&program, state)?.map_or_else(|| spawn(&program, state, 0), Ok)?;
        let stop = CancellationToken::new();
        let name = program.name;
        let task = tokio::spawn(keep(program, state.to_owned(), first, stop.clone()));
        Ok(Keeper { name, stop, task })
    }

    /// Ends the process: SIGTERM, and SIGKILL after [`GRACE`].
    pub async fn stop(self) {
        self.stop.cancel();
        // It fails only if the task panicked; then there is nobody left to wait for.
        let _ = self.task.await;
    }
}

async fn keep(program: Program, state: PathBuf, mut process: Watched, stop: CancellationToken) {
    let mut pause = FIRST_PAUSE;
    loop {
        let begun = Instant::now();
        let how = tokio::select! {
            how = process.ended() => how,
            () = stop.cancelled() => return end(program.name, &state, process).await,
        };
        let ran = begun.elapsed();
        pause = if ran >= STAYED { FIRST_PAUSE } else { pause };
        tracing::warn!(program = program.name, pid = process.started.pid, %how, again_in_ms = pause.as_millis() as u64, "ended");
        process = loop {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => return record::forget(&state, program.name),
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
            match spawn(&program, &state, process.started.restarts + 1) {
                Ok(process) => break process,
                Err(error) => tracing::error!(program = program.name, %error, "cannot be started again"),
            }
        };
    }
}

async fn end(name: &str, state: &Path, mut process: Watched) {
    process.signal(Signal::SIGTERM);
    if tokio::time::timeout(GRACE, process.ended()).await.is_err() {
        tracing::warn!(program = name, "did not end within {} s of SIGTERM and is killed", GRACE.as_secs());
        process.signal(Signal::SIGKILL);
        process.ended().await;
    }
    record::forget(state, name);
}

fn spawn(program: &Program, state: &Path, restarts: u32) -> Result<Watched> {
    let child = program.spawn(state)?;
    let pid = child.id();
    // A process that has ended already has no start time; it will be seen to have ended.
    let start_ticks = record::start_ticks(pid).unwrap_or(0);
    let started = Started { pid, start_ticks, command: program.command(), restarts };
    record::write(state, program.name, &started)?;
    tracing::info!(program = program.name, pid, "started");
    Watched::of(started, Some(child)).map_err(|error| CliError::System("cannot watch a process", error))
}

/// The process that an earlier `mallee up` left behind, if it is what would be started now; one that
/// is something else is ended first, so that there are never two.
fn take_over(program: &Program, state: &Path) -> Result<Option<Watched>> {
    let Some(started) = record::read::<Started>(state, program.name).filter(Started::alive) else { return Ok(None) };
    let same = started.command == program.command() && runs_current_program(started.pid, &program.path);
    let pid = started.pid;
    let process = match Watched::of(started, None) {
        Ok(process) => process,
        // Ended in this moment.
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        Err(error) => return Err(CliError::System("cannot watch a process", error)),
    };
    if same {
        tracing::info!(program = program.name, pid, "runs already and is taken over");
        return Ok(Some(process));
    }
    tracing::info!(program = program.name, pid, "runs with other options or an older program and is started anew");
    end_now(&process.started);
    Ok(None)
}

/// Whether the process executes the file that is there now, not one that was replaced meanwhile.
fn runs_current_program(pid: u32, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let identity = |path: &Path| std::fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
    identity(Path::new(&format!("/proc/{pid}/exe"))).is_some_and(|running| identity(path) == Some(running))
}

/// Ends a process and waits for it, without a runtime's help.
pub fn end_now(started: &Started) {
    let Ok(handle) = open_pidfd(started.pid) else { return };
    if !started.alive() {
        return;
    }
    for (signal, patience) in [(Signal::SIGTERM, GRACE), (Signal::SIGKILL, GRACE)] {
        send_signal(&handle, signal);
        let until = Instant::now() + patience;
        while Instant::now() < until {
            if !started.alive() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A descriptor that stands for one process, however often its id is used again.
fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, libc::PIDFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Sends a signal; a process that has ended already is no error.
fn send_signal(handle: &OwnedFd, signal: Signal) {
    // SAFETY: pidfd_send_signal with a null siginfo reads no memory of ours.
    let done = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            handle.as_raw_fd(),
            signal as i32,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if done < 0 {
        tracing::debug!(%signal, error = %io::Error::last_os_error(), "signal");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(name: &'static str, seconds: &str) -> Program {
        Program { name, path: "/bin/sleep".into(), arguments: vec![seconds.into()], namespace: None }
    }

    fn pid(state: &Path, name: &str) -> u32 {
        record::read::<Started>(state, name).map_or(0, |started| started.pid)
    }

    async fn until(mut check: impl FnMut() -> bool) {
        for _ in 0..500 {
            if check() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("waited in vain");
    }

    fn kill(pid: u32) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
    }

    #[tokio::test]
    async fn a_killed_process_comes_back_and_a_stopped_one_does_not() {
        let state = tempfile::tempdir().unwrap();
        record::make_folders(state.path()).unwrap();
        let keeper = Keeper::start(sleeper("netd", "600"), state.path()).unwrap();
        let first = pid(state.path(), "netd");
        kill(first);
        until(|| ![0, first].contains(&pid(state.path(), "netd"))).await;
        let second: Started = record::read(state.path(), "netd").unwrap();
        assert!(second.alive() && second.restarts == 1);
        keeper.stop().await;
        assert!(!second.alive());
        assert_eq!(pid(state.path(), "netd"), 0);
    }

    #[tokio::test]
    async fn a_process_left_behind_is_taken_over_unless_it_is_another_one() {
        let state = tempfile::tempdir().unwrap();
        record::make_folders(state.path()).unwrap();
        let keeper = Keeper::start(sleeper("agent", "600"), state.path()).unwrap();
        let first: Started = record::read(state.path(), "agent").unwrap();
        // As if this `mallee up` was killed: its task is gone, its process is not.
        keeper.task.abort();
        let again = Keeper::start(sleeper("agent", "600"), state.path()).unwrap();
        assert_eq!(pid(state.path(), "agent"), first.pid);
        again.task.abort();
        let other = Keeper::start(sleeper("agent", "601"), state.path()).unwrap();
        let second: Started = record::read(state.path(), "agent").unwrap();
        assert!(!first.alive() && second.alive());
        other.stop().await;
        assert!(!second.alive());
    }
}
