//! `/tasks`.

use choir_api::sandbox::{Task, TaskEvent, TaskEventKind, TaskState};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use crate::sandbox::{Sandbox, is_alive, soon, until};

async fn create(sandbox: &Sandbox, body: Value) -> Task {
    let (status, body) = sandbox.request("POST", "/tasks", body).await;
    assert_eq!(status, 201, "{body}");
    serde_json::from_value(body).unwrap()
}

async fn task(sandbox: &Sandbox, id: &str) -> Task {
    serde_json::from_value(sandbox.get(&format!("/tasks/{id}")).await).unwrap()
}

/// Up to `most` events after number `since`; then the connection is dropped.
async fn events(sandbox: &Sandbox, id: &str, since: u64, most: usize) -> Vec<TaskEvent> {
    let last = since.to_string();
    let headers = [("last-event-id", last.as_str())];
    let path = format!("/tasks/{id}/events");
    let mut stream = sandbox.client().await.events("GET", &path, &headers, Value::Null).await;
    let mut all = Vec::new();
    while all.len() < most
        && let Some(event) = stream.next().await
    {
        let parsed: TaskEvent = serde_json::from_value(event.data).unwrap();
        assert_eq!(event.id, parsed.seq.to_string());
        assert_eq!(event.name, parsed.what.name());
        all.push(parsed);
    }
    all
}

async fn websocket_events(sandbox: &Sandbox, id: &str, since: u64, most: usize) -> Vec<TaskEvent> {
    let mut socket = sandbox.websocket(&format!("/tasks/{id}/events?since={since}")).await;
    let mut all = Vec::new();
    while all.len() < most {
        match soon(socket.next()).await {
            Some(Ok(Message::Text(text))) => all.push(serde_json::from_str(&text).unwrap()),
            _ => break,
        }
    }
    all
}

fn text(events: &[TaskEvent]) -> String {
    let piece = |e: &TaskEvent| match &e.what {
        TaskEventKind::Output { chunk, .. } => Some(chunk.data.clone()),
        _ => None,
    };
    events.iter().filter_map(piece).collect()
}

fn final_state(events: &[TaskEvent]) -> Option<TaskState> {
    match events.last()?.what {
        TaskEventKind::State { state, .. } => Some(state),
        _ => None,
    }
}

#[tokio::test]
async fn a_task_outlives_its_request_and_tells_its_end() {
    let (sandbox, _link) = Sandbox::ready().await;
    let made = create(&sandbox, json!({"command": "echo hi; exit 4"})).await;
    let all = events(&sandbox, &made.id, 0, usize::MAX).await;
    let states: Vec<_> = all
        .iter()
        .filter(|e| matches!(e.what, TaskEventKind::State { .. }))
        .collect();
    assert_eq!(states.len(), 3);
    assert_eq!(
        (text(&all).as_str(), final_state(&all)),
        ("hi\n", Some(TaskState::Failed))
    );
    let done = task(&sandbox, &made.id).await;
    assert_eq!((done.state, done.exit_code), (TaskState::Failed, Some(4)));
    assert!(done.finished_at >= done.started_at && done.started_at >= Some(done.created_at));
    assert_eq!(done.last_seq, all.last().unwrap().seq);
}

#[tokio::test]
async fn events_resume_over_broken_connections_without_loss_or_repeat() {
    let (sandbox, _link) = Sandbox::ready().await;
    let command = json!(["sh", "-c", "seq 1 300000; echo end \u{20ac} >&2"]);
    let made = create(&sandbox, json!({ "command": command })).await;
    let mut all: Vec<TaskEvent> = Vec::new();
    for round in 0.. {
        let since = all.last().map_or(0, |e| e.seq);
        let most = 1 + round * 3;
        let some = match round % 2 {
            0 => events(&sandbox, &made.id, since, most).await,
            _ => websocket_events(&sandbox, &made.id, since, most).await,
        };
        all.extend(some);
        if final_state(&all) == Some(TaskState::Succeeded) {
            break;
        }
    }
    for (event, n) in all.iter().zip(1..) {
        assert_eq!(event.seq, n);
    }
    let expected: String = (1..=300_000).map(|n| format!("{n}\n")).collect();
    assert_eq!(text(&all).replace("end \u{20ac}\n", ""), expected);
    assert!(
        events(&sandbox, &made.id, all.last().unwrap().seq, usize::MAX)
            .await
            .is_empty()
    );
}

