//! A developer's first hour in a sandbox: what is installed and built there works, and stays over stop, start and swap.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use choir_api::client::{Client, SlotVerb};
use choir_api::grants::CreateGrant;
use choir_api::secrets::{PutSecret, SecretText};
use choir_core::Slot;
use choir_e2e::instance::Instance;
use choir_e2e::neighbour::Neighbour;
use choir_e2e::person::{self, exec, run, workspace};
use choir_e2e::registries;
use choir_e2e::skip;
use choir_e2e::waiting::{PATIENCE, step, until};
use choir_e2e::wire::Wire;
use url::Url;

#[tokio::test]
async fn packages_install_inside_a_sandbox_and_stay_over_stop_start_and_swap() -> Result<()> {
    if skip::cannot_run("packages") {
        return Ok(());
    }
    let repository = tempfile::tempdir()?;
    make_repository(repository.path())?;
    let neighbour = Neighbour::serve(repository.path()).await?;
    let mut instance = Instance::up(&[])?;
    let client = person::sign_in(&instance).await?;
    client.create_workspace(&workspace()).await?;
    step("start dev", person::start(&client, Slot::Dev)).await?;

    let mut allowed = step("find the registries", registries::networks(&client, &registries::ALL)).await?;
    allowed.push(format!("{}/32", neighbour.wire.address));
    step("down and up again", async { instance.restart(&allowed) }).await?;
    // The client's old connection is found dead by being used.
    until("the hypervisor to answer again", async || {
        Ok(Some(client.alive().await?))
    })
    .await?;

    for slot in Slot::ALL {
        step(&format!("start {slot}"), person::start(&client, slot)).await?;
    }
    step("git clone", clone(&client, &neighbour)).await?;
    for (name, install, _) in KINDS {
        step(name, run(&client, Slot::Dev, install)).await?;
    }
    step("everything works in dev", everything_works(&client, Slot::Dev)).await?;
    step(
        "a call with a secret",
        a_call_with_a_secret_is_answered_by_a_real_server(&client),
    )
    .await?;
    for verb in [SlotVerb::Stop, SlotVerb::Start] {
        step(verb.as_str(), client_ask(&client, verb)).await?;
    }
    step("everything works in dev after it", everything_works(&client, Slot::Dev)).await?;
    client.swap(&workspace(), "swap", PATIENCE).await?;
    step(
        "everything works in live after a swap",
        everything_works(&client, Slot::Live),
    )
    .await?;
    let other = exec(&client, Slot::Dev, "command -v hello").await?;
    ensure!(
        other.exit.exit_code != 0,
        "what was installed in one sandbox is in the other, too"
    );
    Ok(())
}

/// What is done once, and what shows that it is still there.
const KINDS: [(&str, &str, &str); 4] = [
    (
        "apt",
        "sudo apt-get -q update && sudo apt-get -qy install hello",
        "hello",
    ),
    (
        "pip",
        "python3 -m venv ~/venv && ~/venv/bin/pip -q install six",
        "~/venv/bin/python -c 'import six; print(six.__version__)'",
    ),
    (
        "npm",
        "mkdir ~/npm && cd ~/npm && npm install --no-progress is-number",
        "cd ~/npm && node -e 'process.exit(require(\"is-number\")(1) ? 0 : 1)'",
    ),
    (
        "cargo",
        "cargo init -q --name a ~/cargo && cd ~/cargo && echo 'itoa = \"1\"' >> Cargo.toml && \
         echo 'fn main() { println!(\"{}\", itoa::Buffer::new().format(7)) }' > src/main.rs && cargo build -q",
        "test $(~/cargo/target/debug/a) = 7",
    ),
];

async fn everything_works(client: &Client, slot: Slot) -> Result<()> {
    for (name, _, shown) in KINDS {
        run(client, slot, shown).await.context(name)?;
    }
    run(client, slot, "git -C ~/clone log --oneline").await?;
    Ok(())
}

