//! Unmodified clients in a real sandbox use a secret that they never hold: `curl` by each of the three ways to inject, and
//! `git`, `pip`, `npm` and `cargo` over TLS, against servers that ask for credentials and write down what they get (D26).
//! Then the day goes on: a secret is replaced under load, the hypervisor is killed, secrets are deleted, the box is lost
//! and comes back from a backup, and `choir prove` finds none of them anywhere (D02).

use std::path::Path;
use std::sync::{Arc, Mutex};

use age::secrecy::ExposeSecret as _;
use age::x25519::Identity;
use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use choir_api::client::Client;
use choir_api::grants::CreateGrant;
use choir_api::sandbox::{Command as Line, CreateTask};
use choir_api::secrets::{PutSecret, SecretText};
use choir_core::{Slot, WorkspaceSettings};
use choir_e2e::git;
use choir_e2e::instance::Instance;
use choir_e2e::person::{self, exec, run, workspace};
use choir_e2e::skip;
use choir_e2e::upstream::{Answer, Seen, Upstream, whole};
use choir_e2e::waiting::{step, until};
use data_encoding::BASE64;
use http::{HeaderValue, StatusCode};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

const API: &str = "api.acme.example";
const GIT: &str = "git.acme.example";
const PYPI: &str = "pypi.acme.example";
const NPM: &str = "npm.acme.example";
const CARGO: &str = "cargo.acme.example";

/// One secret a server, all of the same shape.
fn canary(host: &str) -> String {
    format!("canary-{}-3f9b61d07ac2e845", host.split('.').next().unwrap_or_default())
}

/// What a server that asks for this scheme must be sent.
fn credential(host: &str) -> String {
    let basic = |user: &str| format!("Basic {}", BASE64.encode(format!("{user}:{}", canary(host)).as_bytes()));
    match host {
        GIT => basic("x-access-token"),
        PYPI => basic("__token__"),
        _ => format!("Bearer {}", canary(host)),
    }
}

/// What the package servers give out: made in the sandbox, with its own tools, before anybody may use a secret.
#[derive(Clone, Default)]
struct Wares(Arc<Mutex<Packages>>);

#[derive(Clone, Default)]
struct Packages {
    wheel: Bytes,
    tarball: Bytes,
    crated: Bytes,
    crate_sum: String,
}

#[tokio::test]
async fn unmodified_clients_in_a_sandbox_use_secrets_that_they_never_hold() -> Result<()> {
    if skip::cannot_run("clients") {
        return Ok(());
    }
    let repositories = tempfile::tempdir()?;
    git::make_repositories(repositories.path(), "https://git.acme.example").await?;
    let wares = Wares::default();
    let (root, sold) = (repositories.path().to_owned(), wares.clone());
    let upstream = Upstream::start(&[API, GIT, PYPI, NPM, CARGO], move |seen: Seen| {
        let (root, sold) = (root.clone(), sold.clone());
        async move { serve(&seen, &root, &sold).await }
    })
    .await?;
    let mut instance = Instance::up_beside(&[&upstream], &[upstream.network()])?;
    let (client, _) = person::sign_in_with_token(&instance).await?;
    client.create_workspace(&workspace()).await?;
    step("start dev", person::start(&client, Slot::Dev)).await?;
    step("make packages", make(&client, &wares)).await?;

    step("without a grant nobody is let in", refused(&client)).await?;
    upstream.forget();
    grants(&client).await?;
    step("curl, by three ways", curl(&client, &upstream)).await?;
    let on = WorkspaceSettings {
        intercept_tls: Some(true),
        ..WorkspaceSettings::default()
    };
    client.patch_workspace(&workspace(), &on).await?;
    step("curl over TLS", curl_over_tls(&client, &upstream)).await?;
    step(
        "git clone and push",
        clone_and_push(&client, &upstream, repositories.path()),
    )
    .await?;
    for (name, host, line) in INSTALLS {
        upstream.forget();
        step(name, run(&client, Slot::Dev, line)).await?;
        let seen: Vec<_> = upstream.seen().into_iter().filter(|seen| seen.host == host).collect();
        ensure!(!seen.is_empty(), "{name} asked nobody");
        let wanted = credential(host);
        let all = seen
            .iter()
            .all(|seen| seen.header("authorization") == [wanted.as_str()]);
        ensure!(all, "{name} sent something else: {seen:?}");
    }
    step("replace under load, kill, delete", day(&client, &instance, &upstream)).await?;
    let back = restore(&mut instance, &client, upstream.network());
    let (client, token) = step("lose the box, and restore it", back).await?;
    let clean = step("prove that nothing is anywhere", prove(&instance, &token, None, 0)).await?;
    ensure!(clean.contains("CLEAN") && !leaks(&instance), "it says otherwise");
    step("look for the secrets inside", nothing_inside(&client)).await?;
    // The controls: that looked, and left a leak behind; and a build that leaks takes the hypervisor's place.
    instance.replace_hypervisor("faulty-choir-hypervisor")?;
    until("a call by the build that leaks", async || {
        let called = exec(&client, Slot::Dev, "curl -fsS https://api.acme.example/leaky").await;
        Ok(called
            .is_ok_and(|it| it.exit.exit_code == 0 && leaks(&instance))
            .then_some(()))
    })
    .await?;
    let leaky = step("prove after leaks", prove(&instance, &token, Some("--all"), 1)).await?;
    for found in [
        "GIT of ada (version 1) as clear in files of dev of ada/main, /home/choir/leak",
        "API of ada (version 2) as clear in log of box",
    ] {
        ensure!(
            leaky.contains("HITS") && leaky.contains(found),
            "it does not say so: {found}"
        );
    }
    Ok(())
}

