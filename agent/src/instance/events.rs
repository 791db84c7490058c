//! The VMM's events file: what it says about the VM's state, and the measurements in it.
//!
//! The file is read by polling: a handful of lines are written in a VM's first second and hardly any
//! after that, a look costs one system call, and the kernel's inotify instances are few (128 per user).
//! The end of the process is not read from here but seen through its pidfd.

use std::io::{self, Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::time::Duration;

use mallee_vmm::api::guest::phase;
use mallee_vmm::api::{Event, EventKind, ExitReason};

use super::folder::open_foreign;
use crate::api::Span;
use crate::ids::InstanceId;

/// Bytes of a file that are read at all. A guest may write to the boot timer port for ever; the VMM
/// bounds what it writes, and the agent what it reads.
const READ_LIMIT: u64 = 1 << 20;

/// Lines longer than this are not events.
const LINE_LIMIT: usize = 4096;

/// How long to wait between two looks at the file of a VM that has run for `age`.
pub fn poll_interval(age: Duration) -> Duration {
    match age.as_secs() {
        0..10 => Duration::from_millis(5),
        10..300 => Duration::from_millis(100),
        _ => Duration::from_secs(1),
    }
}

/// Reads one start's events from the beginning.
#[derive(Debug)]
pub struct EventsReader {
    path: PathBuf,
    offset: u64,
    /// The beginning of a line that was not whole yet.
    partial: Vec<u8>,
}

impl EventsReader {
    pub fn new(path: PathBuf) -> Self {
        Self { path, offset: 0, partial: Vec::new() }
    }

    /// The events that were added since the last look. A file that is not there yet is empty.
    pub fn read(&mut self) -> io::Result<Vec<Event>> {
        let mut file = match open_foreign(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        file.seek(SeekFrom::Start(self.offset))?;
        let mut bytes = Vec::new();
        file.take(READ_LIMIT.saturating_sub(self.offset)).read_to_end(&mut bytes)?;
        self.offset += bytes.len() as u64;
        Ok(self.split(&bytes))
    }

    fn split(&mut self, bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.partial.extend_from_slice(&piece[..piece.len().min(LINE_LIMIT)]);
            if piece.ends_with(b"\n") {
                // A later VMM may write events that this agent does not know: they are passed over.
                events.extend(serde_json::from_slice::<Event>(&self.partial).ok());
                self.partial.clear();
            } else if self.partial.len() > LINE_LIMIT {
                self.partial.truncate(LINE_LIMIT);
            }
        }
        events
    }
}

/// What the events of one start say so far.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The guest executes.
    pub first_run: bool,
    pub exit: Option<(ExitReason, String)>,
}

/// Turns the events of one start into spans, each once.
#[derive(Debug)]
pub struct Timeline {
    names: SpanNames,
    pub progress: Progress,
    started: Option<u64>,
    built: Option<u64>,
    first_run: Option<u64>,
    serial_seen: bool,
    /// End of the guest phase before.
    phase_begun: Option<u64>,
    phases_seen: [bool; 256],
}

/// What every span of one start has in common.
#[derive(Debug, Clone)]
pub struct SpanNames {
    pub trace: String,
    pub instance: InstanceId,
    pub start: u64,
}

impl SpanNames {
    /// A span of this start. Its id depends on nothing but the instance, the start and the names, so
    /// that an agent that reads the events again reports the same span.
    pub fn span(&self, part: &str, name: &str, start_unix_ns: u64, end_unix_ns: u64) -> Span {
        Span {
            trace: self.trace.clone(),
            part: part.to_owned(),
            name: name.to_owned(),
            start_unix_ns,
            end_unix_ns: end_unix_ns.max(start_unix_ns),
            instance: self.instance.to_string(),
            id: format!("{}/{}/{part}/{name}", self.instance, self.start),
            ..Default::default()
        }
    }
}

impl Timeline {
    pub fn new(names: SpanNames) -> Self {
        Self {
            names,
            progress: Progress::default(),
            started: None,
            built: None,
            first_run: None,
            serial_seen: false,
            phase_begun: None,
            phases_seen: [false; 256],
        }
    }

