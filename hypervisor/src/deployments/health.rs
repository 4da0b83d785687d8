//! Whether an app is well, by the check that its home or its release names. It must not know what depends on the answer.

use std::time::Duration;

use choir_core::settings::HealthCheck;
use choir_core::{Door, Generation, Slot};
use choir_store::WorkspaceView;
use http::header::{CONNECTION, HOST, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE};
use http_body_util::Empty;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;

use super::text;
use crate::app::App;
use crate::reconcile::launch;

/// Between two tries.
const AGAIN: Duration = Duration::from_millis(100);
/// What the handshake asks with; any 16 bytes do.
const KEY: &str = "Y2hvaXIgaXMgd2F0Y2hpbg==";
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
        let own = self.says(view, slot);
        let Some(check) = own.over(&release).health else {
            return Ok(());
        };
        let port = check.port.unwrap_or_else(|| launch::app_port(view, &release, &own));
        let deadline = tokio::time::Instant::now() + Duration::from_secs(check.timeout_s);
        let handle = self.fleet.handle(&generation.sandbox);
        loop {
            // What is being looked at is not idle.
            if let Some(handle) = &handle {
                handle.activity.touch();
            }
            let Err(why) = self.passes(generation, port, &check).await else {
                return Ok(());
            };
            if tokio::time::Instant::now() + AGAIN >= deadline {
                return Err(format!(
                    "the app did not become healthy within {} s: {why}",
                    check.timeout_s
                ));
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn passes(&self, generation: &Generation, port: u16, check: &HealthCheck) -> Result<(), String> {
        let plain = http::Request::get(&check.path).header(CONNECTION, "close");
        self.answers(generation, port, plain, check.expect).await?;
        let Some(path) = &check.websocket else {
            return Ok(());
        };
        let handshake = http::Request::get(path)
            .header(CONNECTION, "Upgrade")
            .header(UPGRADE, "websocket")
            .header(SEC_WEBSOCKET_VERSION, "13")
            .header(SEC_WEBSOCKET_KEY, KEY);
        self.answers(generation, port, handshake, 101).await
    }

    async fn answers(
        &self,
        generation: &Generation,
        port: u16,
        request: http::request::Builder,
        expect: u16,
    ) -> Result<(), String> {
        let request = request
            .header(HOST, format!("localhost:{port}"))
            .body(Empty::<Bytes>::new());
        let request = request.map_err(text)?;
        let what = match request.headers().contains_key(UPGRADE) {
            true => format!("websocket {}", request.uri()),
            false => format!("GET {}", request.uri()),
        };
        let asked = tokio::time::timeout(ANSWERED_WITHIN, self.ask(generation, port, request)).await;
        match asked.unwrap_or_else(|_| Err("it does not answer".to_owned())) {
            Ok(status) if status == expect => Ok(()),
            Ok(status) => Err(format!("{what} on port {port}: it answers {status} and not {expect}")),
            Err(why) => Err(format!("{what} on port {port}: {why}")),
        }
    }

    async fn ask(
        &self,
        generation: &Generation,
        port: u16,
        request: http::Request<Empty<Bytes>>,
    ) -> Result<u16, String> {
        let runtime = &self.fleet.services.runtime;
        let stream = runtime.open(generation, Door::Port(port)).await.map_err(text)?;
        let (mut send, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(text)?;
        // It ends with the answer, of which the status is all that is wanted.
        tokio::spawn(connection);
        let answer = send.send_request(request).await.map_err(text)?;
        Ok(answer.status().as_u16())
    }
}