/// The value that takes the first one's place.
const ANEW: &str = "canary-anew-8c52e07d4b19fa36";

/// Whether the log of the box has a secret in it.
fn leaks(instance: &Instance) -> bool {
    std::fs::read_to_string(instance.path("up.log")).is_ok_and(|log| log.contains(ANEW))
}

/// Stored after the backup.
const LATE: &str = "canary-late-41d97ac0e25b83f6";

/// While a program calls and calls, its secret is replaced and the hypervisor is killed; then secrets are deleted.
async fn day(client: &Client, instance: &Instance, upstream: &Upstream) -> Result<()> {
    upstream.forget();
    let calls = "for i in $(seq 300); do curl -s -o /dev/null -w '%{http_code}\\n' https://api.acme.example/$i; done > ~/codes; \
                 touch ~/called";
    let task = CreateTask {
        command: Line::Line(calls.to_owned()),
        cwd: None,
        env: [].into(),
        timeout_ms: None,
    };
    client.sandbox(&workspace(), Slot::Dev).create_task(&task).await?;
    let came = async |word: &str| {
        let wanted = format!("Bearer {word}");
        until("a call with the secret of now", async || {
            let last = upstream.seen().pop();
            Ok(last.filter(|seen| seen.header("authorization") == [wanted.as_str()]))
        })
        .await
    };
    came(&canary(API)).await?;
    let put = PutSecret {
        value: SecretText::new(ANEW.to_owned()),
        reveal: false,
    };
    client.put_secret(&"API".parse()?, &put).await?;
    came(ANEW).await?;
    let process = Pid::from_raw(instance.hypervisor_pid()?).context("no process")?;
    kill_process(process, Signal::KILL)?;
    until("the calls to end", async || {
        let ended = exec(client, Slot::Dev, "test -e ~/called").await;
        Ok(ended.is_ok_and(|it| it.exit.exit_code == 0).then_some(()))
    })
    .await?;
    let codes = run(client, Slot::Dev, "sort ~/codes | uniq -c").await?;
    // What was under way at the kill broke; nobody was turned away for having no secret or the wrong one.
    ensure!(
        !codes.contains("401") && !codes.contains("403"),
        "the calls ended so: {codes}"
    );
    let known = [canary(API), ANEW.to_owned()].map(|word| format!("Bearer {word}"));
    for seen in upstream.seen() {
        let sent = seen.header("authorization");
        ensure!(
            sent.len() == 1 && known.iter().any(|it| it == sent[0]),
            "{sent:?} was sent"
        );
    }
    for name in ["NPM", "CARGO"] {
        client.delete_secret(&name.parse()?).await?;
    }
    let refused = exec(client, Slot::Dev, "curl -fsS $CHOIR_BROKER_URL/v1/egress/npm/acme-pkg").await?;
    ensure!(refused.exit.exit_code == 22, "a deleted secret was used: {refused:?}");
    Ok(())
}

