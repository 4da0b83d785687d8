//! Releases as a person builds them: of a Dockerfile and of a devcontainer.json, inside a sandbox. What fails leaves
//! nothing behind.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use choir_api::client::Client;
use choir_api::workspaces::CreateWorkspace;
use choir_core::settings::{Access, PerSlot};
use choir_core::{Slot, WorkspaceSettings};
use choir_e2e::instance::Instance;
use choir_e2e::person::{self, USER, WORKSPACE, run, workspace};
use choir_e2e::waiting::{step, until};
use choir_e2e::{http, skip};
use serde_json::Value;

const DOCKERFILE: &str = r#"# syntax=docker/dockerfile:1
ARG BASE=default
FROM $BASE
ARG WHO=nobody
ENV GREETING="good morning" PLACE=/srv/site
RUN printf '#!/bin/sh\necho "%s, %s"\n' "$GREETING" "$WHO" \
    # As root, or it could not.
    > /usr/local/bin/hello && chmod 755 /usr/local/bin/hello
WORKDIR $PLACE
COPY index.html .
COPY --chown=choir:choir assets assets/
COPY tool /opt/tools/renamed
USER choir
RUN id -un > assets/who && pwd >> assets/who
LABEL of=nothing
EXPOSE 5173
CMD ["python3", "-m", "http.server", "5173", "--bind", "127.0.0.1"]
"#;

struct Scene {
    instance: Instance,
    client: Client,
    token: String,
    project: tempfile::TempDir,
}

#[tokio::test(flavor = "multi_thread")]
async fn dockerfiles_and_devcontainers_become_releases_that_run_and_broken_ones_leave_nothing() -> Result<()> {
    if skip::cannot_run("builds") {
        return Ok(());
    }
    let instance = Instance::up(&[])?;
    let (client, token) = person::sign_in_with_token(&instance).await?;
    let scene = Scene {
        instance,
        client,
        token,
        project: tempfile::tempdir()?,
    };
    let release = step("a Dockerfile is built", scene.dockerfile()).await?;
    step("what it made runs", scene.runs(&release)).await?;
    step("what fails names its line", scene.fails()).await?;
    step("what leads out of the directory is refused", scene.leads_out()).await?;
    step("a devcontainer.json is built", scene.devcontainer()).await?;
    step("no workspace of a build is left", scene.nothing_is_left()).await
}

impl Scene {
    fn path(&self, name: &str) -> PathBuf {
        self.project.path().join(name)
    }

    /// Builds what is in the project; the release, or what it complains of.
    fn builds(&self, more: &[&str]) -> Result<Result<Value, String>> {
        let mut choir = self.instance.choir(&self.token)?;
        choir.args(["--json", "releases", "build"]).arg(self.project.path());
        let output = choir.args(more).output()?;
        Ok(match output.status.code() {
            Some(0) => Ok(serde_json::from_slice(&output.stdout)?),
            Some(1) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
            other => bail!("a build with {more:?} ended with {other:?}"),
        })
    }

    fn built(&self, more: &[&str]) -> Result<Value> {
        self.builds(more)?
            .map_err(|told| anyhow::anyhow!("a build failed: {told}"))
    }

    fn refused(&self, more: &[&str]) -> Result<String> {
        self.builds(more)?.err().context("it was built")
    }

    async fn dockerfile(&self) -> Result<Value> {
        fs::create_dir_all(self.path("assets/deep"))?;
        for (name, text) in [
            ("Dockerfile", DOCKERFILE),
            ("index.html", "the page"),
            ("assets/deep/style.css", "a style"),
            ("tool", "#!/bin/sh\necho a tool\n"),
        ] {
            fs::write(self.path(name), text)?;
        }
        // Over what one call to a sandbox takes.
        fs::write(self.path("assets/large"), vec![b'x'; 12 << 20])?;
        fs::set_permissions(self.path("tool"), fs::Permissions::from_mode(0o755))?;
        let made = self.built(&["--name", "site", "--arg", "WHO=ada"])?;
        ensure!(made["name"] == "site" && made["own"] == true, "{made}");
        ensure!(made["config"]["app_port"] == 5173, "{made}");
        ensure!(made["config"]["env"]["GREETING"] == "good morning", "{made}");
        ensure!(made["config"]["env"]["WHO"].is_null(), "{made}");
        Ok(made)
    }

