//! The SSH agent of one sandbox: lists the keys that its slot is granted, and signs with them where a grant says so. A
//! refusal has no words in the protocol; they are in the audit trail and among the owner's requests. It must not see a
//! key, nor decide what a grant covers.

use std::io;
use std::time::Duration;

use choir_broker::ssh::{self, Asked, Bind, Denial, KeyError, Session, Sign, Signing};
use choir_core::{Inject, SshUse};
use choir_proxy::Body;
use choir_store::{Grant, Standing, Wanted};
use http::header::{CONNECTION, CONTENT_TYPE, UPGRADE};
use http::{HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::Door;
use super::refusal::Refusal;

pub(super) const AGENT: &str = "/v1/ssh-agent";
pub(super) const KNOWN_HOSTS: &str = "/v1/ssh-known-hosts";

/// The action's name in the audit trail.
const ACTION: &str = "secret.sign";
/// A client asks for what it needs and closes; one that keeps quiet keeps a place that others could have.
const QUIET: Duration = Duration::from_secs(600);
/// From a message's first byte to its last, and for an answer to be taken.
const WITHIN: Duration = Duration::from_secs(30);

impl Door {
    /// Makes the connection the agent's, once this answer is sent.
    pub(super) fn to_agent(&self, request: &mut Request<Incoming>) -> Result<Response<Body>, Refusal> {
        let wanted = request.headers().get(UPGRADE).map_or(&[][..], HeaderValue::as_bytes);
        if !wanted.eq_ignore_ascii_case(b"ssh-agent") {
            return Err(Refusal::not_upgraded());
        }
        let mut upgraded = self.upgraded.lock().expect("never poisoned: no panic while held");
        *upgraded = Some(hyper::upgrade::on(request));
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("ssh-agent"));
        Ok(response)
    }

    /// The hosts of the slot's keys, as `KnownHostsCommand` of ssh_config(5) wants them.
    pub(super) async fn known_hosts(&self) -> Result<Response<Body>, Refusal> {
        let granted = self
            .outlet
            .granted()
            .await?
            .map(|(_, granted)| granted)
            .unwrap_or_default();
        let lines: String = granted.iter().map(|grant| ssh::known_hosts(&grant.rule)).collect();
        let mut response = Response::new(Body::full(lines));
        let text = HeaderValue::from_static("text/plain; charset=utf-8");
        response.headers_mut().insert(CONTENT_TYPE, text);
        Ok(response)
    }
}

/// Serves the agent protocol until the client goes, keeps quiet, or sends what is no message.
pub(super) async fn serve(upgraded: OnUpgrade, door: &Door) {
    let ended = match upgraded.await {
        Ok(stream) => converse(TokioIo::new(stream), door).await,
        Err(error) => Err(io::Error::other(error)),
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection to the SSH agent ended");
    }
}

async fn converse(mut stream: impl AsyncRead + AsyncWrite + Unpin, door: &Door) -> io::Result<()> {
    let mut client = Client {
        door,
        session: Session::default(),
    };
    loop {
        let length = tokio::time::timeout(QUIET, stream.read_u32()).await?? as usize;
        if !(1..=ssh::LONGEST).contains(&length) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut message = vec![0; length];
        tokio::time::timeout(WITHIN, stream.read_exact(&mut message)).await??;
        let answer = client.answer(&message).await;
        let framed = [&(answer.len() as u32).to_be_bytes()[..], &answer].concat();
        tokio::time::timeout(WITHIN, stream.write_all(&framed)).await??;
    }
}

/// One client of the agent.
struct Client<'a> {
    door: &'a Door,
    session: Session,
}

