//! Every route of the control host, aimed at things that exist.

use anyhow::{Result, ensure};
use choir_e2e::page::Page;
use choir_hypervisor::auth::Route;
use choir_hypervisor::router;
use serde_json::{Value, json};

/// Lists whose first item is what a route with an id below them is aimed at.
const LISTS: [&str; 6] = [
    "/me/passkeys",
    "/me/sessions",
    "/me/tokens",
    "/admin/invites",
    "/api/workspaces/main/deployments",
    "/api/releases",
];

/// What is there, asked from a page of the control host as its person.
pub async fn things(control: &Page) -> Result<Value> {
    let lists = json!(LISTS);
    let things = control
        .eval(&format!(
            "Promise.all({lists}.map(it => fetch(it).then(async answer => [it, answer.status, await answer.json()])))"
        ))
        .await?;
    for list in things.as_array().into_iter().flatten() {
        ensure!(list[1] == 200, "{} answered {}: {}", list[0], list[1], list[2]);
    }
    Ok(things)
}

/// Every route as `{method, path}`.
pub fn targets(things: &Value) -> Vec<Value> {
    let routes = router::tables().into_iter().flatten();
    let aimed = routes.flat_map(|route| {
        let methods: &[&str] = match route.method {
            "ANY" => &["GET", "POST"],
            method => &[method],
        };
        let path = aim(route, things);
        methods
            .iter()
            .map(|method| json!({"method": method, "path": path}))
            .collect::<Vec<_>>()
    });
    aimed.collect()
}

fn aim(route: &Route, things: &Value) -> String {
    let (list, _) = route.path.split_once("/{id}").unwrap_or((route.path, ""));
    let list = list.replace("{ws}", "main");
    let known = things
        .as_array()
        .into_iter()
        .flatten()
        .find(|it| it[0] == list.as_str());
    let id = known.and_then(|it| it[2]["items"][0]["id"].as_str()).unwrap_or("none");
    let path = route
        .path
        .replace("{ws}", "main")
        .replace("{slot}", "live")
        .replace("{id}", id);
    path.replace("{file}", "auth.js").replace("{*path}", "exec")
}
