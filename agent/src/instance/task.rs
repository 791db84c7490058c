//! One instance's task: compare, do one step, compare again. What it sees and tells is in `task/report.rs`.

mod report;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::block_in_place;

use super::events::{EventsReader, SpanNames, Timeline, poll_interval};
use super::folder::Folder;
use super::launch::{self, Trouble};
use super::record::{Record, Rest, RestKind, Run};
use super::state::{AfterEnd, CRASH_WINDOW_S, Step, USER_SHUTDOWN, after_end, next_step};
use super::stop::{Manner, end};
use super::vmm_process::{VmmProcess, kill_all_in, log_end};
use super::{Handle, Services};
use crate::api::InstancePhase;
use crate::clock::unix_ns;
use crate::ids::InstanceId;
use crate::news::News;
use crate::wait::Wait;
use crate::wanted::Wanted;

/// Between two tries of a step that failed: doubles from the first to the second.
const FIRST_WAIT: Duration = Duration::from_millis(250);
const LONGEST_WAIT: Duration = Duration::from_secs(15);

/// A VM that ends sooner than this after its start is started again with growing delays, so that a
/// guest which resets at once does not keep the node busy.
const SHORT_LIFE: Duration = Duration::from_secs(10);

/// A VMM that has not entered its guest by then hangs.
const FIRST_RUN_TIMEOUT: Duration = Duration::from_secs(60);

pub struct Task {
    id: InstanceId,
    folder: Folder,
    record: Record,
    services: Arc<Services>,
    wanted: watch::Receiver<Option<Wanted>>,
    news: mpsc::Receiver<News>,
    life: Option<Life>,
    /// The instance ran and is between two VMMs: it is still `RUNNING` to the outside, as in EC2.
    restarting: bool,
    /// Before a step that failed is tried again.
    retry: Wait,
    /// Before a VM that ended soon after its start is started again.
    restart: Wait,
}

/// A VMM that runs.
struct Life {
    process: VmmProcess,
    events: EventsReader,
    timeline: Timeline,
    /// When this agent started or found it.
    since: Instant,
    /// It was running before this agent was.
    adopted: bool,
}

impl Task {
    /// Takes up an instance whose folder and record are there: finds its VMM if one runs, looks into
    /// how it ended if one ran, and puts its row on the board. Makes no other change.
    pub fn take_up(id: InstanceId, record: Record, services: Arc<Services>, wanted: Option<Wanted>) -> (Self, Handle) {
        let (wanted_sender, wanted) = watch::channel(wanted);
        let (news_sender, news) = mpsc::channel(16);
        let folder = Folder::of(&services.instances, &id);
        let mut task = Self {
            id,
            folder,
            record,
            services,
            wanted,
            news,
            life: None,
            restarting: false,
            retry: Wait::new(FIRST_WAIT, LONGEST_WAIT),
            restart: Wait::new(FIRST_WAIT, LONGEST_WAIT),
        };
        if let Err(trouble) = block_in_place(|| task.adopt()) {
            tracing::error!(instance = %task.id, %trouble, "the instance's VMM could not be looked for");
            task.report(InstancePhase::Preparing, &trouble.to_string());
        }
        (task, Handle { wanted: wanted_sender, news: news_sender })
    }

    fn adopt(&mut self) -> Result<(), Trouble> {
        let found = VmmProcess::find(&self.folder).map_err(Trouble::host("looking for the VMM"))?;
        let trace = self.record.run.as_ref().map(|run| run.trace.clone()).unwrap_or_default();
        match found {
            Some(process) => {
                tracing::info!(instance = %self.id, pid = process.pid(), "found its VMM again");
                self.begin_life(process, trace, true);
                self.read_events();
            }
            None if self.record.run.is_some() => self.look_into_past_end()?,
            None => {}
        }
        self.report_current();
        Ok(())
    }

