//! The decisions: what is the next step towards what is wanted, and what follows from a VMM's end.
//!
//! Pure functions of what is wanted, what is remembered and what is there: no clock, no file, no
//! process. An agent that was killed asks them again and gets the same answers; that is the whole of
//! its recovery.

use mallee_vmm::api::ExitReason;

use super::record::{Record, Rest, RestKind};
use crate::wanted::{Power, Wanted};

/// The next step of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Not wanted any more: end it and delete all that is of it.
    Remove,
    /// Off is wanted: bring the guest down.
    Stop,
    /// Off is wanted and it is off. Stay.
    StayOff,
    /// On is wanted and nothing runs.
    Launch,
    /// On is wanted and it runs. Watch it.
    Watch,
    /// It runs, and one more reboot is wanted than was carried out.
    Reboot,
    /// On is wanted, but the guest powered itself off or it cannot be run: stay until asked anew.
    Rest,
}

/// Decides the next step. `alive`: a VMM of the instance runs.
pub fn next_step(wanted: Option<&Wanted>, record: &Record, alive: bool) -> Step {
    let Some(wanted) = wanted else { return Step::Remove };
    match (wanted.power, alive) {
        (Power::Off, true) => Step::Stop,
        (Power::On, true) if record.run.as_ref().is_some_and(|run| run.ending) => Step::Stop,
        (Power::Off, false) => Step::StayOff,
        (Power::On, true) if wanted.reboots > record.reboots => Step::Reboot,
        (Power::On, true) => Step::Watch,
        (Power::On, false) => match &record.rest {
            Some(rest) if holds(rest, wanted) => Step::Rest,
            _ => Step::Launch,
        },
    }
}

/// An instance that came to rest stays there until a start is asked for: under a new trace, by one
/// more reboot, or by power off and on again.
fn holds(rest: &Rest, wanted: &Wanted) -> bool {
    !rest.released && rest.trace == wanted.trace && wanted.reboots <= rest.reboots
}

/// What follows when a VMM ended that should have run on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AfterEnd {
    /// The guest asked for a reset.
    Restart,
    /// Nobody asked for this end: start again, and count it.
    RestartAfterCrash,
    Rest(RestKind, String),
}

/// Crashes within [`CRASH_WINDOW_S`] after which an instance is not started again.
pub const CRASHES_ALLOWED: usize = 3;
/// Seconds.
pub const CRASH_WINDOW_S: u64 = 600;

/// Words of EC2's own `StateReason` for a guest that powers itself off (API reference, `StateReason`).
pub const GUEST_SHUTDOWN: &str = "Client.InstanceInitiatedShutdown: Instance initiated shutdown";
/// The same for a stop that was asked for.
pub const USER_SHUTDOWN: &str = "Client.UserInitiatedShutdown: User initiated shutdown";

