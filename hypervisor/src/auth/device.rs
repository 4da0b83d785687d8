//! Signing a command line in (RFC 8628 in spirit): it shows a code, a person approves it in the browser, the command
//! line gets a token. What waits is in memory for ten minutes. It must not hold a token: one is made when it is fetched.

use std::collections::HashMap;
use std::sync::Mutex;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use choir_core::UserId;
use choir_store::Hash;
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use serde_json::json;

use super::account::user_view;
use super::extract::{Body, PeerAddr};
use super::register::text;
use super::secret::{self, Secret};
use super::{Auth, Caller};
use crate::error::{ApiError, ApiResult};

const LIFETIME: SignedDuration = SignedDuration::from_mins(10);
const INTERVAL_S: u32 = 2;
/// Logins that wait at once.
const MOST: usize = 1024;

#[derive(Default)]
pub(super) struct Devices(Mutex<HashMap<Hash, Device>>);

struct Device {
    user_code: String,
    client: String,
    peer: PeerAddr,
    until: Timestamp,
    answer: Answer,
}

enum Answer {
    Pending,
    Approved(UserId),
    Denied,
}

/// What the person who approves is shown.
pub(super) struct Waiting {
    pub client: String,
    pub peer: String,
}

#[derive(Deserialize)]
pub(super) struct Start {
    client_name: String,
}

#[derive(Deserialize)]
pub(super) struct Poll {
    device_code: String,
}

#[derive(Deserialize)]
pub(super) struct Decide {
    user_code: String,
}

pub(super) async fn start(State(auth): State<Auth>, peer: PeerAddr, Body(start): Body<Start>) -> ApiResult<Response> {
    auth.limit_starts(peer)?;
    let client = text(&start.client_name, 64)?.unwrap_or_else(|| "A program".into());
    let (now, device_code) = (auth.now(), Secret::draw(auth.random()));
    let user_code = secret::user_code(auth.random());
    let mut devices = auth.0.devices.lock();
    devices.retain(|_, device| device.until > now);
    if devices.len() >= MOST {
        return Err(ApiError::too_many(LIFETIME.as_secs().unsigned_abs()));
    }
    let device = Device {
        user_code: user_code.clone(),
        client,
        peer,
        until: now + LIFETIME,
        answer: Answer::Pending,
    };
    devices.insert(device_code.hash(), device);
    let uri = format!("{}/auth/device", auth.0.origin);
    Ok(Json(json!({
        "device_code": device_code.expose(),
        "user_code": user_code,
        "verification_uri": uri,
        "verification_uri_complete": format!("{uri}?code={user_code}"),
        "interval_s": INTERVAL_S,
        "expires_in_s": LIFETIME.as_secs(),
    }))
    .into_response())
}

/// 202 while nobody decided, 200 with the token once, 410 when it was denied, fetched or is too old.
pub(super) async fn poll(State(auth): State<Auth>, Body(poll): Body<Poll>) -> ApiResult<Response> {
    let hash = Secret::parse(poll.device_code.as_bytes()).ok_or_else(gone)?.hash();
    let Some((user, client)) = auth.0.devices.fetch(&hash, auth.now())? else {
        return Ok((StatusCode::ACCEPTED, Json(json!({"status": "pending"}))).into_response());
    };
    let user = auth.0.store.user_by_id(user).await?.ok_or_else(gone)?;
    let token = auth.device_token(&user, client).await?;
    Ok(Json(json!({"token": token, "user": user_view(&user)})).into_response())
}

pub(super) async fn approve(State(auth): State<Auth>, caller: Caller, Body(by): Body<Decide>) -> ApiResult<StatusCode> {
    auth.fresh(&caller)?;
    auth.0
        .devices
        .decide(&by.user_code, Answer::Approved(caller.user.id.clone()), auth.now())?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn deny(State(auth): State<Auth>, Body(by): Body<Decide>) -> ApiResult<StatusCode> {
    auth.0.devices.decide(&by.user_code, Answer::Denied, auth.now())?;
    Ok(StatusCode::NO_CONTENT)
}

impl Devices {
    /// Who waits under this code.
    pub fn waiting(&self, user_code: &str, now: Timestamp) -> Option<Waiting> {
        let devices = self.lock();
        let device = devices.values().find(|device| device.waits_as(user_code, now))?;
        Some(Waiting {
            client: device.client.clone(),
            peer: device.peer.0.to_string(),
        })
    }

    fn decide(&self, user_code: &str, answer: Answer, now: Timestamp) -> ApiResult<()> {
        let mut devices = self.lock();
        let device = devices
            .values_mut()
            .find(|device| device.waits_as(user_code, now))
            .ok_or_else(|| {
                ApiError::new(
                    StatusCode::NOT_FOUND,
                    "code_unknown",
                    "No program waits under this code; start its login again.",
                )
            })?;
        device.answer = answer;
        Ok(())
    }

    /// The user and the program's name once it was approved; it is forgotten then.
    fn fetch(&self, hash: &Hash, now: Timestamp) -> ApiResult<Option<(UserId, String)>> {
        let mut devices = self.lock();
        let device = devices.get(hash).filter(|device| device.until > now).ok_or_else(gone)?;
        if matches!(device.answer, Answer::Pending) {
            return Ok(None);
        }
        match devices.remove(hash) {
            Some(Device {
                answer: Answer::Approved(user),
                client,
                ..
            }) => Ok(Some((user, client))),
            _ => Err(gone()),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Hash, Device>> {
        self.0.lock().expect("no holder of this lock panics")
    }
}

impl Device {
    fn waits_as(&self, user_code: &str, now: Timestamp) -> bool {
        let typed = user_code
            .chars()
            .filter(char::is_ascii_alphabetic)
            .map(|c| c.to_ascii_uppercase());
        let ours = self.user_code.chars().filter(char::is_ascii_alphabetic);
        self.until > now && matches!(self.answer, Answer::Pending) && typed.eq(ours)
    }
}

fn gone() -> ApiError {
    ApiError::new(
        StatusCode::GONE,
        "login_over",
        "This login was denied or took too long; start it again.",
    )
}
