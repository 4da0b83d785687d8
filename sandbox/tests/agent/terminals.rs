//! `/terminals`.

use choir_api::sandbox::{Terminal, TerminalControl};
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use crate::sandbox::{Sandbox, soon, until};

/// One attached client: what it has seen.
struct Attached {
    socket: WebSocketStream<UnixStream>,
    from: u64,
    seen: Vec<u8>,
    exit: Option<i32>,
    close: Option<u16>,
}

impl Attached {
    async fn new(sandbox: &Sandbox, id: &str, since: Option<u64>) -> Self {
        let query = since.map(|s| format!("?since={s}")).unwrap_or_default();
        let mut socket = sandbox.websocket(&format!("/terminals/{id}/attach{query}")).await;
        let Message::Text(hello) = soon(socket.next()).await.unwrap().unwrap() else {
            panic!("the first frame is text");
        };
        let TerminalControl::Hello { seq } = serde_json::from_str(&hello).unwrap() else {
            panic!("the first frame is a hello");
        };
        Self {
            socket,
            from: seq,
            seen: Vec::new(),
            exit: None,
            close: None,
        }
    }

    fn end(&self) -> u64 {
        self.from + self.seen.len() as u64
    }

    /// Takes one frame; false at the end.
    async fn frame(&mut self) -> bool {
        match soon(self.socket.next()).await {
            Some(Ok(Message::Binary(bytes))) => self.seen.extend_from_slice(&bytes),
            Some(Ok(Message::Text(text))) => match serde_json::from_str(&text).unwrap() {
                TerminalControl::Exit { code } => self.exit = Some(code),
                other => panic!("unexpected {other:?}"),
            },
            Some(Ok(Message::Close(close))) => self.close = close.map(|c| c.code.into()),
            _ => return false,
        }
        true
    }

    async fn sees(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.seen).contains(text) {
            assert!(
                self.frame().await,
                "ended after {:?}",
                String::from_utf8_lossy(&self.seen)
            );
        }
    }

    async fn types(&mut self, text: &str) {
        self.socket
            .send(Message::Binary(text.as_bytes().to_vec().into()))
            .await
            .unwrap();
    }

    async fn says(&mut self, control: Value) {
        self.socket
            .send(Message::Text(control.to_string().into()))
            .await
            .unwrap();
    }
}

async fn create(sandbox: &Sandbox) -> Terminal {
    let body = json!({"shell": "/bin/sh", "cols": 80, "rows": 24});
    let (status, body) = sandbox.request("POST", "/terminals", body).await;
    assert_eq!(status, 201, "{body}");
    serde_json::from_value(body).unwrap()
}

#[tokio::test]
async fn a_shell_echoes_resizes_and_exits() {
    let (sandbox, _link) = Sandbox::ready().await;
    let made = create(&sandbox).await;
    let mut client = Attached::new(&sandbox, &made.id, None).await;
    client.types("echo T=$TERM; stty size; tty; cd /; pwd\n").await;
    client.sees("T=xterm-256color").await;
    client.sees("24 80").await;
    client.sees("/dev/pts/").await;
    client.says(json!({"type": "resize", "cols": 132, "rows": 50})).await;
    client.types("stty size\n").await;
    client.sees("50 132").await;
    client.types("exit 7\n").await;
    while client.frame().await {}
    assert_eq!((client.exit, client.close), (Some(7), Some(1000)));
    let mut late = Attached::new(&sandbox, &made.id, Some(client.end())).await;
    while late.frame().await {}
    assert_eq!((late.exit, late.seen.len()), (Some(7), 0));
}

