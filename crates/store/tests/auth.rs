//! What the store promises about people: one transaction for a new user, links and codes that work once, and ends that
//! take everything with them.

use choir_core::{Name, UserId};
use choir_store::{
    AuditEvent, AuditFilter, Error, Hash, InviteKind, NewInvite, NewPasskey, NewSession, NewToken, PasskeyUse,
    RecoverySession, RecoveryTry, Registration, Role, SessionKind, Store,
};
use jiff::{SignedDuration, Timestamp};

struct TestStore {
    store: Store,
    _dir: tempfile::TempDir,
}

fn open() -> TestStore {
    let dir = tempfile::tempdir().unwrap();
    TestStore {
        store: Store::open(&dir.path().join("choir.db")).unwrap(),
        _dir: dir,
    }
}

fn now() -> Timestamp {
    "2026-01-02T03:04:05Z".parse().unwrap()
}

fn hash(text: &str) -> Hash {
    let mut hash = [0; 32];
    hash[..text.len()].copy_from_slice(text.as_bytes());
    hash
}

fn user_id(name: &str) -> UserId {
    let mut bytes = [0; 16];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    UserId::from_random(bytes)
}

fn event(user: &UserId) -> AuditEvent {
    AuditEvent {
        at: now(),
        actor: user.to_string(),
        user: Some(user.clone()),
        action: "test",
        subject: "x".into(),
        outcome: "ok",
    }
}

fn session(user: &UserId, name: &str) -> NewSession {
    NewSession {
        hash: hash(name),
        id: name.into(),
        user: user.clone(),
        kind: SessionKind::Full,
        user_agent: String::new(),
        created_at: now(),
        expires_at: now() + SignedDuration::from_hours(24),
        verified_at: Some(now()),
    }
}

fn link(name: &str, kind: InviteKind) -> NewInvite {
    NewInvite {
        hash: hash(name),
        id: name.into(),
        kind,
        role: if kind == InviteKind::Claim {
            Role::Admin
        } else {
            Role::Member
        },
        for_user: None,
        created_by: None,
        created_at: now(),
        expires_at: now() + SignedDuration::from_mins(30),
    }
}

fn registration(name: &str, invite: Option<&str>) -> Registration {
    let id = user_id(name);
    Registration {
        at: now(),
        name: name.parse().unwrap(),
        display_name: name.into(),
        invite: invite.map(hash),
        passkey: NewPasskey {
            id: format!("key-{name}"),
            name: "Passkey".into(),
            credential: "{}".into(),
        },
        recovery_codes: vec![hash("code-1"), hash("code-2")],
        session: session(&id, &format!("first-{name}")),
        id,
    }
}

impl TestStore {
    async fn ada(&self) -> UserId {
        assert!(
            self.store
                .replace_claim(link("claim", InviteKind::Claim), event(&user_id("root")))
                .await
                .unwrap()
        );
        self.store
            .register(registration("ada", Some("claim")))
            .await
            .unwrap()
            .id
    }

    async fn recover(&self, name: &str, code: &str, at: Timestamp) -> bool {
        let session = RecoverySession {
            hash: hash(&format!("{name}{code}{}", at.as_second())),
            id: format!("{name}{code}{}", at.as_second()),
            user_agent: String::new(),
            expires_at: at + SignedDuration::from_mins(10),
        };
        let by = RecoveryTry::Code {
            name: name.into(),
            hash: hash(code),
        };
        self.store.recover(by, session, at).await.unwrap().is_some()
    }
}

