//! Git over SSH from a real sandbox to a real OpenSSH server, and signed commits, with a key that stays with the
//! hypervisor.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use choir_api::client::Client;
use choir_api::grants::CreateGrant;
use choir_api::secrets::{PutSecret, SecretText};
use choir_core::{Inject, Slot, SshUse};
use choir_e2e::browser::Browser;
use choir_e2e::instance::Instance;
use choir_e2e::neighbour::Neighbour;
use choir_e2e::person::{self, exec, run, workspace};
use choir_e2e::skip;
use choir_e2e::waiting::{step, until};
use tokio::net::TcpStream;

/// How the sandbox calls the server. Nothing resolves it: the way there is the proxy's, to an address.
const HOST: &str = "git.e2e.example";

/// Carries a connection through the sandbox's proxy, as `nc -X connect` would.
const TUNNEL: &str = r"
import os, socket, sys, threading
s = socket.create_connection(('127.0.0.1', 9092))
s.sendall(('CONNECT %s:22 HTTP/1.1\r\nHost: %s:22\r\n\r\n' % (sys.argv[1], sys.argv[1])).encode())
head = b''
while b'\r\n\r\n' not in head:
    more = s.recv(1)
    if not more: sys.exit('closed: %r' % head)
    head += more
if b' 200 ' not in head.split(b'\r\n')[0]: sys.exit(repr(head))
def up():
    while True:
        data = os.read(0, 65536)
        if not data: break
        s.sendall(data)
    s.shutdown(socket.SHUT_WR)
threading.Thread(target=up, daemon=True).start()
while True:
    data = s.recv(65536)
    if not data: break
    os.write(1, data)
";

/// Where some bytes, which are written backwards, are: files, environments and command lines.
const SEARCH: &str = r"
import glob, os, sys
wanted = [word[::-1].encode() for word in sys.argv[1:]]
places = glob.glob('/proc/[0-9]*/environ') + glob.glob('/proc/[0-9]*/cmdline')
for top in ['/home', '/root', '/etc', '/run', '/tmp', '/var']:
    for directory, _, files in os.walk(top):
        places += [os.path.join(directory, name) for name in files]
for place in places:
    if os.path.isfile(place):
        try:
            with open(place, 'rb') as file:
                data = file.read()
        except OSError:
            continue
        if any(word in data for word in wanted):
            print(place)
";

#[tokio::test]
async fn a_sandbox_clones_pushes_and_signs_with_a_key_that_it_never_holds() -> Result<()> {
    if skip::cannot_run("repositories") {
        return Ok(());
    }
    let nothing = tempfile::tempdir()?;
    let neighbour = Neighbour::serve(nothing.path()).await?;
    let server = Server::start(&neighbour).await?;
    let instance = Instance::up(&[format!("{}/32", neighbour.wire.address)])?;
    let browser = Browser::start().await?;
    let page = browser.page().await?;
    person::register(&page, &instance).await?;
    let client = person::token(&page, &instance, &person::EVERYTHING).await?;
    client.create_workspace(&workspace()).await?;
    for slot in Slot::ALL {
        step(&format!("start {slot}"), person::start(&client, slot)).await?;
        prepare(&client, slot, &neighbour).await?;
    }

    step("refused without a grant", refused(&client, Slot::Dev, "dev")).await?;
    step("grant", grant(&client, &server)).await?;
    step("clone, commit and push", work(&client, &server)).await?;
    step("the other slot is refused", refused(&client, Slot::Live, "live")).await?;
    step("another user is refused", another_user(&client)).await?;
    step("the key is nowhere inside", nowhere(&client, &server)).await
}

/// Reaches the server by the name in addresses and grants, without a word about host keys or identities.
async fn prepare(client: &Client, slot: Slot, neighbour: &Neighbour) -> Result<()> {
    let line = format!(
        "cat > ~/tunnel.py <<'END'\n{TUNNEL}END\nmkdir -p -m 700 ~/.ssh && printf 'Host {HOST}\\n ProxyCommand python3 \
         ~/tunnel.py {}\\n' > ~/.ssh/config",
        neighbour.wire.address
    );
    run(client, slot, &line).await.map(drop)
}

