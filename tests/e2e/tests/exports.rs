//! A workspace goes from one box to another in one encrypted file: its files with owners and modes, its release, its
//! settings; of its secrets only the names. What does not open or ends early leaves nothing behind.

use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::Command;

use age::secrecy::SecretString;
use age::{Decryptor, Identity, scrypt};
use anyhow::{Context as _, Result, bail, ensure};
use choir_api::client::Client;
use choir_api::grants::CreateGrant;
use choir_api::sandbox::{Command as Shell, ExecRequest};
use choir_api::secrets::{PutSecret, SecretText};
use choir_api::workspaces::{CreateRelease, CreateWorkspace};
use choir_core::{Name, ReleaseConfig, Slot, WorkspaceSettings};
use choir_e2e::instance::Instance;
use choir_e2e::person::{self, run, workspace};
use choir_e2e::skip;
use choir_e2e::waiting::{step, until};
use serde_json::{Value, json};

const PASSPHRASE: &str = "correct horse battery staple";
const SECRET: &str = "GITHUB_TOKEN";
const CANARY: &str = "canary-export-5b1f0e9a27c64d83";
const MARK: &str = "a file of the first box";

/// The system becomes a small one, since all of it travels several times.
const SHRINK: &str = "sudo rm -rf /usr/share /usr/include /usr/lib/rustlib /usr/lib/gcc /usr/lib/git-core /usr/lib/postgresql \
    /var/lib/postgresql /usr/lib/python3* && sudo find /usr/lib /usr/bin -xdev -type f -size +6M -delete";
/// Files in the home and in the system, of several owners and modes.
const WRITE: &str = "mkdir -p ~/deep && echo 'a file of the first box' > ~/deep/file && chmod 640 ~/deep/file \
    && ln -s deep/file ~/link && ln ~/deep/file ~/twin \
    && echo theirs | sudo tee ~/theirs > /dev/null && sudo chown 33:1234 ~/theirs && sudo chmod 4751 ~/theirs \
    && printf '#!/bin/sh\\necho a tool\\n' | sudo tee /opt/tool > /dev/null && sudo chmod 755 /opt/tool \
    && printf '[health]\\npath = \"/\"\\n' > ~/choir.toml";
/// What the release starts, and what the file above has checked: without it nothing answers.
const SERVE: &str = r#"exec perl -MIO::Socket::INET -e '
    $all = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => 3000, Listen => 9, ReuseAddr => 1) or die;
    while ($one = $all->accept) {
        while (<$one>) { last if /^\r?$/ }
        print $one "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        close $one;
    }'"#;
const LOOK: &str = "cd && stat -c '%n %F %a %u:%g %s %h' deep/file link twin /opt/tool \
    && stat -c '%n %a %u:%g' deep theirs && readlink link && cat link && /opt/tool";

/// A box, and the person who uses it.
struct Scene {
    instance: Instance,
    client: Client,
    token: String,
}

impl Scene {
    async fn up() -> Result<Self> {
        let instance = Instance::up(&[])?;
        let (client, token) = person::sign_in_with_token(&instance).await?;
        Ok(Self {
            instance,
            client,
            token,
        })
    }

    /// What a person types; its answer as JSON, or what it complains of.
    fn choir(&self, arguments: &[&str]) -> Result<Result<Value, String>> {
        let mut choir = self.instance.choir(&self.token)?;
        let output = choir.arg("--json").args(arguments).output()?;
        Ok(match output.status.code() {
            Some(0) => Ok(serde_json::from_slice(&output.stdout)?),
            Some(1) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
            other => bail!("`choir {arguments:?}` ended with {other:?}: {output:?}"),
        })
    }

