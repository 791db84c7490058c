//! What a task sees of its instance, and what it tells of it.
//!
//! A VMM writes events (`events.rs`), netd and the metadata service tell news; both become spans, and a row on the board that the controller reads.
//! Nothing is decided here, and nothing is done to the instance.

use super::super::events::SpanNames;
use super::super::launch::Trouble;
use super::super::record::RestKind;
use super::super::state::{Step, USER_SHUTDOWN, next_step};
use super::Task;
use crate::api::{InstancePhase, ObservedInstance};
use crate::clock::unix_ns;
use crate::news::News;

/// Bytes after which a VMM's log is emptied.
const LOG_LIMIT: u64 = 1 << 20;

impl Task {
    pub(super) fn read_events(&mut self) {
        let Some(life) = &mut self.life else { return };
        let events = life.events.read().unwrap_or_else(|error| {
            tracing::warn!(instance = %self.id, %error, "the VMM's events cannot be read");
            Vec::new()
        });
        let ran = life.timeline.progress.first_run;
        let names = SpanNames {
            trace: self.record.run.as_ref().map(|run| run.trace.clone()).unwrap_or_default(),
            instance: self.id.clone(),
            start: self.record.starts,
        };
        for event in &events {
            life.timeline.take(event).into_iter().for_each(|span| self.services.spans.push(span));
        }
        if !ran && life.timeline.progress.first_run && !life.adopted {
            self.services.spans.push(names.span("agent", "running", unix_ns(), 0));
        }
    }

    pub(super) fn take_news(&mut self, news: News) -> Result<(), Trouble> {
        let start = self.record.starts;
        let Some(run) = &mut self.record.run else { return Ok(()) };
        let (seen, part, name, at) = match news {
            News::Leased { unix_ns } => (&mut run.leased, "netd", "DHCP lease", unix_ns),
            News::FetchedMetadata { unix_ns } => {
                (&mut run.fetched_metadata, "agent", "first metadata request", unix_ns)
            }
        };
        if *seen || at < run.started_unix_ns {
            return Ok(());
        }
        *seen = true;
        let trace = run.trace.clone();
        self.services.spans.push(self.names(trace, start).span(part, name, at, at));
        self.save()
    }

    /// The log is the VMM's own voice, but a guest can make it speak.
    pub(super) fn bound_log(&self) {
        let path = self.folder.log();
        if std::fs::metadata(&path).is_ok_and(|log| log.len() > LOG_LIMIT)
            && let Ok(log) = std::fs::OpenOptions::new().write(true).open(&path)
        {
            let _ = log.set_len(0);
        }
    }

    /// The phase of an instance that is being started.
    pub(super) fn coming_up(&self) -> InstancePhase {
        if self.restarting { InstancePhase::Running } else { InstancePhase::Preparing }
    }

    pub(super) fn report_current(&self) {
        let step = next_step(self.wanted.borrow().as_ref(), &self.record, self.life.is_some());
        match (&self.life, &self.record.rest) {
            (Some(life), _) if life.timeline.progress.first_run => self.report(InstancePhase::Running, ""),
            (Some(_), _) => self.report(self.coming_up(), ""),
            (None, Some(rest)) if step != Step::Launch => {
                let phase = match rest.kind {
                    RestKind::Stopped => InstancePhase::Stopped,
                    RestKind::Failed => InstancePhase::Failed,
                };
                self.report(phase, &rest.reason);
            }
            (None, None) if step == Step::StayOff => self.report(InstancePhase::Stopped, USER_SHUTDOWN),
            (None, _) => self.report(self.coming_up(), ""),
        }
    }

    pub(super) fn report(&self, phase: InstancePhase, reason: &str) {
        let run = self.record.run.as_ref();
        let row = ObservedInstance {
            id: self.id.to_string(),
            phase: phase as i32,
            reason: reason.to_owned(),
            reboots: self.record.reboots,
            leased: run.is_some_and(|run| run.leased),
            fetched_metadata: run.is_some_and(|run| run.fetched_metadata),
            vmm_pid: self.life.as_ref().map_or(0, |life| life.process.pid()),
        };
        // "Stopped" and "failed" are the end of a life: not to be said any more once a new one is wanted.
        let is_last_word = matches!(phase, InstancePhase::Stopped | InstancePhase::Failed);
        self.services.board.put_unless(&self.id, row, || is_last_word && self.wanted.has_changed().unwrap_or(false));
    }

    pub(super) fn names(&self, trace: String, start: u64) -> SpanNames {
        SpanNames { trace, instance: self.id.clone(), start }
    }
}