/// The database is lost, and what a backup holds takes its place: the secret that it has is used, and one that was stored
/// after it is gone.
async fn restore(instance: &mut Instance, client: &Client, network: String) -> Result<(Client, String)> {
    let elsewhere = tempfile::tempdir()?;
    let place = |name: &str| elsewhere.path().join(name).display().to_string();
    let identity = Identity::generate();
    std::fs::write(place("identity"), identity.to_string().expose_secret())?;
    instance.reconfigure(|config| {
        let recipients = vec![identity.to_public().to_string()];
        let backup = toml::Table::from_iter([("recipients".to_owned(), recipients.into())]);
        config.insert("backup".to_owned(), backup.into());
    })?;
    instance.operate(&["backup", "--to", &place("backups")])?;
    until("the hypervisor to be back", async || Ok(client.alive().await.ok())).await?;
    let put = PutSecret {
        value: SecretText::new(LATE.to_owned()),
        reveal: false,
    };
    client.put_secret(&"LATE".parse()?, &put).await?;
    instance.stop()?;
    for part in ["choir.db", "choir.db-wal", "choir.db-shm"] {
        let _none = std::fs::remove_file(instance.path(part));
    }
    let backup = std::fs::read_dir(place("backups"))?
        .next()
        .context("no backup")??
        .path();
    let backup = backup.display().to_string();
    instance.operate(&[
        "restore",
        &backup,
        "--into",
        &place("into"),
        "--identity",
        &place("identity"),
    ])?;
    std::fs::copy(place("into/choir.db"), instance.path("choir.db"))?;
    instance.restart(&[network])?;
    let (client, token) = person::come_back(instance).await?;
    let names: Vec<_> = client
        .secrets()
        .await?
        .items
        .into_iter()
        .map(|secret| secret.name.to_string())
        .collect();
    ensure!(names == ["API", "GIT", "PYPI"], "restored: {names:?}");
    person::start(&client, Slot::Dev).await?;
    let told = run(&client, Slot::Dev, "curl -fsS https://api.acme.example/restored").await?;
    ensure!(told == "let in", "it was told {told}");
    Ok((client, token))
}

/// What `choir prove` says, of one's own unless said otherwise; it must end with this exit code.
async fn prove(instance: &Instance, token: &str, scope: Option<&str>, code: i32) -> Result<String> {
    // A search is followed by a pause as long as it took.
    let (ended, told) = until("the pause after a search to end", async || {
        let mut choir = instance.choir(token)?;
        choir.arg("prove").args(scope);
        let output = tokio::task::spawn_blocking(move || choir.output()).await??;
        let told = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        let paused = told.contains("Too many requests");
        Ok((!paused).then_some((output.status.code(), told)))
    })
    .await?;
    println!("{told}");
    ensure!(ended == Some(code), "`choir prove` ended with {ended:?}");
    Ok(told)
}

/// Each tool, told where to look and nothing else.
const INSTALLS: [(&str, &str, &str); 3] = [
    (
        "pip",
        PYPI,
        "python3 -m venv ~/venv && ~/venv/bin/pip -q install --index-url https://pypi.acme.example/simple acme-pkg && \
         ~/venv/bin/python -c 'import acme_pkg; assert acme_pkg.WORD == \"wheel\"'",
    ),
    (
        "npm",
        NPM,
        "mkdir -p ~/npm && cd ~/npm && npm install --no-progress --no-audit --registry https://npm.acme.example/ acme-pkg && \
         test \"$(node -p 'require(\"acme-pkg\")')\" = tarball",
    ),
    (
        "cargo",
        CARGO,
        "mkdir -p ~/use && cd ~/use && cargo init -q --vcs none --name use-it . && \
         echo 'acme-pkg = { version = \"1\", registry = \"acme\" }' >> Cargo.toml && \
         echo 'fn main() { println!(\"{}\", acme_pkg::WORD) }' > src/main.rs && \
         export CARGO_REGISTRIES_ACME_INDEX=sparse+https://cargo.acme.example/index/ && \
         cargo build -q && test \"$(./target/debug/use-it)\" = crate",
    ),
];

