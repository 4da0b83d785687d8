//! Everything a person can see of the state, for comparing it before and after.

use anyhow::{Result, ensure};
use choir_e2e::page::Page;
use choir_hypervisor::auth::Route;
use choir_hypervisor::router;
use serde_json::{Value, json};

const LISTS: [&str; 12] = [
    "/auth/me",
    "/me/passkeys",
    "/me/sessions",
    "/me/tokens",
    "/me/recovery-codes",
    "/me/audit",
    "/admin/users",
    "/admin/invites",
    "/admin/audit",
    "/api/workspaces",
    "/api/workspaces/main/deployments",
    "/api/releases",
];

/// Asked from a page of the control host, as its person.
pub async fn state(control: &Page) -> Result<Value> {
    let lists = json!(LISTS);
    let state = control
        .eval(&format!(
            "Promise.all({lists}.map(it => fetch(it).then(async answer => [it, answer.status, await answer.json()])))"
        ))
        .await?;
    for list in state.as_array().into_iter().flatten() {
        ensure!(list[1] == 200, "{} answered {}: {}", list[0], list[1], list[2]);
    }
    let mut state = state;
    forget_times_of_use(&mut state);
    Ok(state)
}

/// When something was last used changes by looking.
fn forget_times_of_use(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, _| !name.starts_with("last_"));
            fields.values_mut().for_each(forget_times_of_use);
        }
        Value::Array(items) => items.iter_mut().for_each(forget_times_of_use),
        _ => {}
    }
}

/// Fails with the first list that differs.
pub fn same(before: &Value, after: &Value) -> Result<()> {
    for (before, after) in before
        .as_array()
        .into_iter()
        .flatten()
        .zip(after.as_array().into_iter().flatten())
    {
        ensure!(before == after, "{} changed:\n{before}\n{after}", before[0]);
    }
    Ok(())
}

/// Every route of the control host as `{method, path}`, aimed at things that exist.
pub fn targets(state: &Value) -> Vec<Value> {
    let routes = router::tables().into_iter().flatten();
    let aimed = routes.flat_map(|route| {
        let methods: &[&str] = match route.method {
            "ANY" => &["GET", "POST"],
            method => &[method],
        };
        let path = aim(route, state);
        methods
            .iter()
            .map(|method| json!({"method": method, "path": path}))
            .collect::<Vec<_>>()
    });
    aimed.collect()
}

fn aim(route: &Route, state: &Value) -> String {
    let (list, _) = route.path.split_once("/{id}").unwrap_or((route.path, ""));
    let list = list.replace("{ws}", "main");
    let known = state.as_array().into_iter().flatten().find(|it| it[0] == list.as_str());
    let id = known.and_then(|it| it[2]["items"][0]["id"].as_str()).unwrap_or("none");
    let path = route
        .path
        .replace("{ws}", "main")
        .replace("{slot}", "live")
        .replace("{id}", id);
    path.replace("{file}", "auth.js").replace("{*path}", "exec")
}
