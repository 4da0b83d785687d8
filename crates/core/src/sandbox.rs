//! The life of one sandbox. What is wanted and what is seen are two types; nobody can ask for "starting".
//!
//! ```text
//!            start          agent ready         idle            longer idle
//! Stopped ──────────▶ Starting ──────▶ Ready ──────▶ Paused ───────────────▶ Stopping ──▶ Stopped
//!    ▲                 │  ▲   ▲        │  ▲  ▲  thaw    │
//!    │     budget spent│  │   └─exited─┤  │  └──────────┘
//!    │                 ▼  │            ▼  │ probe ok
//!    │              Failed┘        Unhealthy
//!    └── Creating              any of these ── delete asked ──▶ Deleting ──▶ Deleted
//! ```
//!
//! `apply` says what an event makes of a state, `next_action` what to do to bring a state to what is wanted. Both
//! are pure: the reconciler in the hypervisor runs them, one task per sandbox, and is their only caller.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// What a sandbox should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Desired {
    Running,
    Stopped,
    Deleted,
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// 0 to 255; 128 + n when a signal ended it.
    pub code: i32,
    pub oom_killed: bool,
}

/// What is seen of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Observed {
    Creating {
        since: Timestamp,
    },
    Starting {
        generation: u64,
        attempt: u32,
        since: Timestamp,
        not_before: Timestamp,
        /// Why the generation before it ended, where it ended by itself.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        because: Option<String>,
    },
    Ready {
        generation: u64,
        since: Timestamp,
        /// Which start in a row this was; forgotten after [`STABLE_AFTER`].
        #[serde(default)]
        attempt: u32,
    },
    Paused {
        generation: u64,
        since: Timestamp,
    },
    Unhealthy {
        generation: u64,
        since: Timestamp,
        reason: String,
        #[serde(default)]
        attempt: u32,
    },
    Stopping {
        generation: u64,
        deadline: Timestamp,
    },
    Stopped {
        exit: Option<Exit>,
        since: Timestamp,
    },
    Failed {
        reason: String,
        since: Timestamp,
        retry_at: Option<Timestamp>,
        /// 0 where its volume was never made.
        attempt: u32,
    },
    Deleting {
        since: Timestamp,
    },
    Deleted,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Created,
    CreateFailed {
        reason: String,
    },
    StartAsked {
        generation: u64,
    },
    AgentReady {
        generation: u64,
    },
    /// The container ended, or it did not become ready in time; `reason` says which.
    Exited {
        generation: u64,
        exit: Exit,
        reason: String,
    },
    ProbeFailed {
        reason: String,
    },
    ProbeOk,
    Paused,
    Thawed,
    StopAsked,
    DeleteAsked,
    Gone,
}

/// What the reconciler should do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Make the volume.
    Create,
    /// Begin a new generation.
    Start,
    /// Wait until then, or for an event.
    Wait(Timestamp),
    /// End the container: asked first, by force at the deadline.
    Stop,
    /// Remove container and volume.
    Delete,
}

/// An event that makes no sense in a state: a bug, or a message that came late.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{event} does not apply to a sandbox that is {from}")]
pub struct TransitionError {
    pub from: &'static str,
    pub event: &'static str,
}

/// Starts of one sandbox in a row before it is left failed for longer.
pub const ATTEMPTS: u32 = 5;
/// How long a container may take from start to the agent's handshake.
pub const READY_WITHIN: Duration = Duration::from_secs(20);
/// How long an agent may be out of reach before its container is replaced.
pub const UNHEALTHY_FOR: Duration = Duration::from_secs(10);
/// From SIGTERM to SIGKILL.
pub const STOP_GRACE: Duration = Duration::from_secs(10);
/// A sandbox that was ready this long has earned its attempts back.
pub const STABLE_AFTER: Duration = Duration::from_secs(60);
/// A volume that could not be made is tried again after this long, wanted or not.
pub const CREATE_AGAIN: Duration = Duration::from_secs(10);
/// A failed sandbox that should be running is tried again after this long.
pub const RETRY_FAILED: Duration = Duration::from_secs(300);

/// Wait before the n-th start in a row: none for the first, then 0.5 s doubling to 30 s.
pub fn backoff(attempt: u32) -> Duration {
    match attempt {
        0 | 1 => Duration::ZERO,
        n => Duration::from_millis(500 << (n - 2).min(6)).min(Duration::from_secs(30)),
    }
}