async fn grants(client: &Client) -> Result<()> {
    for (host, way) in [
        (API, "bearer"),
        (GIT, "basic:x-access-token"),
        (PYPI, "basic:__token__"),
        (NPM, "bearer"),
        (CARGO, "bearer"),
    ] {
        let name = host.split('.').next().context("a name")?;
        let put = PutSecret {
            value: SecretText::new(canary(host)),
            reveal: false,
        };
        let secret = name.to_uppercase();
        client.put_secret(&secret.parse()?, &put).await?;
        let grant = CreateGrant {
            workspace: workspace(),
            slot: Slot::Dev,
            capability: name.parse()?,
            secret: secret.parse()?,
            template: Some(way.to_owned()),
            hosts: Some(vec![host.parse()?]),
            methods: Some(["GET", "HEAD", "POST", "PUT"].map(str::to_owned).into()),
            path_prefix: None,
            inject: None,
            expires_at: None,
        };
        client.create_grant(&grant).await?;
    }
    Ok(())
}

/// The control: the servers do ask, and a program that has nothing gets nothing.
async fn refused(client: &Client) -> Result<()> {
    for line in [
        "test $(curl -ks -o /dev/null -w '%{http_code}' https://api.acme.example/x) = 401",
        "! GIT_TERMINAL_PROMPT=0 GIT_SSL_NO_VERIFY=1 git clone -q https://git.acme.example/private.git ~/nothing 2> ~/why && \
         grep -Eq 'could not read Username|Authentication failed' ~/why",
        "! npm install --strict-ssl=false --no-progress --registry https://npm.acme.example/ acme-pkg 2> ~/why && grep -q E401 ~/why",
    ] {
        run(client, Slot::Dev, line).await?;
    }
    Ok(())
}

/// The broker's base URL, and plain HTTP by the proxy.
async fn curl(client: &Client, upstream: &Upstream) -> Result<()> {
    for (nth, line) in [
        "curl -fsS $CHOIR_BROKER_URL/v1/egress/api/by-broker",
        "curl -fsS http://api.acme.example/in-plain",
    ]
    .into_iter()
    .enumerate()
    {
        let told = run(client, Slot::Dev, line).await?;
        ensure!(told == "let in", "`{line}` was told {told}");
        let seen = upstream.seen();
        ensure!(
            seen.len() == nth + 1 && seen[nth].header("authorization") == [credential(API)],
            "{seen:?}"
        );
    }
    Ok(())
}

async fn curl_over_tls(client: &Client, upstream: &Upstream) -> Result<()> {
    upstream.forget();
    let line = "curl -fsS -H 'authorization: Bearer placeholder' https://api.acme.example/over-tls";
    let told = run(client, Slot::Dev, line).await?;
    ensure!(told == "let in", "it was told {told}");
    let seen = upstream.seen();
    ensure!(
        seen.len() == 1 && seen[0].header("authorization") == [credential(API)] && seen[0].target == "/over-tls",
        "{seen:?}"
    );
    Ok(())
}