#[tokio::test]
async fn a_user_comes_with_passkey_codes_session_and_event_or_not_at_all() {
    let test = open();
    let ada = test.ada().await;
    assert_eq!(test.store.passkeys(ada.clone()).await.unwrap().len(), 1);
    assert_eq!(test.store.recovery_codes_left(ada.clone()).await.unwrap(), 2);
    assert!(test.store.session(hash("first-ada")).await.unwrap().is_some());

    let id = user_id("bob");
    test.store
        .add_invite(link("invite", InviteKind::Invite), event(&ada))
        .await
        .unwrap();
    let mut clash = registration("bob", Some("invite"));
    clash.passkey.id = "key-ada".into();
    assert!(matches!(test.store.register(clash).await, Err(Error::Exists)));
    assert!(test.store.user_by_id(id.clone()).await.unwrap().is_none());
    assert!(test.store.session(hash("first-bob")).await.unwrap().is_none());
    assert!(
        test.store.usable_invite(hash("invite"), now()).await.unwrap().is_some(),
        "the invite is not used up"
    );
    let events = test
        .store
        .audit_rows(AuditFilter {
            user: Some(id),
            limit: 10,
            ..AuditFilter::default()
        })
        .await
        .unwrap();
    assert!(events.is_empty());
    test.store.register(registration("bob", Some("invite"))).await.unwrap();
}

#[tokio::test]
async fn of_many_registrations_with_one_claim_one_wins() {
    let test = open();
    test.store
        .replace_claim(link("claim", InviteKind::Claim), event(&user_id("root")))
        .await
        .unwrap();
    let mut all = tokio::task::JoinSet::new();
    for number in 0..50 {
        let store = test.store.clone();
        all.spawn(async move {
            store
                .register(registration(&format!("user{number}"), Some("claim")))
                .await
                .is_ok()
        });
    }
    assert_eq!(all.join_all().await.into_iter().filter(|won| *won).count(), 1);
    assert_eq!(test.store.users().await.unwrap().len(), 1);
    assert!(
        !test
            .store
            .replace_claim(link("again", InviteKind::Claim), event(&user_id("root")))
            .await
            .unwrap()
    );
}

#[tokio::test]
async fn every_user_has_an_id_range_of_their_own() {
    let test = open();
    let ada = test.ada().await;
    for name in ["bob", "carol"] {
        test.store
            .add_invite(link(name, InviteKind::Invite), event(&ada))
            .await
            .unwrap();
        test.store.register(registration(name, Some(name))).await.unwrap();
    }
    let mut ranges: Vec<_> = test
        .store
        .users()
        .await
        .unwrap()
        .into_iter()
        .map(|user| user.id_range.base)
        .collect();
    ranges.sort();
    ranges.dedup();
    assert_eq!(ranges.len(), 3);
}

#[tokio::test]
async fn the_first_user_needs_a_claim_and_the_second_cannot_use_one() {
    let test = open();
    for invite in [None, Some("absent")] {
        assert!(matches!(
            test.store.register(registration("eve", invite)).await,
            Err(Error::NotFound)
        ));
    }
    test.ada().await;
    assert!(matches!(
        test.store.register(registration("eve", Some("claim"))).await,
        Err(Error::NotFound)
    ));
    test.store.register(registration("bob", None)).await.unwrap();
}

#[tokio::test]
async fn ten_tries_an_hour_are_evaluated_for_any_name() {
    let test = open();
    test.ada().await;
    for _ in 0..10 {
        assert!(!test.recover("ada", "wrong", now()).await);
        assert!(!test.recover("nobody", "wrong", now()).await);
    }
    assert!(
        !test.recover("ada", "code-1", now()).await,
        "the eleventh is not evaluated, not even a right one"
    );
    let later = now() + SignedDuration::from_hours(1);
    assert!(test.recover("ada", "code-1", later).await);
    assert!(
        !test
            .recover("ada", "code-1", later + SignedDuration::from_secs(1))
            .await,
        "once"
    );
}

#[tokio::test]
async fn after_recovery_nothing_of_before_is_alive() {
    let test = open();
    let ada = test.ada().await;
    let token = NewToken {
        hash: hash("token"),
        id: "token".into(),
        user: ada.clone(),
        name: "ci".into(),
        scopes: vec!["read".into()],
        created_at: now(),
        expires_at: now() + SignedDuration::from_hours(1),
    };
    test.store.add_token(token, event(&ada)).await.unwrap();
    test.store
        .add_host_session(hash("host"), "first-ada".into(), "h".into(), now())
        .await
        .unwrap();
    let passkey = NewPasskey {
        id: "key-2".into(),
        name: "New".into(),
        credential: "{}".into(),
    };
    test.store
        .finish_recovery(ada.clone(), passkey, session(&ada, "after"), now())
        .await
        .unwrap();
    assert!(test.store.session(hash("first-ada")).await.unwrap().is_none());
    assert!(
        test.store
            .host_session(hash("host"), "h".into())
            .await
            .unwrap()
            .is_none()
    );
    assert!(test.store.token(hash("token"), now()).await.unwrap().is_none());
    assert!(test.store.session(hash("after")).await.unwrap().is_some());
}