    async fn runs(&self, release: &Value) -> Result<()> {
        let id = release["id"].as_str().context("no id")?;
        let asked = CreateWorkspace {
            name: workspace(),
            release: Some(id.parse()?),
        };
        self.client.create_workspace_from(&asked).await?;
        let everybody = WorkspaceSettings {
            access: Some(PerSlot {
                live: Access::Private,
                dev: Access::Public,
            }),
            ..WorkspaceSettings::default()
        };
        self.client.patch_workspace(&workspace(), &everybody).await?;
        person::start(&self.client, Slot::Dev).await?;
        until("the app of the build to answer", async || {
            let dev = self.instance.app("dev", WORKSPACE, USER);
            let answer = http::send("GET", &dev.join("index.html")?, &[], "").await?;
            Ok((answer.status == 200 && answer.body == "the page").then_some(()))
        })
        .await?;
        let line = "hello && /opt/tools/renamed && cat /srv/site/assets/who && wc -c < /srv/site/assets/large";
        let told = run(&self.client, Slot::Dev, line).await?;
        let expected = "good morning, ada\na tool\nchoir\n/srv/site\n12582912\n";
        ensure!(told == expected, "{told}");
        let line = "cd /srv/site && stat -c '%U:%G %a %n' /usr/local/bin/hello index.html assets assets/deep/style.css";
        let owners = run(&self.client, Slot::Dev, line).await?;
        for owner in [
            "root:root 755 /usr/local/bin/hello\n",
            "root:root 644 index.html\n",
            "choir:choir 755 assets\n",
            "choir:choir 644 assets/deep/style.css\n",
        ] {
            ensure!(owners.contains(owner), "{owner}: {owners}");
        }
        let left = run(&self.client, Slot::Dev, "ls -A ~").await?;
        ensure!(!left.contains(".choir-build"), "{left}");
        Ok(())
    }

    async fn fails(&self) -> Result<()> {
        let broken = self.path("broken.Dockerfile");
        let broken = broken.to_str().context("a path")?;
        fs::write(broken, "FROM default\n\nRUN true\nRUN echo on its way && exit 7\n")?;
        let told = self.refused(&["--file", broken])?;
        ensure!(
            told.contains("broken.Dockerfile:4: ") && told.contains("ended with 7"),
            "{told}"
        );
        ensure!(told.contains("on its way\n"), "its output is shown: {told}");
        // A registry that nobody runs.
        fs::write(broken, "FROM localhost:1/none:1\n")?;
        let told = self.refused(&["--file", broken])?;
        ensure!(told.contains("localhost:1/none:1 could not be fetched"), "{told}");
        self.nothing_is_left().await
    }

    async fn leads_out(&self) -> Result<()> {
        std::os::unix::fs::symlink("/etc/hostname", self.path("leak"))?;
        let leak = self.path("leak.Dockerfile");
        let leak = leak.to_str().context("a path")?;
        for source in ["leak", "../../etc/hostname"] {
            fs::write(leak, format!("FROM default\nCOPY {source} /srv/x\n"))?;
            let told = self.refused(&["--file", leak])?;
            ensure!(
                told.contains("leak.Dockerfile:2: ") && told.contains("leads out of"),
                "{told}"
            );
        }
        Ok(())
    }

    async fn devcontainer(&self) -> Result<()> {
        fs::remove_file(self.path("Dockerfile"))?;
        fs::create_dir(self.path(".devcontainer"))?;
        let text = r#"{
            // What new workspaces start from.
            "image": "default",
            "name": "from-devcontainer",
            "containerEnv": {"MODE": "trial"},
            "postCreateCommand": "echo \"$MODE by $(id -un)\" | sudo tee /etc/made-by",
            "forwardPorts": [4321],
        }"#;
        fs::write(self.path(".devcontainer/devcontainer.json"), text)?;
        let made = self.built(&[])?;
        ensure!(made["name"] == "from-devcontainer", "{made}");
        ensure!(made["config"]["app_port"] == 4321, "{made}");
        let id = made["id"].as_str().context("no id")?;
        let mut choir = self.instance.choir(&self.token)?;
        let deployed = choir.args(["deploy", "dev", id]).output()?;
        ensure!(deployed.status.success(), "{deployed:?}");
        let told = run(&self.client, Slot::Dev, "cat /etc/made-by && echo $MODE").await?;
        ensure!(told == "trial by choir\ntrial\n", "{told}");
        Ok(())
    }

    async fn nothing_is_left(&self) -> Result<()> {
        let workspaces = self.client.workspaces().await?;
        let names: Vec<&str> = workspaces.iter().map(|it| it.name.as_str()).collect();
        ensure!(names == [WORKSPACE], "{names:?}");
        Ok(())
    }
}
