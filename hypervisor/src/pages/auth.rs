//! The pages for signing in, registering, recovering, one's account and approving a program. It must not decide anything.

use axum::response::Html;
use choir_store::{Passkey, Session, Token, User};
use jiff::Timestamp;
use maud::{Markup, html};

use super::Layout;

const SCRIPT: Option<&str> = Some("auth.js");

pub fn login(next: &str, open: bool) -> Html<String> {
    let content = html! {
        form data-do="login" data-next=(next) {
            p { "Use the passkey you made for this box. No name is needed." }
            button type="submit" autofocus { "Sign in with a passkey" }
        }
        p { a href="/recover" { "I lost my passkey" } }
        @if open {
            p { a href="/register" { "Make an account" } }
        }
    };
    Layout {
        title: "Sign in",
        user: None,
        script: SCRIPT,
    }
    .render(&content)
}

/// `invited`: whether the link is good, or none is needed; `first`: whether there is no user yet.
pub fn register(invite: Option<&str>, invited: bool, first: bool) -> Html<String> {
    let content = if invited {
        register_form(invite, first)
    } else {
        not_invited(first)
    };
    Layout {
        title: "Make an account",
        user: None,
        script: SCRIPT,
    }
    .render(&content)
}

fn register_form(invite: Option<&str>, first: bool) -> Markup {
    html! {
        form data-do="register" data-invite=[invite] {
            @if first {
                p { "You are the first: this account will administer the box." }
            }
            label for="username" { "Name" }
            input #username name="username" required minlength="1" maxlength="20" pattern="[a-z0-9]+(-[a-z0-9]+)*"
                autocomplete="username" autocapitalize="none" spellcheck="false" aria-describedby="username-help" autofocus;
            p.help #username-help { "1 to 20 of a-z, 0-9 and single hyphens. It becomes part of your sandboxes' addresses." }
            label for="display_name" { "Name to show" }
            input #display_name name="display_name" maxlength="64" autocomplete="name" aria-describedby="display-help";
            p.help #display-help { "Optional." }
            button type="submit" { "Make a passkey" }
        }
        (codes())
    }
}

fn not_invited(first: bool) -> Markup {
    html! {
        @if first {
            p { "This box has no user yet. Open the claim link that the server printed; \
                 if it is too old, run " code { "choir-hypervisor claim" } " on the server for a new one." }
        } @else {
            p { "This link is used or too old. Ask an admin of this box for a new invite." }
        }
        p { a href="/login" { "Sign in" } }
    }
}

pub fn recover(link: Option<&str>) -> Html<String> {
    let content = html! {
        form data-do="recover" data-link=[link] {
            @if link.is_some() {
                p { "This link lets you make a new passkey. All other sessions and tokens of your account end." }
            } @else {
                p { "One of your recovery codes lets you make a new passkey. All other sessions and tokens of your account end." }
                label for="username" { "Name" }
                input #username name="username" required maxlength="20" autocomplete="username" autocapitalize="none"
                    spellcheck="false" autofocus;
                label for="code" { "Recovery code" }
                input #code name="code" required maxlength="64" autocomplete="off" autocapitalize="characters"
                    spellcheck="false";
            }
            button type="submit" { "Continue" }
        }
        form data-do="new-passkey" hidden {
            p { "Now make a new passkey. You have ten minutes." }
            button type="submit" { "Make a passkey" }
        }
        p { a href="/login" { "Back to signing in" } }
    };
    Layout {
        title: "Get back in",
        user: None,
        script: SCRIPT,
    }
    .render(&content)
}

/// `asks`: the program's name and the address it came from, when one waits under this code.
pub fn device(user: &str, code: &str, asks: Option<(&str, &str)>) -> Html<String> {
    let content = html! {
        @match asks {
            Some((client, peer)) => {
                p { strong { (client) } " at " (peer) " asks to act as you. Its code is:" }
                p.code { (code) }
                p { "Allow this only if you started it just now and it shows the same code." }
                form data-do="device" data-code=(code) {
                    button type="submit" value="approve" { "Allow" }
                    " "
                    button.quiet type="submit" value="deny" { "Deny" }
                }
            }
            None => {
                @if !code.is_empty() {
                    p.error { "No program waits under this code. Start its login again." }
                }
                form method="get" action="/auth/device" {
                    label for="code" { "Code that the program shows" }
                    input #code name="code" required maxlength="9" autocomplete="off" autocapitalize="characters" autofocus;
                    button type="submit" { "Continue" }
                }
            }
        }
    };
    Layout {
        title: "Sign a program in",
        user: Some(user),
        script: SCRIPT,
    }
    .render(&content)
}