    /// The VMM ended while no agent was there to see it.
    fn look_into_past_end(&mut self) -> Result<(), Trouble> {
        let Some(run) = self.record.run.clone() else { return Ok(()) };
        if run.boot_id != self.services.boot_id {
            tracing::info!(instance = %self.id, "its VMM went with the node's last boot");
            self.record.run = None;
            return self.save();
        }
        // Should the VMM have been taken over and have let go of its lock, it still runs.
        kill_all_in(&self.folder, self.record.uid);
        let mut events = EventsReader::new(self.folder.events(self.record.starts));
        let mut timeline = Timeline::new(self.names(run.trace, self.record.starts));
        let events = events.read().unwrap_or_default();
        if events.is_empty() {
            // The agent was killed before the VMM was one: nothing ran, nothing ended.
            self.record.run = None;
            return self.save();
        }
        events.iter().filter_map(|event| timeline.take(event)).for_each(|span| self.services.spans.push(span));
        self.restarting = timeline.progress.first_run;
        self.conclude(timeline)
    }

    /// Runs until the instance is gone.
    pub async fn run(mut self) {
        loop {
            let wanted = self.wanted.borrow_and_update().clone();
            let step = next_step(wanted.as_ref(), &self.record, self.life.is_some());
            tracing::debug!(instance = %self.id, ?step, "next step");
            let result = match (step, &wanted) {
                (Step::Remove, _) | (_, None) => match self.remove().await {
                    Ok(()) => return self.services.board.remove(&self.id),
                    Err(trouble) => Err(trouble),
                },
                (Step::Stop, Some(_)) => self.stop().await,
                (Step::StayOff, Some(_)) => self.stay_off().await,
                (Step::Launch, Some(wanted)) => self.launch(wanted).await,
                (Step::Watch, Some(_)) => self.watch().await,
                (Step::Reboot, Some(wanted)) => self.reboot(wanted).await,
                (Step::Rest, Some(_)) => self.rest().await,
            };
            match result {
                Ok(()) => self.retry.reset(),
                Err(Trouble::Lasting(reason)) => self.fail(reason, wanted.as_ref()).await,
                Err(Trouble::Passing(reason)) => self.try_later(reason).await,
            }
        }
    }

    async fn launch(&mut self, wanted: &Wanted) -> Result<(), Trouble> {
        if let Some(process) = VmmProcess::find(&self.folder).map_err(Trouble::host("looking for the VMM"))? {
            // `adopt` could not find out whether it runs; now it can be.
            let trace = self.record.run.as_ref().map(|run| run.trace.clone()).unwrap_or_default();
            self.begin_life(process, trace, true);
            return Ok(());
        }
        self.report(self.coming_up(), "");
        let names = self.names(wanted.trace.clone(), self.record.starts + 1);
        let mut changed = self.wanted.clone();
        let prepared = tokio::select! {
            biased;
            () = differs(&mut changed) => return Ok(()),
            prepared = self.prepare(&names, wanted) => prepared?,
        };
        let (files, interface) = prepared;
        // The record first: a VMM that starts after this belongs to this start, whoever finds it.
        self.record.starts += 1;
        self.record.reboots = wanted.reboots;
        self.record.rest = None;
        self.record.run = Some(Run {
            boot_id: self.services.boot_id.clone(),
            trace: wanted.trace.clone(),
            started_unix_ns: unix_ns(),
            ending: false,
            leased: false,
            fetched_metadata: false,
        });
        self.save()?;
        while self.news.try_recv().is_ok() {}
        let process = launch::start(&self.services, &names, &self.folder, &self.record, wanted, &files, &interface)?;
        self.begin_life(process, wanted.trace.clone(), false);
        Ok(())
    }

    /// Everything up to the start of the process; may be dropped.
    async fn prepare(
        &self,
        names: &SpanNames,
        wanted: &Wanted,
    ) -> Result<(launch::Files, mallee_netd::api::Interface), Trouble> {
        let begin = launch::Begin::now(&self.services);
        tokio::time::sleep(self.restart.time()).await;
        launch::check_kvm(&self.services.facts, &wanted.machine.image).await?;
        block_in_place(|| self.folder.make(self.record.uid)).map_err(Trouble::host("the instance's folder"))?;
        let files = launch::fetch_image(&self.services, names, &wanted.machine.image).await?;
        launch::make_disk(&self.services, names, &self.folder, &wanted.machine, &files, self.record.uid)?;
        let waiting = |error: &str| {
            let reason = if error.is_empty() { String::new() } else { format!("waiting for its network: {error}") };
            self.report(self.coming_up(), &reason);
        };
        let interface = launch::await_network(&self.services, names, wanted, self.record.uid, begin, waiting).await?;
        Ok((files, interface))
    }

