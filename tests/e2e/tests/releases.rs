//! Releases as a person makes them: of images that Podman built and saved, without bash, without a user of ours, without a
//! shell at all; and of a sandbox. What an image says of how it wants to run is not obeyed.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};

use anyhow::{Context as _, Result, bail, ensure};
use choir_api::client::Client;
use choir_api::events::{RELEASE, ReleaseChanged};
use choir_api::sandbox::{Command as Shell, ExecRequest};
use choir_core::settings::{Access, PerSlot};
use choir_core::{Slot, WorkspaceSettings};
use choir_e2e::instance::Instance;
use choir_e2e::person::{self, USER, WORKSPACE, run, workspace};
use choir_e2e::waiting::{PATIENCE, step, until};
use choir_e2e::{http, skip};
use data_encoding::BASE64;
use serde_json::{Value, json};

/// Layers that add, replace and take away, and a configuration that wants what nobody may have.
const CONTAINERFILE: &str = "\
FROM localhost/base:1
COPY new /opt/new
RUN rm -r /opt/old /etc/gone && echo changed > /etc/motd
USER 0:0
ENV LD_PRELOAD=/opt/new CHOIR_SLOT_AT_START=forged
VOLUME /etc
LABEL io.podman.annotations.cid-file=/etc/choir-e2e-evil choir.sandbox=forged
ENTRYPOINT [\"/bin/sh\", \"-c\", \"echo evil > /etc/motd\"]
";

/// What Podman puts into a container of its own, and so into what it exports.
const OF_PODMAN: [&str; 9] = [
    "etc/hosts",
    "etc/hostname",
    "etc/resolv.conf",
    "etc/mtab",
    "proc",
    "dev",
    "sys",
    "run",
    ".dockerenv",
];

struct Scene {
    instance: Instance,
    client: Client,
    token: String,
    builder: Builder,
}

/// A Podman of the test's own, whose storage is thrown away.
struct Builder(tempfile::TempDir);

impl Builder {
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn podman(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new("podman");
        command
            .current_dir(self.0.path())
            .arg("--root")
            .arg(self.path("storage"))
            .arg("--runroot")
            .arg(self.path("run"))
            .args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"])
            .args(["--events-backend", "none", "--runtime", "runc"]);
        let output = succeeded(command.args(arguments))?;
        Ok(String::from_utf8(output.stdout)?)
    }

    /// A root file system of one static program under these names.
    fn base(&self, name: &str, programs: &[&str]) -> Result<()> {
        let root = self.path(name);
        for directory in ["bin", "etc", "opt/old", "tmp"] {
            fs::create_dir_all(root.join(directory))?;
        }
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].map(Path::new);
        let busybox = busybox.into_iter().find(|path| path.exists());
        fs::copy(busybox.context("no busybox")?, root.join("bin/busybox"))?;
        for program in programs {
            symlink("busybox", root.join("bin").join(program))?;
        }
        fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
        fs::write(root.join("etc/gone"), "below")?;
        fs::write(root.join("opt/old/file"), "below")?;
        let tar = self.path(&format!("{name}.tar"));
        succeeded(Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&tar).arg("."))?;
        let image = format!("localhost/{name}:1");
        self.podman(&["import", &format!("{name}.tar"), &image]).map(drop)
    }
}

fn succeeded(command: &mut Command) -> Result<Output> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed: {told}");
    Ok(output)
}

/// Debian's registry, with one user.
struct Registry {
    host: String,
    storage: PathBuf,
    process: Child,
}

