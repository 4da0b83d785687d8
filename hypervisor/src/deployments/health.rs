//! Whether an app is well, by the check its release names. It must not know what depends on the answer.

use std::time::Duration;

use choir_core::settings::HealthCheck;
use choir_core::{Door, Generation, Slot};
use choir_store::WorkspaceView;
use http::header::{CONNECTION, HOST};
use http_body_util::Empty;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;

use super::text;
use crate::app::App;
use crate::reconcile::launch;

/// Between two tries.
const AGAIN: Duration = Duration::from_millis(100);
/// How long one try may take.
const ANSWERED_WITHIN: Duration = Duration::from_secs(5);

impl App {
    /// Asks the app of a slot until it answers as it should, for as long as its check allows. Without a check it is well.
    pub(super) async fn app_is_well(
        &self,
        view: &WorkspaceView,
        slot: Slot,
        generation: &Generation,
    ) -> Result<(), String> {
        let release = self.releases.config(&view.slot(slot).release).await?;
        let Some(check) = &release.health else {
            return Ok(());
        };
        let port = check.port.unwrap_or_else(|| launch::app_port(view, &release));
        let deadline = tokio::time::Instant::now() + Duration::from_secs(check.timeout_s);
        loop {
            let asked = tokio::time::timeout(ANSWERED_WITHIN, self.ask(generation, port, check)).await;
            let why = match asked.unwrap_or_else(|_| Err("it does not answer".to_owned())) {
                Ok(status) if status == check.expect => return Ok(()),
                Ok(status) => format!("it answers {status} and not {}", check.expect),
                Err(why) => why,
            };
            if tokio::time::Instant::now() + AGAIN >= deadline {
                return Err(format!(
                    "the app did not become healthy within {} s: GET {} on port {port}: {why}",
                    check.timeout_s, check.path
                ));
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn ask(&self, generation: &Generation, port: u16, check: &HealthCheck) -> Result<u16, String> {
        let runtime = &self.fleet.services.runtime;
        let stream = runtime.open(generation, Door::Port(port)).await.map_err(text)?;
        let (mut send, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(text)?;
        let request = http::Request::get(&check.path)
            .header(HOST, format!("localhost:{port}"))
            .header(CONNECTION, "close")
            .body(Empty::<Bytes>::new())
            .map_err(text)?;
        // It ends with the answer, of which the status is all that is wanted.
        tokio::spawn(connection);
        let answer = send.send_request(request).await.map_err(text)?;
        Ok(answer.status().as_u16())
    }
}
