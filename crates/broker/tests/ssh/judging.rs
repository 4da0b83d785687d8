//! What a granted key signs and what it does not; each attack beside the honest request that it is made from.

use choir_broker::ssh::{Denial, Session, Sign};
use choir_core::SshUse;
use proptest::prelude::*;
use ssh_key::encoding::Encode as _;

use super::rig::{Key, sign_in, to_sign_for};

/// A key granted at one host, and another host.
struct Scene {
    key: Key,
    host: Key,
    other: Key,
    granted: SshUse,
}

impl Scene {
    fn new() -> Self {
        let [key, host, other] = [(); 3].map(|()| Key::new(&["ed25519"]));
        let granted = key.granted_at(&[&host]);
        Self {
            key,
            host,
            other,
            granted,
        }
    }

    /// A connection that the host has bound to the session `id`.
    fn bound(&self) -> Session {
        let mut session = Session::default();
        let bound = session.bind(&self.host.binds(b"id"), [&self.granted].into_iter());
        bound.unwrap();
        session
    }

    fn outcome(&self, session: &Session, sign: &Sign) -> &'static str {
        session
            .judge(sign, &self.granted)
            .map_or_else(|denial| denial.outcome(), |_| "ok")
    }

    /// A sign-in with one part of it changed.
    fn odd(&self, session: &[u8], parts: &[&[u8]; 3], scheme: &str, key: &[u8]) -> Sign {
        self.key.asks(&sign_in(session, parts, scheme, key), 0)
    }
}

#[test]
fn a_sign_in_is_signed_only_for_the_session_that_a_granted_host_has_signed() {
    let scene = Scene::new();
    let asked = scene.key.signs_in(b"id", "git");
    let honest = scene.bound();
    let signing = honest.judge(&asked, &scene.granted).unwrap();
    assert!(signing.what().starts_with("sign-in git SHA256:"), "{}", signing.what());

    assert_eq!(scene.outcome(&Session::default(), &asked), "unbound");
    assert_eq!(scene.outcome(&honest, &scene.key.signs_in(b"other", "git")), "unbound");
    assert_eq!(scene.outcome(&honest, &scene.key.signs_in(b"id", "root")), "users");
    assert_eq!(scene.outcome(&honest, &scene.key.signs_in(b"id", "")), "users");
}

#[test]
fn a_session_is_bound_only_by_the_signature_of_a_granted_host_and_one_failure_spoils_the_connection() {
    let scene = Scene::new();
    let asked = scene.key.signs_in(b"id", "git");
    let mut forwarded = scene.host.binds(b"id");
    forwarded.forwarding = true;
    let mut replayed = scene.host.binds(b"another id");
    replayed.session = b"id".to_vec();
    let mut borrowed = scene.other.binds(b"id");
    borrowed.host_key = scene.host.blob();
    let mut torn = scene.host.binds(b"id");
    torn.signature.push(0);
    let mut no_key = scene.host.binds(b"id");
    no_key.host_key = b"nothing".to_vec();
    let empty = scene.host.binds(b"");
    let long = scene.host.binds(&[7; 129]);
    for (bind, outcome) in [
        (forwarded, "forwarded"),
        (replayed, "unproven"),
        (borrowed, "unproven"),
        (torn, "unproven"),
        (empty, "unproven"),
        (long, "unproven"),
        (no_key, "host_keys"),
        (scene.other.binds(b"id"), "host_keys"),
    ] {
        let mut session = Session::default();
        let denial = session.bind(&bind, [&scene.granted].into_iter()).unwrap_err();
        assert_eq!(denial.outcome(), outcome, "{bind:?}");
        // Whoever speaks on it now may be somewhere else: the honest messages come too late.
        let late = session.bind(&scene.host.binds(b"id"), [&scene.granted].into_iter());
        assert_eq!(late, Err(Denial::Spoilt));
        assert_eq!(scene.outcome(&session, &asked), "spoilt");
        assert!(!session.offers(&scene.granted));
    }
    // The control: without the failure before it.
    assert_eq!(scene.outcome(&scene.bound(), &asked), "ok");
}

#[test]
fn one_connection_is_bound_to_few_sessions_and_to_each_once() {
    let scene = Scene::new();
    let mut session = Session::default();
    for n in 0..16_u8 {
        session
            .bind(&scene.host.binds(&[n]), [&scene.granted].into_iter())
            .unwrap();
    }
    assert_eq!(scene.outcome(&session, &scene.key.signs_in(&[15], "git")), "ok");
    let more = session.bind(&scene.host.binds(&[16]), [&scene.granted].into_iter());
    assert_eq!(more, Err(Denial::Proof));
    let mut session = scene.bound();
    let again = session.bind(&scene.host.binds(b"id"), [&scene.granted].into_iter());
    assert_eq!(again, Err(Denial::Proof));
}

#[test]
fn a_key_signs_in_only_at_its_own_grants_hosts() {
    let scene = Scene::new();
    let second = Key::new(&["ed25519"]);
    let elsewhere = second.granted_at(&[&scene.other]);
    let mut session = Session::default();
    let both = [&scene.granted, &elsewhere];
    session.bind(&scene.other.binds(b"id"), both.into_iter()).unwrap();
    assert_eq!(
        session.judge(&scene.key.signs_in(b"id", "git"), &scene.granted),
        Err(Denial::OtherHost)
    );
    assert!(!session.offers(&scene.granted) && session.offers(&elsewhere));
    // The control.
    assert!(session.judge(&second.signs_in(b"id", "git"), &elsewhere).is_ok());
}

