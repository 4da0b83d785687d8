//! One suite for volumes, run against the simulated ones and against the real helper with plain copies.

use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use choir_core::snapshot::Diff;
use choir_core::{IdRange, SandboxId};
use choir_runtime::{Error, SimVolumes, Volumes, VolumesClient};
use tempfile::TempDir;

struct Helper {
    client: VolumesClient,
    child: Child,
    dir: TempDir,
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn skip(test: &str, reason: &str) {
    eprintln!("skipped: {test}: {reason}");
    if let Some(path) = std::env::var_os("CHOIR_SKIP_LOG")
        && let Ok(mut log) = std::fs::OpenOptions::new().create(true).append(true).open(path)
    {
        let _ = writeln!(log, "{test}: {reason}");
    }
}

async fn helper(test: &str) -> Option<Helper> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/debug/choir-volumes");
    let binary = std::env::var_os("CHOIR_VOLUMES").map_or(built, PathBuf::from);
    if !binary.is_file() {
        skip(test, "there is no helper; build choir-volumes or set CHOIR_VOLUMES");
        return None;
    }
    if !rustix::process::geteuid().is_root() {
        skip(test, "it needs root");
        return None;
    }
    let dir = tempfile::Builder::new().prefix("choir-").tempdir_in("/tmp").unwrap();
    let (volumes, socket) = (dir.path().join("v"), dir.path().join("s"));
    std::fs::create_dir(&volumes).unwrap();
    let child = Command::new(binary)
        .args(["serve", "--plain", "--dir"])
        .arg(&volumes)
        .arg("--socket")
        .arg(&socket)
        .spawn()
        .unwrap();
    let client = VolumesClient::new(socket);
    let up = async {
        while client.backend().await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), up)
        .await
        .expect("the helper answers");
    Some(Helper { client, child, dir })
}

fn archive(dir: &Path) -> PathBuf {
    std::fs::create_dir_all(dir.join("image/etc")).unwrap();
    std::fs::write(dir.join("image/etc/motd"), "hello\n").unwrap();
    let path = dir.join("image.tar");
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(dir.join("image")).arg("-cf").arg(&path).arg(".");
    assert!(tar.status().unwrap().success());
    path
}

async fn a_release_becomes_sandboxes_and_snapshots(volumes: &dyn Volumes, archive: &Path) {
    let sandbox = SandboxId::from_random([9; 16]);
    let digest = volumes.import("r-one", archive).await.unwrap();
    assert_eq!(digest.len(), 64);
    volumes.shift("r-one", IdRange::nth(0).unwrap()).await.unwrap();
    for _ in 0..2 {
        volumes.derive("r-one", sandbox.as_str()).await.unwrap();
    }
    volumes.limit(sandbox.as_str(), 1 << 30).await.unwrap();
    volumes.usage(sandbox.as_str()).await.unwrap();
    for _ in 0..2 {
        volumes.snapshot(sandbox.as_str(), "p-one", true).await.unwrap();
    }
    let nothing = volumes.diff("p-one", sandbox.as_str(), 10).await.unwrap();
    assert_eq!(nothing, Diff::default());
    assert!(matches!(
        volumes.diff("p-one", "p-none", 10).await,
        Err(Error::NotFound)
    ));
    let mut all = volumes.list().await.unwrap();
    all.sort();
    assert_eq!(all, ["p-one", "r-one", sandbox.as_str()]);
    assert!(matches!(volumes.usage("p-none").await, Err(Error::NotFound)));
    assert!(matches!(
        volumes.snapshot("p-none", "p-two", true).await,
        Err(Error::NotFound)
    ));
    for name in ["p-one", "p-one", "r-one", sandbox.as_str(), "p-none"] {
        volumes.delete(name).await.unwrap();
    }
    assert!(volumes.list().await.unwrap().is_empty());
}

fn file_of(bytes: &[u8]) -> OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file.into()
}

