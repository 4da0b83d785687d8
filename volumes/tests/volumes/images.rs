//! Image archives: how their layers come to lie over each other, and those that are not what they say.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType};

use crate::contents::{add, header, root_only};
use crate::support::{Server, code, on_each_backend};

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("written");
        text
    })
}

/// A layer's entries: a name that ends with / is a directory, `a -> b` a symbolic and `a = b` a hard link.
fn layer(entries: &[(&str, &str)]) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    for (name, text) in entries {
        if let Some((name, to)) = name.split_once(" -> ") {
            add(&mut tar, header(name, EntryType::Symlink, 0o777, 0), to, b"");
        } else if let Some((name, to)) = name.split_once(" = ") {
            add(&mut tar, header(name, EntryType::Link, 0o644, 0), to, b"");
        } else if name.ends_with('/') {
            add(&mut tar, header(name, EntryType::Directory, 0o755, 0), "", b"");
        } else {
            let header = header(name, EntryType::Regular, 0o644, text.len());
            add(&mut tar, header, "", text.as_bytes());
        }
    }
    tar.into_inner().expect("a tar")
}

#[derive(Clone, Copy, PartialEq)]
enum Packed {
    No,
    Gzip,
    Zstd,
}

fn packed(tar: &[u8], how: Packed) -> Vec<u8> {
    match how {
        Packed::No => tar.to_vec(),
        Packed::Gzip => {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(tar).expect("compressed");
            gzip.finish().expect("compressed")
        }
        Packed::Zstd => {
            // Two frames and one to be skipped, as some registries store them.
            let (first, second) = tar.split_at(tar.len() / 2);
            let frame =
                |bytes: &[u8]| ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest);
            let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
            [frame(first), skipped, frame(second)].concat()
        }
    }
}

/// The members of an OCI archive, and the digest of its manifest.
struct Oci {
    members: Vec<(String, Vec<u8>)>,
    digest: String,
}

fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") {
        "arm64"
    } else {
        "amd64"
    }
}

impl Oci {
    fn of(layers: &[Vec<u8>], how: Packed) -> Self {
        Self::with(layers, how, |_| {})
    }