/// By the system's resolver and certificates, over TLS, to the registry that npm asks. What arrives there is shown by the
/// hypervisor's own tests.
async fn a_call_with_a_secret_is_answered_by_a_real_server(client: &Client) -> Result<()> {
    const CANARY: &str = "canary-granted-71c0d4e9a8b35f26";
    let registry = Url::parse(run(client, Slot::Dev, "npm config get registry").await?.trim())?;
    let host = registry.host_str().context("the registry has no host")?;
    let call = format!(
        "curl -sS -w '\\n%{{http_code}}' $CHOIR_BROKER_URL/v1/egress/registry{}is-number",
        registry.path()
    );
    let before = run(client, Slot::Dev, &call).await?;
    ensure!(before.ends_with("\n403"), "without a grant the answer is {before}");
    let put = PutSecret {
        value: SecretText::new(CANARY.to_owned()),
        reveal: false,
    };
    client.put_secret(&"REGISTRY".parse()?, &put).await?;
    let grant = CreateGrant {
        workspace: workspace(),
        slot: Slot::Dev,
        capability: "registry".parse()?,
        secret: "REGISTRY".parse()?,
        template: Some("header:x-canary".to_owned()),
        hosts: Some(vec![host.parse()?]),
        methods: None,
        path_prefix: None,
        inject: None,
        expires_at: None,
    };
    client.create_grant(&grant).await?;
    let after = run(client, Slot::Dev, &call).await?;
    let (body, status) = after.rsplit_once('\n').context("curl told no status")?;
    ensure!(status == "200", "with a grant the answer is {status}");
    let told: serde_json::Value = serde_json::from_str(body).context("the registry's answer is not whole")?;
    ensure!(told["name"] == "is-number", "another package came: {}", told["name"]);
    ensure!(!after.contains(CANARY), "the secret came back");
    Ok(())
}

async fn client_ask(client: &Client, verb: SlotVerb) -> Result<()> {
    let view = client.ask_slot(&workspace(), Slot::Dev, verb, PATIENCE).await?;
    let wanted = if verb == SlotVerb::Stop { "stopped" } else { "ready" };
    ensure!(view.state == wanted, "dev is {} ({:?})", view.state, view.reason);
    Ok(())
}

/// From another machine on a private network, which is allowed; this machine itself never is.
async fn clone(client: &Client, neighbour: &Neighbour) -> Result<()> {
    let Wire { address, ours, .. } = &neighbour.wire;
    run(
        client,
        Slot::Dev,
        &format!("git clone -q http://{address}/a.git ~/clone"),
    )
    .await?;
    let read = run(client, Slot::Dev, "cat ~/clone/README").await?;
    ensure!(read.trim() == "cloned", "the clone has `{read}`");
    let own = exec(
        client,
        Slot::Dev,
        &format!("curl -sS -o /dev/null -w '%{{http_code}}' http://{ours}/"),
    )
    .await?;
    ensure!(
        own.stdout == "403",
        "a request to this machine itself was answered {} {}",
        own.stdout,
        own.stderr
    );
    Ok(())
}

/// A bare repository that a plain web server can serve.
fn make_repository(directory: &Path) -> Result<()> {
    let git = |at: &Path, arguments: &[&str]| -> Result<()> {
        let mut command = Command::new("git");
        command
            .current_dir(at)
            .args(["-c", "user.name=Ada", "-c", "user.email=ada@example.com"]);
        let output = command.args(arguments).output().context("cannot run git")?;
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "git {}: {told}", arguments.join(" "));
        Ok(())
    };
    let work = directory.join("work");
    git(directory, &["init", "-q", "work"])?;
    std::fs::write(work.join("README"), "cloned\n")?;
    git(&work, &["add", "README"])?;
    git(&work, &["commit", "-q", "-m", "first"])?;
    git(directory, &["clone", "-q", "--bare", "work", "a.git"])?;
    git(&directory.join("a.git"), &["update-server-info"])
}
