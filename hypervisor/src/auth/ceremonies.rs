//! Passkey ceremonies under way: the challenge stays here, the browser only gets a cookie that names it. One use, one
//! purpose, five minutes. It must not know what a finished ceremony leads to.

use std::collections::HashMap;
use std::sync::Mutex;

use axum::http::{HeaderMap, HeaderValue};
use choir_core::{Name, UserId};
use choir_store::Hash;
use jiff::{SignedDuration, Timestamp};
use webauthn_rs::prelude::{DiscoverableAuthentication, PasskeyRegistration};

use super::cookies;
use super::secret::Secret;
use crate::error::{ApiError, ApiResult};
use crate::random::Random;

/// How long a person may take.
const LIFETIME: SignedDuration = SignedDuration::from_mins(5);
/// Ceremonies at once; the oldest makes room.
const MOST: usize = 4096;

/// What a ceremony was begun for. Its end serves that alone.
pub(super) enum Purpose {
    NewUser {
        state: PasskeyRegistration,
        draft: Draft,
    },
    AddPasskey {
        state: PasskeyRegistration,
        session_id: String,
        passkey_name: String,
    },
    Login {
        state: DiscoverableAuthentication,
    },
    StepUp {
        state: DiscoverableAuthentication,
        session_id: String,
    },
}

/// A user who does not exist until the ceremony ends.
pub(super) struct Draft {
    pub id: UserId,
    pub name: Name,
    pub display_name: String,
    pub invite: Option<Hash>,
    pub passkey_name: String,
}

#[derive(Default)]
pub(super) struct Ceremonies(Mutex<HashMap<Hash, (Timestamp, Box<Purpose>)>>);

impl Ceremonies {
    /// Keeps a ceremony and gives the cookie that binds it to this browser.
    pub fn begin(&self, purpose: Purpose, random: &dyn Random, now: Timestamp) -> HeaderValue {
        let cookie = Secret::draw(random);
        let mut all = self.0.lock().expect("no holder of this lock panics");
        if all.len() >= MOST {
            all.retain(|_, (until, _)| *until > now);
        }
        if all.len() >= MOST
            && let Some(oldest) = all.iter().min_by_key(|(_, (until, _))| *until).map(|(hash, _)| *hash)
        {
            all.remove(&oldest);
        }
        all.insert(cookie.hash(), (now + LIFETIME, Box::new(purpose)));
        cookies::set(cookies::CEREMONY, &cookie, LIFETIME)
    }

    /// Takes this browser's ceremony, which is then used up whatever comes of it.
    pub fn take(&self, headers: &HeaderMap, now: Timestamp) -> ApiResult<Purpose> {
        let cookie = cookies::read(headers, cookies::CEREMONY)?.ok_or_else(over)?;
        let taken = self
            .0
            .lock()
            .expect("no holder of this lock panics")
            .remove(&cookie.hash());
        match taken {
            Some((until, purpose)) if until > now => Ok(*purpose),
            _ => Err(over()),
        }
    }
}

/// The answer for a ceremony that is unknown, used, too old, or was begun for something else.
pub(super) fn over() -> ApiError {
    ApiError::bad_request("ceremony_over", "This took too long or was used already; start again.")
}
