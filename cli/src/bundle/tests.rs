//! Exports of every kind, whole and spoilt. It must not need a hypervisor.

use age::secrecy::SecretString;
use age::{scrypt, x25519};
use choir_core::settings::HealthCheck;

use super::*;

fn manifest() -> Manifest {
    Manifest {
        format: FORMAT,
        exported_at: "2026-01-02T03:04:05Z".parse().unwrap(),
        origin: "http://localhost:9090".into(),
        workspace: "main".parse().unwrap(),
        slot: Slot::Live,
        snapshot: SnapshotId::from_random([1; 16]),
        settings: WorkspaceSettings {
            env: Some([("GREETING".to_owned(), "hello".to_owned())].into()),
            ..WorkspaceSettings::default()
        },
        release: ExportedRelease {
            name: "site".into(),
            image_digest: "ab".repeat(32),
            config: ReleaseConfig {
                start: Some("exec httpd".into()),
                health: Some(HealthCheck {
                    path: "/well".into(),
                    port: None,
                    expect: 200,
                    timeout_s: 10,
                    websocket: None,
                }),
                ..ReleaseConfig::default()
            },
        },
        secrets: vec!["GITHUB_TOKEN".parse().unwrap()],
        grants: Vec::new(),
    }
}

/// Of several parts of age's, and of no use to compress.
fn payload() -> Vec<u8> {
    let mut state = 1_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(300_000).collect()
}

fn written(recipient: impl Recipient + 'static, manifest: &Manifest, payload: &[u8]) -> Vec<u8> {
    let mut writer = Writer::begin(Vec::new(), &[Box::new(recipient)], manifest).unwrap();
    writer.write_all(payload).unwrap();
    writer.finish().unwrap()
}

/// A passphrase that is tried quickly.
fn passphrase(text: &str) -> scrypt::Recipient {
    let mut recipient = scrypt::Recipient::new(SecretString::from(text.to_owned()));
    recipient.set_work_factor(2);
    recipient
}

fn known(text: &str) -> scrypt::Identity {
    scrypt::Identity::new(SecretString::from(text.to_owned()))
}

fn read(file: &[u8], identity: impl Identity + 'static) -> Result<(Manifest, Vec<u8>), String> {
    let (manifest, mut archive) = Sealed::new(file)?.open(&[Box::new(identity)])?;
    let mut rest = Vec::new();
    archive.read_to_end(&mut rest).map_err(|e| e.to_string())?;
    Ok((manifest, rest))
}

#[test]
fn an_export_comes_back_with_its_passphrase_or_its_identity() {
    let by_passphrase = written(passphrase("correct horse"), &manifest(), &payload());
    assert!(Sealed::new(&by_passphrase[..]).unwrap().has_passphrase());
    let whole = (manifest(), payload());
    assert_eq!(read(&by_passphrase, known("correct horse")), Ok(whole.clone()));
    let identity = x25519::Identity::generate();
    let to_recipient = written(identity.to_public(), &manifest(), &payload());
    assert!(!Sealed::new(&to_recipient[..]).unwrap().has_passphrase());
    assert_eq!(read(&to_recipient, identity), Ok(whole));
}

#[test]
fn another_passphrase_or_identity_does_not_open_it() {
    let by_passphrase = written(passphrase("correct horse"), &manifest(), b"");
    let told = read(&by_passphrase, known("battery staple")).unwrap_err();
    assert!(told.contains("not the passphrase"), "{told}");
    let to_recipient = written(x25519::Identity::generate().to_public(), &manifest(), b"");
    let told = read(&to_recipient, x25519::Identity::generate()).unwrap_err();
    assert!(told.contains("none of these identities"), "{told}");
}

/// All over the file, and both ends.
fn places(length: usize) -> impl Iterator<Item = usize> {
    (0..length).step_by(4099).chain([1, length - 1])
}

#[test]
fn one_that_ends_early_is_told_from_a_whole_one_wherever_it_ends() {
    let identity = x25519::Identity::generate();
    let whole = written(identity.to_public(), &manifest(), &payload());
    for end in places(whole.len()) {
        assert!(read(&whole[..end], identity.clone()).is_err(), "{end}");
    }
    assert!(read(&whole, identity).is_ok());
}

#[test]
fn one_in_which_any_byte_was_changed_is_refused() {
    let identity = x25519::Identity::generate();
    let whole = written(identity.to_public(), &manifest(), &payload());
    for place in places(whole.len()) {
        let mut spoilt = whole.clone();
        spoilt[place] ^= 1;
        assert!(read(&spoilt, identity.clone()).is_err(), "{place}");
    }
    assert!(read(&whole, identity).is_ok());
}

#[test]
fn what_follows_the_end_is_not_passed_over() {
    let identity = x25519::Identity::generate();
    let recipients: [Box<dyn Recipient>; 1] = [Box::new(identity.to_public())];
    let writer = Writer::begin(Vec::new(), &recipients, &manifest()).unwrap();
    let mut below = writer.0.finish().unwrap();
    below.write_all(b"more").unwrap();
    let told = read(&below.finish().unwrap(), identity).unwrap_err();
    assert!(told.contains("something follows"), "{told}");
}

#[test]
fn what_is_no_export_is_named_as_such() {
    for other in [&b""[..], b"hello", &[0x1f, 0x8b, 8, 0], b"age-encryption.org/v1\n"] {
        let told = read(other, known("x")).unwrap_err();
        assert!(told.contains("no file that `choir export` wrote"), "{told}");
    }
    let identity = x25519::Identity::generate();
    for inside in [&b"a letter to somebody else"[..], &[b'x'; 2000]] {
        let sealed = age::encrypt(&identity.to_public(), inside).unwrap();
        let told = read(&sealed, identity.clone()).unwrap_err();
        assert!(told.contains("no file that `choir export` wrote"), "{told}");
    }
    let newer = Manifest {
        format: FORMAT + 1,
        ..manifest()
    };
    let told = read(&written(identity.to_public(), &newer, b""), identity).unwrap_err();
    assert!(told.contains("newer choir"), "{told}");
}

#[test]
fn ordinary_tools_find_the_manifest_before_the_files() {
    let mut files = tar::Builder::new(Vec::new());
    let mut header = Header::new_gnu();
    header.set_size(4);
    header.set_mode(0o644);
    files.append_data(&mut header, "home/file", &b"text"[..]).unwrap();
    let files = files.into_inner().unwrap();
    let identity = x25519::Identity::generate();
    let sealed = written(identity.to_public(), &manifest(), &files);
    let clear = age::decrypt(&identity, &sealed).unwrap();
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(&clear[..]));
    let mut found = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        found.push((entry.path().unwrap().display().to_string(), text));
    }
    let [(first, text), (second, _)] = &found[..] else {
        panic!("{found:?}")
    };
    assert_eq!((first.as_str(), second.as_str()), ("choir.json", "home/file"));
    assert_eq!(serde_json::from_str::<Manifest>(text).unwrap(), manifest());
}