    /// With a configuration that `change` has changed.
    fn with(layers: &[Vec<u8>], how: Packed, change: impl FnOnce(&mut Value)) -> Self {
        let mut members = Vec::new();
        let mut blob = |bytes: Vec<u8>| {
            let digest = hex(&bytes);
            let size = bytes.len();
            let name = format!("blobs/sha256/{digest}");
            if !members.iter().any(|(known, _)| *known == name) {
                members.push((name, bytes));
            }
            json!({"mediaType": "application/octet-stream", "digest": format!("sha256:{digest}"), "size": size})
        };
        let diff_ids: Vec<_> = layers.iter().map(|tar| format!("sha256:{}", hex(tar))).collect();
        let mut config = json!({
            "os": "linux", "architecture": architecture(), "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        change(&mut config);
        let config = blob(config.to_string().into());
        let layers: Vec<_> = layers.iter().map(|tar| blob(packed(tar, how))).collect();
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": layers}).to_string();
        let digest = hex(manifest.as_bytes());
        let entry = blob(manifest.into());
        let index = json!({"schemaVersion": 2, "manifests": [entry]}).to_string();
        members.push(("index.json".to_owned(), index.into()));
        members.push(("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()));
        Self { members, digest }
    }

    fn archive(&self) -> Vec<u8> {
        let mut tar = Builder::new(Vec::new());
        for (name, bytes) in &self.members {
            add(
                &mut tar,
                header(name, EntryType::Regular, 0o644, bytes.len()),
                "",
                bytes,
            );
        }
        tar.into_inner().expect("a tar")
    }
}

/// The same image as `docker save` wrote it before it knew OCI.
fn saved(layers: &[Vec<u8>]) -> (Vec<u8>, String) {
    let diff_ids: Vec<_> = layers.iter().map(|tar| format!("sha256:{}", hex(tar))).collect();
    let config = json!({"os": "linux", "architecture": architecture(), "rootfs": {"diff_ids": diff_ids}}).to_string();
    let id = hex(config.as_bytes());
    let names: Vec<_> = (0..layers.len()).map(|nth| format!("{nth}/layer.tar")).collect();
    let manifest = json!([{"Config": format!("{id}.json"), "RepoTags": ["x:1"], "Layers": names}]).to_string();
    let mut tar = Builder::new(Vec::new());
    let mut member = |name: &str, bytes: &[u8]| {
        add(
            &mut tar,
            header(name, EntryType::Regular, 0o644, bytes.len()),
            "",
            bytes,
        );
    };
    member(&format!("{id}.json"), config.as_bytes());
    for (name, layer) in names.iter().zip(layers) {
        member(name, layer);
    }
    member("manifest.json", manifest.as_bytes());
    (tar.into_inner().expect("a tar"), id)
}

fn send(server: &Server, archive: &[u8], most: u64) -> Value {
    let path = server.pool.beside("image.tar");
    fs::write(&path, archive).expect("an archive");
    let mut client = server.connect();
    let request = json!({"verb": "create", "volume": "rel", "from": "image", "most": most});
    client.say_with(&request, File::open(path).expect("an archive"));
    client.hear().expect("an answer")
}

const ROOM: u64 = 1 << 20;

fn three_layers() -> Vec<Vec<u8>> {
    vec![
        layer(&[
            ("etc/", ""),
            ("etc/one", "below"),
            ("etc/gone", "below"),
            ("etc/linked = etc/one", ""),
            ("opt/", ""),
            ("opt/old", "below"),
            ("opt/deep/", ""),
            ("opt/deep/old", "below"),
            ("becomes-file/", ""),
            ("becomes-file/inner", "below"),
            ("becomes-directory", "below"),
        ]),
        layer(&[
            ("etc/one", "above"),
            ("etc/.wh.gone", ""),
            // What is said of the layers below holds for what the layer itself puts there before.
            ("opt/new", "above"),
            ("opt/.wh..wh..opq", ""),
            ("becomes-file", "above"),
            ("becomes-directory/", ""),
            // As overlayfs marks a directory that replaces something else.
            ("becomes-directory/.wh..wh..opq", ""),
            ("becomes-directory/inner", "above"),
            ("link -> etc", ""),
        ]),
        layer(&[
            (".wh.link", ""),
            ("link/", ""),
            ("link/inner", "top"),
            ("etc/.wh.never", ""),
        ]),
    ]
}

fn look(server: &Server) {
    let read = |name: &str| fs::read_to_string(server.path(&format!("rel/root/{name}"))).ok();
    let above = Some("above".to_owned());
    assert_eq!(read("etc/one"), above);
    assert_eq!(
        read("etc/linked").as_deref(),
        Some("below"),
        "the other name of a replaced file keeps its contents"
    );
    assert_eq!(read("etc/gone"), None);
    assert_eq!(
        (read("opt/old"), read("opt/deep/old"), read("opt/new")),
        (None, None, above.clone())
    );
    assert_eq!(read("becomes-file"), above);
    assert_eq!(read("becomes-directory/inner"), above);
    assert_eq!(read("link/inner").as_deref(), Some("top"));
    assert_eq!(read("etc/inner"), None);
    let marks = fs::read_dir(server.path("rel/root/etc")).expect("readable");
    let names: Vec<_> = marks.map(|e| e.expect("an entry").file_name()).collect();
    assert!(
        !names.iter().any(|name| name.to_string_lossy().starts_with(".wh.")),
        "{names:?}"
    );
    assert_eq!(fs::metadata(server.path("rel/root/etc")).expect("there").uid(), 0);
}

#[test]
fn layers_lie_over_each_other_however_they_are_packed_and_the_digest_is_the_images() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        let layers = three_layers();
        let unpacked: usize = layers.iter().map(Vec::len).sum();
        let mut archives = Vec::new();
        for how in [Packed::No, Packed::Gzip, Packed::Zstd] {
            let oci = Oci::of(&layers, how);
            archives.push((oci.archive(), oci.digest));
        }
        archives.push(saved(&layers));
        for (archive, digest) in archives {
            let answer = send(&server, &archive, ROOM);
            assert_eq!(answer, json!({"bytes": unpacked, "sha256": digest}));
            look(&server);
            server.ask(&json!({"verb": "delete", "volume": "rel"}));
        }
    });
}

fn refused(server: &Server, why: &str, archive: &[u8], most: u64) {
    let answer = send(server, archive, most);
    let message = answer["error"]["message"].as_str().unwrap_or_default();
    assert!(code(&answer) == "refused" && message.contains(why), "{why}: {answer}");
    let left = [server.path("rel"), server.path(".new-rel")].iter().any(|p| p.exists());
    assert!(!left, "{why}: nothing is left");
}

#[test]
fn an_image_that_is_not_what_its_digests_say_is_refused() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        let honest = Oci::of(&three_layers(), Packed::Gzip);
        let other = layer(&[("etc/one", "planted")]);
        for nth in 0..honest.members.len() {
            let mut changed = Oci::of(&three_layers(), Packed::Gzip);
            let (name, bytes) = &mut changed.members[nth];
            if !name.starts_with("blobs/") {
                continue;
            }
            *bytes = packed(&other, Packed::Gzip);
            refused(&server, "is not what its digest says", &changed.archive(), ROOM);
        }
        // The stored bytes are right and hold another tar than the configuration tells of.
        let told = Oci::with(&three_layers(), Packed::Gzip, |config| {
            config["rootfs"]["diff_ids"][1] = json!(format!("sha256:{}", hex(&other)));
        });
        refused(&server, "layer 1 is not what its digest says", &told.archive(), ROOM);
        let fewer = Oci::with(&three_layers(), Packed::No, |config| {
            config["rootfs"]["diff_ids"].as_array_mut().expect("a list").pop();
        });
        refused(&server, "its configuration tells of 2", &fewer.archive(), ROOM);
        let foreign = Oci::with(&three_layers(), Packed::No, |config| {
            config["architecture"] = json!("s390x")
        });
        refused(&server, "it is for linux/s390x", &foreign.archive(), ROOM);
        let mut twice = Oci::of(&three_layers(), Packed::No);
        twice.members.push(twice.members[0].clone());
        refused(&server, "is in it twice", &twice.archive(), ROOM);
        let mut without = Oci::of(&three_layers(), Packed::Gzip);
        without
            .members
            .retain(|(name, _)| name != &format!("blobs/sha256/{}", honest.digest));
        refused(&server, "is missing", &without.archive(), ROOM);
        let (mut docker, _) = saved(&three_layers());
        let at = docker.windows(5).position(|w| w == b"below").expect("a file");
        docker[at] ^= 1;
        refused(&server, "layer 0 is not what its digest says", &docker, ROOM);
        assert!(
            send(&server, &honest.archive(), ROOM).get("error").is_none(),
            "the honest one is taken"
        );
    });
}

