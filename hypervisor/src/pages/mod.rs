//! Server-rendered pages and their static files: plain HTML that works with a keyboard, no inline script or style. It
//! must not fetch anything: what a page shows comes in as arguments.

use axum::extract::Path;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{Html, IntoResponse, Response};
use maud::{DOCTYPE, Markup, html};

use crate::error::ApiError;

pub mod auth;
pub mod status;

/// Static files: name, type, content.
const ASSETS: &[(&str, &str, &str)] = &[
    (
        "auth.js",
        "text/javascript; charset=utf-8",
        include_str!("assets/auth.js"),
    ),
    (
        "api.js",
        "text/javascript; charset=utf-8",
        include_str!("assets/api.js"),
    ),
    (
        "status.js",
        "text/javascript; charset=utf-8",
        include_str!("assets/status.js"),
    ),
    ("choir.css", "text/css; charset=utf-8", include_str!("assets/choir.css")),
    ("choir.svg", "image/svg+xml", include_str!("assets/choir.svg")),
];

/// What every page has around its content.
pub struct Layout<'a> {
    pub title: &'a str,
    /// Who is signed in.
    pub user: Option<&'a str>,
    /// The page's script below `/assets/`.
    pub script: Option<&'a str>,
}

impl Layout<'_> {
    /// The whole page. Content sits in `main`; scripts report in `#status` (polite) and `#error` (assertive). What a
    /// script serves stays disabled until it listens: a form sent before would put its fields into the address.
    pub fn render(&self, content: &Markup) -> Html<String> {
        let page = html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta name="color-scheme" content="light dark";
                    title { (self.title) " · ChoirOS" }
                    link rel="stylesheet" href="/assets/choir.css";
                    link rel="icon" href="/assets/choir.svg" type="image/svg+xml";
                    @if let Some(script) = self.script {
                        script type="module" src={ "/assets/" (script) } {}
                    }
                }
                body {
                    a.skip href="#main" { "Skip to content" }
                    header {
                        a.brand href="/" { "ChoirOS" }
                        @if let Some(user) = self.user {
                            nav aria-label="Account" {
                                a href="/account" { (user) }
                                button.quiet type="button" data-do="logout" { "Sign out" }
                            }
                        }
                    }
                    main #main {
                        h1 { (self.title) }
                        @if self.script.is_some() {
                            noscript { p.error { "This page needs JavaScript, because passkeys do." } }
                        }
                        p #error.error role="alert" hidden {}
                        p #status role="status" {}
                        @if self.script.is_some() {
                            fieldset #controls disabled { (content) }
                        } @else {
                            (content)
                        }
                    }
                }
            }
        };
        Html(page.into_string())
    }
}

/// A page that says one thing and offers one way on.
pub fn message(title: &str, text: &str, way_on: &str) -> Html<String> {
    let content = html! {
        p { (text) }
        p { a.button href=(way_on) { "Go on" } }
    };
    Layout {
        title,
        user: None,
        script: None,
    }
    .render(&content)
}

/// Shown while a sandbox wakes; the response's `Refresh` header asks again.
pub fn waiting() -> Html<String> {
    let content = html! {
        p role="status" { "The sandbox is starting. This page opens by itself as soon as it is there." }
    };
    Layout {
        title: "Starting…",
        user: None,
        script: None,
    }
    .render(&content)
}

/// Serves one static file.
pub async fn asset(Path(file): Path<String>) -> Response {
    match ASSETS.iter().find(|(name, _, _)| *name == file) {
        Some((_, kind, body)) => {
            let headers: [(HeaderName, HeaderValue); 2] = [
                (header::CONTENT_TYPE, HeaderValue::from_static(kind)),
                (header::CACHE_CONTROL, HeaderValue::from_static("public, max-age=300")),
            ];
            (headers, *body).into_response()
        }
        None => ApiError::not_found().into_response(),
    }
}
