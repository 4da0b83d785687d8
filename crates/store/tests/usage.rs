//! What is counted of the model providers: before a request is sent, never beyond a cap, and still after a crash.

use choir_core::{SandboxId, Slot, UserId};
use choir_store::{AuditEvent, AuditFilter, Caps, Counted, Error, KeyOwner, Spent, Store, Tokens, UsePlace};
use jiff::Timestamp;

struct Account {
    dir: tempfile::TempDir,
    store: Store,
    user: UserId,
}

impl Account {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let user = UserId::from_random([1; 16]);
        let path = dir.path().join("choir.db");
        let store = Store::open(&path).unwrap();
        rusqlite::Connection::open(&path)
            .unwrap()
            .execute(
                "INSERT INTO users (id, name, display_name, role, id_range, created_at) VALUES (?1, 'ada', '', 'member', 1, 0)",
                [user.as_str()],
            )
            .unwrap();
        Self { dir, store, user }
    }

    fn place(&self, sandbox: u8, day: &str) -> UsePlace {
        UsePlace {
            day: day.parse().unwrap(),
            user: self.user.clone(),
            workspace: "main".parse().unwrap(),
            slot: Slot::Dev,
            sandbox: SandboxId::from_random([sandbox; 16]),
            provider: "openai".parse().unwrap(),
            key: KeyOwner::Platform,
        }
    }

    fn event(&self) -> AuditEvent {
        AuditEvent {
            at: Timestamp::UNIX_EPOCH,
            actor: "sandbox".into(),
            user: Some(self.user.clone()),
            action: "provider.use",
            subject: "main/dev openai".into(),
            outcome: "ok",
        }
    }

    async fn begin(&self, sandbox: u8, day: &str, caps: Caps) -> Counted {
        let counted = self.store.begin_use(self.place(sandbox, day), caps, self.event()).await;
        counted.unwrap()
    }

    async fn outcomes(&self) -> Vec<String> {
        let filter = AuditFilter {
            limit: 500,
            ..AuditFilter::default()
        };
        let rows = self.store.audit_rows(filter).await.unwrap();
        rows.into_iter().map(|row| row.outcome).collect()
    }
}

const DAY: &str = "2026-01-02";

fn requests(most: u64) -> Caps {
    Caps {
        requests: Some(most),
        ..Caps::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_at_once_as_many_are_counted_as_the_cap_allows_and_each_has_its_row() {
    let account = std::sync::Arc::new(Account::new());
    let all: Vec<_> = (0..200)
        .map(|n| {
            let account = account.clone();
            tokio::spawn(async move { account.begin(n % 3, DAY, requests(70)).await })
        })
        .collect();
    let mut gone = 0;
    for one in all {
        match one.await.unwrap() {
            Counted::Go(_) => gone += 1,
            Counted::Capped(spent) => assert_eq!((spent.cap, spent.used, spent.tokens), (70, 70, false)),
        }
    }
    assert_eq!(gone, 70);
    let outcomes = account.outcomes().await;
    let of = |wanted: &str| outcomes.iter().filter(|it| *it == wanted).count();
    assert_eq!((of("intent"), of("capped")), (70, 130));
    // The control: without a cap the next one goes, too.
    assert!(matches!(account.begin(0, DAY, Caps::default()).await, Counted::Go(_)));
}

#[tokio::test]
async fn what_was_counted_is_there_after_the_process_ended_before_an_answer_came() {
    let mut account = Account::new();
    assert!(matches!(account.begin(1, DAY, requests(1)).await, Counted::Go(_)));
    account.store = Store::open(&account.dir.path().join("choir.db")).unwrap();
    let capped = account.begin(1, DAY, requests(1)).await;
    let spent = Spent {
        sandbox: false,
        tokens: false,
        cap: 1,
        used: 1,
    };
    assert_eq!(capped, Counted::Capped(spent));
    assert!(matches!(
        account.begin(1, "2026-01-03", requests(1)).await,
        Counted::Go(_)
    ));
}

#[tokio::test]
async fn nothing_is_counted_where_the_intent_cannot_be_recorded() {
    let account = Account::new();
    let path = account.dir.path().join("choir.db");
    rusqlite::Connection::open(path)
        .unwrap()
        .execute_batch("CREATE TRIGGER broken BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'broken'); END")
        .unwrap();
    let refused = account
        .store
        .begin_use(account.place(1, DAY), requests(9), account.event())
        .await;
    assert!(refused.is_err() && account.store.audit_is_failing());
    let used = account.store.provider_use(None, DAY.parse().unwrap()).await.unwrap();
    assert_eq!(used, []);
}

#[tokio::test]
async fn tokens_are_added_where_their_request_was_counted_and_nowhere_else() {
    let account = Account::new();
    let tokens = Tokens {
        input: 5,
        cached: 2,
        output: 3,
    };
    let early = account.store.add_tokens(account.place(1, DAY), tokens).await;
    assert!(matches!(early, Err(Error::NotFound)));
    for sandbox in [1, 2] {
        account.begin(sandbox, DAY, Caps::default()).await;
        account
            .store
            .add_tokens(account.place(sandbox, DAY), tokens)
            .await
            .unwrap();
    }
    let used = account
        .store
        .provider_use(Some(account.user.clone()), DAY.parse().unwrap())
        .await
        .unwrap();
    let sum = Tokens {
        input: 10,
        cached: 4,
        output: 6,
    };
    assert_eq!((used.len(), used[0].requests, used[0].tokens), (1, 2, sum));
    let caps = Caps {
        sandbox_tokens: Some(8),
        tokens: Some(17),
        ..Caps::default()
    };
    let Counted::Capped(spent) = account.begin(2, DAY, caps).await else {
        panic!("the sandbox has used its tokens")
    };
    assert_eq!((spent.sandbox, spent.tokens, spent.used), (true, true, 8));
    assert!(matches!(account.begin(3, DAY, caps).await, Counted::Go(_)));
}