impl Registry {
    async fn start(builder: &Builder) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let (storage, users) = (builder.path("registry"), builder.path("users"));
        // `sesame`, by bcrypt.
        fs::write(
            &users,
            "ada:$2y$05$abcdefghijklmnopqrstuuKcS.CYWVYVaLiiCKrrc0A5s3mGesJ9O\n",
        )?;
        let settings = json!({
            "version": "0.1",
            "storage": {"filesystem": {"rootdirectory": storage}},
            "http": {"addr": format!("127.0.0.1:{port}")},
            "auth": {"htpasswd": {"realm": "test", "path": users}},
        });
        // What is JSON is YAML, too.
        let file = builder.path("registry.yml");
        fs::write(&file, settings.to_string())?;
        let log = fs::File::create(builder.path("registry.log"))?;
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(file).stdout(log.try_clone()?).stderr(log);
        let process = command.spawn().context("cannot run docker-registry")?;
        until("the registry to listen", async || {
            Ok(TcpStream::connect(("127.0.0.1", port)).ok().map(drop))
        })
        .await?;
        Ok(Self {
            host: format!("localhost:{port}"),
            storage,
            process,
        })
    }

    /// Changes a byte of every blob that is no document.
    fn spoil(&self) -> Result<()> {
        let listed = Command::new("find")
            .arg(&self.storage)
            .args(["-name", "data"])
            .output()?;
        let mut spoilt = 0;
        for path in String::from_utf8(listed.stdout)?.lines() {
            let mut bytes = fs::read(path)?;
            if !bytes.starts_with(b"{") {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                fs::write(path, bytes)?;
                spoilt += 1;
            }
        }
        ensure!(spoilt > 0, "there is no layer");
        Ok(())
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn text(value: &Value) -> Result<&str> {
    value.as_str().with_context(|| format!("{value} is no text"))
}

#[tokio::test(flavor = "multi_thread")]
async fn images_and_sandboxes_become_releases_that_run_and_hostile_ones_do_not() -> Result<()> {
    if skip::cannot_run("releases") {
        return Ok(());
    }
    let builder = Builder(tempfile::tempdir()?);
    step("Podman builds images", async { build(&builder) }).await?;
    let instance = Instance::up(&[])?;
    let (client, token) = person::sign_in_with_token(&instance).await?;
    client.create_workspace(&workspace()).await?;
    let scene = Scene {
        instance,
        client,
        token,
        builder,
    };
    person::start(&scene.client, Slot::Dev).await?;
    let release = step("an image without bash or a user of ours", scene.alpine_like()).await?;
    step("nothing it asks for is obeyed", scene.is_not_obeyed()).await?;
    step(
        "it holds what Podman would give it",
        scene.holds_what_podman_exports(&release),
    )
    .await?;
    step("an image in a registry", scene.in_a_registry()).await?;
    step("an image without a shell", scene.shell_less()).await?;
    step("an image that was changed", scene.changed()).await?;
    step("an image that cannot start", scene.cannot_start()).await?;
    step("a release of a sandbox", scene.of_a_sandbox()).await?;
    step("what is used stays", scene.used_ones_stay(&release)).await?;
    step("a release that is edited on the host", scene.edited_on_the_host()).await
}

fn build(builder: &Builder) -> Result<()> {
    builder.base(
        "base",
        &["sh", "cat", "id", "ls", "rm", "echo", "httpd", "env", "sleep"],
    )?;
    builder.base("bare", &[])?;
    fs::write(builder.path("new"), "above")?;
    fs::write(builder.path("Containerfile"), CONTAINERFILE)?;
    let tag = [
        "build",
        "--isolation=chroot",
        "--network=host",
        "--layers=true",
        "-t",
        "localhost/layered:1",
        ".",
    ];
    builder.podman(&tag)?;
    builder.podman(&[
        "save",
        "--format=oci-archive",
        "-o",
        "layered.tar",
        "localhost/layered:1",
    ])?;
    builder.podman(&[
        "save",
        "--format=docker-archive",
        "-o",
        "docker.tar",
        "localhost/layered:1",
    ])?;
    builder.podman(&[
        "save",
        "--format=oci-archive",
        "-o",
        "bare-image.tar",
        "localhost/bare:1",
    ])?;
    fs::create_dir(builder.path("homeless"))?;
    fs::write(builder.path("homeless/home"), "a file")?;
    builder.base("homeless", &[])?;
    let (image, archive) = ("localhost/homeless:1", "homeless.tar");
    fs::remove_file(builder.path(archive))?;
    builder.podman(&["save", "--format=oci-archive", "-o", archive, image])?;
    builder.podman(&["create", "--name=c", "--network=none", "localhost/layered:1"])?;
    builder.podman(&["export", "-o", "export.tar", "c"])?;
    fs::create_dir(builder.path("export"))?;
    let (tar, into) = (builder.path("export.tar"), builder.path("export"));
    succeeded(Command::new("tar").arg("-C").arg(into).arg("-xf").arg(tar)).map(drop)
}

impl Scene {
    /// What a person types; its answer as JSON, or what it complains of.
    fn choir(&self, arguments: &[&str]) -> Result<Result<Value, String>> {
        let mut choir = self.instance.choir(&self.token)?;
        let output = choir.arg("--json").args(arguments).output()?;
        Ok(match output.status.code() {
            Some(0) => Ok(serde_json::from_slice(&output.stdout)?),
            Some(1) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
            other => bail!("`choir {arguments:?}` ended with {other:?}"),
        })
    }

    fn done(&self, arguments: &[&str]) -> Result<Value> {
        let answer = self.choir(arguments)?;
        answer.map_err(|told| anyhow::anyhow!("`choir {}` failed: {told}", arguments.join(" ")))
    }

    /// Imports an archive and deploys it to dev; the release.
    fn runs(&self, archive: &str, more: &[&str]) -> Result<String> {
        let archive = self.builder.path(archive);
        let archive = archive.to_str().context("a path")?;
        let made = self.done(&[&["releases", "import", archive], more].concat())?;
        let id = made["id"].as_str().context("no id")?.to_owned();
        let deployed = self.done(&["deploy", "dev", &id])?;
        ensure!(deployed["step"] == "succeeded", "{deployed}");
        Ok(id)
    }

    async fn alpine_like(&self) -> Result<String> {
        let config = self.builder.path("config.json");
        fs::write(
            &config,
            r#"{"start": "exec httpd -f -p 127.0.0.1:3000 -h /opt", "health": {"path": "/new", "timeout_s": 10}}"#,
        )?;
        let config = config.to_str().context("a path")?;
        let id = self.runs("layered.tar", &["--name", "layered", "--config", config])?;
        let files = run(&self.client, Slot::Dev, "cat /etc/motd /opt/new; ls /opt /etc").await?;
        ensure!(files.starts_with("changed\nabove"), "{files}");
        ensure!(!files.contains("old") && !files.contains("gone"), "{files}");
        ensure!(run(&self.client, Slot::Dev, "id -u").await? == "1000\n");
        let written = run(&self.client, Slot::Dev, "echo mine > ~/file && cat ~/file").await?;
        ensure!(written == "mine\n", "its home is its user's");
        Ok(id)
    }

    async fn is_not_obeyed(&self) -> Result<()> {
        let environment = run(&self.client, Slot::Dev, "env").await?;
        ensure!(!environment.contains("LD_PRELOAD"), "{environment}");
        ensure!(environment.contains("CHOIR_SLOT_AT_START=dev\n"), "{environment}");
        ensure!(!Path::new("/etc/choir-e2e-evil").exists());
        let motd = run(&self.client, Slot::Dev, "cat /etc/motd").await?;
        ensure!(
            motd == "changed\n",
            "its entry point was not run, nor is /etc another volume: {motd}"
        );
        // The control: it does ask for all that, and Podman would do as it says.
        let asks = self.builder.podman(&["image", "inspect", "localhost/layered:1"])?;
        for wish in ["LD_PRELOAD", "io.podman.annotations.cid-file", "0:0", "echo evil"] {
            ensure!(asks.contains(wish), "{wish}: {asks}");
        }
        Ok(())
    }

    async fn holds_what_podman_exports(&self, release: &str) -> Result<()> {
        let ours = self.instance.path("volumes").join(release).join("root");
        let (ours, podmans) = (tree(&ours)?, tree(&self.builder.path("export"))?);
        ensure!(podmans.len() > 10, "{podmans:?}");
        for (name, entry) in &podmans {
            if !OF_PODMAN.contains(&name.as_str()) {
                let own = ours.iter().find(|(n, _)| n == name);
                ensure!(
                    own.is_some_and(|(_, own)| own == entry),
                    "{name}: {own:?} and not {entry}"
                );
            }
        }
        let extra = ours.iter().find(|(name, _)| !podmans.iter().any(|(n, _)| n == name));
        ensure!(extra.is_none(), "{extra:?}");
        Ok(())
    }

    async fn shell_less(&self) -> Result<()> {
        self.runs("bare-image.tar", &["--name", "bare"])?;
        let request = ExecRequest {
            command: Shell::Argv(["/bin/busybox", "echo", "hello"].map(str::to_owned).to_vec()),
            cwd: None,
            env: [].into(),
            stdin: None,
            timeout_ms: None,
            max_output_bytes: None,
        };
        let done = self.client.sandbox(&workspace(), Slot::Dev).exec(&request).await?;
        ensure!(done.exit.exit_code == 0 && done.stdout == "hello\n", "{done:?}");
        Ok(())
    }

    async fn changed(&self) -> Result<()> {
        let honest = fs::read(self.builder.path("docker.tar"))?;
        let at = honest
            .windows(8)
            .position(|w| w == b"changed\n")
            .context("no such file")?;
        let mut changed = honest;
        changed[at] = b'C';
        let path = self.builder.path("changed.tar");
        fs::write(&path, changed)?;
        let refused = self.choir(&["releases", "import", path.to_str().context("a path")?])?;
        let told = refused.err().context("it was imported")?;
        ensure!(told.contains("is not what its digest says"), "{told}");
        let volumes = self.instance.operate(&["fsck"])?;
        ensure!(volumes.starts_with("clean"), "{volumes}");
        // The control: unchanged it is a release.
        let honest = self.builder.path("docker.tar");
        let made = self.done(&[
            "releases",
            "import",
            honest.to_str().context("a path")?,
            "--name",
            "docker",
        ])?;
        ensure!(made["state"] == "verified", "{made}");
        let id = made["id"].as_str().context("no id")?;
        self.done(&["releases", "rm", id]).map(drop)
    }

    /// As root on the host does it: a release that ran is changed, and nothing starts from it any more.
    async fn edited_on_the_host(&self) -> Result<()> {
        let client = &self.client;
        let releases = client.releases().await?.items;
        let release = &releases.iter().find(|it| !it.own).context("no release of the box")?.id;
        self.done(&["deploy", "dev", release.as_str()])?;
        let volumes = fs::read_dir(self.instance.path("volumes"))?;
        let names = volumes.map(|entry| Ok(entry?.file_name().into_string().unwrap_or_default()));
        let names = names.collect::<Result<Vec<_>>>()?;
        let copy = names.iter().find(|name| name.starts_with(&format!("{release}-u")));
        let root = self
            .instance
            .path("volumes")
            .join(copy.context("no copy")?)
            .join("root");
        let writable = |yes: bool| {
            let value = if yes { "false" } else { "true" };
            let mut btrfs = Command::new("btrfs");
            succeeded(
                btrfs
                    .args(["property", "set", "-f", "-ts"])
                    .arg(&root)
                    .args(["ro", value]),
            )
            .map(drop)
        };
        ensure!(fs::write(root.join("etc/motd"), "evil").is_err(), "it is not read-only");
        writable(true)?;
        fs::write(root.join("etc/motd"), "evil")?;
        writable(false)?;
        let told = self
            .choir(&["deploy", "dev", release.as_str()])?
            .err()
            .context("it was deployed")?;
        ensure!(told.contains("was changed on the host"), "{told}");
        let motd = run(client, Slot::Dev, "cat /etc/motd 2>/dev/null; true").await?;
        ensure!(!motd.contains("evil"), "{motd}");
        Ok(())
    }

    /// Where the home should be there is a file: it is found when it is imported, and not when a slot is to run it.
    async fn cannot_start(&self) -> Result<()> {
        let path = self.builder.path("homeless.tar");
        let refused = self.choir(&["releases", "import", path.to_str().context("a path")?])?;
        let told = refused.err().context("it was imported")?;
        ensure!(told.contains("it does not start"), "{told}");
        until("nothing of the trial to be left", async || {
            let volumes = self.instance.operate(&["fsck"])?;
            Ok(volumes.starts_with("clean").then_some(()))
        })
        .await?;
        let containers = self.instance.containers().await?;
        ensure!(containers.len() == 1, "{containers:?}");
        Ok(())
    }

    /// A private one, whose login this user keeps where `docker login` keeps it. Nothing of it reaches the hypervisor.
    async fn in_a_registry(&self) -> Result<()> {
        let registry = Registry::start(&self.builder).await?;
        let image = format!("{}/team/layered:1", registry.host);
        let pushed = format!("docker://{image}");
        let push = [
            "push",
            "--tls-verify=false",
            "--creds",
            "ada:sesame",
            "localhost/layered:1",
            &pushed,
        ];
        self.builder.podman(&push)?;
        let refused = self.choir(&["releases", "pull", &image])?;
        let told = refused.err().context("a stranger has it")?;
        ensure!(told.contains("podman login"), "{told}");

        let auth = BASE64.encode(b"ada:sesame");
        let logins = json!({"auths": {&registry.host: {"auth": auth}}}).to_string();
        fs::create_dir(self.instance.path(".docker"))?;
        fs::write(self.instance.path(".docker/config.json"), logins)?;
        let made = self.done(&["releases", "pull", &image])?;
        ensure!(
            made["state"] == "verified" && made["name"] == "team/layered:1",
            "{made}"
        );
        let id = made["id"].as_str().context("no id")?;
        let deployed = self.done(&["deploy", "dev", id])?;
        ensure!(deployed["step"] == "succeeded", "{deployed}");
        let seen = run(&self.client, Slot::Dev, "cat /opt/new").await?;
        ensure!(seen == "above", "{seen}");
        let again = format!("{}/team/layered@sha256:{}", registry.host, text(&made["image_digest"])?);
        let pinned = self.done(&["releases", "pull", &again, "--name", "pinned"])?;
        ensure!(pinned["image_digest"] == made["image_digest"], "{pinned}");

        // What the registry holds is changed, and it may not notice.
        let absent = self.choir(&["releases", "pull", &format!("{}/team/none:1", registry.host)])?;
        ensure!(absent.is_err(), "it has what nobody pushed");
        registry.spoil()?;
        let refused = self.choir(&["releases", "pull", &image])?;
        let told = refused.err().context("what was changed was imported")?;
        ensure!(told.contains("could not be fetched"), "{told}");
        Ok(())
    }

    async fn of_a_sandbox(&self) -> Result<()> {
        let mut events = self.client.events(None).await?;
        let made = self.done(&["releases", "make", "--from", "dev", "--name", "of-dev"])?;
        let id = made["id"].as_str().context("no id")?;
        let told = async {
            while let Some(event) = events.next().await? {
                if event.name == RELEASE {
                    return Ok(serde_json::from_str::<ReleaseChanged>(&event.data)?);
                }
            }
            bail!("the stream of events ended")
        };
        let told = tokio::time::timeout(PATIENCE, told)
            .await
            .context("nothing was told")??;
        ensure!(told.id.as_str() == id && told.state == "candidate", "{told:?}");
        let listed = self.done(&["releases"])?;
        let found = listed["items"]
            .as_array()
            .context("no list")?
            .iter()
            .find(|r| r["id"] == id);
        ensure!(
            found.is_some_and(|r| r["own"] == true && r["bytes"].as_u64() > Some(0)),
            "{found:?}"
        );
        let deployed = self.done(&["deploy", "live", id])?;
        ensure!(deployed["step"] == "succeeded", "{deployed}");
        let motd = run(&self.client, Slot::Live, "/bin/busybox cat /etc/motd").await;
        ensure!(motd.is_err(), "there is no shell in it: {motd:?}");
        let rolled = self.done(&["rollback"])?;
        ensure!(rolled["step"] == "succeeded", "{rolled}");
        ensure!(run(&self.client, Slot::Live, "bash -c 'echo $0'").await? == "bash\n");
        Ok(())
    }

    async fn used_ones_stay(&self, release: &str) -> Result<()> {
        self.done(&["deploy", "dev", release])?;
        let everybody = WorkspaceSettings {
            access: Some(PerSlot {
                live: Access::Private,
                dev: Access::Public,
            }),
            ..WorkspaceSettings::default()
        };
        self.client.patch_workspace(&workspace(), &everybody).await?;
        until("the app of the image to answer", async || {
            let dev = self.instance.app("dev", WORKSPACE, USER);
            let answer = http::send("GET", &dev.join("new")?, &[], "").await?;
            Ok((answer.status == 200 && answer.body == "above").then_some(()))
        })
        .await?;
        let refused = self.choir(&["releases", "rm", release])?;
        let told = refused.err().context("it was deleted")?;
        ensure!(told.contains("slot runs this release"), "{told}");
        Ok(())
    }
}

/// Every path below a directory with its kind, mode, owner and contents, whatever range its ids are in.
fn tree(top: &Path) -> Result<Vec<(String, String)>> {
    let base = fs::metadata(top)?.uid();
    let (mut found, mut left) = (Vec::new(), vec![top.to_owned()]);
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            let meta = fs::symlink_metadata(&path)?;
            let holds = if meta.is_dir() {
                left.push(path.clone());
                "a directory".to_owned()
            } else if meta.is_symlink() {
                format!("a link to {}", fs::read_link(&path)?.display())
            } else {
                format!("{} bytes, {:x}", meta.len(), checksum(&fs::read(&path)?))
            };
            let name = path.strip_prefix(top)?.to_string_lossy().into_owned();
            found.push((name, format!("{holds}, {:o}, {}", meta.mode(), meta.uid() - base)));
        }
    }
    Ok(found)
}

fn checksum(bytes: &[u8]) -> u64 {
    use std::hash::{DefaultHasher, Hash as _, Hasher as _};
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}