#[test]
fn what_is_not_a_sign_in_with_that_very_key_is_not_signed() {
    let scene = Scene::new();
    let session = scene.bound();
    let (own, scheme) = (scene.key.blob(), "ssh-ed25519");
    let plain: [&[u8]; 3] = [b"git", b"ssh-connection", b"publickey"];
    assert_eq!(scene.outcome(&session, &scene.odd(b"id", &plain, scheme, &own)), "ok");

    let other_key = scene.odd(b"id", &plain, scheme, &scene.other.blob());
    let other_scheme = scene.odd(b"id", &plain, "rsa-sha2-512", &own);
    let other_service = scene.odd(b"id", &[b"git", b"ssh-userauth", b"publickey"], scheme, &own);
    let other_method = scene.odd(b"id", &[b"git", b"ssh-connection", b"hostbased"], scheme, &own);
    let mut longer = sign_in(b"id", &plain, scheme, &own);
    longer.push(0);
    let mut unsigned = sign_in(b"id", &plain, scheme, &own);
    let flag = unsigned.len() - own.len() - scheme.len() - 4 - 4 - 1;
    unsigned[flag] = 0;
    for asked in [
        other_key,
        other_scheme,
        other_service,
        other_method,
        scene.key.asks(&longer, 0),
        scene.key.asks(&unsigned, 0),
        scene.key.asks(b"", 0),
        scene.key.asks(b"any data that somebody would like to have signed", 0),
        scene.key.asks(b"SSHSIG", 0),
    ] {
        assert_eq!(scene.outcome(&session, &asked), "form");
    }
}

#[test]
fn a_sign_in_that_names_its_host_must_name_the_one_that_bound_the_session() {
    let scene = Scene::new();
    let session = scene.bound();
    let named = |host: &[u8]| {
        let parts: [&[u8]; 3] = [b"git", b"ssh-connection", b"publickey-hostbound-v00@openssh.com"];
        let mut data = sign_in(b"id", &parts, "ssh-ed25519", &scene.key.blob());
        host.encode(&mut data).unwrap();
        scene.key.asks(&data, 0)
    };
    assert_eq!(scene.outcome(&session, &named(&scene.host.blob())), "ok");
    assert_eq!(scene.outcome(&session, &named(&scene.other.blob())), "host_keys");
    assert_eq!(scene.outcome(&session, &named(b"")), "host_keys");
}

#[test]
fn signatures_over_data_are_made_in_the_granted_namespaces_only() {
    let mut scene = Scene::new();
    let unbound = Session::default();
    let git = scene.key.asks(&to_sign_for("git"), 0);
    assert_eq!(scene.outcome(&unbound, &git), "namespaces");
    scene.granted.namespaces = vec!["git".to_owned()];
    assert_eq!(scene.outcome(&unbound, &git), "ok");
    for other in ["file", "", "git ", "Git", "git\0"] {
        let asked = scene.key.asks(&to_sign_for(other), 0);
        assert_eq!(scene.outcome(&unbound, &asked), "namespaces", "{other:?}");
    }
    let mut longer = to_sign_for("git");
    longer.push(0);
    assert_eq!(scene.outcome(&unbound, &scene.key.asks(&longer, 0)), "form");
    let mut reserved = b"SSHSIG".to_vec();
    for part in [&b"git"[..], b"x", b"sha512", &[7; 64]] {
        part.encode(&mut reserved).unwrap();
    }
    assert_eq!(scene.outcome(&unbound, &scene.key.asks(&reserved, 0)), "form");
    // A grant of this alone signs in nowhere.
    scene.granted.host_keys.clear();
    let mut session = Session::default();
    assert!(
        session
            .bind(&scene.host.binds(b"id"), [&scene.granted].into_iter())
            .is_err()
    );
}

#[test]
fn only_what_a_grant_could_allow_is_put_before_its_owner() {
    let wanted = |denial: Denial| denial.wanted();
    let host = Some("SHA256:x".to_owned());
    assert_eq!(
        wanted(Denial::Host { host }).as_deref(),
        Some("sign in at the host with the key SHA256:x")
    );
    assert_eq!(
        wanted(Denial::User { user: "root".into() }).as_deref(),
        Some("sign in as root")
    );
    for never in [
        Denial::User {
            user: "\u{1b}[2J".into(),
        },
        Denial::Namespace {
            namespace: "a b".into(),
        },
        Denial::Unbound,
        Denial::Forwarded,
        Denial::Form,
    ] {
        assert_eq!(wanted(never), None);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_data_makes_the_judgement_panic_or_is_signed(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 0_usize..200) {
        thread_local!(static SCENE: Scene = Scene::new());
        SCENE.with(|scene| {
            let session = scene.bound();
            // Noise, and an honest wish with noise at its end or in its midst.
            let mut honest = scene.key.signs_in(b"id", "git").data;
            honest.truncate(cut);
            let odd = [honest, bytes.clone()].concat();
            for data in [bytes, odd] {
                let outcome = scene.outcome(&session, &scene.key.asks(&data, 0));
                assert!(outcome != "ok" || data == scene.key.signs_in(b"id", "git").data);
            }
            let mut hostile = scene.host.binds(b"id");
            hostile.signature.truncate(cut);
            let whole = hostile.signature.len() == scene.host.binds(b"id").signature.len();
            assert_eq!(Session::default().bind(&hostile, [&scene.granted].into_iter()).is_ok(), whole);
        });
    }
}
