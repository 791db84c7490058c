//! An instance's life: which states there are, who may bring it from one to the next.
//!
//! Callers *ask* ([`stop`], [`start`], [`terminate`], [`reboot`]); nodes *observe* ([`observe`]).
//! Asking changes what is wanted; only an observation makes an instance `running`, `stopped` or
//! `terminated`, but for the operator's word that its node is lost ([`lose`]). The functions here know no database: they are the whole of the rules.
//!
//! ```text
//!            run                      stop                     terminate (from any)
//!             │                        │                              │
//!          pending ──observed──▶ running ──▶ stopping ──observed──▶ stopped     shutting-down
//!             ▲                                                       │              │ observed gone
//!             └────────────────────────── start ─────────────────────┘         terminated
//! ```

/// EC2's instance states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, sqlx::Type)]
#[sqlx(rename_all = "kebab-case")]
pub enum InstanceState {
    Pending,
    Running,
    Stopping,
    Stopped,
    ShuttingDown,
    Terminated,
}

/// What is wanted of an instance on its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    On,
    Off,
    /// No trace of it.
    Gone,
}

/// What the guest's own power-off means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::Type)]
#[sqlx(rename_all = "kebab-case")]
pub enum ShutdownBehavior {
    Stop,
    Terminate,
}

impl InstanceState {
    pub const ALL: [InstanceState; 6] = [
        InstanceState::Pending,
        InstanceState::Running,
        InstanceState::Stopping,
        InstanceState::Stopped,
        InstanceState::ShuttingDown,
        InstanceState::Terminated,
    ];

    /// The low byte of EC2's `InstanceState.Code`.
    pub fn code(self) -> i32 {
        match self {
            InstanceState::Pending => 0,
            InstanceState::Running => 16,
            InstanceState::ShuttingDown => 32,
            InstanceState::Terminated => 48,
            InstanceState::Stopping => 64,
            InstanceState::Stopped => 80,
        }
    }

    pub fn wanted(self) -> Wanted {
        match self {
            InstanceState::Pending | InstanceState::Running => Wanted::On,
            InstanceState::Stopping | InstanceState::Stopped => Wanted::Off,
            InstanceState::ShuttingDown | InstanceState::Terminated => Wanted::Gone,
        }
    }

    /// EC2's word for it, for messages.
    pub fn word(self) -> &'static str {
        match self {
            InstanceState::Pending => "pending",
            InstanceState::Running => "running",
            InstanceState::Stopping => "stopping",
            InstanceState::Stopped => "stopped",
            InstanceState::ShuttingDown => "shutting-down",
            InstanceState::Terminated => "terminated",
        }
    }
}

/// EC2's `StateReason`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateReason {
    pub code: &'static str,
    pub message: String,
}

impl StateReason {
    fn new(code: &'static str, message: impl Into<String>) -> StateReason {
        StateReason { code, message: message.into() }
    }
}

/// A step from one state to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub to: InstanceState,
    /// Why; `None` takes an older reason away.
    pub reason: Option<StateReason>,
}

/// The state does not allow what was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotFrom(pub InstanceState);

type Asked = Result<Option<Change>, NotFrom>;

fn user_initiated(to: InstanceState, code: &'static str, what: &str) -> Option<Change> {
    Some(Change { to, reason: Some(StateReason::new(code, format!("{code}: {what}"))) })
}

/// `StopInstances`. `Ok(None)`: it is so already.
pub fn stop(from: InstanceState) -> Asked {
    match from {
        InstanceState::Running => {
            Ok(user_initiated(InstanceState::Stopping, "Client.UserInitiatedShutdown", "User initiated shutdown"))
        }
        InstanceState::Stopping | InstanceState::Stopped => Ok(None),
        _ => Err(NotFrom(from)),
    }
}

/// `StartInstances`.
pub fn start(from: InstanceState) -> Asked {
    match from {
        InstanceState::Stopped => Ok(Some(Change { to: InstanceState::Pending, reason: None })),
        InstanceState::Pending | InstanceState::Running => Ok(None),
        _ => Err(NotFrom(from)),
    }
}

/// `TerminateInstances`: possible at any time.
pub fn terminate(from: InstanceState) -> Option<Change> {
    match from {
        InstanceState::ShuttingDown | InstanceState::Terminated => None,
        _ => user_initiated(InstanceState::ShuttingDown, "Client.UserInitiatedShutdown", "User initiated shutdown"),
    }
}

/// `RebootInstances`.
pub fn reboot(from: InstanceState) -> Result<(), NotFrom> {
    if from == InstanceState::Running { Ok(()) } else { Err(NotFrom(from)) }
}

/// What a node says of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Observation {
    Preparing,
    Running,
    Stopping,
    /// With the node's words for why.
    Stopped(String),
    Failed(String),
    /// The node has nothing of it.
    Absent,
}

/// What an observation is judged by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    pub state: InstanceState,
    /// It was running at some time: its disk may hold something.
    pub ran: bool,
    pub behavior: ShutdownBehavior,
}