async fn refused(client: &Client, slot: Slot, name: &str) -> Result<()> {
    let line = format!(
        "GIT_SSH_COMMAND='ssh -o BatchMode=yes -o StrictHostKeyChecking=no' git clone -q git@{HOST}:/a.git ~/no"
    );
    let told = exec(client, slot, &line).await?;
    ensure!(told.exit.exit_code != 0, "{name} cloned without a grant");
    ensure!(told.stderr.contains("Permission denied"), "{}", told.stderr);
    // What was refused waits for its owner, with the host's fingerprint to compare.
    let requests = client.grant_requests().await?.items;
    let asked = requests.iter().find(|it| it.slot == slot && it.ssh.is_some());
    let asked = asked.with_context(|| format!("no request among {requests:?}"))?;
    let what = asked.ssh.as_deref().unwrap_or_default();
    ensure!(what.starts_with("sign in at the host with the key SHA256:"), "{what}");
    // What it believed without being told must not help the next try.
    run(client, slot, "rm -rf ~/no ~/.ssh/known_hosts").await.map(drop)
}

async fn grant(client: &Client, server: &Server) -> Result<()> {
    let put = PutSecret {
        value: SecretText::new(fs::read_to_string(server.path("user"))?),
        reveal: false,
    };
    client.put_secret(&"DEPLOY".parse()?, &put).await?;
    let host_key = fs::read_to_string(server.path("host.pub"))?;
    let ssh = SshUse {
        host_keys: vec![host_key.trim().to_owned()],
        namespaces: vec!["git".to_owned()],
        ..SshUse::default()
    };
    let grant = CreateGrant {
        workspace: workspace(),
        slot: Slot::Dev,
        capability: "deploy".parse()?,
        secret: "DEPLOY".parse()?,
        template: None,
        hosts: Some(vec![HOST.parse()?]),
        methods: None,
        path_prefix: None,
        inject: Some(Inject::Ssh { ssh }),
        expires_at: None,
    };
    client.create_grant(&grant).await.map(drop)?;
    let open = client.grant_requests().await?.items;
    ensure!(
        !open.iter().any(|it| it.slot == Slot::Dev && it.ssh.is_some()),
        "a request is left open: {open:?}"
    );
    Ok(())
}

/// No option is needed and nothing asks: the host is known, the key is found.
async fn work(client: &Client, server: &Server) -> Result<()> {
    run(
        client,
        Slot::Dev,
        &format!("git clone -q git@{HOST}:/a.git ~/a </dev/null"),
    )
    .await?;
    let read = run(client, Slot::Dev, "cat ~/a/README").await?;
    ensure!(read.trim() == "cloned", "the clone has `{read}`");
    let setup = "cd ~/a && git config user.name Ada && git config user.email ada@example.com && git config gpg.format ssh \
                 && git config user.signingkey \"key::$(ssh-add -L)\" && git config commit.gpgsign true";
    run(client, Slot::Dev, setup).await?;
    let commit =
        "cd ~/a && echo changed > README && git commit -qam second && git push -q origin HEAD:main && git fetch -q";
    run(client, Slot::Dev, commit).await?;
    let pushed = server.git(&["show", "main:README"])?;
    ensure!(pushed.trim() == "changed", "the server has `{pushed}`");
    // Verified by the server's own Git, with the public half that it always had.
    let public = fs::read_to_string(server.path("user.pub"))?;
    fs::write(server.path("allowed"), format!("ada@example.com {public}"))?;
    let allowed = format!("gpg.ssh.allowedSignersFile={}", server.path("allowed").display());
    server.git(&["-c", &allowed, "verify-commit", "main"])?;
    // The control: the commit before it was not signed.
    let unsigned = server.git(&["-c", &allowed, "verify-commit", "main~1"]);
    ensure!(unsigned.is_err(), "an unsigned commit was verified");
    Ok(())
}

async fn another_user(client: &Client) -> Result<()> {
    let told = exec(client, Slot::Dev, &format!("ssh -o BatchMode=yes root@{HOST} true")).await?;
    ensure!(told.exit.exit_code != 0, "signed in as root");
    let requests = client.grant_requests().await?.items;
    ensure!(
        requests.iter().any(|it| it.ssh.as_deref() == Some("sign in as root")),
        "no request among {requests:?}"
    );
    Ok(())
}