#[test]
fn hostile_images_are_refused_and_leave_nothing() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        let outside = server.pool.beside("outside");
        fs::create_dir(&outside).expect("a directory");
        fs::write(outside.join("kept"), "kept").expect("a file");
        let target = outside.to_str().expect("a path");
        let climb = format!("../../../{}", outside.file_name().expect("a name").to_string_lossy());
        let one = |entries: &[(&str, &str)]| Oci::of(&[layer(entries)], Packed::Gzip).archive();
        let two = |upper: &[(&str, &str)]| {
            let below = layer(&[(&format!("link -> {target}"), "")]);
            Oci::of(&[below, layer(upper)], Packed::Gzip).archive()
        };
        let raw = |name: &str, kind: EntryType| {
            let mut tar = Builder::new(Vec::new());
            add(&mut tar, header(name, kind, 0o666, 0), "", b"");
            Oci::of(&[tar.into_inner().expect("a tar")], Packed::No).archive()
        };
        let dots = one(&[(&format!("{climb}/evil"), "evil")]);
        refused(&server, "absolute or has `..`", &dots, ROOM);
        refused(
            &server,
            "absolute or has `..`",
            &one(&[(&format!("{target}/evil"), "evil")]),
            ROOM,
        );
        refused(
            &server,
            "hard link's target",
            &one(&[("a = ../../etc/passwd", "")]),
            ROOM,
        );
        refused(&server, "device node", &raw("dev/sda", EntryType::Block), ROOM);
        // Whiteouts climb no better than files.
        refused(
            &server,
            "absolute or has `..`",
            &one(&[(&format!("{climb}/.wh.kept"), "")]),
            ROOM,
        );
        refused(&server, "through a symbolic link", &two(&[("link/evil", "evil")]), ROOM);
        refused(&server, "whiteout names nothing", &one(&[(".wh...", "")]), ROOM);
        // There is nothing below a link to take away; what it points to is not that.
        for mark in ["link/.wh.kept", "link/.wh..wh..opq"] {
            assert!(
                send(&server, &two(&[(mark, "")]), ROOM).get("error").is_none(),
                "{mark}"
            );
            server.ask(&json!({"verb": "delete", "volume": "rel"}));
        }
        let far = two(&[("link/deep/.wh.kept", "")]);
        refused(&server, "through a symbolic link", &far, ROOM);
        let left: Vec<_> = fs::read_dir(&outside).expect("readable").collect();
        assert_eq!(left.len(), 1, "{left:?}");
    });
}