/// What an observation changes. The observation must have been made from a desired state that
/// already carried what is now wanted of the instance (the caller compares generations).
pub fn observe(life: Life, observation: Observation) -> Option<Change> {
    use InstanceState as S;
    let plain = |to| Some(Change { to, reason: None });
    match (life.state, observation) {
        (S::Pending, Observation::Running) => plain(S::Running),
        // A disk that was written to is kept, and its owner may try again.
        (S::Pending | S::Running, Observation::Failed(why)) if life.ran => {
            Some(Change { to: S::Stopped, reason: Some(StateReason::new("Server.InternalError", why)) })
        }
        // The launch did not succeed: nothing is worth keeping.
        (S::Pending | S::Running, Observation::Failed(why)) => {
            Some(Change { to: S::ShuttingDown, reason: Some(launch_failure(why)) })
        }
        (S::Pending | S::Running, Observation::Stopped(_)) => {
            let to = match life.behavior {
                ShutdownBehavior::Stop => S::Stopped,
                ShutdownBehavior::Terminate => S::ShuttingDown,
            };
            Some(Change {
                to,
                reason: Some(StateReason::new(
                    "Client.InstanceInitiatedShutdown",
                    "Client.InstanceInitiatedShutdown: Instance initiated shutdown",
                )),
            })
        }
        (S::Stopping, Observation::Stopped(_) | Observation::Failed(_)) => Some(Change {
            to: S::Stopped,
            reason: Some(StateReason::new(
                "Client.UserInitiatedShutdown",
                "Client.UserInitiatedShutdown: User initiated shutdown",
            )),
        }),
        (S::ShuttingDown, Observation::Absent) => Some(Change { to: S::Terminated, reason: None }),
        _ => None,
    }
}

/// Its node is lost, so that nobody is left to observe it. Why an end was begun that was under way is kept.
pub fn lose(from: InstanceState) -> Change {
    let reason = StateReason::new("Server.InternalError", "Server.InternalError: The instance's node was lost");
    Change { to: InstanceState::Terminated, reason: (from != InstanceState::ShuttingDown).then_some(reason) }
}

/// Failures whose words begin with `Client.` are the caller's (a kernel that cannot be booted).
fn launch_failure(why: String) -> StateReason {
    let code = if why.starts_with("Client.") { "Client.InvalidImage" } else { "Server.InternalError" };
    let message = if why.starts_with("Client.") || why.starts_with("Server.") { why } else { format!("{code}: {why}") };
    StateReason::new(code, message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn states() -> impl Strategy<Value = InstanceState> {
        prop::sample::select(InstanceState::ALL.to_vec())
    }

    fn observations() -> impl Strategy<Value = Observation> {
        prop_oneof![
            Just(Observation::Preparing),
            Just(Observation::Running),
            Just(Observation::Stopping),
            Just(Observation::Stopped(String::new())),
            Just(Observation::Failed("why".into())),
            Just(Observation::Absent),
        ]
    }

    proptest! {
        /// Only a node's word makes an instance run, stop for good or be gone; and once an instance
        /// is being terminated nothing brings it back.
        #[test]
        fn nothing_leaves_termination(from in states(), ran: bool, observation in observations()) {
            let life = Life { state: from, ran, behavior: ShutdownBehavior::Stop };
            let change = observe(life, observation.clone());
            if from == InstanceState::Terminated {
                prop_assert_eq!(change.clone(), None);
            }
            if from == InstanceState::ShuttingDown {
                prop_assert!(change.clone().is_none_or(|c| c.to == InstanceState::Terminated));
                prop_assert!(start(from).is_err() && stop(from).is_err() && reboot(from).is_err());
            }
            if let Some(change) = change {
                prop_assert_ne!(change.to, from);
                prop_assert!(change.to != InstanceState::Running || observation == Observation::Running);
                prop_assert!(change.to != InstanceState::Terminated || observation == Observation::Absent);
            }
        }

        #[test]
        fn what_callers_ask_for_is_never_reached_by_asking(from in states()) {
            let asked = [stop(from).ok().flatten(), start(from).ok().flatten(), terminate(from)];
            for change in asked.into_iter().flatten() {
                let halfway = [InstanceState::Stopping, InstanceState::Pending, InstanceState::ShuttingDown];
                prop_assert!(halfway.contains(&change.to));
            }
        }
    }

    #[test]
    fn a_launch_that_fails_is_terminated_and_a_start_that_fails_is_stopped() {
        let life = |ran| Life { state: InstanceState::Pending, ran, behavior: ShutdownBehavior::Terminate };
        let first = observe(life(false), Observation::Failed("Client.InvalidImage: not an ELF file".into())).unwrap();
        assert_eq!(first.to, InstanceState::ShuttingDown);
        assert_eq!(first.reason.unwrap().code, "Client.InvalidImage");
        let again = observe(life(true), Observation::Failed("no memory".into())).unwrap();
        assert_eq!(again.to, InstanceState::Stopped);
    }
}
