//! Disks that fail under the trail, for real (D20): no secret leaves without its row, and whoever is signed in goes on.

use std::path::{Path, PathBuf};
use std::process::Command;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use choir_hypervisor::gate::Gatekeeper;
use serde_json::json;

use super::super::access::{HOST, knock};
use super::{SECRET, Scene};
use crate::support::skip;

/// A small file system in a file, mounted until this is dropped.
struct Disk {
    mounted: PathBuf,
    _image: tempfile::TempDir,
}

impl Disk {
    /// `None` where this may not mount, which is told to the test run.
    fn new() -> Option<Self> {
        let image = tempfile::tempdir().unwrap();
        let (file, mounted) = (image.path().join("image"), image.path().join("mounted"));
        std::fs::create_dir(&mounted).unwrap();
        std::fs::File::create(&file).unwrap().set_len(32 << 20).unwrap();
        let made = run("mkfs.ext4", &["-q", "-F", "-m", "0", file.to_str().unwrap()])
            && run(
                "mount",
                &["-o", "loop", file.to_str().unwrap(), mounted.to_str().unwrap()],
            );
        if !made {
            skip("a disk that fails under the trail: needs root, mkfs.ext4 and a loop device");
            return None;
        }
        Some(Self { mounted, _image: image })
    }

    fn directory(&self) -> tempfile::TempDir {
        tempfile::tempdir_in(&self.mounted).unwrap()
    }

    fn ballast(&self) -> PathBuf {
        self.mounted.join("ballast")
    }

    /// Leaves no room at all.
    fn fill(&self) {
        use std::io::Write as _;
        let mut ballast = std::fs::File::create(self.ballast()).unwrap();
        for size in [1 << 20, 4096, 1] {
            while ballast.write_all(&vec![1; size]).is_ok() {}
        }
    }

    /// What the kernel does after a failed write of the journal: from now on it can only be read.
    fn abort(&self) {
        assert!(run("mount", &["-o", "remount,abort", self.mounted.to_str().unwrap()]));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: the database of a failed test is still open.
        run("umount", &["-l", self.mounted.to_str().unwrap()]);
    }
}

fn run(program: &str, args: &[&str]) -> bool {
    Command::new(program)
        .args(args)
        .output()
        .is_ok_and(|output| output.status.success())
}

/// Empties the write-ahead log, so that the next row needs room.
fn empty_log(database: &Path) {
    let connection = rusqlite::Connection::open(database).unwrap();
    connection
        .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
        .unwrap();
}

impl Scene {
    async fn with_two_grants(disk: &Disk) -> Self {
        let mut scene = Self::on(disk.directory()).await;
        scene.grant(json!({})).await;
        scene.store("open", "opened-to-all", true).await;
        scene.grant(json!({"capability": "open", "secret": "open"})).await;
        let told = scene.get("/v1/egress/github/before").await;
        assert_eq!(told.status, StatusCode::OK, "{}", told.text());
        scene.until("secret.use", "ok").await;
        scene
    }

    /// Asks for both secrets again and again: each time it is refused, and nothing is released.
    async fn releases_nothing(&mut self) {
        let reveal = || {
            Request::post("/v1/capabilities/open/resolve")
                .body(Body::empty())
                .unwrap()
        };
        for _ in 0..10 {
            for told in [self.get("/v1/egress/github/user").await, self.ask(reveal()).await] {
                assert_eq!(told.status, StatusCode::SERVICE_UNAVAILABLE, "{}", told.text());
                assert_eq!(told.json()["error"]["code"], "audit_unavailable");
                assert!(!told.has("opened-to-all") && !told.has(SECRET));
            }
        }
        assert_eq!(self.outdoors.seen().len(), 1, "only the call from before");
        assert_eq!(self.ada.get("/readyz").await.json()["parts"]["audit"], "not ready");
        // Who is signed in goes on, to the sandboxes too.
        assert!(self.ada.is_signed_in().await);
        self.ada.get("/api/workspaces/main").await.expect(StatusCode::OK);
    }
}

#[tokio::test]
async fn on_a_full_disk_no_secret_is_released_and_with_room_again_both_are() {
    let Some(disk) = Disk::new() else { return };
    let mut scene = Scene::with_two_grants(&disk).await;
    let gate = Gatekeeper::new(scene.start.app.clone());
    // Before, since a visitor who comes to a host for the first time needs a ticket.
    assert_eq!(knock(&gate, &scene.start, HOST, Some(&scene.ada), true).await.0, 200);
    empty_log(&scene.start.app.config.store.path);
    disk.fill();
    scene.releases_nothing().await;
    std::fs::remove_file(disk.ballast()).unwrap();
    let told = scene.get("/v1/egress/github/user").await;
    assert_eq!(told.status, StatusCode::OK, "{}", told.text());
    assert_eq!(knock(&gate, &scene.start, HOST, Some(&scene.ada), true).await.0, 200);
    assert_eq!(scene.start.app.store.verify_audit(None).await.unwrap().bad, None);
    assert_eq!(scene.ada.get("/readyz").await.json()["parts"]["audit"], "ok");
}

#[tokio::test]
async fn on_a_disk_that_can_only_be_read_no_secret_is_released() {
    let Some(disk) = Disk::new() else { return };
    let mut scene = Scene::with_two_grants(&disk).await;
    disk.abort();
    scene.releases_nothing().await;
}