#[tokio::test]
async fn a_host_cookie_follows_its_session_through_a_step_up_to_its_end() {
    let test = open();
    let ada = test.ada().await;
    test.store
        .add_host_session(hash("host"), "first-ada".into(), "h".into(), now())
        .await
        .unwrap();
    let used = PasskeyUse {
        id: "key-ada".into(),
        before: "{}".into(),
        after: "{}".into(),
    };
    test.store
        .step_up(used, hash("first-ada"), hash("rotated"), event(&ada))
        .await
        .unwrap();
    assert!(test.store.session(hash("first-ada")).await.unwrap().is_none());
    assert!(
        test.store
            .host_session(hash("host"), "h".into())
            .await
            .unwrap()
            .is_some()
    );
    assert!(
        test.store
            .host_session(hash("host"), "other".into())
            .await
            .unwrap()
            .is_none()
    );
    test.store
        .end_session(ada.clone(), "first-ada".into(), event(&ada))
        .await
        .unwrap();
    assert!(
        test.store
            .host_session(hash("host"), "h".into())
            .await
            .unwrap()
            .is_none()
    );
    let late = test
        .store
        .add_host_session(hash("late"), "first-ada".into(), "h".into(), now())
        .await;
    assert!(matches!(late, Err(Error::NotFound)));
}

#[tokio::test]
async fn an_assertion_that_was_overtaken_is_not_written() {
    let test = open();
    let ada = test.ada().await;
    let used = |after: &str| PasskeyUse {
        id: "key-ada".into(),
        before: "{}".into(),
        after: after.into(),
    };
    test.store
        .login(used("{\"counter\":6}"), session(&ada, "one"), None, event(&ada))
        .await
        .unwrap();
    let second = test
        .store
        .login(used("{\"counter\":5}"), session(&ada, "two"), None, event(&ada))
        .await;
    assert!(matches!(second, Err(Error::Conflict(_))));
    assert!(test.store.session(hash("two")).await.unwrap().is_none());
}

#[tokio::test]
async fn the_sweep_deletes_what_is_over_and_nothing_else() {
    let test = open();
    let ada = test.ada().await;
    test.store
        .add_invite(link("invite", InviteKind::Invite), event(&ada))
        .await
        .unwrap();
    let before = now() - SignedDuration::from_hours(1);
    test.store.sweep_auth(now(), before).await.unwrap();
    assert!(test.store.session(hash("first-ada")).await.unwrap().is_some());
    assert_eq!(test.store.invites().await.unwrap().len(), 1);
    test.store
        .sweep_auth(now() + SignedDuration::from_hours(24), before)
        .await
        .unwrap();
    assert!(test.store.session(hash("first-ada")).await.unwrap().is_none());
    assert!(test.store.invites().await.unwrap().is_empty());
}

#[tokio::test]
async fn the_last_passkey_stays_and_another_users_is_not_there() {
    let test = open();
    let ada = test.ada().await;
    let bob = test.store.register(registration("bob", None)).await.unwrap().id;
    let last = test
        .store
        .delete_passkey(ada.clone(), "key-ada".into(), event(&ada))
        .await;
    assert!(matches!(last, Err(Error::Conflict(_))));
    let theirs = test
        .store
        .delete_passkey(bob.clone(), "key-ada".into(), event(&bob))
        .await;
    assert!(matches!(theirs, Err(Error::NotFound)));
    assert!(test.store.passkey("key-ada".into()).await.unwrap().is_some());
    let name: Name = "ada".parse().unwrap();
    assert_eq!(test.store.user_by_name(name).await.unwrap().unwrap().id, ada);
}