async fn a_snapshot_is_packed_and_made_again(volumes: &dyn Volumes, archive: &Path) {
    const MOST: u64 = 1 << 20;
    let ids = IdRange::nth(0).unwrap();
    volumes.import("r-one", archive).await.unwrap();
    volumes.shift("r-one", ids).await.unwrap();
    volumes.snapshot("r-one", "p-one", true).await.unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    let (packed, unpacked) = tokio::join!(
        volumes.pack("p-one", writer.into()),
        volumes.unpack("p-two", reader.into(), ids, MOST),
    );
    packed.unwrap();
    unpacked.unwrap();
    assert_eq!(volumes.diff("p-one", "p-two", 10).await.unwrap(), Diff::default());

    let mut file = tempfile::tempfile().unwrap();
    let into = || OwnedFd::from(file.try_clone().unwrap());
    volumes.snapshot("p-two", "p-open", false).await.unwrap();
    let open = volumes.pack("p-open", into()).await;
    assert!(matches!(open, Err(Error::Refused(_))), "{open:?}");
    let absent = volumes.pack("p-none", into()).await;
    assert!(matches!(absent, Err(Error::NotFound)), "{absent:?}");
    volumes.pack("p-two", into()).await.unwrap();
    let mut whole = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut whole).unwrap();
    let (whole, cut) = (&whole[..], &whole[..whole.len() - 1]);
    for (name, bytes, most) in [("p-three", cut, MOST), ("p-three", whole, 0), ("p-two", whole, MOST)] {
        let refused = volumes.unpack(name, file_of(bytes), ids, most).await;
        assert!(matches!(refused, Err(Error::Refused(_))), "{refused:?}");
    }
    assert!(!volumes.list().await.unwrap().contains(&"p-three".to_owned()));
    volumes.unpack("p-three", file_of(whole), ids, MOST).await.unwrap();
    for name in ["p-one", "p-two", "p-three", "p-open", "r-one"] {
        volumes.delete(name).await.unwrap();
    }
    assert!(volumes.list().await.unwrap().is_empty());
}

#[tokio::test]
async fn simulated_volumes_do_what_real_ones_do() {
    let volumes = SimVolumes::default();
    assert_eq!(volumes.backend().await.unwrap(), "sim");
    a_release_becomes_sandboxes_and_snapshots(&volumes, Path::new("image.tar")).await;
    a_snapshot_is_packed_and_made_again(&volumes, Path::new("image.tar")).await;
}

#[tokio::test]
async fn the_helper_makes_volumes_from_an_archive() {
    let Some(helper) = helper("volumes::the_helper_makes_volumes_from_an_archive").await else {
        return;
    };
    assert_eq!(helper.client.backend().await.unwrap(), "plain");
    let archive = archive(helper.dir.path());
    a_release_becomes_sandboxes_and_snapshots(&helper.client, &archive).await;
    a_snapshot_is_packed_and_made_again(&helper.client, &archive).await;
    let digest = helper.client.import("r-two", &archive).await.unwrap();
    let sum = Command::new("sha256sum").arg(&archive).output().unwrap();
    assert!(String::from_utf8(sum.stdout).unwrap().starts_with(&digest));
    let motd = helper.dir.path().join("v/r-two/root/etc/motd");
    assert_eq!(std::fs::read_to_string(motd).unwrap(), "hello\n");
    helper.client.snapshot("r-two", "p-two", false).await.unwrap();
    for path in ["root/etc/new", "home/new"] {
        std::fs::write(helper.dir.path().join("v/p-two").join(path), "four").unwrap();
    }
    let diff = helper.client.diff("r-two", "p-two", 10).await.unwrap();
    let paths: Vec<&str> = diff.entries.iter().map(|e| e.path.as_str()).collect();
    assert_eq!(paths, ["/home/choir/new", "/etc/new"]);
    assert_eq!((diff.added, diff.added_bytes), (2, 8));
    let missing = helper.client.import("r-three", Path::new("/nowhere.tar")).await;
    assert!(matches!(missing, Err(Error::Refused(why)) if why.contains("/nowhere.tar")));
}
