//! The auth pages' data: gathered here, drawn in `pages`. It must not write HTML.

use axum::extract::State;
use axum::response::{Html, IntoResponse, Redirect, Response};
use choir_store::InviteKind;
use serde::Deserialize;

use super::extract::Query;
use super::secret::Secret;
use super::{Auth, Caller, RegistrationMode, safe_next};
use crate::error::ApiResult;
use crate::pages;

#[derive(Deserialize)]
pub(super) struct Next {
    next: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct Invited {
    invite: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct Linked {
    link: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct Coded {
    code: Option<String>,
}

pub(super) async fn login(
    State(auth): State<Auth>,
    headers: axum::http::HeaderMap,
    Query(query): Query<Next>,
) -> ApiResult<Response> {
    let next = safe_next(query.next.as_deref());
    if auth.session_of(&headers).await?.is_some() {
        return Ok(Redirect::to(next).into_response());
    }
    let open = auth.0.registration == RegistrationMode::Open;
    Ok(pages::auth::login(next, open).into_response())
}

pub(super) async fn register(State(auth): State<Auth>, Query(query): Query<Invited>) -> ApiResult<Html<String>> {
    let first = !auth.0.store.has_users().await?;
    let secret = query
        .invite
        .as_deref()
        .and_then(|token| Secret::parse(token.as_bytes()));
    let invited = match &secret {
        Some(token) => {
            let invite = auth.0.store.usable_invite(token.hash(), auth.now()).await?;
            invite.is_some_and(|invite| invite.kind != InviteKind::Recover)
        }
        None => auth.0.registration == RegistrationMode::Open && !first,
    };
    Ok(pages::auth::register(
        secret.as_ref().map(Secret::expose),
        invited,
        first,
    ))
}

pub(super) async fn recover(Query(query): Query<Linked>) -> Html<String> {
    let secret = query.link.as_deref().and_then(|link| Secret::parse(link.as_bytes()));
    pages::auth::recover(secret.as_ref().map(Secret::expose))
}

pub(super) async fn device(State(auth): State<Auth>, caller: Caller, Query(query): Query<Coded>) -> Html<String> {
    let code = query.code.unwrap_or_default();
    let waiting = auth.0.devices.waiting(&code, auth.now());
    let asks = waiting
        .as_ref()
        .map(|waiting| (waiting.client.as_str(), waiting.peer.as_str()));
    pages::auth::device(caller.user.name.as_str(), &code, asks)
}

pub(super) async fn account(State(auth): State<Auth>, caller: Caller) -> ApiResult<Html<String>> {
    let (store, id) = (&auth.0.store, &caller.user.id);
    let notices = auth.notices(&caller).await?;
    Ok(pages::auth::account(&pages::auth::Account {
        user: &caller.user,
        current: &caller.session()?.id,
        notices: notices.iter().filter_map(|notice| notice["message"].as_str()).collect(),
        passkeys: store.passkeys(id.clone()).await?,
        sessions: store.sessions(id.clone()).await?,
        tokens: store.tokens(id.clone(), auth.now()).await?,
        codes_left: store.recovery_codes_left(id.clone()).await?,
    }))
}
