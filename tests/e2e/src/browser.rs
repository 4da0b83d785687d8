//! A real Chromium, spoken to over its DevTools protocol. It must not know what is on a page.
//!
//! Our own, because the crate that does the same compiles all of the protocol, which takes longer than every other
//! dependency together; a dozen of its commands are used here.
//! Source: <https://chromedevtools.github.io/devtools-protocol/>

use std::collections::HashMap;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result, bail};
use futures_util::{SinkExt as _, StreamExt as _};
use rustix::process::{Pid, Signal, WaitOptions, kill_process_group, waitpid};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use url::Url;

use crate::page::Page;
use crate::waiting::PATIENCE;

/// Tests run as root, without a display and without the internet.
const FLAGS: [&str; 12] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-breakpad",
    "--no-proxy-server",
    // Else a click that comes before the first frame of a new page is dropped.
    "--allow-pre-commit-input",
    "--remote-debugging-port=0",
];

/// A browser with a profile of its own; dropping it ends it.
pub struct Browser {
    calls: Calls,
    process: Child,
    profile: TempDir,
}

impl Browser {
    pub async fn start() -> Result<Self> {
        Self::start_with(&[]).await
    }

    /// With further flags.
    pub async fn start_with(flags: &[String]) -> Result<Self> {
        let profile = tempfile::Builder::new().prefix("choir-e2e-browser-").tempdir()?;
        let mut process = Command::new("chromium")
            .args(FLAGS)
            .args(flags)
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .context("cannot start chromium")?;
        let stderr = process.stderr.take().context("chromium has no stderr")?;
        let address = tokio::time::timeout(PATIENCE, address(BufReader::new(stderr)))
            .await
            .context("chromium did not say its address")??;
        Ok(Self {
            calls: Calls::connect(&address).await?,
            process,
            profile,
        })
    }

    /// A new tab with an authenticator in it that makes and uses passkeys without asking.
    pub async fn page(&self) -> Result<Page> {
        self.open(json!({})).await
    }

    /// The same in a context of its own, as of another person: no cookie and no storage is shared.
    pub async fn stranger(&self) -> Result<Page> {
        let made = self.calls.call(None, "Target.createBrowserContext", json!({})).await?;
        self.open(json!({"browserContextId": made["browserContextId"]})).await
    }

    /// Each tab has a window of its own and believes to have the focus: one behind another draws no frames and loses
    /// keys and clicks.
    async fn open(&self, mut target: Value) -> Result<Page> {
        target["url"] = "about:blank".into();
        target["newWindow"] = true.into();
        let created = self.calls.call(None, "Target.createTarget", target).await?;
        let target = json!({"targetId": created["targetId"], "flatten": true});
        let attached = self.calls.call(None, "Target.attachToTarget", target).await?;
        let session = attached["sessionId"].as_str().context("the new tab has no session")?;
        let page = Page::new(self.calls.clone(), session.to_owned());
        page.call("Page.enable", json!({})).await?;
        page.call("Emulation.setFocusEmulationEnabled", json!({"enabled": true}))
            .await?;
        page.call("WebAuthn.enable", json!({})).await?;
        page.new_device().await?;
        Ok(page)
    }

    /// The addresses that frames of other sites show, error pages included.
    pub async fn frames(&self) -> Result<Vec<String>> {
        let answer = self.calls.call(None, "Target.getTargets", json!({})).await?;
        let mut shown = Vec::new();
        for target in answer["targetInfos"].as_array().context("no targets")? {
            if target["type"] == "iframe" {
                let asked = json!({"targetId": target["targetId"], "flatten": true});
                let attached = self.calls.call(None, "Target.attachToTarget", asked).await?;
                let session = attached["sessionId"].as_str().context("the frame has no session")?;
                let frame = Page::new(self.calls.clone(), session.to_owned());
                shown.push(
                    frame
                        .eval("location.href")
                        .await?
                        .as_str()
                        .unwrap_or_default()
                        .to_owned(),
                );
            }
        }
        Ok(shown)
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let group = self.process.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        if let Some(group) = group {
            // A browser that ended by itself is fine, too.
            let _gone = kill_process_group(group, Signal::KILL);
            let _gone = waitpid(Some(group), WaitOptions::empty());
        }
        // Its helpers end by themselves, and may write until then.
        for _ in 0..100 {
            if std::fs::remove_dir_all(self.profile.path()).is_ok() {
                return;
            }
        }
    }
}

/// Chromium writes it on stderr, which must be read on so that it never blocks.
async fn address(mut stderr: BufReader<tokio::process::ChildStderr>) -> Result<Url> {
    let mut line = String::new();
    while stderr.read_line(&mut line).await? > 0 {
        if let Some(address) = line.trim().strip_prefix("DevTools listening on ") {
            let address = Url::parse(address)?;
            tokio::spawn(async move { tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await });
            return Ok(address);
        }
        line.clear();
    }
    bail!("chromium ended at once")
}

/// Commands under way, by number.
type Pending = Arc<Mutex<HashMap<u64, oneshot::Sender<Value>>>>;

/// The one connection to the browser, shared by its tabs.
#[derive(Clone)]
pub(crate) struct Calls {
    outgoing: mpsc::UnboundedSender<String>,
    pending: Pending,
    next: Arc<AtomicU64>,
}

impl Calls {
    async fn connect(address: &Url) -> Result<Self> {
        let port = address.port().context("chromium's address has no port")?;
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        let (socket, _) = tokio_tungstenite::client_async(address.as_str(), stream).await?;
        let (outgoing, queue) = mpsc::unbounded_channel();
        let pending = Pending::default();
        tokio::spawn(carry(socket, queue, pending.clone()));
        Ok(Self {
            outgoing,
            pending,
            next: Arc::default(),
        })
    }

    /// One command and its result; `session` names a tab.
    pub(crate) async fn call(&self, session: Option<&str>, method: &str, params: Value) -> Result<Value> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut command = json!({"id": id, "method": method, "params": params});
        if let Some(session) = session {
            command["sessionId"] = session.into();
        }
        let (sender, receiver) = oneshot::channel();
        self.pending
            .lock()
            .expect("no holder of this lock panics")
            .insert(id, sender);
        self.outgoing.send(command.to_string()).context("the browser is gone")?;
        let mut answer = tokio::time::timeout(PATIENCE, receiver)
            .await
            .with_context(|| format!("the browser did not answer {method}"))?
            .with_context(|| format!("the browser ended during {method}"))?;
        match answer.get("error") {
            Some(error) => bail!("{method}: {error}"),
            None => Ok(answer["result"].take()),
        }
    }
}

/// Ends with the browser, and with it every command under way. Events are not listened to: tests look at values.
async fn carry(socket: WebSocketStream<TcpStream>, mut queue: mpsc::UnboundedReceiver<String>, pending: Pending) {
    let (mut sink, mut stream) = socket.split();
    loop {
        tokio::select! {
            command = queue.recv() => {
                let Some(command) = command else { break };
                if sink.send(Message::text(command)).await.is_err() {
                    break;
                }
            }
            message = stream.next() => {
                let Some(Ok(message)) = message else { break };
                let answer: Value = serde_json::from_slice(&message.into_data()).unwrap_or_default();
                let waiting = answer["id"].as_u64().and_then(|id| {
                    pending.lock().expect("no holder of this lock panics").remove(&id)
                });
                if let Some(waiting) = waiting {
                    // Whoever asked may have given up.
                    let _given_up = waiting.send(answer);
                }
            }
        }
    }
    pending.lock().expect("no holder of this lock panics").clear();
}
