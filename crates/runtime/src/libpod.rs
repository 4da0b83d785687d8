//! A small typed client of Podman's libpod API over its Unix socket. It must not know what a sandbox is.
//!
//! A connection a call: connecting costs some 20 µs, and a pool would have to notice restarts of the service.
//! Shapes are those of Podman 4.3 and later, <https://docs.podman.io/en/latest/_static/api.html>.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use crate::{Error, Result};

/// Answers are held in memory; the longest, a list with all labels, is far below this.
const MAX_BODY: usize = 8 << 20;
/// Podman may be busy with its own locks.
const CALL: Duration = Duration::from_secs(20);
const CONNECT: Duration = Duration::from_secs(3);

/// A client of one service.
#[derive(Debug, Clone)]
pub struct Libpod {
    socket: PathBuf,
}

/// `State` of an inspected container.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct State {
    pub status: String,
    #[serde(rename = "OOMKilled")]
    pub oom_killed: bool,
    pub pid: i32,
    pub conmon_pid: i32,
    pub exit_code: i32,
}

/// What inspection says that we compare. Absent fields read as empty, and so differ from the template.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Inspect {
    pub id: String,
    pub state: State,
    pub rootfs: String,
    pub effective_caps: Option<Vec<String>>,
    pub bounding_caps: Option<Vec<String>>,
    pub mounts: Vec<Mounted>,
    pub config: Config,
    pub host_config: HostConfig,
    #[serde(rename = "OCIConfigPath")]
    pub oci_config_path: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Mounted {
    pub r#type: String,
    pub source: String,
    pub destination: String,
    pub options: Vec<String>,
    #[serde(rename = "RW")]
    pub rw: bool,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Config {
    pub env: Vec<String>,
    pub cmd: Vec<String>,
    pub labels: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct HostConfig {
    pub network_mode: String,
    pub ipc_mode: String,
    pub pid_mode: String,
    #[serde(rename = "UTSMode")]
    pub uts_mode: String,
    pub userns_mode: String,
    pub cgroup_mode: String,
    pub privileged: bool,
    pub security_opt: Vec<String>,
    pub tmpfs: BTreeMap<String, String>,
    pub devices: Option<Vec<serde_json::Value>>,
    pub shm_size: i64,
    pub memory: i64,
    pub memory_swap: i64,
    pub cpu_period: u64,
    pub cpu_quota: i64,
    pub pids_limit: i64,
    pub ulimits: Vec<Ulimit>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Ulimit {
    pub name: String,
    pub soft: i64,
    pub hard: i64,
}

/// One container of a list.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Listed {
    pub labels: BTreeMap<String, String>,
    pub state: String,
    pub exit_code: i32,
    pub names: Vec<String>,
}

/// One event.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Event {
    pub action: String,
    pub actor: Actor,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Actor {
    /// Labels and Podman's own, in one map.
    pub attributes: BTreeMap<String, String>,
}

/// Resource limits, as the OCI runtime specification writes them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Resources {
    pub memory: Memory,
    pub cpu: Cpu,
    pub pids: Pids,
}

/// Bytes; `swap` counts memory and swap together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Memory {
    pub limit: i64,
    pub swap: i64,
}

/// Microseconds, and how much against other containers that want the same processor.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cpu {
    pub shares: u64,
    pub quota: i64,
    pub period: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Pids {
    pub limit: i64,
}

