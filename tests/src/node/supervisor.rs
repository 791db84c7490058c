//! Keeps the node's services running, each in a thread of its own.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::process::ExitStatusExt,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::{boot::say, control::port_device, setup::Service};
use crate::lab::channel::ServiceStatus;

/// A service that ended sooner than this after its start is started again only after as long.
const BRIEF: Duration = Duration::from_secs(1);

/// The services and how they are.
#[derive(Clone, Default)]
pub struct Supervisor {
    states: Arc<Mutex<Vec<ServiceStatus>>>,
}

impl Supervisor {
    pub fn status(&self) -> Vec<ServiceStatus> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Starts `service` and keeps it running until the machine ends.
    pub fn keep(&self, service: Service) -> io::Result<()> {
        let place = {
            let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
            states.push(ServiceStatus { name: service.name.clone(), pid: None, restarts: 0 });
            states.len() - 1
        };
        let log = OpenOptions::new().write(true).open(port_device(&service.log_port())?)?;
        let own = self.clone();
        std::thread::Builder::new()
            .name(service.name.clone())
            .spawn(move || own.run_for_ever(&service, &log, place))?;
        Ok(())
    }

    fn run_for_ever(&self, service: &Service, log: &File, place: usize) -> ! {
        loop {
            let began = Instant::now();
            let end = match start(service, log) {
                Ok(mut child) => {
                    self.update(place, |state| state.pid = Some(child.id()));
                    child.wait().map(describe)
                }
                Err(error) => Err(error),
            };
            self.update(place, |state| {
                state.pid = None;
                state.restarts += 1;
            });
            let end = end.unwrap_or_else(|error| error.to_string());
            say(&format!("{} ended ({end}); starting it again", service.name));
            std::thread::sleep(BRIEF.saturating_sub(began.elapsed()));
        }
    }

    fn update(&self, place: usize, change: impl FnOnce(&mut ServiceStatus)) {
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(state) = states.get_mut(place) {
            change(state);
        }
    }
}

fn start(service: &Service, log: &File) -> io::Result<Child> {
    let (program, arguments) =
        service.argv.split_first().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no program is named"))?;
    Command::new(program)
        .args(arguments)
        .envs(service.environment.iter().cloned())
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log.try_clone()?)
        .spawn()
}

fn describe(status: std::process::ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("signal {signal}"),
        None => format!("status {}", status.code().unwrap_or_default()),
    }
}
