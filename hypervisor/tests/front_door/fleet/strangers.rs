//! Whose things are whose (C25), generated from the tables: every route that names a thing is asked by its owner, and by
//! somebody else for that thing and for one that is not there.

use axum::http::{HeaderMap, Method, StatusCode};
use choir_core::{GrantRequestId, Slot, WorkspaceId};
use choir_hypervisor::auth::{Access, Route};
use choir_hypervisor::router::tables;
use choir_store::{NewRequest, Wanted};
use jiff::SignedDuration;
use serde_json::{Value, json};

use super::{Box, change, workspace};
use crate::support::{Answer, Browser};

/// Routes whose parameter names nobody's own thing. A new one fails the test until it is listed here, or its things are
/// in [`Things`].
const OF_THE_BOX: &[&str] = &["/assets/{file}", "/download/{file}", "/api/releases/{id}"];

/// Routes that make a thing under whatever name the caller gives, so that nobody's own can be meant.
const MADE_BY_NAME: &[(&str, &str)] = &[("PUT", "/me/secrets/{name}")];

const WORKSPACE: &str = "main";
const NOWHERE: &str = "none";
/// The workspace of somebody else.
const OTHER: &str = "other";

/// What ada has, by the collection that a path names before the id.
struct Things(Vec<(&'static str, String)>);

impl Things {
    async fn of(start: &Box, ada: &mut Browser) -> Self {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let swapped = ada
            .post("/api/workspaces/main/swap?wait_s=60", json!({}))
            .await
            .expect(StatusCode::OK);
        let snapshot = ada
            .post("/api/workspaces/main/slots/live/snapshots", json!({}))
            .await
            .expect(StatusCode::CREATED);
        let release = ada
            .post("/api/releases", json!({"sandbox": snapshot["sandbox"]}))
            .await
            .expect(StatusCode::CREATED);
        let token = ada
            .post("/me/tokens", json!({"name": "ci", "scopes": ["read"]}))
            .await
            .expect(StatusCode::CREATED);
        let secret = ada
            .fetch(Method::PUT, "/me/secrets/TOKEN_OF_ADA", Some(json!({"value": "x"})))
            .await
            .expect(StatusCode::CREATED);
        let asked = json!({"workspace": WORKSPACE, "slot": "dev", "capability": "github", "secret": "TOKEN_OF_ADA"});
        let grant = ada.post("/me/grants", asked).await.expect(StatusCode::CREATED);
        let request = refused(start, ada).await;
        let passkeys = ada.get("/me/passkeys").await.expect(StatusCode::OK);
        // A second session, since ending the one in use would end the test's.
        let mut elsewhere = ada.clone();
        elsewhere.cookies.clear();
        elsewhere.login().await.expect(StatusCode::OK);
        ada.key = elsewhere.key.clone();
        let session = elsewhere.get("/auth/me").await.expect(StatusCode::OK);
        Self(vec![
            ("deployments", text(&swapped["id"])),
            ("snapshots", text(&snapshot["id"])),
            ("releases", text(&release["id"])),
            ("tokens", text(&token["item"]["id"])),
            ("sessions", text(&session["session"]["id"])),
            ("passkeys", text(&passkeys["items"][0]["id"])),
            ("secrets", text(&secret["name"])),
            ("grants", text(&grant["id"])),
            ("requests", request),
        ])
    }

    fn of_collection(&self, collection: &str) -> Option<&str> {
        let found = self.0.iter().find(|(of, _)| *of == collection);
        found.map(|(_, id)| id.as_str())
    }

    fn id(&self, route: &Route, collection: &str) -> &str {
        let Some(id) = self.of_collection(collection) else {
            panic!(
                "{} {}: say in this file whose `{collection}` these are",
                route.method, route.path
            )
        };
        id
    }
}

/// A host that one of ada's sandboxes was refused; the request's id.
async fn refused(start: &Box, ada: &mut Browser) -> String {
    let now = start.app.clock.now();
    let main = ada.get("/api/workspaces/main").await.expect(StatusCode::OK);
    let workspace: WorkspaceId = main["id"].as_str().unwrap().parse().unwrap();
    let event = start
        .app
        .event(&start.app.store.workspace(&workspace).await.unwrap(), "egress.connect");
    let request = NewRequest {
        id: GrantRequestId::from_random([7; 16]),
        workspace,
        slot: Slot::Dev,
        wanted: Wanted::Host("refused.example".into()),
        at: now,
        expires_at: now + SignedDuration::from_hours(1),
    };
    start
        .app
        .store
        .record_refusal(Some(event), Some(request))
        .await
        .unwrap();
    GrantRequestId::from_random([7; 16]).to_string()
}

/// An id of the same shape that nothing has.
fn absent(id: &str) -> String {
    let middle = id.len() / 2;
    let other = if id[middle..].starts_with('a') { "b" } else { "a" };
    format!("{}{other}{}", &id[..middle], &id[middle + 1..])
}

/// A path of the route with this workspace, and each id given by `id`.
fn fill(route: &Route, workspace: &str, id: impl Fn(&str) -> String) -> String {
    let mut before = "";
    let parts = route.path.split('/').map(|part| {
        let filled = match part {
            "{ws}" => workspace.to_owned(),
            "{slot}" => "live".to_owned(),
            "{*path}" => "health".to_owned(),
            part if part.starts_with('{') => id(before),
            part => part.to_owned(),
        };
        before = part;
        filled
    });
    parts.collect::<Vec<_>>().join("/")
}

fn methods(route: &Route) -> &[&'static str] {
    match &route.method {
        &"ANY" => &["GET", "POST", "PUT", "DELETE"],
        one => std::slice::from_ref(one),
    }
}

fn names_an_id(route: &Route) -> bool {
    let own = |part: &str| part.starts_with('{') && !["{ws}", "{slot}", "{*path}"].contains(&part);
    route.path.split('/').any(own)
}

/// Every route that names somebody's own thing.
fn scoped() -> Vec<&'static Route> {
    let all = tables().into_iter().flatten();
    let named = all.filter(|route| route.path.contains('{') && !OF_THE_BOX.contains(&route.path));
    let scoped = named.filter(|route| !MADE_BY_NAME.contains(&(route.method, route.path)));
    scoped.filter(|route| route.access != Access::Admin).collect()
}

async fn ask(browser: &mut Browser, method: &str, path: &str, things: &Things) -> Answer {
    let method: Method = method.parse().unwrap();
    let body = (method != Method::GET).then(|| match path.ends_with("/deploy") {
        true => json!({"release": things.of_collection("releases")}),
        false => json!({}),
    });
    browser.fetch(method, path, body).await
}

/// All that an answer says, apart from the request's own id.
fn told(answer: &Answer) -> (StatusCode, HeaderMap, String) {
    let mut headers = answer.headers.clone();
    let id = headers.remove("x-request-id").expect("every answer has an id");
    (
        answer.status,
        headers,
        answer.text().replace(id.to_str().unwrap(), "REQUEST"),
    )
}

#[tokio::test]
async fn on_every_route_somebody_elses_thing_is_answered_like_one_that_is_not_there() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    let things = Things::of(&start, &mut ada).await;
    let mut eve = start.member(&mut ada, "eve").await;
    eve.post("/api/workspaces", json!({"name": OTHER}))
        .await
        .expect(StatusCode::CREATED);
    let before = ada.get("/api/workspaces").await.expect(StatusCode::OK);
    let starts = start.world.starts();
    let mut checked = 0;
    for route in scoped() {
        let own = |collection: &str| things.id(route, collection).to_owned();
        let not_there = |collection: &str| absent(things.id(route, collection));
        let mut pairs = Vec::new();
        if route.path.contains("{ws}") {
            pairs.push((fill(route, WORKSPACE, own), fill(route, NOWHERE, own)));
        }
        if names_an_id(route) {
            // Below a workspace this is somebody else's id below one's own.
            pairs.push((fill(route, OTHER, own), fill(route, OTHER, not_there)));
        }
        assert!(!pairs.is_empty(), "{} names nothing that is known here", route.path);
        for method in methods(route) {
            for (hers, nobodys) in &pairs {
                let answer = ask(&mut eve, method, hers, &things).await;
                answer.refused(StatusCode::NOT_FOUND, "not_found");
                let missing = ask(&mut eve, method, nobodys, &things).await;
                assert_eq!(told(&answer), told(&missing), "{method} {hers}");
                checked += 1;
            }
        }
    }
    assert!(checked >= 20, "the tables name only {checked} cases");
    assert_eq!(ada.get("/api/workspaces").await.expect(StatusCode::OK), before);
    assert_eq!(start.world.starts(), starts, "nothing was woken");
}

