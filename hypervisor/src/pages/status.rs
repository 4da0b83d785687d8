//! The plain status page: each workspace with its two slots, and buttons for start, stop and swap. It must not hold
//! anything that the API does not say, too: its script only calls the API.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Html;
use choir_api::workspaces::{SlotView, Workspace};
use choir_core::Slot;
use maud::{Markup, html};

use super::Layout;
use crate::app::App;
use crate::auth::{Caller, routes};
use crate::error::ApiResult;

routes! {
    pub ROUTES, router -> Arc<App>;
    Session GET get "/" => home;
}

async fn home(State(app): State<Arc<App>>, caller: Caller) -> ApiResult<Html<String>> {
    let mut workspaces = Vec::new();
    for view in app.store.workspaces_of(&caller.user.id).await? {
        workspaces.push(app.show(&view).await);
    }
    let content = html! {
        @for workspace in &workspaces {
            (section(workspace))
        }
        @if workspaces.is_empty() {
            p { "A workspace is a pair of computers: " strong { "live" } ", in daily use, and " strong { "dev" }
                ", where things are tried. Make your first one." }
        }
        form data-do="create" {
            label for="name" { "New workspace" }
            input #name name="name" required pattern="[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?" autocomplete="off"
                value=[workspaces.is_empty().then_some("main")] aria-describedby="name-help";
            p.help #name-help { "1 to 20 of a-z, 0-9 and hyphens." }
            button type="submit" { "Create" }
        }
    };
    let user = caller.user.display_name.as_str();
    Ok(Layout {
        title: "Workspaces",
        user: Some(user),
        script: Some("status.js"),
    }
    .render(&content))
}

fn section(workspace: &Workspace) -> Markup {
    let name = workspace.name.as_str();
    html! {
        section data-workspace=(name) aria-label={ "Workspace " (name) } {
            h2 { (name) }
            @for slot in Slot::ALL {
                (row(workspace.slots.get(slot)))
            }
            button type="button" data-do="swap" { "Swap live and dev" }
        }
    }
}

fn row(view: &SlotView) -> Markup {
    html! {
        div.slot data-slot=(view.slot) {
            strong { (view.slot) }
            " " span data-show="state" { (view.state) }
            " " span.help data-show="reason" { (view.reason.as_deref().unwrap_or("")) }
            " " a href=(view.address) rel="noopener" { "Open" }
            " " button.quiet type="button" data-do="start" { "Start " (view.slot) }
            " " button.quiet type="button" data-do="stop" { "Stop " (view.slot) }
        }
    }
}