/// Decides after an end that was seen, or found by an agent that came back.
///
/// `exit` is what the VMM wrote last, `None` when it was killed before it could; `log` its last words
/// on standard error; `crashes` how often it crashed of late, this time not counted.
pub fn after_end(exit: Option<&(ExitReason, String)>, log: &str, crashes: usize) -> AfterEnd {
    let failed = |reason: String| AfterEnd::Rest(RestKind::Failed, reason);
    match exit {
        Some((ExitReason::PowerOff, _)) => AfterEnd::Rest(RestKind::Stopped, GUEST_SHUTDOWN.to_owned()),
        Some((ExitReason::Reset, _)) => AfterEnd::Restart,
        Some((ExitReason::BadConfiguration, message)) => failed(format!("Client.InvalidParameterValue: {message}")),
        Some((ExitReason::HostFailure, message)) if crashes >= CRASHES_ALLOWED => {
            failed(format!("Server.InternalError: {message}"))
        }
        None if crashes >= CRASHES_ALLOWED => {
            let last_words = if log.is_empty() { "it left no message" } else { log };
            failed(format!("Server.InternalError: the VMM ended {} times in a row: {last_words}", crashes + 1))
        }
        // Somebody on the node sent it SIGTERM, as an orderly shutdown of the machine does: no crash.
        Some((ExitReason::Signal, _)) => AfterEnd::Restart,
        Some((ExitReason::HostFailure, _)) | None => AfterEnd::RestartAfterCrash,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::record::Run;
    use crate::wanted;
    use proptest::prelude::*;

    fn record(reboots: u64, rest: Option<Rest>) -> Record {
        Record { reboots, rest, ..Record::new(1000) }
    }

    fn wants(power: Power, reboots: u64, trace: &str) -> Wanted {
        let (_, mut wanted) = wanted::parse(&wanted::tests::desired()).unwrap();
        (wanted.power, wanted.reboots, wanted.trace) = (power, reboots, trace.to_owned());
        wanted
    }

    fn run(ending: bool) -> Run {
        let (boot_id, trace) = (String::new(), String::new());
        Run { boot_id, trace, started_unix_ns: 0, ending, leased: false, fetched_metadata: false }
    }

    fn rest(trace: &str, reboots: u64, released: bool) -> Rest {
        Rest { kind: RestKind::Stopped, reason: String::new(), trace: trace.to_owned(), reboots, released }
    }

    #[test]
    fn a_guest_that_powered_itself_off_stays_off_until_it_is_asked_for_anew() {
        let on = wants(Power::On, 2, "a");
        assert_eq!(next_step(Some(&on), &record(2, Some(rest("a", 2, false))), false), Step::Rest);
        assert_eq!(next_step(Some(&on), &record(2, Some(rest("a", 2, true))), false), Step::Launch, "off, then on");
        assert_eq!(next_step(Some(&on), &record(2, Some(rest("b", 2, false))), false), Step::Launch, "a new start");
        assert_eq!(next_step(Some(&on), &record(1, Some(rest("a", 1, false))), false), Step::Launch, "a reboot");
    }

    #[test]
    fn a_running_one_is_stopped_rebooted_or_watched() {
        assert_eq!(next_step(Some(&wants(Power::Off, 9, "a")), &record(0, None), true), Step::Stop);
        assert_eq!(next_step(Some(&wants(Power::On, 1, "a")), &record(0, None), true), Step::Reboot);
        assert_eq!(next_step(Some(&wants(Power::On, 1, "a")), &record(1, None), true), Step::Watch);
        let stopping = Record { run: Some(run(true)), ..record(1, None) };
        assert_eq!(next_step(Some(&wants(Power::On, 1, "a")), &stopping, true), Step::Stop, "a stop is finished first");
    }

    #[test]
    fn ends_are_told_apart() {
        let said = |reason| Some((reason, "words".to_owned()));
        assert_eq!(
            after_end(said(ExitReason::PowerOff).as_ref(), "", 0),
            AfterEnd::Rest(RestKind::Stopped, GUEST_SHUTDOWN.into())
        );
        assert_eq!(after_end(said(ExitReason::Reset).as_ref(), "", 99), AfterEnd::Restart);
        let AfterEnd::Rest(RestKind::Failed, why) = after_end(said(ExitReason::BadConfiguration).as_ref(), "", 0)
        else {
            panic!()
        };
        assert!(why.contains("words"));
        assert_eq!(after_end(None, "", 0), AfterEnd::RestartAfterCrash);
        let AfterEnd::Rest(RestKind::Failed, why) = after_end(None, "last words", CRASHES_ALLOWED) else { panic!() };
        assert!(why.contains("last words"));
    }

    /// The world as the steps change it: a model of `task`.
    fn carry_out(step: Step, wanted: Option<&Wanted>, record: &mut Record, alive: &mut bool) {
        match step {
            Step::Remove | Step::Stop => {
                *alive = false;
                record.run = None;
            }
            Step::StayOff => record.rest.iter_mut().for_each(|rest| rest.released = true),
            Step::Launch => {
                *alive = true;
                record.rest = None;
                record.reboots = wanted.map_or(0, |wanted| wanted.reboots);
            }
            Step::Reboot => {
                *alive = false;
                record.reboots = wanted.map_or(0, |wanted| wanted.reboots);
            }
            Step::Watch | Step::Rest => {}
        }
    }

    fn some_wanted() -> impl Strategy<Value = Option<Wanted>> {
        proptest::option::of(
            (any::<bool>(), 0u64..4, "[ab]")
                .prop_map(|(on, reboots, trace)| wants(if on { Power::On } else { Power::Off }, reboots, &trace)),
        )
    }

    proptest! {
        /// From any state, whatever is wanted is reached in a few steps and then stays: also when the
        /// agent forgets everything but its record between any two of them.
        #[test]
        fn every_state_converges(
            wanted in some_wanted(), reboots in 0u64..4, alive in any::<bool>(),
            rested in proptest::option::of(("[ab]", 0u64..4, any::<bool>())), ending in any::<bool>(),
        ) {
            let mut record = record(reboots, rested.map(|(trace, reboots, released)| rest(&trace, reboots, released)));
            record.run = alive.then(|| run(ending));
            let mut alive = alive;
            for _ in 0..4 {
                let step = next_step(wanted.as_ref(), &record, alive);
                carry_out(step, wanted.as_ref(), &mut record, &mut alive);
            }
            let last = next_step(wanted.as_ref(), &record, alive);
            let expected: &[Step] = match wanted.as_ref().map(|wanted| wanted.power) {
                None => &[Step::Remove],
                Some(Power::Off) => &[Step::StayOff],
                Some(Power::On) => &[Step::Watch, Step::Rest],
            };
            prop_assert!(expected.contains(&last), "{last:?}");
            prop_assert!(!(alive && matches!(last, Step::Remove | Step::StayOff | Step::Rest)));
        }
    }
}
