//! Container and volume services that are away, hang, hang up or answer with garbage: each gives an error of the right
//! kind with one sentence, and in bounded time.

use std::path::{Path, PathBuf};
use std::time::Duration;

use choir_core::{Generation, IdRange, Limits, SandboxId};
use choir_link::AgentConfig;
use choir_runtime::{Error, Places, Podman, PodmanOptions, Runtime, Spec, Volumes, VolumesClient};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

/// A service that reads a little and answers `answer`; without one it says nothing for ever.
fn serve(dir: &Path, answer: Option<&'static [u8]>) -> PathBuf {
    let socket = dir.join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let _ = stream.read(&mut [0; 4096]).await;
                match answer {
                    Some(answer) => {
                        let _ = stream.write_all(answer).await;
                        let _ = stream.shutdown().await;
                    }
                    None => std::future::pending().await,
                }
            });
        }
    });
    socket
}

fn dir() -> TempDir {
    tempfile::Builder::new().prefix("choir-").tempdir_in("/tmp").unwrap()
}

fn podman(dir: &Path, socket: PathBuf) -> Podman {
    let places = Places {
        volumes: dir.join("v"),
        run: dir.join("r"),
        agent: dir.join("a"),
    };
    let options = PodmanOptions {
        socket,
        oci_runtime: String::new(),
    };
    Podman::new(places, options).unwrap()
}

fn spec() -> Spec {
    Spec {
        generation: Generation {
            sandbox: SandboxId::from_random([1; 16]),
            number: 1,
        },
        nonce: "0".repeat(64),
        ids: IdRange::nth(0).unwrap(),
        limits: Limits::default(),
        slot: choir_core::Slot::Dev,
        hostname: "box".to_owned(),
        agent: AgentConfig::default(),
    }
}

async fn every_call_fails(answer: Option<&'static [u8]>, is_right: fn(&Error) -> bool) {
    let dir = dir();
    let runtime = podman(dir.path(), serve(dir.path(), answer));
    let spec = spec();
    let errors = [
        runtime.describe().await.unwrap_err(),
        runtime.list().await.unwrap_err(),
        runtime.create(&spec).await.unwrap_err(),
        runtime.stats(&spec.generation).await.unwrap_err(),
        runtime.adopt(&spec).await.unwrap_err(),
    ];
    for error in errors {
        let text = error.to_string();
        assert!(is_right(&error), "{error:?}");
        assert!(text.len() < 500 && !text.contains('\n'), "{text}");
    }
    let left: Vec<_> = std::fs::read_dir(dir.path().join("r")).unwrap().flatten().collect();
    assert!(
        left.iter()
            .all(|e| !e.path().join("choir").exists() || e.path().is_dir())
    );
}

#[tokio::test]
async fn an_absent_service_is_unavailable() {
    let dir = dir();
    let runtime = podman(dir.path(), dir.path().join("nothing"));
    assert!(matches!(runtime.list().await, Err(Error::Unavailable(why)) if why.contains("nothing")));
    assert!(matches!(runtime.create(&spec()).await, Err(Error::Unavailable(_))));
}

#[tokio::test]
async fn a_service_that_hangs_up_is_unavailable() {
    every_call_fails(Some(b""), |e| matches!(e, Error::Unavailable(_))).await;
}

#[tokio::test]
async fn bytes_that_are_no_http_are_a_protocol_error() {
    let garbage = b"\x00\x01\x02 220 smtp.example ready\r\n\r\n";
    every_call_fails(Some(garbage), |e| matches!(e, Error::Protocol(_))).await;
}

#[tokio::test]
async fn http_that_is_not_podman_is_a_protocol_error() {
    let page = b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 15\r\n\r\n<html>hi</html>";
    every_call_fails(Some(page), |e| matches!(e, Error::Protocol(_))).await;
}

#[tokio::test]
async fn an_internal_error_is_told_in_its_own_words() {
    let answer = b"HTTP/1.1 500 X\r\ncontent-length: 55\r\n\r\n{\"cause\":\"x\",\"message\":\"no\\nspace left\",\"response\":500}";
    every_call_fails(
        Some(answer),
        |e| matches!(e, Error::Refused(why) if why == "no space left"),
    )
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_service_that_never_answers_is_given_up_after_its_deadline() {
    let dir = dir();
    let runtime = podman(dir.path(), serve(dir.path(), None));
    let before = tokio::time::Instant::now();
    assert!(matches!(runtime.list().await, Err(Error::Unavailable(_))));
    assert!(before.elapsed() < Duration::from_secs(30));
}

#[tokio::test(start_paused = true)]
async fn no_call_waits_for_ever_for_a_service_that_never_answers() {
    let before = tokio::time::Instant::now();
    every_call_fails(None, |e| matches!(e, Error::Unavailable(_))).await;
    // Five calls.
    assert!(before.elapsed() < 5 * Duration::from_secs(30));
}

#[tokio::test]
async fn a_body_without_end_is_not_kept() {
    let dir = dir();
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n[").await;
                while stream.write_all(&[b' '; 65536]).await.is_ok() {}
            });
        }
    });
    let runtime = podman(dir.path(), socket);
    assert!(matches!(runtime.list().await, Err(Error::Protocol(_))));
}

#[tokio::test]
async fn the_volume_helper_may_be_away_broken_or_unwilling() {
    let away = dir();
    let client = VolumesClient::new(away.path().join("s"));
    assert!(matches!(client.list().await, Err(Error::Unavailable(_))));
    for (answer, is_right) in [
        (
            &b"{]\n"[..],
            (|e| matches!(e, Error::Protocol(_))) as fn(&Error) -> bool,
        ),
        (b"{\"backend\":\"btrfs\"", |e| matches!(e, Error::Unavailable(_))),
        (b"{\"error\":{\"code\":\"not_found\",\"message\":\"No.\"}}\n", |e| {
            matches!(e, Error::NotFound)
        }),
        (b"{\"error\":{\"code\":\"busy\",\"message\":\"Wait.\"}}\n", |e| {
            matches!(e, Error::Busy(_))
        }),
        (
            b"{\"error\":{\"code\":\"no_space\",\"message\":\"Full.\"}}\n",
            |e| matches!(e, Error::NoSpace(why) if why == "Full."),
        ),
        (
            b"{\"error\":{\"code\":\"refused\",\"message\":\"Never.\"}}\n",
            |e| matches!(e, Error::Refused(why) if why == "Never."),
        ),
    ] {
        let dir = dir();
        let client = VolumesClient::new(serve(dir.path(), Some(answer)));
        let error = client.backend().await.unwrap_err();
        assert!(is_right(&error), "{error:?}");
    }
}

#[tokio::test]
async fn a_volume_that_exists_already_is_derived() {
    let dir = dir();
    let answer = b"{\"error\":{\"code\":\"exists\",\"message\":\"It exists.\"}}\n";
    let client = VolumesClient::new(serve(dir.path(), Some(answer)));
    client
        .derive("r-x", SandboxId::from_random([1; 16]).as_str())
        .await
        .unwrap();
    assert!(client.import("r-x", Path::new("/dev/null")).await.is_err());
}