    async fn watch(&mut self) -> Result<(), Trouble> {
        let mut changed = self.wanted.clone();
        loop {
            self.read_events();
            self.report_current();
            let Some(life) = &self.life else { return Ok(()) };
            let age = life.since.elapsed();
            let running = life.timeline.progress.first_run;
            tokio::select! {
                () = differs(&mut changed) => return Ok(()),
                () = life.process.ended() => return self.ended(),
                Some(news) = self.news.recv() => self.take_news(news)?,
                () = tokio::time::sleep(poll_interval(age)) => self.bound_log(),
            }
            if !running && age > FIRST_RUN_TIMEOUT {
                tracing::error!(instance = %self.id, "the VMM did not enter its guest within {FIRST_RUN_TIMEOUT:?}");
                let Some(life) = &self.life else { return Ok(()) };
                end(&life.process, &self.folder, Manner::Kill).await.map_err(Trouble::host("ending the VMM"))?;
                return self.ended();
            } else if running && age > SHORT_LIFE {
                self.restart.reset();
            }
        }
    }

    /// The VMM ended, and nobody had asked for it.
    fn ended(&mut self) -> Result<(), Trouble> {
        self.read_events();
        let Some(life) = self.life.take() else { return Ok(()) };
        self.restarting = life.timeline.progress.first_run;
        if life.since.elapsed() < SHORT_LIFE {
            self.restart.grow();
        }
        self.conclude(life.timeline)
    }

    /// Draws the conclusion from an end and remembers it.
    fn conclude(&mut self, timeline: Timeline) -> Result<(), Trouble> {
        if self.record.run.take().is_some_and(|run| run.ending) {
            self.restarting = false;
            return self.save();
        }
        let now = unix_ns() / 1_000_000_000;
        self.record.crashes.retain(|crash| now.saturating_sub(*crash) < CRASH_WINDOW_S);
        let exit = timeline.progress.exit.as_ref();
        let log = log_end(&self.folder);
        let then = after_end(exit, &log, self.record.crashes.len());
        tracing::info!(instance = %self.id, ?exit, ?then, log, "VMM ended");
        match then {
            AfterEnd::Restart => {}
            AfterEnd::RestartAfterCrash => self.record.crashes.push(now),
            AfterEnd::Rest(kind, reason) => {
                self.restarting = false;
                let trace = self.wanted.borrow().as_ref().map(|wanted| wanted.trace.clone()).unwrap_or_default();
                let reboots = self.record.reboots;
                self.record.rest = Some(Rest { kind, reason, trace, reboots, released: false });
            }
        }
        self.save()
    }

    async fn reboot(&mut self, wanted: &Wanted) -> Result<(), Trouble> {
        self.restarting = true;
        let mut changed = self.wanted.clone();
        let manner = Manner::Reboot { grace: self.services.settings.stop_grace };
        if let Some(life) = &self.life {
            tokio::select! {
                biased;
                result = end(&life.process, &self.folder, manner) => result.map_err(Trouble::host("ending the VMM"))?,
                () = differs(&mut changed) => return Ok(()),
            }
        }
        self.record.reboots = wanted.reboots;
        self.forget_life()
    }