impl Observed {
    /// The state's name, as the API writes it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Creating { .. } => "creating",
            Self::Starting { .. } => "starting",
            Self::Ready { .. } => "ready",
            Self::Paused { .. } => "paused",
            Self::Unhealthy { .. } => "unhealthy",
            Self::Stopping { .. } => "stopping",
            Self::Stopped { .. } => "stopped",
            Self::Failed { .. } => "failed",
            Self::Deleting { .. } => "deleting",
            Self::Deleted => "deleted",
        }
    }

    /// The generation whose container exists, if any.
    pub fn generation(&self) -> Option<u64> {
        match self {
            Self::Starting { generation, .. }
            | Self::Ready { generation, .. }
            | Self::Paused { generation, .. }
            | Self::Unhealthy { generation, .. }
            | Self::Stopping { generation, .. } => Some(*generation),
            _ => None,
        }
    }

    /// Since when the state holds; `None` where it has no beginning that matters.
    pub fn since(&self) -> Option<Timestamp> {
        match self {
            Self::Creating { since }
            | Self::Starting { since, .. }
            | Self::Ready { since, .. }
            | Self::Paused { since, .. }
            | Self::Unhealthy { since, .. }
            | Self::Stopped { since, .. }
            | Self::Failed { since, .. }
            | Self::Deleting { since } => Some(*since),
            Self::Stopping { .. } | Self::Deleted => None,
        }
    }

    /// One sentence for people, where the state has a reason.
    pub fn reason(&self) -> Option<String> {
        match self {
            Self::Unhealthy { reason, .. } | Self::Failed { reason, .. } => Some(reason.clone()),
            Self::Starting { because, .. } => because.clone(),
            Self::Stopped { exit: Some(exit), .. } if exit.oom_killed => {
                Some("it ran out of memory and was killed; raise `limits.memory` or use less".to_owned())
            }
            Self::Stopped { exit: Some(exit), .. } if exit.code != 0 => {
                Some(format!("it ended with code {}", exit.code))
            }
            _ => None,
        }
    }
}

impl Event {
    fn name(&self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::CreateFailed { .. } => "create failed",
            Self::StartAsked { .. } => "start asked",
            Self::AgentReady { .. } => "agent ready",
            Self::Exited { .. } => "exited",
            Self::ProbeFailed { .. } => "probe failed",
            Self::ProbeOk => "probe ok",
            Self::Paused => "paused",
            Self::Thawed => "thawed",
            Self::StopAsked => "stop asked",
            Self::DeleteAsked => "delete asked",
            Self::Gone => "gone",
        }
    }
}

/// The state after an event. News about another generation than the present one changes nothing.
pub fn apply(state: Observed, event: Event, now: Timestamp) -> Result<Observed, TransitionError> {
    use Observed as S;
    let error = TransitionError {
        from: state.name(),
        event: event.name(),
    };
    if let (Some(present), Event::AgentReady { generation } | Event::Exited { generation, .. }) =
        (state.generation(), &event)
        && present != *generation
    {
        return Ok(state);
    }
    if let S::Creating { .. } | S::Failed { attempt: 0, .. } = state {
        return without_a_volume(&state, event, now).ok_or(error);
    }
    let kept = state.clone();
    Ok(match (state, event) {
        (S::Failed { attempt, .. }, Event::StartAsked { generation }) => starting(generation, attempt + 1, None, now),
        (S::Stopped { .. }, Event::StartAsked { generation }) => starting(generation, 1, None, now),
        (S::Starting { attempt, because, .. }, Event::StartAsked { generation }) => S::Starting {
            generation,
            attempt,
            since: now,
            not_before: now,
            because,
        },
        // Thawed by a process that has not heard its agent yet.
        (S::Paused { .. }, Event::StartAsked { generation }) => starting(generation, 1, None, now),
        (
            S::Starting {
                generation: g, attempt, ..
            },
            Event::AgentReady { .. },
        ) => ready(g, attempt, now),
        (state, Event::Exited { exit, reason, .. }) => ended(state, exit, reason, now),
        (
            S::Ready {
                generation,
                since,
                attempt,
            },
            Event::ProbeFailed { reason },
        ) => S::Unhealthy {
            generation,
            since: now,
            reason,
            attempt: counted(attempt, since, now),
        },
        (
            S::Unhealthy {
                generation: g, attempt, ..
            },
            Event::ProbeOk,
        ) => ready(g, attempt, now),
        (S::Ready { generation, .. }, Event::Paused) => S::Paused { generation, since: now },
        (S::Paused { generation, .. }, Event::Thawed) => ready(generation, 0, now),
        (
            S::Starting { generation, .. }
            | S::Ready { generation, .. }
            | S::Paused { generation, .. }
            | S::Unhealthy { generation, .. },
            Event::StopAsked,
        ) => S::Stopping {
            generation,
            deadline: after(now, STOP_GRACE),
        },
        (S::Failed { .. }, Event::StopAsked) => S::Stopped { exit: None, since: now },
        (S::Deleting { .. }, Event::Gone) => S::Deleted,
        (S::Deleted | S::Deleting { .. }, Event::DeleteAsked) => return Ok(kept),
        (_, Event::DeleteAsked) => S::Deleting { since: now },
        // Asked twice, or news that came after the fact: nothing to do.
        (S::Ready { .. } | S::Unhealthy { .. }, Event::AgentReady { .. } | Event::Thawed)
        | (S::Ready { .. }, Event::ProbeOk)
        | (S::Stopped { .. }, Event::StopAsked)
        | (S::Stopping { .. }, Event::StopAsked | Event::AgentReady { .. } | Event::ProbeFailed { .. })
        | (S::Unhealthy { .. }, Event::ProbeFailed { .. }) => kept,
        _ => return Err(error),
    })
}

