//! The sandbox API as it goes over the wire: health, exec, tasks and terminals. It must not know how anything is run.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// `GET /health`. Readiness is this answer with the wanted sandbox, generation and nonce.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// `ok`, or `stopping` once SIGTERM came.
    pub status: String,
    /// Always `sandbox`.
    pub service: String,
    pub version: String,
    pub sandbox_id: String,
    pub generation: u64,
    pub nonce: String,
    pub uptime_ms: u64,
}

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Command {
    /// A line for the user's login shell.
    Line(String),
    /// A program, searched in PATH, and its arguments.
    Argv(Vec<String>),
}

/// How bytes are written in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    #[default]
    Utf8,
    Base64,
}

impl Encoding {
    pub fn is_utf8(&self) -> bool {
        *self == Self::Utf8
    }
}

/// Bytes: text where they are UTF-8, else base64.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Chunk {
    pub data: String,
    #[serde(default)]
    pub encoding: Encoding,
}

impl Chunk {
    pub fn new(bytes: &[u8]) -> Self {
        match std::str::from_utf8(bytes) {
            Ok(text) => Self {
                data: text.to_owned(),
                encoding: Encoding::Utf8,
            },
            Err(_) => Self {
                data: data_encoding::BASE64.encode(bytes),
                encoding: Encoding::Base64,
            },
        }
    }

    /// The bytes; `None` where the text is not base64 although it says so.
    pub fn into_bytes(self) -> Option<Vec<u8>> {
        match self.encoding {
            Encoding::Utf8 => Some(self.data.into_bytes()),
            Encoding::Base64 => data_encoding::BASE64.decode(self.data.as_bytes()).ok(),
        }
    }
}

/// What a command reads: text, or bytes as a chunk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Stdin {
    Text(String),
    Chunk(Chunk),
}

impl Stdin {
    /// The bytes; `None` where the chunk is not what it says.
    pub fn into_bytes(self) -> Option<Vec<u8>> {
        match self {
            Self::Text(text) => Some(text.into_bytes()),
            Self::Chunk(chunk) => chunk.into_bytes(),
        }
    }
}

/// `POST /exec`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    pub command: Command,
    /// Absolute, or relative to HOME; HOME where missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// On top of the sandbox's environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<Stdin>,
    /// After this the whole process group is killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// For each of stdout and stderr; 1 MiB where missing, at most 8 MiB. A stream has no limit unless one is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_output_bytes: Option<u64>,
}

/// Answer to a plain `POST /exec`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecResult {
    #[serde(flatten)]
    pub exit: ExecExit,
    pub stdout: String,
    #[serde(default, skip_serializing_if = "Encoding::is_utf8")]
    pub stdout_encoding: Encoding,
    pub stderr: String,
    #[serde(default, skip_serializing_if = "Encoding::is_utf8")]
    pub stderr_encoding: Encoding,
}

/// How a command ended; the data of the stream's last event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecExit {
    /// 0 to 255: the command's own; 128 + n where a signal ended it; 126 or 127 where it could not be started.
    pub exit_code: i32,
    /// The signal's name, such as `SIGKILL`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
    pub duration_ms: u64,
    /// Whether output was left out.
    pub truncated: bool,
    /// Whether `timeout_ms` ended it.
    pub timed_out: bool,
}

/// How far a task is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskState {
    Queued,
    Running,
    Succeeded,
    Failed,
    Cancelled,
    TimedOut,
}

impl TaskState {
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }
}

/// `POST /tasks`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateTask {
    pub command: Command,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Counted from the start of the command, not from the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// `GET /tasks/{id}`, and what POST and DELETE answer with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    pub id: String,
    pub command: Command,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    pub state: TaskState,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
    pub created_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
    /// Number of the newest event.
    pub last_seq: u64,
}

/// Where output came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputStream {
    Stdout,
    Stderr,
}

/// One event of `/tasks/{id}/events`: an SSE event named like `type` whose id is `seq`, or a websocket text frame.
/// Numbers start at 1 and have no holes, except those a gap names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskEvent {
    pub seq: u64,
    #[serde(flatten)]
    pub what: TaskEventKind,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum TaskEventKind {
    Output {
        stream: OutputStream,
        #[serde(flatten)]
        chunk: Chunk,
    },
    State {
        state: TaskState,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        exit_code: Option<i32>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        signal: Option<String>,
    },
    /// Events `from` to `seq` were dropped because there was too much output.
    Gap { from: u64 },
}

impl TaskEventKind {
    /// The value of `type`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Output { .. } => "output",
            Self::State { .. } => "state",
            Self::Gap { .. } => "gap",
        }
    }
}

/// `POST /terminals`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateTerminal {
    /// A program; the user's login shell where missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shell: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    pub cols: u16,
    pub rows: u16,
}

/// `GET /terminals/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    pub id: String,
    pub shell: String,
    pub cols: u16,
    pub rows: u16,
    pub created_at: Timestamp,
    /// Set when the shell has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// How many clients are attached.
    pub clients: u32,
    /// Bytes written by the terminal so far.
    pub seq: u64,
}

/// Text frames from a client of `/terminals/{id}/attach`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum TerminalInput {
    Resize {
        cols: u16,
        rows: u16,
    },
    /// Everything up to byte `seq` was shown. A client that sends one is never more than 256 KiB ahead of it.
    Ack {
        seq: u64,
    },
}

/// Text frames to a client of `/terminals/{id}/attach`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum TerminalControl {
    /// First frame: number of the byte that comes first. Greater than the `since` asked for where that was dropped.
    Hello { seq: u64 },
    /// Last frame.
    Exit { code: i32 },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_survive_json_whether_they_are_text_or_not() {
        for bytes in [&b"plain \xc3\xa4"[..], b"\xff\xfe\x00", b""] {
            let text = serde_json::to_string(&Chunk::new(bytes)).unwrap();
            let back: Chunk = serde_json::from_str(&text).unwrap();
            assert_eq!(back.into_bytes().unwrap(), bytes);
        }
    }

    #[test]
    fn an_event_is_one_flat_object() {
        let event = TaskEvent {
            seq: 7,
            what: TaskEventKind::Output {
                stream: OutputStream::Stderr,
                chunk: Chunk::new(b"hi"),
            },
        };
        let text = serde_json::to_string(&event).unwrap();
        assert_eq!(
            text,
            r#"{"seq":7,"type":"output","stream":"stderr","data":"hi","encoding":"utf8"}"#
        );
        assert_eq!(serde_json::from_str::<TaskEvent>(&text).unwrap(), event);
    }

    #[test]
    fn a_command_is_a_line_or_a_list() {
        let line: ExecRequest = serde_json::from_str(r#"{"command":"ls -l | wc"}"#).unwrap();
        assert_eq!(line.command, Command::Line("ls -l | wc".into()));
        let argv: ExecRequest = serde_json::from_str(r#"{"command":["ls","-l"],"stdin":"x"}"#).unwrap();
        assert_eq!(argv.command, Command::Argv(vec!["ls".into(), "-l".into()]));
        assert!(serde_json::from_str::<ExecRequest>(r#"{"command":["ls"],"tty":true}"#).is_err());
    }
}