impl Client<'_> {
    async fn answer(&mut self, message: &[u8]) -> Vec<u8> {
        match ssh::read(message) {
            Asked::Identities => self.identities().await,
            Asked::Bind(bind) => self.bind(&bind).await,
            Asked::Sign(sign) => self.sign(&sign).await.unwrap_or_else(|| ssh::FAILURE.to_vec()),
            Asked::Other => ssh::FAILURE.to_vec(),
        }
    }

    /// What the slot is granted now; nothing where that cannot be read.
    async fn granted(&self) -> Option<(Standing, Vec<Grant>)> {
        self.door.outlet.granted().await.ok().flatten()
    }

    async fn identities(&self) -> Vec<u8> {
        let Some((_, granted)) = self.granted().await else {
            return ssh::FAILURE.to_vec();
        };
        let mut keys: Vec<(Vec<u8>, String)> = Vec::new();
        for (grant, key) in keys_of(&granted) {
            if let Some(blob) = ssh::blob(key).filter(|_| self.session.offers(key))
                && keys.iter().all(|(known, _)| *known != blob)
            {
                keys.push((blob, grant.capability.to_string()));
            }
        }
        ssh::identities(&keys)
    }

    async fn bind(&mut self, bind: &Bind) -> Vec<u8> {
        let found = self.granted().await;
        let granted = found.as_ref().map_or(&[][..], |(_, granted)| granted);
        let bound = self.session.bind(bind, keys_of(granted).map(|(_, key)| key));
        let Err(denial) = bound else {
            return ssh::SUCCESS.to_vec();
        };
        if let Some((standing, _)) = &found {
            let host = ssh::fingerprint(&bind.host_key).unwrap_or_else(|| "an unknown host".to_owned());
            self.refuse(standing, &format!("session with {host}"), &denial).await;
        }
        ssh::FAILURE.to_vec()
    }

    /// The answer with the signature; `None` where there is none.
    async fn sign(&self, sign: &Sign) -> Option<Vec<u8>> {
        let (standing, granted) = self.granted().await?;
        let mut denied = None;
        for (grant, key) in keys_of(&granted) {
            if ssh::blob(key).is_some_and(|blob| blob == sign.key) {
                match self.session.judge(sign, key) {
                    Ok(signing) => return self.release(&standing, grant, key, signing).await,
                    // The first one speaks for all.
                    Err(denial) => drop(denied.get_or_insert((grant, denial))),
                }
            }
        }
        match denied {
            Some((grant, denial)) => {
                let what = format!("{}: {denial}", grant.capability);
                self.refuse(&standing, &what, &denial).await;
            }
            None => {
                let key = ssh::fingerprint(&sign.key);
                let what = key.clone().unwrap_or_else(|| "an unknown key".to_owned());
                let event = self.door.outlet.event(&standing, ACTION, &what, "no_grant");
                let wanted = key.map(|key| Wanted::Ssh(format!("sign with the key {key}")));
                self.door.outlet.refused(&standing, event, wanted).await;
            }
        }
        None
    }

    /// Records the intent, then opens the key and signs.
    async fn release(&self, standing: &Standing, grant: &Grant, key: &SshUse, signing: Signing) -> Option<Vec<u8>> {
        let deps = &self.door.outlet.gateway.deps;
        let what = format!("{} {}", grant.capability, signing.what());
        let receipt = self.door.outlet.receipt(standing, ACTION, &what).await.ok()?;
        let opened = match deps.vault.open(&standing.user, &grant.secret).await {
            Ok(opened) => opened,
            Err(error) => {
                receipt.end(Refusal::from_vault(&error, standing, grant).outcome);
                return None;
            }
        };
        let key = key.clone();
        // RSA takes milliseconds.
        let signed = tokio::task::spawn_blocking(move || ssh::sign(&opened.value, &key, &signing)).await;
        match signed.unwrap_or(Err(KeyError::Broken)) {
            Ok(signature) => {
                self.door.outlet.used(standing, grant);
                receipt.end("ok");
                Some(ssh::signed(&signature))
            }
            Err(error) => {
                tracing::info!(%error, capability = %grant.capability, "a granted key did not sign");
                receipt.end(if error == KeyError::Changed {
                    "key_changed"
                } else {
                    "unfit"
                });
                None
            }
        }
    }

    async fn refuse(&self, standing: &Standing, what: &str, denial: &Denial) {
        let outlet = &self.door.outlet;
        let event = outlet.event(standing, ACTION, what, denial.outcome());
        outlet.refused(standing, event, denial.wanted().map(Wanted::Ssh)).await;
    }
}

/// The grants that are of keys, and what each says.
fn keys_of(granted: &[Grant]) -> impl Iterator<Item = (&Grant, &SshUse)> {
    granted.iter().filter_map(|grant| match &grant.rule.inject {
        Inject::Ssh { ssh } => Some((grant, ssh)),
        _ => None,
    })
}