#[tokio::test]
async fn two_clients_see_the_same_and_what_was_missed_is_replayed() {
    let (sandbox, _link) = Sandbox::ready().await;
    let made = create(&sandbox).await;
    let mut one = Attached::new(&sandbox, &made.id, None).await;
    let mut two = Attached::new(&sandbox, &made.id, None).await;
    one.types("echo fi''rst\n").await;
    one.sees("first\r\n").await;
    two.sees("first\r\n").await;
    let left = two.end();
    drop(two);
    one.types("echo sec''ond\n").await;
    one.sees("second\r\n").await;
    let mut back = Attached::new(&sandbox, &made.id, Some(left)).await;
    assert_eq!(back.from, left);
    back.sees("second\r\n").await;
    let start = usize::try_from(left - one.from).unwrap();
    let same = back.seen.len().min(one.seen.len() - start);
    assert_eq!(back.seen[..same], one.seen[start..start + same]);
    let listed = sandbox.get(&format!("/terminals/{}", made.id)).await;
    assert_eq!(listed["clients"], 2);
}

#[tokio::test]
async fn control_characters_reach_the_foreground_job() {
    let (sandbox, _link) = Sandbox::ready().await;
    let made = create(&sandbox).await;
    let mut client = Attached::new(&sandbox, &made.id, None).await;
    // Not `sh`: dash loses a signal that comes while it starts a program.
    client.types("bash -c 'echo rea''dy; sleep 1000'\n").await;
    client.sees("ready").await;
    client.types("\x03").await;
    client.types("echo c''ode=$?\n").await;
    client.sees("code=130").await;
}

#[tokio::test]
async fn a_client_that_does_not_read_is_told_to_come_again() {
    let (sandbox, _link) = Sandbox::ready().await;
    let made = create(&sandbox).await;
    let mut slow = Attached::new(&sandbox, &made.id, None).await;
    slow.types("head -c 4000000 /dev/zero | tr '\\0' x; echo do''ne\n")
        .await;
    until(async || {
        let now: Terminal = serde_json::from_value(sandbox.get(&format!("/terminals/{}", made.id)).await).unwrap();
        now.seq > 4_000_000
    })
    .await;
    while slow.frame().await {}
    assert_eq!(slow.close, Some(1013));
    let mut back = Attached::new(&sandbox, &made.id, Some(slow.end())).await;
    assert!(back.from > slow.end());
    back.sees("done").await;
}

#[tokio::test]
async fn a_client_that_acknowledges_is_never_far_behind() {
    let (sandbox, _link) = Sandbox::ready().await;
    let made = create(&sandbox).await;
    let mut client = Attached::new(&sandbox, &made.id, None).await;
    client.says(json!({"type": "ack", "seq": 0})).await;
    client
        .types("head -c 900000 /dev/zero | tr '\\0' x; echo do''ne\n")
        .await;
    while client.end() < 256 << 10 {
        assert!(client.frame().await);
    }
    assert!(client.end() < (256 + 32) << 10);
    while !String::from_utf8_lossy(&client.seen).contains("done") {
        let seq = client.end();
        client.says(json!({"type": "ack", "seq": seq})).await;
        assert!(client.frame().await);
    }
}

#[tokio::test]
async fn deleting_hangs_up() {
    let (sandbox, _link) = Sandbox::ready().await;
    let made = create(&sandbox).await;
    let mut client = Attached::new(&sandbox, &made.id, None).await;
    let (status, _) = sandbox
        .request("DELETE", &format!("/terminals/{}", made.id), Value::Null)
        .await;
    assert_eq!(status, 204);
    while client.frame().await {}
    assert_eq!(client.exit, Some(129));
    let (status, body) = sandbox
        .request("GET", &format!("/terminals/{}", made.id), Value::Null)
        .await;
    assert_eq!(
        (status.as_u16(), &body["error"]["code"]),
        (404, &json!("no_such_terminal"))
    );
}

#[tokio::test]
async fn a_plain_get_and_a_shell_that_is_not_there_are_refused() {
    let (sandbox, _link) = Sandbox::ready().await;
    let made = create(&sandbox).await;
    let (status, _) = sandbox
        .request("GET", &format!("/terminals/{}/attach", made.id), Value::Null)
        .await;
    assert_eq!(status, 426);
    let body = json!({"shell": "/no/shell", "cols": 80, "rows": 24});
    let (status, body) = sandbox.request("POST", "/terminals", body).await;
    assert_eq!((status.as_u16(), &body["error"]["code"]), (400, &json!("bad_shell")));
}