/// The control of the test above: the same routes are there for the owner, and her answers differ.
#[tokio::test]
async fn on_every_route_the_owner_is_let_through() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    workspace(&mut ada).await;
    let things = Things::of(&start, &mut ada).await;
    let mut routes = scoped();
    // What deletes comes last, the workspace after what is in it, and a secret after the grants that end with it.
    routes.sort_by_key(|route| {
        (
            route.method == "DELETE",
            ["/api/workspaces/{ws}", "/me/secrets/{name}"].contains(&route.path),
            std::cmp::Reverse(route.path.matches('/').count()),
        )
    });
    for route in routes {
        for method in methods(route) {
            let own = fill(route, WORKSPACE, |of| things.id(route, of).to_owned());
            let answer = ask(&mut ada, method, &own, &things).await;
            let turned_away = [
                StatusCode::UNAUTHORIZED,
                StatusCode::FORBIDDEN,
                StatusCode::NOT_FOUND,
                StatusCode::INTERNAL_SERVER_ERROR,
            ];
            assert!(
                !turned_away.contains(&answer.status),
                "{method} {own}: {}",
                answer.text()
            );
            assert!(
                route.method != "ANY" || answer.status == StatusCode::OK,
                "{method} {own}: {}",
                answer.text()
            );
            let nobodys = fill(route, NOWHERE, |of| absent(things.id(route, of)));
            assert_ne!(
                told(&answer),
                told(&ask(&mut ada, method, &nobodys, &things).await),
                "{method} {own}"
            );
        }
    }
}