    /// Takes in one event; the span that it completes, if it does.
    pub fn take(&mut self, event: &Event) -> Option<Span> {
        let now = event.unix_ns;
        match &event.kind {
            EventKind::ProcessStarted { .. } => {
                self.started = Some(now);
                None
            }
            EventKind::VmBuilt => {
                self.built = Some(now);
                self.started.map(|started| self.names.span("vmm", "build the VM", started, now))
            }
            EventKind::FirstRun => {
                self.progress.first_run = true;
                self.first_run = Some(now);
                self.phase_begun = Some(now);
                self.built.map(|built| self.names.span("vmm", "enter the guest", built, now))
            }
            EventKind::FirstSerialByte if !self.serial_seen => {
                self.serial_seen = true;
                self.first_run.map(|begun| self.names.span("guest", "first serial byte", begun, now))
            }
            EventKind::BootTimer { value } if !self.phases_seen[usize::from(*value)] => {
                self.phases_seen[usize::from(*value)] = true;
                let name = phase_name(*value)?;
                let begun = self.phase_begun.replace(now)?;
                Some(self.names.span("guest", name, begun, now))
            }
            EventKind::Exit { reason, message } => {
                self.progress.exit = Some((*reason, message.clone()));
                None
            }
            _ => None,
        }
    }
}

/// Names of the bytes that guests of ours write to the boot timer port.
fn phase_name(value: u8) -> Option<&'static str> {
    match value {
        phase::INIT => Some("kernel to init"),
        phase::ROOT => Some("root file system"),
        phase::NETWORK => Some("network"),
        phase::METADATA => Some("metadata"),
        phase::LOGIN => Some("login"),
        phase::USER_DATA => Some("user data"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn event(unix_ns: u64, kind: EventKind) -> Event {
        Event { unix_ns, monotonic_ns: unix_ns, kind }
    }

    fn boot() -> Vec<Event> {
        vec![
            event(100, EventKind::ProcessStarted { pid: 7 }),
            event(200, EventKind::VmBuilt),
            event(300, EventKind::FirstRun),
            event(400, EventKind::FirstSerialByte),
            event(500, EventKind::BootTimer { value: phase::INIT }),
            event(600, EventKind::BootTimer { value: phase::NETWORK }),
            event(650, EventKind::BootTimer { value: phase::NETWORK }),
            event(660, EventKind::BootTimer { value: 200 }),
            event(700, EventKind::Exit { reason: ExitReason::PowerOff, message: "guest".into() }),
        ]
    }

    fn timeline() -> Timeline {
        Timeline::new(SpanNames { trace: "t".into(), instance: "i-00000001".parse().unwrap(), start: 1 })
    }

    #[test]
    fn a_boot_becomes_spans_that_follow_one_another() {
        let mut timeline = timeline();
        let spans: Vec<_> = boot().iter().filter_map(|event| timeline.take(event)).collect();
        let found: Vec<_> = spans
            .iter()
            .map(|span| (span.part.as_str(), span.name.as_str(), span.start_unix_ns, span.end_unix_ns))
            .collect();
        assert_eq!(
            found,
            [
                ("vmm", "build the VM", 100, 200),
                ("vmm", "enter the guest", 200, 300),
                ("guest", "first serial byte", 300, 400),
                ("guest", "kernel to init", 300, 500),
                ("guest", "network", 500, 600),
            ]
        );
        assert_eq!(timeline.progress, Progress { first_run: true, exit: Some((ExitReason::PowerOff, "guest".into())) });
        let ids: std::collections::HashSet<_> = spans.iter().map(|span| &span.id).collect();
        assert_eq!(ids.len(), spans.len());
    }

    proptest! {
        /// However the writes fall, and whatever stands between the lines, each event is read once.
        #[test]
        fn lines_are_read_whole_wherever_they_are_cut(cuts in proptest::collection::vec(1usize..60, 1..40), noise in "[ -~]{0,30}") {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("events-1");
            let mut text = Vec::new();
            for event in boot() {
                text.extend(serde_json::to_vec(&event).unwrap());
                text.extend(format!("\n#{noise}\n").bytes());
            }
            let mut reader = EventsReader::new(path.clone());
            prop_assert!(reader.read().unwrap().is_empty(), "a file that is not there is empty");
            let mut file = std::fs::File::create(&path).unwrap();
            let mut found = Vec::new();
            let mut rest = text.as_slice();
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                file.write_all(now).unwrap();
                found.extend(reader.read().unwrap());
                rest = later;
                if rest.is_empty() { break; }
            }
            prop_assert_eq!(found, boot());
        }
    }

    #[test]
    fn an_endless_line_is_not_kept() {
        let mut reader = EventsReader::new("/nonexistent".into());
        for _ in 0..100 {
            reader.split(&[b'x'; 1000]);
        }
        assert!(reader.partial.len() <= LINE_LIMIT + 1000);
    }
}