    /// A stop that was begun is gone through with, also when on is wanted again meanwhile: the guest
    /// may already be on its way down. Only removal is quicker.
    async fn stop(&mut self) -> Result<(), Trouble> {
        self.restarting = false;
        self.report(InstancePhase::Stopping, USER_SHUTDOWN);
        if let Some(run) = &mut self.record.run {
            run.ending = true;
            self.save()?;
        }
        let mut changed = self.wanted.clone();
        let manner = Manner::PowerOff { grace: self.services.settings.stop_grace };
        if let Some(life) = &self.life {
            tokio::select! {
                biased;
                result = end(&life.process, &self.folder, manner) => result.map_err(Trouble::host("ending the VMM"))?,
                _ = changed.wait_for(Option::is_none) => return Ok(()),
            }
        }
        self.forget_life()
    }

    /// After an end that the agent brought about.
    fn forget_life(&mut self) -> Result<(), Trouble> {
        self.read_events();
        self.life = None;
        self.record.run = None;
        self.save()
    }

    async fn stay_off(&mut self) -> Result<(), Trouble> {
        self.restarting = false;
        self.restart.reset();
        self.record.run = None;
        self.record.crashes.clear();
        let mut reason = USER_SHUTDOWN.to_owned();
        if let Some(rest) = &mut self.record.rest {
            rest.released = true;
            reason.clone_from(&rest.reason);
        }
        self.save()?;
        self.report(InstancePhase::Stopped, &reason);
        self.until_wanted_differs().await;
        Ok(())
    }

    async fn rest(&mut self) -> Result<(), Trouble> {
        self.report_current();
        self.until_wanted_differs().await;
        Ok(())
    }

    /// The instance cannot be run as it is wanted: it rests until something else is.
    async fn fail(&mut self, reason: String, wanted: Option<&Wanted>) {
        tracing::error!(instance = %self.id, reason, "the instance failed");
        self.restarting = false;
        let (trace, reboots) = wanted.map(|wanted| (wanted.trace.clone(), wanted.reboots)).unwrap_or_default();
        self.record.rest = Some(Rest { kind: RestKind::Failed, reason, trace, reboots, released: false });
        if let Err(trouble) = self.save() {
            self.try_later(trouble.to_string()).await;
        }
    }

    async fn try_later(&mut self, reason: String) {
        let wait = self.retry.grow();
        tracing::warn!(instance = %self.id, reason, ?wait, "will be tried again");
        let phase = if self.wanted.borrow().is_some() { InstancePhase::Preparing } else { InstancePhase::Stopping };
        self.report(phase, &reason);
        let mut changed = self.wanted.clone();
        tokio::select! {
            () = differs(&mut changed) => {}
            () = tokio::time::sleep(wait) => {}
        }
    }

    /// Ends and deletes everything of the instance.
    async fn remove(&mut self) -> Result<(), Trouble> {
        self.report(InstancePhase::Stopping, "");
        if let Some(life) = &self.life {
            end(&life.process, &self.folder, Manner::Kill).await.map_err(Trouble::host("ending the VMM"))?;
            self.life = None;
        }
        block_in_place(|| {
            kill_all_in(&self.folder, self.record.uid);
            if let Some(cgroups) = &self.services.cgroups {
                cgroups.remove(&self.id).map_err(Trouble::host("cgroup"))?;
            }
            self.folder.remove().map_err(Trouble::host("the instance's folder"))
        })?;
        tracing::info!(instance = %self.id, "gone, with disk and folder");
        Ok(())
    }

    fn begin_life(&mut self, process: VmmProcess, trace: String, adopted: bool) {
        let start = self.record.starts;
        self.life = Some(Life {
            process,
            events: EventsReader::new(self.folder.events(start)),
            timeline: Timeline::new(self.names(trace, start)),
            since: Instant::now(),
            adopted,
        });
    }

    async fn until_wanted_differs(&mut self) {
        let mut changed = self.wanted.clone();
        loop {
            tokio::select! {
                () = differs(&mut changed) => return,
                Some(_) = self.news.recv() => {}
            }
        }
    }

    fn save(&self) -> Result<(), Trouble> {
        self.record.save(&self.folder).map_err(Trouble::host("the instance's record"))
    }
}

/// Waits until something else is wanted; for ever when the agent is ending.
async fn differs(wanted: &mut watch::Receiver<Option<Wanted>>) {
    if wanted.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}