async fn clone_and_push(client: &Client, upstream: &Upstream, repositories: &Path) -> Result<()> {
    upstream.forget();
    // A large push comes in chunks of unknown number.
    let line = "git clone -q --recurse-submodules https://git.acme.example/private.git ~/private && cd ~/private && \
                test \"$(cat README part/README)\" = \"$(printf 'private\\npart')\" && head -c 3000000 /dev/urandom > big && git add big && \
                git -c user.name=Ada -c user.email=ada@example.com commit -qm big && git push -q origin HEAD && \
                git fetch -q && git status -sb";
    run(client, Slot::Dev, line).await?;
    // What Git LFS keeps aside goes and comes with the same grant.
    let line = "cd ~/private && git lfs track '*.bin' > /dev/null && head -c 300000 /dev/urandom > a.bin && git add . && \
                git -c user.name=Ada -c user.email=ada@example.com commit -qm large && git push -q origin HEAD && \
                git clone -q https://git.acme.example/private.git ~/again && cmp a.bin ~/again/a.bin && \
                git -C ~/again lfs ls-files | grep -q a.bin";
    run(client, Slot::Dev, line).await?;
    let large = std::fs::read_dir(repositories.join("lfs"))?.count();
    ensure!(large == 1, "{large} large files came");
    let (ours, theirs) = (
        run(client, Slot::Dev, "git -C ~/private rev-parse HEAD").await?,
        git::at(&repositories.join("private.git"), &["rev-parse", "HEAD"]).await?,
    );
    ensure!(ours.trim() == theirs.trim(), "pushed {ours}, arrived {theirs}");
    let seen = upstream.seen();
    let pushed = seen
        .iter()
        .any(|seen| seen.path().ends_with("/git-receive-pack") && seen.method == "POST");
    let wanted = credential(GIT);
    let all = seen
        .iter()
        .all(|seen| seen.header("authorization") == [wanted.as_str()]);
    ensure!(pushed && all, "{seen:?}");
    Ok(())
}

/// Neither as it is nor as the servers got it, while programs still run that used it.
async fn nothing_inside(client: &Client) -> Result<()> {
    let mut words = Vec::new();
    words.extend([ANEW, LATE].map(str::to_owned));
    for host in [API, GIT, PYPI, NPM, CARGO] {
        words.push(canary(host));
        let sent = credential(host);
        words.push(sent.rsplit(' ').next().unwrap_or_default().to_owned());
    }
    // The patterns come by stdin, so that the search does not find itself.
    let look = "cat > /dev/shm/words; env > /dev/shm/seen; sudo sh -c 'cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline' 2>/dev/null \
                | tr '\\0' '\\n' >> /dev/shm/seen; grep -cFf /dev/shm/words /dev/shm/seen; \
                sudo grep -rlFf /dev/shm/words /home /etc /run /tmp /var /root 2>/dev/null; rm /dev/shm/words; true";
    let request = choir_api::sandbox::ExecRequest {
        command: choir_api::sandbox::Command::Line(look.to_owned()),
        cwd: None,
        env: [].into(),
        stdin: Some(choir_api::sandbox::Stdin::Chunk(choir_api::sandbox::Chunk::new(
            words.join("\n").as_bytes(),
        ))),
        timeout_ms: None,
        max_output_bytes: None,
    };
    let found = client.sandbox(&workspace(), Slot::Dev).exec(&request).await?.stdout;
    ensure!(found.trim() == "0", "found inside: {found}");
    // The control: the same search finds what somebody wrote down.
    let leak = format!("echo {} > ~/leak", canary(GIT));
    run(client, Slot::Dev, &leak).await?;
    let found = client.sandbox(&workspace(), Slot::Dev).exec(&request).await?.stdout;
    ensure!(found.contains("/home/choir/leak"), "the search found {found}");
    Ok(())
}