    /// The same for a verb on an exported file, with a file that holds a passphrase.
    fn moves(&self, verb: &str, file: &Path, passphrase: &Path, more: &[&str]) -> Result<Result<Value, String>> {
        let [file, passphrase] = [file, passphrase].map(|path| path.to_str().context("a path"));
        let words = [verb, file?, "--passphrase-file", passphrase?];
        self.choir(&[&words[..], more].concat())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workspace_goes_from_one_box_to_another_without_its_secrets() -> Result<()> {
    if skip::cannot_run("exports") {
        return Ok(());
    }
    let outside = tempfile::tempdir()?;
    let (file, passphrase) = (outside.path().join("main.choir"), outside.path().join("passphrase"));
    fs::write(&passphrase, format!("{PASSPHRASE}\n"))?;
    let scene = step("the first box", Scene::up()).await?;
    let look = step("a workspace to move", filled(&scene.client)).await?;
    step("export", exported(&scene, &file, &passphrase)).await?;
    step("no secret is in it", async { holds_no_secret(&file, outside.path()) }).await?;
    drop(scene);

    let scene = step("the second box", Scene::up()).await?;
    step(
        "what does not open makes nothing",
        refused(&scene, &file, outside.path()),
    )
    .await?;
    step("import", imported(&scene, &file, &passphrase, &look)).await?;
    step(
        "what ends early is gone again",
        ends_early(&scene, &file, outside.path()),
    )
    .await?;
    step(
        "import where the secret is",
        with_the_secret(&scene, &file, &passphrase),
    )
    .await
}

/// A workspace with files, a setting, a secret and a grant; how its files look.
async fn filled(client: &Client) -> Result<String> {
    let releases = client.releases().await?.items;
    let image = &releases.first().context("no release")?.image_digest;
    let serving = ReleaseConfig {
        start: Some(SERVE.to_owned()),
        ..ReleaseConfig::default()
    };
    let release = client.create_release(&CreateRelease::of_image(image, serving)).await?;
    let asked = CreateWorkspace {
        name: workspace(),
        release: Some(release.id),
    };
    client.create_workspace_from(&asked).await?;
    let settings = WorkspaceSettings {
        env: Some([("GREETING".to_owned(), "hello".to_owned())].into()),
        ..WorkspaceSettings::default()
    };
    client.patch_workspace(&workspace(), &settings).await?;
    store(client).await?;
    let grant = CreateGrant {
        workspace: workspace(),
        slot: Slot::Dev,
        capability: "github".parse()?,
        secret: SECRET.parse()?,
        template: None,
        hosts: None,
        methods: None,
        path_prefix: None,
        inject: None,
        expires_at: None,
    };
    client.create_grant(&grant).await?;
    person::start(client, Slot::Live).await?;
    run(client, Slot::Live, SHRINK).await?;
    run(client, Slot::Live, WRITE).await?;
    let look = run(client, Slot::Live, LOOK).await?;
    ensure!(look.contains(MARK) && look.contains("4751 33:1234"), "{look}");
    Ok(look)
}

async fn store(client: &Client) -> Result<()> {
    let secret = PutSecret {
        value: SecretText::new(CANARY.to_owned()),
        reveal: false,
    };
    client.put_secret(&SECRET.parse()?, &secret).await?;
    Ok(())
}

async fn exported(scene: &Scene, file: &Path, passphrase: &Path) -> Result<()> {
    let written = scene.moves("export", file, passphrase, &[])?;
    let written = written.map_err(|told| anyhow::anyhow!("the export failed: {told}"))?;
    ensure!(written["slot"] == "live" && written["workspace"] == "main", "{written}");
    ensure!(written["bytes"] == fs::metadata(file)?.len(), "{written}");
    let left = scene.client.snapshots(&workspace(), Slot::Live).await?.items;
    let asked_for = left.iter().filter(|it| !it.scheduled && it.taken_for.is_none());
    ensure!(asked_for.count() == 0, "the snapshot that was taken stays: {left:?}");
    let trail = scene.choir(&["audit", "--action", "snapshot.export"])?;
    let trail = trail.map_err(|told| anyhow::anyhow!("no trail: {told}"))?;
    let outcomes: Vec<&Value> = trail["items"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|row| &row["outcome"])
        .collect();
    ensure!(outcomes == [&json!("ok"), &json!("intent")], "{trail}");
    Ok(())
}

/// Looks into the file with nothing of ours.
fn holds_no_secret(file: &Path, outside: &Path) -> Result<()> {
    let (clear, archive) = (outside.join("clear.tar.gz"), outside.join("clear.tar"));
    let mut identity = scrypt::Identity::new(SecretString::from(PASSPHRASE.to_owned()));
    identity.set_max_work_factor(22);
    let sealed = Decryptor::new_buffered(BufReader::new(File::open(file)?))?;
    let mut opened = sealed.decrypt(std::iter::once(&identity as &dyn Identity))?;
    std::io::copy(&mut opened, &mut File::create(&clear)?)?;
    let gunzip = Command::new("gzip").arg("-d").arg(&clear).status()?;
    ensure!(gunzip.success(), "it is not compressed");
    let first = tar(&["-xOf"], &archive, &["choir.json"])?;
    let manifest: Value = serde_json::from_slice(&first)?;
    ensure!(manifest["secrets"] == json!([SECRET]), "{manifest}");
    ensure!(manifest["grants"][0]["capability"] == "github", "{manifest}");
    let names = String::from_utf8(tar(&["-tf"], &archive, &[])?)?;
    let first: Vec<&str> = names.lines().take(2).collect();
    ensure!(first == ["choir.json", "root/"], "{first:?}");
    ensure!(
        names.lines().any(|name| name == "home/deep/file"),
        "no file of the home"
    );
    let holds = |text: &str| -> Result<bool> {
        let mut command = Command::new("grep");
        command.env("LC_ALL", "C").args(["-aFq", "--", text]).arg(&archive);
        Ok(command.status()?.success())
    };
    ensure!(!holds(CANARY)?, "the secret is in the export");
    ensure!(holds(MARK)? && holds(SECRET)?, "the search finds nothing at all");
    fs::remove_file(archive)?;
    Ok(())
}

fn tar(before: &[&str], archive: &Path, after: &[&str]) -> Result<Vec<u8>> {
    let output = Command::new("tar").args(before).arg(archive).args(after).output()?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "tar: {told}");
    Ok(output.stdout)
}

async fn refused(scene: &Scene, file: &Path, outside: &Path) -> Result<()> {
    let wrong = outside.join("wrong");
    fs::write(&wrong, "another one\n")?;
    let told = scene
        .moves("import", file, &wrong, &[])?
        .err()
        .context("it was imported")?;
    ensure!(told.contains("not the passphrase"), "{told}");
    let other = outside.join("other");
    fs::write(&other, "a letter")?;
    let told = scene
        .moves("import", &other, &wrong, &[])?
        .err()
        .context("it was imported")?;
    ensure!(told.contains("no file that `choir export` wrote"), "{told}");
    ensure!(scene.client.workspaces().await?.is_empty(), "something was made");
    Ok(())
}

async fn imported(scene: &Scene, file: &Path, passphrase: &Path, look: &str) -> Result<()> {
    let made = scene.moves("import", file, passphrase, &[])?;
    let made = made.map_err(|told| anyhow::anyhow!("the import failed: {told}"))?;
    ensure!(made["workspace"] == "main", "{made}");
    ensure!(made["grants_made"] == json!([]), "{made}");
    ensure!(made["secrets_missing"] == json!([SECRET]), "{made}");
    let left = &made["grants_left"][0];
    ensure!(left["capability"] == "github" && left["secret"] == SECRET, "{made}");
    for slot in Slot::ALL {
        person::start(&scene.client, slot).await?;
        let there = run(&scene.client, slot, LOOK).await?;
        ensure!(there == look, "{slot}: {there} and not {look}");
        let greeting = run(&scene.client, slot, "echo $GREETING").await?;
        ensure!(greeting == "hello\n", "{slot}: {greeting}");
        run(&scene.client, slot, "echo more >> ~/deep/file && sudo touch /opt/more").await?;
    }
    let slots = scene.client.workspace(&workspace()).await?.slots;
    for slot in Slot::ALL {
        let release = &slots.get(slot).release;
        ensure!(made["release"] == release.as_str(), "{slot} runs {release}: {made}");
    }
    ensure!(scene.client.grants().await?.items.is_empty());
    let again = scene
        .moves("import", file, passphrase, &[])?
        .err()
        .context("it was imported")?;
    ensure!(again.contains("choose another name"), "{again}");
    Ok(())
}

async fn ends_early(scene: &Scene, file: &Path, outside: &Path) -> Result<()> {
    let half: PathBuf = outside.join("half");
    fs::copy(file, &half)?;
    let length = fs::metadata(&half)?.len();
    File::options().write(true).open(&half)?.set_len(length / 2)?;
    let passphrase = outside.join("passphrase");
    let before = scene.client.releases().await?.items.len();
    let told = scene.moves("import", &half, &passphrase, &["--name", "half"])?;
    let told = told.err().context("half a file was imported")?;
    ensure!(
        told.contains("damaged or not whole") && told.contains("deleted again"),
        "{told}"
    );
    until("the workspace to be gone", async || {
        let all = scene.client.workspaces().await?;
        Ok(all.iter().all(|it| it.name == workspace()).then_some(()))
    })
    .await?;
    ensure!(scene.client.releases().await?.items.len() == before, "a release stays");
    until("everything to fit together", async || {
        let findings = scene.client.fsck().await?.items;
        ensure!(findings.is_empty(), "{findings:?}");
        Ok(Some(()))
    })
    .await
}

async fn with_the_secret(scene: &Scene, file: &Path, passphrase: &Path) -> Result<()> {
    store(&scene.client).await?;
    let unasked = scene.moves("import", file, passphrase, &["--name", "unasked"])?;
    let unasked = unasked.map_err(|told| anyhow::anyhow!("the import failed: {told}"))?;
    ensure!(
        unasked["grants_made"] == json!([]),
        "whoever wrote the file got a secret: {unasked}"
    );
    let reason = &unasked["grants_left"][0]["reason"];
    ensure!(reason == "grants are made with --grants only", "{unasked}");
    let made = scene.moves("import", file, passphrase, &["--name", "again", "--grants"])?;
    let made = made.map_err(|told| anyhow::anyhow!("the import failed: {told}"))?;
    ensure!(
        made["grants_left"] == json!([]) && made["secrets_missing"] == json!([]),
        "{made}"
    );
    let grants = scene.client.grants().await?.items;
    let [grant] = &grants[..] else { bail!("{grants:?}") };
    let again: Name = "again".parse()?;
    ensure!(grant.workspace == again && grant.slot == Slot::Dev, "{grant:?}");
    // It is the file that was imported, not what became of the first import.
    let request = ExecRequest {
        command: Shell::Line("cat ~/deep/file; ls /opt".to_owned()),
        cwd: None,
        env: [].into(),
        stdin: None,
        timeout_ms: None,
        max_output_bytes: None,
    };
    let there = scene.client.sandbox(&again, Slot::Live).exec(&request).await?.stdout;
    ensure!(
        there.starts_with(&format!("{MARK}\n")) && !there.contains("more"),
        "{there}"
    );
    Ok(())
}
