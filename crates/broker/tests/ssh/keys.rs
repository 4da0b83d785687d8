//! Which secrets are taken as keys, and that what they sign verifies.

use std::process::{Command, Stdio};

use choir_broker::SecretValue;
use choir_broker::ssh::{self, KeyError, Session};
use choir_core::SshUse;
use signature::Verifier as _;
use ssh_key::encoding::{Decode as _, Encode as _};
use ssh_key::{LineEnding, Signature, SshSig};

use super::rig::{Key, to_sign_for};

const KINDS: [&[&str]; 5] = [
    &["ed25519"],
    &["ecdsa", "-b", "256"],
    &["ecdsa", "-b", "384"],
    &["ecdsa", "-b", "521"],
    &["rsa", "-b", "2048"],
];

#[test]
fn each_kind_signs_in_and_the_signature_verifies_with_the_public_half() {
    let host = Key::new(&["ed25519"]);
    for kind in KINDS {
        let key = Key::new(kind);
        let granted = key.granted_at(&[&host]);
        assert_eq!(granted.public_key, key.line(), "{kind:?}");
        let mut session = Session::default();
        session.bind(&host.binds(b"session"), [&granted].into_iter()).unwrap();
        let asked = key.signs_in(b"session", "git");
        let signing = session.judge(&asked, &granted).unwrap();
        let signed = ssh::sign(&key.secret(), &granted, &signing).unwrap();
        let signature = Signature::decode(&mut signed.as_slice()).unwrap();
        key.public.key_data().verify(&asked.data, &signature).unwrap();
        // The control: over other data it does not.
        assert!(key.public.key_data().verify(b"other", &signature).is_err());
    }
}

#[test]
fn hosts_of_each_kind_bind_a_session() {
    let key = Key::new(&["ed25519"]);
    for kind in KINDS {
        let host = Key::new(kind);
        let granted = key.granted_at(&[&host]);
        let mut session = Session::default();
        assert_eq!(
            session.bind(&host.binds(b"id"), [&granted].into_iter()),
            Ok(()),
            "{kind:?}"
        );
    }
}

#[test]
fn rsa_signs_with_the_hash_that_was_asked_for_and_never_with_sha1() {
    let key = Key::new(&["rsa", "-b", "2048"]);
    let granted = SshUse {
        namespaces: vec!["git".into()],
        ..key.granted_at(&[])
    };
    for (flags, name) in [(2, "rsa-sha2-256"), (4, "rsa-sha2-512"), (6, "rsa-sha2-512")] {
        let asked = key.asks(&to_sign_for("git"), flags);
        let signing = Session::default().judge(&asked, &granted).unwrap();
        let signed = ssh::sign(&key.secret(), &granted, &signing).unwrap();
        let signature = Signature::decode(&mut signed.as_slice()).unwrap();
        assert_eq!(signature.algorithm().as_str(), name);
        key.public.key_data().verify(&asked.data, &signature).unwrap();
    }
    for flags in [0, 1, 8] {
        let asked = key.asks(&to_sign_for("git"), flags);
        assert_eq!(
            Session::default().judge(&asked, &granted).unwrap_err().outcome(),
            "sha1",
            "{flags}"
        );
    }
}

#[test]
fn openssh_verifies_a_signature_over_a_file() {
    for kind in KINDS {
        let key = Key::new(kind);
        let granted = SshUse {
            namespaces: vec!["git".into()],
            ..key.granted_at(&[])
        };
        let message = b"a commit\n";
        let data = SshSig::signed_data("git", ssh_key::HashAlg::Sha512, message).unwrap();
        let asked = key.asks(&data, 4);
        let signing = Session::default().judge(&asked, &granted).unwrap();
        let signed = ssh::sign(&key.secret(), &granted, &signing).unwrap();
        let signature = Signature::decode(&mut signed.as_slice()).unwrap();
        let whole = SshSig::new(
            key.public.key_data().clone(),
            "git",
            ssh_key::HashAlg::Sha512,
            signature,
        );
        let text = whole.unwrap().to_pem(LineEnding::LF).unwrap();
        std::fs::write(key.path("signature"), text).unwrap();
        std::fs::write(key.path("allowed"), format!("ada {}\n", key.line())).unwrap();
        let verifies = |message: &[u8]| {
            let mut keygen = Command::new("ssh-keygen")
                .args(["-Y", "verify", "-n", "git", "-I", "ada", "-f"])
                .arg(key.path("allowed"))
                .arg("-s")
                .arg(key.path("signature"))
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            std::io::Write::write_all(&mut keygen.stdin.take().unwrap(), message).unwrap();
            keygen.wait().unwrap().success()
        };
        assert!(verifies(message), "{kind:?}");
        // The control: of another file it is not the signature.
        assert!(!verifies(b"another\n"));
    }
}

#[test]
fn what_is_no_key_or_has_a_passphrase_is_refused_with_a_sentence_that_says_what_to_do() {
    let locked = Key::with_passphrase(&["ed25519"], "a passphrase");
    assert_eq!(ssh::public_key(&locked.secret()), Err(KeyError::Encrypted));
    assert!(KeyError::Encrypted.to_string().contains("ssh-keygen -p"));
    let key = Key::new(&["ed25519"]);
    let public = key.line().into_bytes();
    let text = key.secret().expose().to_vec();
    let half = text[..text.len() / 2].to_vec();
    for bad in [public, half, b"hunter2".to_vec(), vec![0; 40], Vec::new()] {
        assert_eq!(ssh::public_key(&SecretValue::new(bad)), Err(KeyError::NotAKey));
    }
    // The controls: as it is, without its last line's end, and with those of another system, it is taken.
    let ends = String::from_utf8(text.clone()).unwrap().replace('\n', "\r\n");
    for good in [text.clone(), text.trim_ascii_end().to_vec(), ends.into_bytes()] {
        assert_eq!(ssh::public_key(&SecretValue::new(good)), Ok(key.line()));
    }
}

#[test]
fn a_secret_that_became_another_key_does_not_sign_for_the_old_ones_grant() {
    let (old, new) = (Key::new(&["ed25519"]), Key::new(&["ed25519"]));
    let granted = SshUse {
        namespaces: vec!["git".into()],
        ..old.granted_at(&[])
    };
    let asked = old.asks(&to_sign_for("git"), 0);
    let signing = Session::default().judge(&asked, &granted).unwrap();
    assert_eq!(ssh::sign(&new.secret(), &granted, &signing), Err(KeyError::Changed));
    assert!(ssh::sign(&old.secret(), &granted, &signing).is_ok());
}

#[test]
fn the_listing_has_each_key_and_its_name() {
    let key = Key::new(&["ed25519"]);
    let answer = ssh::identities(&[(key.blob(), "deploy".to_owned())]);
    let mut expected = vec![12, 0, 0, 0, 1];
    key.blob().encode(&mut expected).unwrap();
    "deploy".encode(&mut expected).unwrap();
    assert_eq!(answer, expected);
}