async fn make(client: &Client, wares: &Wares) -> Result<()> {
    let wheel = "mkdir -p ~/wheel && cd ~/wheel && python3 - <<'END'\n\
        import zipfile\n\
        info = 'acme_pkg-1.0.dist-info/'\n\
        with zipfile.ZipFile('acme_pkg-1.0-py3-none-any.whl', 'w') as whl:\n    \
            whl.writestr('acme_pkg.py', 'WORD = \"wheel\"\\n')\n    \
            whl.writestr(info + 'METADATA', 'Metadata-Version: 2.1\\nName: acme-pkg\\nVersion: 1.0\\n')\n    \
            whl.writestr(info + 'WHEEL', 'Wheel-Version: 1.0\\nGenerator: e2e\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n')\n    \
            whl.writestr(info + 'RECORD', '')\n\
        END\n\
        base64 -w0 *.whl";
    let tarball = "mkdir -p ~/tarball && cd ~/tarball && echo 'module.exports = \"tarball\"' > index.js && \
        echo '{\"name\":\"acme-pkg\",\"version\":\"1.0.0\"}' > package.json && npm pack -s > /dev/null && base64 -w0 *.tgz";
    let crated = "mkdir -p ~/crated && cd ~/crated && cargo init -q --vcs none --lib --name acme-pkg . && \
        sed -i 's/^version.*/version = \"1.0.0\"/' Cargo.toml && echo 'pub const WORD: &str = \"crate\";' > src/lib.rs && \
        cargo package -q --no-verify --allow-dirty --offline 2>/dev/null && base64 -w0 target/package/*.crate";
    let made = async |line: &str| -> Result<Bytes> {
        let text = run(client, Slot::Dev, line).await?;
        Ok(BASE64.decode(text.trim().as_bytes())?.into())
    };
    let (wheel, tarball, crated) = (made(wheel).await?, made(tarball).await?, made(crated).await?);
    let sum = exec(client, Slot::Dev, "sha256sum ~/crated/target/package/*.crate")
        .await?
        .stdout;
    let crate_sum = sum.split_whitespace().next().context("no sum")?.to_owned();
    *wares.0.lock().expect("no holder panics") = Packages {
        wheel,
        tarball,
        crated,
        crate_sum,
    };
    Ok(())
}

/// Lets in who shows the credential, and nobody else.
async fn serve(seen: &Seen, repositories: &Path, wares: &Wares) -> Answer {
    let host = seen.host.clone();
    let shown = seen.header("authorization");
    let anew = format!("Bearer {ANEW}");
    if shown != [credential(&host)] && !(host == API && shown == [anew.as_str()]) {
        let mut answer = whole(StatusCode::UNAUTHORIZED, "text/plain", "who are you?");
        let asks = if host == GIT || host == PYPI {
            "Basic realm=\"acme\""
        } else {
            "Bearer"
        };
        let headers = answer.headers_mut();
        headers.insert("www-authenticate", HeaderValue::from_static(asks));
        return answer;
    }
    let packages = wares.0.lock().expect("no holder panics").clone();
    let found = |kind, body: Bytes| whole(StatusCode::OK, kind, body);
    match (host.as_str(), seen.path()) {
        (API, _) => found("text/plain", "let in".into()),
        (GIT, _) => git::smart_http(seen, repositories)
            .await
            .unwrap_or_else(|error| whole(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", format!("{error:#}"))),
        (PYPI, "/simple/acme-pkg/") => {
            let page = "<a href=\"/files/acme_pkg-1.0-py3-none-any.whl\">acme_pkg-1.0-py3-none-any.whl</a>";
            found("text/html", page.into())
        }
        (PYPI, "/files/acme_pkg-1.0-py3-none-any.whl") => found("application/octet-stream", packages.wheel),
        (NPM, "/acme-pkg") => {
            let version = json!({
                "name": "acme-pkg", "version": "1.0.0", "dist": {"tarball": "https://npm.acme.example/acme-pkg.tgz"},
            });
            let all = json!({"name": "acme-pkg", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}});
            found("application/json", all.to_string().into())
        }
        (NPM, "/acme-pkg.tgz") => found("application/octet-stream", packages.tarball),
        (CARGO, "/index/config.json") => found(
            "application/json",
            json!({"dl": "https://cargo.acme.example/dl"}).to_string().into(),
        ),
        (CARGO, "/index/ac/me/acme-pkg") => {
            let line = json!({
                "name": "acme-pkg", "vers": "1.0.0", "deps": [], "cksum": packages.crate_sum, "features": {}, "yanked": false,
            });
            found("text/plain", format!("{line}\n").into())
        }
        (CARGO, "/dl/acme-pkg/1.0.0/download") => found("application/octet-stream", packages.crated),
        _ => whole(StatusCode::NOT_FOUND, "text/plain", "nothing here"),
    }
}