/// One container's use.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Usage {
    #[serde(rename = "CPUNano")]
    pub cpu_ns: u64,
    #[serde(rename = "MemUsage")]
    pub memory: u64,
    #[serde(rename = "MemLimit")]
    pub memory_limit: u64,
    #[serde(rename = "PIDs")]
    pub pids: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct UsageReport {
    stats: Option<Vec<Usage>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Refusal {
    cause: String,
    message: String,
}

impl Libpod {
    /// A client of the service at `socket`. Nothing is connected before the first call.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// `create`; `body` is a SpecGenerator. Returns the id.
    pub async fn create(&self, body: &impl Serialize) -> Result<String> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Created {
            id: String,
        }
        let created: Created = self.json(Method::POST, "/containers/create", Some(body)).await?;
        Ok(created.id)
    }

    /// `init`: makes everything but does not start it; already made is fine.
    pub async fn init(&self, name: &str) -> Result<()> {
        self.done(Method::POST, &format!("/containers/{name}/init")).await
    }

    /// `start`; already started is fine.
    pub async fn start(&self, name: &str) -> Result<()> {
        self.done(Method::POST, &format!("/containers/{name}/start")).await
    }

    /// `kill` with a signal's name without `SIG`.
    pub async fn kill(&self, name: &str, signal: &str) -> Result<()> {
        self.done(Method::POST, &format!("/containers/{name}/kill?signal={signal}"))
            .await
    }

    pub async fn pause(&self, name: &str) -> Result<()> {
        self.done(Method::POST, &format!("/containers/{name}/pause")).await
    }

    pub async fn unpause(&self, name: &str) -> Result<()> {
        self.done(Method::POST, &format!("/containers/{name}/unpause")).await
    }

    /// Removes by force, without grace.
    pub async fn remove(&self, name: &str) -> Result<()> {
        self.done(
            Method::DELETE,
            &format!("/containers/{name}?force=true&v=true&timeout=0"),
        )
        .await
    }

    pub async fn inspect(&self, name: &str) -> Result<Inspect> {
        let path = format!("/containers/{name}/json");
        match self.json(Method::GET, &path, None::<&()>).await {
            // It ended while Podman looked into /proc; now that is known.
            Err(Error::Refused(why)) if why.contains("no such process") => {
                self.json(Method::GET, &path, None::<&()>).await
            }
            inspected => inspected,
        }
    }

    /// All that Podman tells of a container, as it tells it.
    pub async fn description(&self, name: &str) -> Result<Bytes> {
        let path = format!("/containers/{name}/json?size=false");
        self.call(Method::GET, &path, None::<&()>).await
    }

    /// All containers, running or not, that have the label.
    pub async fn list(&self, label: &str) -> Result<Vec<Listed>> {
        self.list_by("label", label).await
    }

    /// Whether there is anything left of a container.
    pub async fn lists(&self, name: &str) -> Result<bool> {
        // A name that is asked for is an expression. Ours have no letter that means something else in one.
        let found = self.list_by("name", &format!("^{name}$")).await?;
        Ok(found.iter().any(|listed| listed.names.iter().any(|it| it == name)))
    }

    async fn list_by(&self, key: &str, value: &str) -> Result<Vec<Listed>> {
        let filters = encode(&format!("{{\"{key}\":[\"{value}\"]}}"));
        self.json(
            Method::GET,
            &format!("/containers/json?all=true&filters={filters}"),
            None::<&()>,
        )
        .await
    }

    pub async fn update(&self, name: &str, resources: &Resources) -> Result<()> {
        let path = format!("/containers/{name}/update");
        self.call(Method::POST, &path, Some(resources)).await.map(|_| ())
    }

    pub async fn stats(&self, name: &str) -> Result<Usage> {
        let path = format!("/containers/stats?containers={name}&stream=false");
        let report: UsageReport = self.json(Method::GET, &path, None::<&()>).await?;
        report.stats.and_then(|mut all| all.pop()).ok_or(Error::NotFound)
    }

    pub async fn ping(&self) -> Result<()> {
        self.call(Method::GET, "/_ping", None::<&()>).await.map(drop)
    }

    pub async fn version(&self) -> Result<serde_json::Value> {
        self.json(Method::GET, "/version", None::<&()>).await
    }

    pub async fn info(&self) -> Result<serde_json::Value> {
        self.json(Method::GET, "/info", None::<&()>).await
    }

    /// Container log in Docker's framing: per frame one byte stream number, three zero, four length.
    pub async fn logs(&self, name: &str, tail: usize, follow: bool) -> Result<Incoming> {
        // Podman seeks the last lines from the end; all of them it reads as they come.
        let tail = if tail == usize::MAX {
            "all".to_owned()
        } else {
            tail.to_string()
        };
        self.stream(&format!(
            "/containers/{name}/logs?stdout=true&stderr=true&tail={tail}&follow={follow}"
        ))
        .await
    }

    /// Ends of containers, one JSON object a line, from now on. Resolves with the first of them. All containers', ours
    /// or not: Podman 4.3 drops every event when told to filter by a label without a value.
    pub async fn deaths(&self) -> Result<Incoming> {
        let filters = encode("{\"type\":[\"container\"],\"event\":[\"died\"]}");
        let path = format!("/events?stream=true&filters={filters}");
        self.streamed(self.send(Method::GET, &path, None::<&()>).await?).await
    }

    async fn done(&self, method: Method, path: &str) -> Result<()> {
        self.call(method, path, None::<&()>).await.map(|_| ())
    }

    async fn json<T: DeserializeOwned>(&self, method: Method, path: &str, body: Option<&impl Serialize>) -> Result<T> {
        let bytes = self.call(method, path, body).await?;
        serde_json::from_slice(&bytes).map_err(|e| self.nonsense(&format!("{path}: {e}")))
    }

    async fn call(&self, method: Method, path: &str, body: Option<&impl Serialize>) -> Result<Bytes> {
        let whole = async {
            let response = self.send(method, path, body).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_BODY)
                .collect()
                .await
                .map_err(|e| self.nonsense(&format!("{path}: {e}")))?
                .to_bytes();
            if status.is_success() || status == StatusCode::NOT_MODIFIED {
                Ok(body)
            } else {
                Err(refusal(status, &body))
            }
        };
        tokio::time::timeout(CALL, whole)
            .await
            .map_err(|_| self.silent(&format!("no answer within {} s", CALL.as_secs())))?
    }

    async fn stream(&self, path: &str) -> Result<Incoming> {
        let head = tokio::time::timeout(CALL, self.send(Method::GET, path, None::<&()>));
        let response = head
            .await
            .map_err(|_| self.silent(&format!("no answer within {} s", CALL.as_secs())))??;
        self.streamed(response).await
    }

    async fn streamed(&self, response: http::Response<Incoming>) -> Result<Incoming> {
        let status = response.status();
        if status.is_success() {
            return Ok(response.into_body());
        }
        let body = Limited::new(response.into_body(), MAX_BODY).collect();
        match tokio::time::timeout(CALL, body).await {
            Ok(Ok(body)) => Err(refusal(status, &body.to_bytes())),
            _ => Err(self.nonsense("a broken answer")),
        }
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<http::Response<Incoming>> {
        let stream = tokio::time::timeout(CONNECT, UnixStream::connect(&self.socket))
            .await
            .map_err(|_| self.silent("connecting takes too long"))?
            .map_err(|e| self.silent(&e.to_string()))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| self.nonsense(&e.to_string()))?;
        // Ends when the response has been read or dropped.
        tokio::spawn(connection);
        let bytes = match body {
            Some(body) => serde_json::to_vec(body).map_err(std::io::Error::from)?,
            None => Vec::new(),
        };
        let request = Request::builder()
            .method(method)
            .uri(format!("/v4.0.0/libpod{path}"))
            .header(http::header::HOST, "podman")
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(bytes)))
            .map_err(|e| self.nonsense(&e.to_string()))?;
        sender.send_request(request).await.map_err(|e| {
            if e.is_incomplete_message() || e.is_closed() || e.is_canceled() {
                self.silent("it hung up")
            } else {
                self.nonsense(&e.to_string())
            }
        })
    }

    fn silent(&self, why: &str) -> Error {
        Error::Unavailable(format!("Podman at {} ({why})", self.socket.display()))
    }

    fn nonsense(&self, what: &str) -> Error {
        Error::Protocol(format!(
            "{} at {}; is it Podman 4.3 or later?",
            sentence(what),
            self.socket.display()
        ))
    }
}

