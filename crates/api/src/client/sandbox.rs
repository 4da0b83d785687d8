//! Calls to the agent inside a sandbox, passed on by the hypervisor: health, exec, tasks and terminals. It must not
//! know of local terminals or files.

use reqwest::Method;
use reqwest::header::ACCEPT;

use super::{Client, ClientError, Events, Request, Socket, read, segment};
use crate::sandbox::{
    CreateTask, CreateTerminal, ExecExit, ExecRequest, ExecResult, Health, OutputStream, Task, TaskEvent, Terminal,
};
use crate::workspaces::Page;

/// The sandbox a slot points at, whichever that is when a call is made.
#[derive(Debug, Clone)]
pub struct Sandbox<'a> {
    client: &'a Client,
    base: String,
}

/// A command that runs and the output it has not yet given.
#[derive(Debug)]
pub struct ExecStream {
    events: Events,
}

/// One piece of a command's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    Output(OutputStream, Vec<u8>),
    Exit(ExecExit),
}

/// A task's events from some number on.
#[derive(Debug)]
pub struct TaskStream {
    events: Events,
}

impl<'a> Sandbox<'a> {
    pub(super) fn new(client: &'a Client, base: String) -> Self {
        Self { client, base }
    }

    /// # Errors
    /// Any.
    pub async fn health(&self) -> Result<Health, ClientError> {
        self.client.get(&self.path("/health")).await
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// Any; that the command failed is none.
    pub async fn exec(&self, request: &ExecRequest) -> Result<ExecResult, ClientError> {
        let call = Request::new(Method::POST, self.path("/exec"))
            .body(request)?
            .patient(None);
        read(self.client.send(call).await?).await
    }

    /// Runs a command and gives its output as it comes.
    ///
    /// # Errors
    /// Any.
    pub async fn exec_stream(&self, request: &ExecRequest) -> Result<ExecStream, ClientError> {
        let call = Request::new(Method::POST, self.path("/exec"))
            .header(ACCEPT.as_str(), "text/event-stream")?
            .body(request)?
            .patient(None);
        let events = Events::new(self.client.send(call).await?);
        Ok(ExecStream { events })
    }

    /// # Errors
    /// Any.
    pub async fn tasks(&self) -> Result<Page<Task>, ClientError> {
        self.client.get(&self.path("/tasks")).await
    }

    /// # Errors
    /// Any.
    pub async fn create_task(&self, task: &CreateTask) -> Result<Task, ClientError> {
        self.client.post(&self.path("/tasks"), task).await
    }

    /// # Errors
    /// Any.
    pub async fn task(&self, id: &str) -> Result<Task, ClientError> {
        self.client.get(&self.path(&format!("/tasks/{}", segment(id)))).await
    }

    /// Ends the task's whole process group.
    ///
    /// # Errors
    /// Any.
    pub async fn cancel_task(&self, id: &str) -> Result<(), ClientError> {
        self.client.delete(&self.path(&format!("/tasks/{}", segment(id)))).await
    }

    /// What happened after event `since`, then what happens; ends with the task.
    ///
    /// # Errors
    /// Any.
    pub async fn task_events(&self, id: &str, since: u64) -> Result<TaskStream, ClientError> {
        let path = self.path(&format!("/tasks/{}/events?since={since}", segment(id)));
        let call = Request::new(Method::GET, path).header(ACCEPT.as_str(), "text/event-stream")?;
        let events = Events::new(self.client.send(call).await?);
        Ok(TaskStream { events })
    }

    /// # Errors
    /// Any.
    pub async fn create_terminal(&self, terminal: &CreateTerminal) -> Result<Terminal, ClientError> {
        self.client.post(&self.path("/terminals"), terminal).await
    }

    /// Hangs the terminal up.
    ///
    /// # Errors
    /// Any.
    pub async fn delete_terminal(&self, id: &str) -> Result<(), ClientError> {
        self.client
            .delete(&self.path(&format!("/terminals/{}", segment(id))))
            .await
    }

    /// The terminal's bytes both ways, beginning with the one after byte `since`.
    ///
    /// # Errors
    /// Any.
    pub async fn attach(&self, id: &str, since: u64) -> Result<Socket, ClientError> {
        self.client
            .socket(&self.path(&format!("/terminals/{}/attach?since={since}", segment(id))))
            .await
    }

    fn path(&self, rest: &str) -> String {
        format!("{}{rest}", self.base)
    }
}

impl ExecStream {
    /// The next piece; `None` where the stream ended, in order only after an exit.
    ///
    /// # Errors
    /// Any.
    pub async fn next(&mut self) -> Result<Option<ExecEvent>, ClientError> {
        while let Some(event) = self.events.next().await? {
            let stream = match event.name.as_str() {
                "stdout" => OutputStream::Stdout,
                "stderr" => OutputStream::Stderr,
                "exit" => return decode(&event.data).map(|exit| Some(ExecEvent::Exit(exit))),
                _ => continue,
            };
            let chunk: crate::sandbox::Chunk = decode(&event.data)?;
            let bytes = chunk.into_bytes().ok_or_else(not_base64)?;
            return Ok(Some(ExecEvent::Output(stream, bytes)));
        }
        Ok(None)
    }
}

impl TaskStream {
    /// The next event; `None` where the stream ended, in order only after a final state.
    ///
    /// # Errors
    /// Any.
    pub async fn next(&mut self) -> Result<Option<TaskEvent>, ClientError> {
        while let Some(event) = self.events.next().await? {
            if matches!(event.name.as_str(), "output" | "state" | "gap") {
                return decode(&event.data).map(Some);
            }
        }
        Ok(None)
    }
}

fn decode<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, ClientError> {
    serde_json::from_str(text).map_err(|e| ClientError::Unexpected(e.to_string()))
}

fn not_base64() -> ClientError {
    ClientError::Unexpected("output that should be base64 is not".to_owned())
}