#[test]
fn bombs_and_endless_stacks_are_refused_and_leave_nothing() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        let one = |entries: &[(&str, &str)]| Oci::of(&[layer(entries)], Packed::Gzip).archive();
        // 64 MiB of zeros in 64 KiB.
        let zeros = "\0".repeat(64 << 20);
        let bomb = one(&[("bomb", &zeros)]);
        assert!(bomb.len() < 1 << 20);
        refused(&server, "larger than a volume may be", &bomb, 32 << 20);
        let many = vec![layer(&[("a", "a")]); 10_000];
        refused(
            &server,
            "it has 10000 layers",
            &Oci::of(&many, Packed::No).archive(),
            ROOM,
        );
        refused(
            &server,
            "no image archive",
            &layer(&[("etc/one", "a root file system")]),
            ROOM,
        );
        refused(
            &server,
            "Could not unpack the image",
            &packed(&one(&[("a", "a")]), Packed::Gzip),
            ROOM,
        );
        // The same bomb where there is room for it, and as many layers as may be.
        assert!(send(&server, &bomb, 128 << 20).get("error").is_none());
        server.ask(&json!({"verb": "delete", "volume": "rel"}));
        let most = vec![layer(&[("a", "a")]); 128];
        assert!(
            send(&server, &Oci::of(&most, Packed::No).archive(), ROOM)
                .get("error")
                .is_none()
        );
    });
}

#[test]
fn an_image_that_makes_the_unpacker_say_much_or_work_for_ever_is_refused_in_one_sentence() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        let member = |name: &str, bytes: &[u8]| {
            let mut tar = Builder::new(Vec::new());
            add(
                &mut tar,
                header(name, EntryType::Regular, 0o644, bytes.len()),
                "",
                bytes,
            );
            tar.into_inner().expect("a tar")
        };
        let name = "a".repeat(1 << 20);
        let manifest = json!([{"Config": name, "Layers": []}]).to_string();
        refused(
            &server,
            "image: aaaa",
            &member("manifest.json", manifest.as_bytes()),
            ROOM.max(4 << 20),
        );
        // One layer of nothing but empty members, named a hundred times.
        let empty = packed(&[], Packed::Gzip).repeat(20_000);
        let layers = vec![layer(&[("a", "a")]); 100];
        let mut stacked = Oci::of(&layers, Packed::Gzip);
        for (name, bytes) in &mut stacked.members {
            if name.starts_with("blobs/") && bytes.starts_with(&[0x1f, 0x8b]) {
                bytes.extend(&empty);
            }
        }
        refused(&server, "its layers are larger", &stacked.archive(), ROOM);
    });
}

#[test]
fn nothing_that_an_image_says_of_how_it_is_to_run_is_obeyed() {
    if !root_only() {
        return;
    }
    on_each_backend(|server| {
        let hostile = Oci::with(&three_layers(), Packed::Gzip, |config| {
            config["config"] = json!({
                "User": "0:0", "Env": ["LD_PRELOAD=/evil.so"], "Entrypoint": ["/evil"], "Volumes": {"/etc": {}},
                "Labels": {"io.podman.annotations.cid-file": "/etc/evil", "choir.sandbox": "s-forged"},
            });
            config["annotations"] = json!({"io.podman.annotations.privileged": "TRUE"});
        });
        assert!(send(&server, &hostile.archive(), ROOM).get("error").is_none());
        look(&server);
        let kept: Vec<_> = fs::read_dir(server.path("rel")).expect("readable").collect();
        assert_eq!(
            kept.len(),
            2,
            "root and home, and nothing of the configuration: {kept:?}"
        );
    });
}