#[tokio::test]
async fn too_much_output_leaves_a_gap_that_is_named() {
    let (sandbox, _link) = Sandbox::ready().await;
    let command = json!(["sh", "-c", "head -c 80000000 /dev/zero | tr '\\0' x"]);
    let made = create(&sandbox, json!({ "command": command })).await;
    until(async || task(&sandbox, &made.id).await.state.is_final()).await;
    let all = events(&sandbox, &made.id, 0, usize::MAX).await;
    let TaskEventKind::Gap { from } = all[0].what else {
        panic!("the first event is {:?}", all[0].what);
    };
    assert_eq!(from, 1);
    assert!(all.windows(2).all(|w| w[1].seq == w[0].seq + 1));
    assert_eq!(final_state(&all), Some(TaskState::Succeeded));
    assert!(text(&all).len() > 60_000_000);
}

#[tokio::test]
async fn cancelling_ends_the_whole_group() {
    let (sandbox, _link) = Sandbox::ready().await;
    let line = "trap 'echo bye; exit 0' TERM; sh -c 'echo $$; exec sleep 1000' & wait";
    let made = create(&sandbox, json!({"command": ["sh", "-c", line]})).await;
    let seen = events(&sandbox, &made.id, 0, 3).await;
    let background = text(&seen).trim().parse().unwrap();
    let (status, _) = sandbox
        .request("DELETE", &format!("/tasks/{}", made.id), Value::Null)
        .await;
    assert_eq!(status, 202);
    let rest = events(&sandbox, &made.id, 3, usize::MAX).await;
    assert_eq!(
        (text(&rest).as_str(), final_state(&rest)),
        ("bye\n", Some(TaskState::Cancelled))
    );
    assert!(!is_alive(background));
}

#[tokio::test]
async fn a_task_that_ignores_sigterm_is_killed_and_so_is_what_it_left() {
    let (sandbox, _link) = Sandbox::ready().await;
    let line = "trap '' TERM; sleep 1000 & echo $!; wait; wait";
    let made = create(&sandbox, json!({"command": ["sh", "-c", line], "timeout_ms": 100})).await;
    let all = events(&sandbox, &made.id, 0, usize::MAX).await;
    assert_eq!(final_state(&all), Some(TaskState::TimedOut));
    let done = task(&sandbox, &made.id).await;
    assert_eq!((done.exit_code, done.signal.as_deref()), (Some(137), Some("SIGKILL")));
    let left: i32 = text(&all).trim().parse().unwrap();
    until(async || !is_alive(left)).await;
}

#[tokio::test]
async fn tasks_beyond_the_limit_wait_for_their_turn() {
    let (sandbox, _link) = Sandbox::ready().await;
    let mut made = Vec::new();
    for _ in 0..66 {
        made.push(create(&sandbox, json!({"command": ["sleep", "1000"]})).await.id);
    }
    until(async || task(&sandbox, &made[63]).await.state == TaskState::Running).await;
    assert_eq!(task(&sandbox, &made[64]).await.state, TaskState::Queued);
    sandbox
        .request("DELETE", &format!("/tasks/{}", made[65]), Value::Null)
        .await;
    assert_eq!(task(&sandbox, &made[65]).await.state, TaskState::Cancelled);
    sandbox
        .request("DELETE", &format!("/tasks/{}", made[0]), Value::Null)
        .await;
    until(async || task(&sandbox, &made[64]).await.state == TaskState::Running).await;
}

#[tokio::test]
async fn the_list_is_paged_newest_first() {
    let (sandbox, _link) = Sandbox::ready().await;
    let mut made = Vec::new();
    for n in 0..5 {
        made.push(create(&sandbox, json!({"command": ["echo", n.to_string()]})).await.id);
    }
    made.reverse();
    let mut listed = Vec::new();
    let mut path = "/tasks?limit=2".to_owned();
    loop {
        let page = sandbox.get(&path).await;
        listed.extend(
            page["items"]
                .as_array()
                .unwrap()
                .iter()
                .map(|t| t["id"].as_str().unwrap().to_owned()),
        );
        match page["next_cursor"].as_str() {
            Some(cursor) => path = format!("/tasks?limit=2&cursor={cursor}"),
            None => break,
        }
    }
    assert_eq!(listed, made);
}

#[tokio::test]
async fn unknown_tasks_and_bad_numbers_are_refused() {
    let (sandbox, _link) = Sandbox::ready().await;
    for path in ["/tasks/t-no", "/tasks/t-no/events"] {
        let (status, body) = sandbox.request("GET", path, Value::Null).await;
        assert_eq!((status.as_u16(), &body["error"]["code"]), (404, &json!("no_such_task")));
    }
    let made = create(&sandbox, json!({"command": ["true"]})).await;
    let (status, _) = sandbox
        .request("GET", &format!("/tasks/{}/events?since=x", made.id), Value::Null)
        .await;
    assert_eq!(status, 400);
    let (status, _) = sandbox.request("POST", "/tasks", json!({"command": ["a\0"]})).await;
    assert_eq!(status, 400);
}