/// What the account page shows.
pub struct Account<'a> {
    pub user: &'a User,
    /// Id of the session that looks at it.
    pub current: &'a str,
    pub notices: Vec<&'a str>,
    pub passkeys: Vec<Passkey>,
    pub sessions: Vec<Session>,
    pub tokens: Vec<Token>,
    pub codes_left: u32,
}

pub fn account(account: &Account<'_>) -> Html<String> {
    let content = html! {
        @for notice in &account.notices {
            p.notice { (notice) }
        }
        p { "Signed in as " strong { (account.user.display_name) } " (" (account.user.name) ", " (account.user.role.as_str()) ")." }
        (passkeys(account))
        (recovery(account.codes_left))
        (sessions(account))
        (tokens(account))
    };
    Layout {
        title: "Your account",
        user: Some(account.user.name.as_str()),
        script: SCRIPT,
    }
    .render(&content)
}

fn passkeys(account: &Account<'_>) -> Markup {
    html! {
        section aria-labelledby="passkeys" {
            h2 #passkeys { "Passkeys" }
            ul {
                @for key in &account.passkeys {
                    li {
                        (key.name) ", made " (day(key.created_at))
                        @if let Some(at) = key.last_used_at { ", last used " (day(at)) }
                        @if account.passkeys.len() > 1 {
                            " " button.quiet type="button" data-do="remove" data-path={ "/me/passkeys/" (key.id) }
                                aria-label={ "Remove passkey " (key.name) } { "Remove" }
                        }
                    }
                }
            }
            form data-do="add-passkey" {
                label for="passkey_name" { "Name of a new passkey" }
                input #passkey_name name="passkey_name" maxlength="64" placeholder="Phone";
                button type="submit" { "Add a passkey" }
            }
        }
    }
}

fn recovery(left: u32) -> Markup {
    html! {
        section aria-labelledby="codes-title" {
            h2 #codes-title { "Recovery codes" }
            p { (left) " of 10 are left. New codes replace all old ones." }
            button type="button" data-do="new-codes" { "Make new codes" }
            (codes())
        }
    }
}

fn sessions(account: &Account<'_>) -> Markup {
    html! {
        section aria-labelledby="sessions" {
            h2 #sessions { "Sessions" }
            ul {
                @for session in &account.sessions {
                    li {
                        @if session.user_agent.is_empty() { "Unknown browser" } @else { (session.user_agent) }
                        ", since " (day(session.created_at)) ", last seen " (day(session.last_seen_at))
                        @if session.id == account.current {
                            " (this one)"
                        } @else {
                            " " button.quiet type="button" data-do="remove" data-path={ "/me/sessions/" (session.id) } { "End" }
                        }
                    }
                }
            }
            @if account.sessions.len() > 1 {
                button.quiet type="button" data-do="remove" data-path="/me/sessions" { "End all others" }
            }
        }
    }
}

fn tokens(account: &Account<'_>) -> Markup {
    html! {
        section aria-labelledby="tokens" {
            h2 #tokens { "API tokens" }
            p.help { "For " a href="/download" { "the command line" } " and other programs." }
            ul {
                @for token in &account.tokens {
                    li {
                        (token.name) " (" (token.scopes.join(", ")) "), until " (day(token.expires_at)) " "
                        button.quiet type="button" data-do="remove" data-path={ "/me/tokens/" (token.id) }
                            aria-label={ "Delete token " (token.name) } { "Delete" }
                    }
                }
            }
            form data-do="new-token" {
                label for="token_name" { "Name of a new token" }
                input #token_name name="name" required maxlength="64";
                label for="token_scope" { "It may" }
                select #token_scope name="scope" {
                    option value="read" { "read" }
                    option value="read write" selected { "read and change" }
                    @if account.user.role == choir_store::Role::Admin {
                        option value="read write admin" { "do everything, administration included" }
                    }
                }
                button type="submit" { "Make a token" }
            }
            p #token.code hidden tabindex="-1" {}
        }
    }
}

/// Where the script shows new recovery codes.
fn codes() -> Markup {
    html! {
        section #codes hidden tabindex="-1" aria-labelledby="saved-title" {
            h2 #saved-title { "Save your recovery codes" }
            p { "Each code works once, when you have no passkey. They are shown only now: keep them where you keep passwords." }
            ol.codes {}
            p {
                button.quiet type="button" data-do="copy-codes" { "Copy" }
                " "
                button.quiet type="button" data-do="download-codes" { "Download" }
            }
            button type="button" data-do="saved" { "I saved them" }
        }
    }
}

fn day(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M UTC").to_string()
}