/// The state after an event where there is nothing to start from yet.
fn without_a_volume(state: &Observed, event: Event, now: Timestamp) -> Option<Observed> {
    use Observed as S;
    match event {
        Event::Created => Some(S::Stopped { exit: None, since: now }),
        Event::CreateFailed { reason } => Some(S::Failed {
            reason,
            since: now,
            retry_at: Some(after(now, CREATE_AGAIN)),
            attempt: 0,
        }),
        // Who asks for anything has it tried at once.
        Event::StopAsked if matches!(state, S::Failed { .. }) => Some(S::Creating { since: now }),
        Event::DeleteAsked => Some(S::Deleting { since: now }),
        _ => None,
    }
}

/// The state after a container ended.
fn ended(state: Observed, exit: Exit, reason: String, now: Timestamp) -> Observed {
    use Observed as S;
    let reason = if exit.oom_killed {
        format!("{reason}: it ran out of memory")
    } else {
        reason
    };
    match state {
        S::Starting {
            generation, attempt, ..
        } => again(generation, attempt, reason, now),
        S::Ready {
            generation,
            since,
            attempt,
        } => again(generation, counted(attempt, since, now), reason, now),
        S::Unhealthy {
            generation, attempt, ..
        } => again(generation, attempt, reason, now),
        S::Paused { .. } | S::Stopping { .. } => S::Stopped {
            exit: Some(exit),
            since: now,
        },
        rest => rest,
    }
}

fn failed(reason: String, attempt: u32, now: Timestamp) -> Observed {
    Observed::Failed {
        reason,
        since: now,
        retry_at: Some(after(now, RETRY_FAILED)),
        attempt,
    }
}

fn ready(generation: u64, attempt: u32, now: Timestamp) -> Observed {
    Observed::Ready {
        generation,
        since: now,
        attempt,
    }
}

/// How many starts in a row still count for a sandbox that has been ready for so long.
fn counted(attempt: u32, ready_since: Timestamp, now: Timestamp) -> u32 {
    let earned = now.duration_since(ready_since).unsigned_abs() >= STABLE_AFTER;
    if earned { 0 } else { attempt }
}

fn starting(generation: u64, attempt: u32, because: Option<String>, now: Timestamp) -> Observed {
    Observed::Starting {
        generation,
        attempt,
        since: now,
        not_before: after(now, backoff(attempt)),
        because,
    }
}

/// The next attempt after a generation ended by itself, or `Failed` when the budget is spent.
fn again(generation: u64, attempt: u32, reason: String, now: Timestamp) -> Observed {
    if attempt >= ATTEMPTS {
        failed(reason, ATTEMPTS - 1, now)
    } else {
        // The number stays until `StartAsked` names the next generation.
        starting(generation, attempt + 1, Some(reason), now)
    }
}

/// `now` later by `by`, at most the end of time.
fn after(now: Timestamp, by: Duration) -> Timestamp {
    now.checked_add(by).unwrap_or(Timestamp::MAX)
}

/// What to do so that `state` becomes `desired`; `None` when nothing is left to do. A paused sandbox is as wanted:
/// it is thawed by a request, not by policy.
///
/// `started` says whether the container of a `Starting` state was already started.
pub fn next_action(desired: Desired, state: &Observed, started: bool, now: Timestamp) -> Option<Action> {
    use Observed as S;
    match (desired, state) {
        (_, S::Deleted) => None,
        (_, S::Deleting { .. }) | (Desired::Deleted, _) => Some(Action::Delete),
        (_, S::Creating { .. }) => Some(Action::Create),
        (
            _,
            S::Failed {
                attempt: 0, retry_at, ..
            },
        ) => Some(at_or(retry_at.unwrap_or(now), Action::Create, now)),
        (_, S::Stopping { .. }) => Some(Action::Stop),
        (Desired::Running, S::Starting { not_before, .. }) if !started && *not_before > now => {
            Some(Action::Wait(*not_before))
        }
        (Desired::Running, S::Starting { .. }) if !started => Some(Action::Start),
        (Desired::Running, S::Starting { since, .. }) => Some(at_or(after(*since, READY_WITHIN), Action::Stop, now)),
        (Desired::Running, S::Unhealthy { since, .. }) => Some(at_or(after(*since, UNHEALTHY_FOR), Action::Stop, now)),
        (Desired::Running, S::Stopped { .. }) => Some(Action::Start),
        (Desired::Running, S::Failed { retry_at: Some(at), .. }) if *at > now => Some(Action::Wait(*at)),
        (Desired::Running, S::Failed { .. }) => Some(Action::Start),
        (Desired::Running, S::Ready { .. } | S::Paused { .. }) => None,
        (Desired::Stopped, S::Stopped { .. } | S::Failed { .. }) => None,
        (Desired::Stopped, _) => Some(Action::Stop),
    }
}

/// `action` from `at` on, and waiting before it.
fn at_or(at: Timestamp, action: Action, now: Timestamp) -> Action {
    if now >= at { action } else { Action::Wait(at) }
}