async fn nowhere(client: &Client, server: &Server) -> Result<()> {
    let text = fs::read_to_string(server.path("user"))?;
    // The lines that hold the private half; the first ones are the public half.
    let lines: Vec<&str> = text.lines().collect();
    let canary = lines.get(4).context("the key is short")?;
    // Backwards, so that the search does not find itself.
    let backwards: String = canary.chars().rev().collect();
    run(client, Slot::Dev, "echo CONTROL-THAT-IS-THERE > ~/control").await?;
    run(client, Slot::Dev, &format!("cat > ~/search.py <<'END'\n{SEARCH}END")).await?;
    // Environments are shown to their own user alone, the rest of the files to root alone.
    let search = |word: &str| format!("python3 ~/search.py {word}; sudo python3 ~/search.py {word}");
    let found = run(client, Slot::Dev, &search(&backwards)).await?;
    ensure!(found.trim() == "", "the key is in {found}");
    // The control: what is in a file, in the environment and in a command line is found there.
    let leak = "A=$(cat ~/control) sh -c 'sleep 60; : CONTROL-THAT-IS-THERE' >/dev/null 2>&1 &";
    let found = run(
        client,
        Slot::Dev,
        &format!("{leak} {}", search("EREHT-SI-TAHT-LORTNOC")),
    )
    .await?;
    for place in ["/home/choir/control", "/environ", "/cmdline"] {
        ensure!(found.contains(place), "the search finds only {found}");
    }
    let files = run(client, Slot::Dev, "ls ~/.ssh").await?;
    ensure!(
        files.split_whitespace().all(|file| file == "config"),
        "~/.ssh has {files}"
    );
    Ok(())
}

/// An OpenSSH server on the neighbour, with a repository of the user `git`.
struct Server {
    directory: tempfile::TempDir,
    daemon: Child,
}

impl Server {
    async fn start(neighbour: &Neighbour) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("choir-e2e-git-")
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir()?;
        let at = |name: &str| directory.path().join(name);
        for key in ["host", "user"] {
            let mut keygen = Command::new("ssh-keygen");
            keygen
                .args(["-q", "-t", "ed25519", "-N", "", "-C", key, "-f"])
                .arg(at(key));
            ensure!(keygen.status().context("ssh-keygen")?.success(), "ssh-keygen failed");
        }
        make_repository(directory.path())?;
        fs::copy(at("user.pub"), at("authorized"))?;
        // Both are this user here, so that the test adds nobody to the machine: `git` by name is forced to the same command.
        fs::write(at("sshd_config"), config(directory.path()))?;
        fs::create_dir_all("/run/sshd")?;
        let passwd = at("passwd");
        let known = fs::read_to_string("/etc/passwd")?;
        let others = known.lines().filter(|line| !line.starts_with("git:"));
        let home = at("").display().to_string();
        let git = format!("git:x:0:0::{home}:/bin/sh");
        fs::write(
            &passwd,
            others.chain([git.as_str()]).collect::<Vec<_>>().join("\n") + "\n",
        )?;
        // In a mount namespace of its own, where there is a user `git`.
        let line = format!(
            "mount --bind {} /etc/passwd && exec /usr/sbin/sshd -D -e -f {}",
            passwd.display(),
            at("sshd_config").display()
        );
        let log = fs::File::create(at("log"))?;
        let mut daemon = Command::new("ip");
        daemon.args([
            "netns",
            "exec",
            &neighbour.wire.name,
            "unshare",
            "--mount",
            "sh",
            "-c",
            &line,
        ]);
        daemon.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let daemon = daemon.spawn().context("cannot start sshd")?;
        let server = Self { directory, daemon };
        until("the SSH server", async || {
            Ok(TcpStream::connect((neighbour.wire.address.as_str(), 22)).await.ok())
        })
        .await?;
        Ok(server)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn git(&self, arguments: &[&str]) -> Result<String> {
        git(&self.path("a.git"), arguments)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _gone = self.daemon.kill();
        let _gone = self.daemon.wait();
    }
}

fn config(at: &Path) -> String {
    let at = at.display();
    format!(
        "Port 22\nHostKey {at}/host\nAuthorizedKeysFile {at}/authorized\nPidFile none\nStrictModes no\nUsePAM no\n\
         PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n\
         ForceCommand case \"$SSH_ORIGINAL_COMMAND\" in git-*) eval \"$(printf %s \"$SSH_ORIGINAL_COMMAND\" | \
         sed \"s|'/a.git'|'{at}/a.git'|\")\";; *) exit 1;; esac\n"
    )
}

fn make_repository(directory: &Path) -> Result<()> {
    git(directory, &["init", "-q", "-b", "main", "work"])?;
    let work = directory.join("work");
    fs::write(work.join("README"), "cloned\n")?;
    git(&work, &["add", "README"])?;
    git(&work, &["commit", "-q", "-m", "first"])?;
    git(directory, &["clone", "-q", "--bare", "work", "a.git"]).map(drop)
}

fn git(at: &Path, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new("git");
    command.current_dir(at);
    command.args([
        "-c",
        "user.name=Ada",
        "-c",
        "user.email=ada@example.com",
        "-c",
        "safe.directory=*",
    ]);
    let output = command.args(arguments).output().context("cannot run git")?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "git {}: {told}", arguments.join(" "));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