#[tokio::test]
async fn no_list_names_somebody_elses_things() {
    let start = Box::new().await;
    let mut ada = start.ada().await;
    let sandboxes = workspace(&mut ada).await;
    let mut secret: Vec<String> = sandboxes.iter().map(ToString::to_string).collect();
    let things = Things::of(&start, &mut ada).await;
    // A release is nobody's own.
    let own = things.0.into_iter().filter(|(of, _)| *of != "releases");
    secret.extend(own.map(|(_, id)| id));
    let me = ada.get("/auth/me").await.expect(StatusCode::OK);
    let shown = ada.get("/api/workspaces/main").await.expect(StatusCode::OK);
    secret.extend([&me["user"]["id"], &shown["id"]].map(|id| id.as_str().unwrap().to_owned()));
    let mut eve = start.member(&mut ada, "eve").await;
    eve.post("/api/workspaces", json!({"name": OTHER}))
        .await
        .expect(StatusCode::CREATED);
    change(&mut ada, Slot::Live, "start").await;
    let mut named = vec![false; secret.len()];
    let all = tables().into_iter().flatten();
    let lists = all.filter(|route| route.method == "GET" && !names_an_id(route));
    for route in lists {
        let hers = eve.get(&fill(route, OTHER, |_| unreachable!())).await.text();
        for id in &secret {
            assert!(!hers.contains(id), "{} names {id}", route.path);
        }
        // An admin sees everything of everybody, which would show nothing here.
        if route.access != Access::Admin {
            let own = ada.get(&fill(route, WORKSPACE, |_| unreachable!())).await.text();
            for (id, seen) in secret.iter().zip(&mut named) {
                *seen |= own.contains(id);
            }
        }
    }
    // The control: the same look finds each of them in the owner's lists.
    for (id, seen) in secret.iter().zip(named) {
        assert!(seen, "{id} is in no list of its owner");
    }
}