/// An error answer as one of our kinds. Podman 4 says 500 for a container in the wrong state, Podman 5 says 409.
fn refusal(status: StatusCode, body: &[u8]) -> Error {
    let refusal: Refusal = serde_json::from_slice(body).unwrap_or_default();
    let message = match refusal.message.as_str() {
        "" => format!("HTTP {} without a reason", status.as_u16()),
        text => sentence(text),
    };
    let improper = refusal.cause == "container state improper";
    let locked = refusal.message.contains("device or resource busy");
    match status {
        StatusCode::NOT_FOUND => Error::NotFound,
        StatusCode::CONFLICT => Error::Busy(message),
        _ if improper || locked => Error::Busy(message),
        _ => Error::Refused(message),
    }
}

/// Foreign text as one line of at most 300 characters.
fn sentence(text: &str) -> String {
    let plain = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    plain.take(300).collect::<String>().trim().to_owned()
}

/// Percent-encoding of everything a query value may not hold.
fn encode(text: &str) -> String {
    text.bytes()
        .map(|b| match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'-' | b'_' => char::from(b).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_service_become_the_kinds_callers_act_on() {
        let body = br#"{"cause":"container state improper","message":"x is not paused","response":500}"#;
        assert!(matches!(refusal(StatusCode::INTERNAL_SERVER_ERROR, body), Error::Busy(m) if m == "x is not paused"));
        assert!(matches!(refusal(StatusCode::NOT_FOUND, b"<html>"), Error::NotFound));
        assert!(matches!(refusal(StatusCode::CONFLICT, b""), Error::Busy(_)));
        let odd = refusal(StatusCode::BAD_GATEWAY, b"\x00\xff").to_string();
        assert!(odd.contains("HTTP 502 without a reason"), "{odd}");
        let long = refusal(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("{{\"message\":\"a\\n{}\"}}", "b".repeat(9000)).as_bytes(),
        );
        assert!(long.to_string().len() < 400 && !long.to_string().contains('\n'));
    }

    #[test]
    fn a_filter_survives_the_query() {
        assert_eq!(encode("{\"a\":[\"b.c\"]}"), "%7B%22a%22%3A%5B%22b.c%22%5D%7D");
    }
}
