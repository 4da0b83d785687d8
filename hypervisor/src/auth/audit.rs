//! Reading the audit trail: one's own events, or for admins everybody's, in pages or as JSON lines. It must not write any.

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use choir_core::{Name, UserId};
use choir_store::{AuditFilter, AuditRow, Store};
use futures_util::stream;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::json;

use super::extract::Query;
use super::{Auth, Caller};
use crate::error::{ApiError, ApiResult};

const JSON_LINES: &str = "application/x-ndjson";

/// The most rows of one page; an export reads this many at a time.
const MOST: u32 = 500;

/// Which events to list.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Events {
    /// Only actions that begin with this.
    action: Option<String>,
    /// Only this outcome.
    outcome: Option<String>,
    since: Option<Timestamp>,
    until: Option<Timestamp>,
    /// Only this user's; for admins.
    user: Option<Name>,
    cursor: Option<i64>,
    limit: Option<u32>,
    /// In pages, or `jsonl`: all that match, one a line.
    format: Option<Format>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Format {
    Json,
    Jsonl,
}

pub(super) async fn own(
    State(auth): State<Auth>,
    caller: Caller,
    headers: HeaderMap,
    Query(events): Query<Events>,
) -> ApiResult<Response> {
    if events.user.is_some() {
        let message = "These are your own events; an admin asks /admin/audit for those of a user.";
        return Err(ApiError::bad_request("bad_query", message));
    }
    auth.events(&caller, Some(caller.user.id.clone()), &headers, events)
        .await
}

pub(super) async fn everybodys(
    State(auth): State<Auth>,
    caller: Caller,
    headers: HeaderMap,
    Query(events): Query<Events>,
) -> ApiResult<Response> {
    let user = match &events.user {
        Some(name) => Some(
            auth.0
                .store
                .user_by_name(name.clone())
                .await?
                .ok_or_else(ApiError::not_found)?
                .id,
        ),
        None => None,
    };
    auth.events(&caller, user, &headers, events).await
}

impl Auth {
    /// Newest first; everybody's when no user is given. An export of them all needs a fresh assertion.
    async fn events(
        &self,
        caller: &Caller,
        user: Option<UserId>,
        headers: &HeaderMap,
        wanted: Events,
    ) -> ApiResult<Response> {
        let accepts = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
        let lines = match wanted.format {
            Some(format) => format == Format::Jsonl,
            None => accepts.is_some_and(|types| types.starts_with(JSON_LINES)),
        };
        let filter = AuditFilter {
            user,
            action: wanted.action,
            outcome: wanted.outcome,
            since: wanted.since,
            until: wanted.until,
            before: wanted.cursor,
            limit: if lines {
                MOST
            } else {
                wanted.limit.unwrap_or(100).clamp(1, MOST)
            },
        };
        let store = self.0.store.clone();
        if lines {
            self.confirm(caller)?;
            return Ok(([(header::CONTENT_TYPE, JSON_LINES)], export(store, filter)).into_response());
        }
        let limit = filter.limit as usize;
        let rows = store.audit_rows(filter).await?;
        let next = rows
            .last()
            .filter(|_| rows.len() == limit)
            .map(|row| row.id.to_string());
        Ok(Json(json!({"items": rows, "next_cursor": next})).into_response())
    }
}

/// Page after page as the reader takes them, so that neither memory nor the database is held by a slow one. A body that
/// cannot be completed breaks off.
fn export(store: Store, filter: AuditFilter) -> Body {
    Body::from_stream(stream::try_unfold(Some(filter), move |filter| {
        let store = store.clone();
        async move {
            let Some(mut filter) = filter else {
                return Ok(None);
            };
            let rows = store.audit_rows(filter.clone()).await?;
            filter.before = rows.last().map(|row| row.id);
            let more = rows.len() == filter.limit as usize;
            Ok::<_, choir_store::Error>(Some((lines(&rows), more.then_some(filter))))
        }
    }))
}

fn lines(rows: &[AuditRow]) -> Bytes {
    let mut text = Vec::new();
    for row in rows {
        serde_json::to_writer(&mut text, row).expect("a row is text, numbers and times");
        text.push(b'\n');
    }
    text.into()
}
