//! Common tools in a real sandbox: each reaches the outside as it is set up, and again without a proxy variable. What the
//! table of docs/egress.md says was seen here.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use choir_api::audit::AuditQuery;
use choir_api::client::Client;
use choir_core::{EgressPolicy, Slot, WorkspaceSettings};
use choir_e2e::instance::Instance;
use choir_e2e::neighbour::Neighbour;
use choir_e2e::person::{self, exec, run, workspace};
use choir_e2e::registries;
use choir_e2e::skip;
use choir_e2e::waiting::{step, until};
use url::Url;

/// How a tool goes out where it is free to choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// It asks the proxy that the variables name.
    Proxy,
    /// It asks the resolver, and connects.
    Resolver,
}

struct Tool {
    name: &'static str,
    way: Way,
    /// What it needs beyond the default release.
    install: &'static str,
    /// `$R` is the address of a package's page, `$H` its host, `$N` the neighbour's name, `$F` its directory.
    line: &'static str,
}

const fn tool(name: &'static str, way: Way, line: &'static str) -> Tool {
    Tool {
        name,
        way,
        install: "",
        line,
    }
}

/// In the default release.
const OWN: [Tool; 15] = [
    tool("curl", Way::Proxy, "curl -fsS -o /dev/null $R"),
    tool("wget", Way::Proxy, "wget -q -O /dev/null $R"),
    tool("git (HTTP)", Way::Proxy, "git ls-remote http://$N/a.git | grep -q HEAD"),
    tool(
        "git (SSH)",
        Way::Resolver,
        "git ls-remote root@$N:$F/a.git | grep -q HEAD",
    ),
    tool("ssh", Way::Resolver, "test $(ssh root@$N echo over ssh | wc -w) = 2"),
    tool(
        "pip",
        Way::Proxy,
        "pip -q download --retries 0 --no-cache-dir --no-deps -d $(mktemp -d) six",
    ),
    tool(
        "npm",
        Way::Proxy,
        "npm --fetch-retries 0 --cache $(mktemp -d) view is-number version",
    ),
    tool(
        "cargo",
        Way::Proxy,
        "cd $(mktemp -d) && cargo init -q --name a && echo 'itoa = \"1\"' >> Cargo.toml && \
         CARGO_HOME=$(mktemp -d) cargo -q fetch",
    ),
    tool(
        "apt",
        Way::Proxy,
        "sudo apt-get -q update -o Acquire::Retries=0 -o APT::Update::Error-Mode=any",
    ),
    tool(
        "node fetch",
        Way::Resolver,
        "node -e 'fetch(process.argv[1]).then(a => process.exit(a.ok ? 0 : 1), e => { console.error(e); process.exit(1) })' $R",
    ),
    tool(
        "Python urllib",
        Way::Proxy,
        "python3 -c 'import sys, urllib.request as it; it.urlopen(sys.argv[1]).read()' $R",
    ),
    tool(
        "Python asyncio",
        Way::Resolver,
        "python3 -c 'import asyncio, sys; asyncio.run(asyncio.open_connection(sys.argv[1], 443, ssl=True))' $H",
    ),
    tool(
        "psql",
        Way::Resolver,
        "test $(psql -h $N -U postgres -Atc 'select 6 * 7') = 42",
    ),
    tool("redis-cli", Way::Resolver, "test $(redis-cli -h $N ping) = PONG"),
    tool(
        "Rust std::net",
        Way::Resolver,
        "cd $(mktemp -d) && echo 'fn main() { std::net::TcpStream::connect((std::env::args().nth(1).unwrap(), 443)).unwrap(); }' \
         > a.rs && rustc a.rs 2>/dev/null && ./a $H",
    ),
];

const fn installed(name: &'static str, way: Way, install: &'static str, line: &'static str) -> Tool {
    Tool {
        name,
        way,
        install,
        line,
    }
}

/// From packages, which takes minutes.
const MORE: [Tool; 10] = [
    installed(
        "uv",
        Way::Proxy,
        "python3 -m venv ~/tools && ~/tools/bin/pip -q install uv requests",
        "~/tools/bin/uv -q pip install --system-certs --no-cache --target $(mktemp -d) six",
    ),
    installed(
        "Python requests",
        Way::Proxy,
        "",
        "~/tools/bin/python -c 'import requests, sys; requests.get(sys.argv[1]).raise_for_status()' $R",
    ),
    installed(
        "pnpm",
        Way::Proxy,
        "npm install --no-progress --prefix ~/js pnpm@9 yarn@1",
        "cd $(mktemp -d) && echo '{}' > package.json && npm_config_fetch_retries=0 ~/js/node_modules/.bin/pnpm add --store-dir s is-number",
    ),
    installed(
        "yarn",
        Way::Proxy,
        "",
        "cd $(mktemp -d) && echo '{}' > package.json && \
         ~/js/node_modules/.bin/yarn add --cache-folder c --registry $(npm config get registry) is-number",
    ),
    installed(
        "mysql",
        Way::Resolver,
        "sudo apt-get -q update && sudo apt-get -qy install mariadb-client",
        "test $(mysql -h $N -u root --skip-ssl -Ne 'select 6 * 7') = 42",
    ),
    installed(
        "Go net/http",
        Way::Proxy,
        "sudo apt-get -qy install golang-go",
        r#"cd $(mktemp -d) && printf 'package main\nimport ("net/http"; "os")\nfunc main() { a, e := http.Get(os.Args[1])
if e != nil || a.StatusCode != 200 { println(e.Error()); os.Exit(1) } }\n' > a.go && go run a.go $R"#,
    ),
    installed(
        "Go net.Dial",
        Way::Resolver,
        "",
        r#"cd $(mktemp -d) && printf 'package main\nimport ("crypto/tls"; "os")\nfunc main() {
if _, e := tls.Dial("tcp", os.Args[1] + ":443", nil); e != nil { println(e.Error()); os.Exit(1) } }\n' > a.go && go run a.go $H"#,
    ),
    installed(
        "Java HttpClient",
        Way::Resolver,
        "sudo apt-get -qy install default-jdk-headless ca-certificates-java",
        r#"cd $(mktemp -d) && printf 'import java.net.*; import java.net.http.*;
class A { public static void main(String[] a) throws Exception { var it = HttpClient.newHttpClient()
.send(HttpRequest.newBuilder(URI.create(a[0])).build(), HttpResponse.BodyHandlers.discarding());
System.exit(it.statusCode() == 200 ? 0 : 1); } }' > A.java && java A.java $R"#,
    ),
    // It would ask the proxy, but not for a name that leads to loopback, as every name here does.
    installed(
        "Ruby net/http",
        Way::Resolver,
        "sudo apt-get -qy install ruby",
        r#"ruby -rnet/http -e 'exit Net::HTTP.get_response(URI(ARGV[0])).is_a?(Net::HTTPOK)' $R"#,
    ),
    installed(
        "PHP streams",
        Way::Resolver,
        "sudo apt-get -qy install php-cli",
        r#"php -r 'exit(file_get_contents($argv[1]) === false ? 1 : 0);' $R"#,
    ),
];

const VARIABLES: &str = "HTTP_PROXY HTTPS_PROXY ALL_PROXY http_proxy https_proxy all_proxy CARGO_HTTP_PROXY";

/// The neighbour, as the hypervisor's resolver knows it.
const NAME: &str = "neighbour.example.com";

#[tokio::test]
async fn tools_reach_the_outside_with_and_without_a_proxy_variable_and_keep_to_the_policy() -> Result<()> {
    if skip::cannot_run("tools") {
        return Ok(());
    }
    let stage = Stage::set().await?;
    let mut seen = Vec::new();
    for tool in &OWN {
        seen.push(step(tool.name, stage.try_out(tool)).await?);
    }
    println!("{}", seen.join("\n"));
    step("the policy", stage.the_policy_holds_on_both_ways()).await
}

#[tokio::test]
#[ignore = "slow"]
async fn installed_tools_reach_the_outside_with_and_without_a_proxy_variable() -> Result<()> {
    if skip::cannot_run("installed tools") {
        return Ok(());
    }
    let stage = Stage::set().await?;
    let mut seen = Vec::new();
    for tool in &MORE {
        seen.push(step(tool.name, stage.try_out(tool)).await?);
    }
    println!("{}", seen.join("\n"));
    Ok(())
}

/// A sandbox, and beside the real registries a neighbour with every server that this machine has.
struct Stage {
    client: Client,
    /// Assignments of the variables in lines.
    given: String,
    host: String,
    /// Tools whose server is not on this machine.
    without_server: BTreeSet<&'static str>,
    _instance: Instance,
    neighbour: Neighbour,
    _files: tempfile::TempDir,
}

impl Stage {
    async fn set() -> Result<Self> {
        let files = tempfile::Builder::new()
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .tempdir()?;
        make_repository(files.path())?;
        let mut neighbour = Neighbour::serve(files.path()).await?;
        let without_server = serve_everything(&mut neighbour, files.path()).await?;
        let hosts = format!("{} {NAME}\n", neighbour.wire.address);
        let mut instance = Instance::up_knowing(&[], &hosts)?;
        let client = person::sign_in(&instance).await?;
        client.create_workspace(&workspace()).await?;
        step("start dev", person::start(&client, Slot::Dev)).await?;
        let mut allowed = step("find the registries", registries::networks(&client, &registries::ALL)).await?;
        allowed.push(format!("{}/32", neighbour.wire.address));
        step("down and up again", async { instance.restart(&allowed) }).await?;
        until("the hypervisor to answer again", async || {
            Ok(Some(client.alive().await?))
        })
        .await?;
        step("start dev again", person::start(&client, Slot::Dev)).await?;
        let registry = Url::parse(run(&client, Slot::Dev, "npm config get registry").await?.trim())?;
        let host = registry.host_str().context("the registry has no host")?.to_owned();
        let page = registry.join("is-number")?;
        let given = format!("R={page}; H={host}; N={NAME}; F={};", files.path().display());
        let key = fs::read_to_string(files.path().join("key"))?;
        run(
            &client,
            Slot::Dev,
            &format!(
                "mkdir -p ~/.ssh && printf '%s' '{key}' > ~/.ssh/id_ed25519 && chmod 600 ~/.ssh/id_ed25519 && \
                 echo 'StrictHostKeyChecking accept-new' > ~/.ssh/config"
            ),
        )
        .await?;
        Ok(Self {
            client,
            given,
            host,
            without_server,
            _instance: instance,
            neighbour,
            _files: files,
        })
    }

    /// The tool's row: as a sandbox is set up, without a proxy variable, and with one that leads nowhere.
    async fn try_out(&self, tool: &Tool) -> Result<String> {
        if self.without_server.contains(tool.name) {
            skip::says(tool.name, "its server is not installed on this machine");
            return Ok(format!("| {} | not tested | | |", tool.name));
        }
        if !tool.install.is_empty() {
            run(&self.client, Slot::Dev, tool.install).await?;
        }
        let Self { client, given, .. } = self;
        run(client, Slot::Dev, &format!("{given} {}", tool.line)).await?;
        let without = format!("unset {VARIABLES} NODE_USE_ENV_PROXY; {given} {}", tool.line);
        run(client, Slot::Dev, &without).await?;
        // The discard port, where nobody listens.
        let nowhere = VARIABLES.split(' ').map(|name| format!("{name}=http://127.0.0.1:9"));
        let nowhere: Vec<_> = nowhere.collect();
        let misled = format!("export {}; {given} {}", nowhere.join(" "), tool.line);
        let way = match exec(client, Slot::Dev, &misled).await?.exit.exit_code {
            0 => Way::Resolver,
            _ => Way::Proxy,
        };
        ensure!(way == tool.way, "{} goes out by {way:?}", tool.name);
        Ok(format!("| {} | {way:?} | works | works |", tool.name))
    }

    async fn the_policy_holds_on_both_ways(&self) -> Result<()> {
        let Self {
            client, given, host, ..
        } = self;
        let ask = format!("{given} curl -sS -m 20 -o /dev/null -w '%{{http_code}}' $R");
        let bare = format!("unset {VARIABLES}; {ask}");
        let raw = format!(
            "unset {VARIABLES}; {given} curl -sS -m 5 -o /dev/null http://{}/",
            self.neighbour.wire.address
        );
        let outcome = async |line: &str| exec(client, Slot::Dev, line).await.map(|done| done.exit.exit_code);
        ensure!(outcome(&raw).await? != 0, "an address leads out by itself");
        ensure!(outcome(&bare).await? == 0, "under `open` the name leads out");
        for policy in [EgressPolicy::Locked, EgressPolicy::Allowlist(vec![NAME.parse()?])] {
            self.set_policy(policy.clone()).await?;
            let before = self.denials().await?;
            for line in [&ask, &bare, &raw] {
                ensure!(outcome(line).await? != 0, "{line} succeeds under {policy:?}");
            }
            let denied = self.denials().await? - before;
            // The same refusal again within minutes is counted in that row. What goes to an address reaches nobody.
            ensure!(
                denied == 1,
                "{denied} rows tell of one refusal, twice, under {policy:?}"
            );
        }
        let listed = format!("unset {VARIABLES}; curl -fsS -o /dev/null http://{NAME}/a.git/HEAD");
        ensure!(outcome(&listed).await? == 0, "what the list names is reached");
        let log = client.logs(&workspace(), Slot::Dev, 200).await?;
        let line = log
            .items
            .iter()
            .find(|l| l.line.contains(&format!("no connection to {host}:443")));
        ensure!(line.is_some(), "the sandbox's log tells of no refusal");
        self.set_policy(EgressPolicy::Allowlist(vec![host.parse()?])).await?;
        ensure!(outcome(&bare).await? == 0, "once allowed, the name leads out");
        Ok(())
    }

    async fn set_policy(&self, egress: EgressPolicy) -> Result<()> {
        let patch = WorkspaceSettings {
            egress: Some(egress),
            ..WorkspaceSettings::default()
        };
        self.client.patch_workspace(&workspace(), &patch).await?;
        Ok(())
    }

    /// Rows of the trail that say a connection to the registry was refused by the policy.
    async fn denials(&self) -> Result<usize> {
        let query = AuditQuery {
            action: Some("egress.connect".to_owned()),
            limit: Some(500),
            ..AuditQuery::default()
        };
        let rows = self.client.audit(&query).await?.items;
        let about = format!("{}:443", self.host);
        let refused = |row: &&choir_api::audit::AuditEntry| {
            row.subject.ends_with(&about) && ["locked", "allowlist"].contains(&row.outcome.as_str())
        };
        Ok(rows.iter().filter(refused).count())
    }
}

/// SSH, PostgreSQL, Redis and MariaDB, as far as they are installed; the tools for which there is no server.
async fn serve_everything(neighbour: &mut Neighbour, files: &Path) -> Result<BTreeSet<&'static str>> {
    let mut without = BTreeSet::new();
    if !serve_ssh(neighbour, files).await? {
        without.extend(["ssh", "git (SSH)"]);
    }
    if !serve_postgres(neighbour, files).await? {
        without.insert("psql");
    }
    if skip::is_installed("redis-server") {
        let serve = "redis-server --bind 0.0.0.0 --protected-mode no --dir";
        let directory = path(files, "")?;
        let command: Vec<_> = serve.split(' ').chain([directory.as_str(), "--save", ""]).collect();
        neighbour.also(6379, &command).await?;
    } else {
        without.insert("redis-cli");
    }
    if skip::is_installed("mariadbd") && skip::is_installed("mariadb-install-db") {
        let data = format!("--datadir={}", path(files, "maria")?);
        must(Command::new("mariadb-install-db").args(["--no-defaults", "--user=root", "--skip-test-db", &data]))?;
        let socket = format!("--socket={}", path(files, "maria.sock")?);
        let serve = "mariadbd --no-defaults --user=root --skip-grant-tables --skip-networking=0";
        let command: Vec<_> = serve.split(' ').chain([data.as_str(), &socket]).collect();
        neighbour.also(3306, &command).await?;
    } else {
        without.insert("mysql");
    }
    Ok(without)
}

/// For root, whose key is the file `key`, empty where there is no server.
async fn serve_ssh(neighbour: &mut Neighbour, files: &Path) -> Result<bool> {
    if !skip::is_installed("sshd") {
        fs::write(files.join("key"), "")?;
        return Ok(false);
    }
    for name in ["key", "host"] {
        must(Command::new("ssh-keygen").args(["-q", "-N", "", "-t", "ed25519", "-f", &path(files, name)?]))?;
    }
    fs::create_dir_all("/run/sshd")?;
    let [host, keys] = [
        format!("HostKey={}", path(files, "host")?),
        format!("AuthorizedKeysFile={}", path(files, "key.pub")?),
    ];
    let options = "StrictModes=no UsePAM=no PermitRootLogin=prohibit-password";
    let mut command = vec!["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-p", "22"];
    command.extend(
        options
            .split(' ')
            .chain([host.as_str(), &keys])
            .flat_map(|it| ["-o", it]),
    );
    neighbour.also(22, &command).await?;
    Ok(true)
}

/// As nobody: it refuses to be root.
async fn serve_postgres(neighbour: &mut Neighbour, files: &Path) -> Result<bool> {
    if !skip::is_installed("initdb") || !skip::is_installed("postgres") {
        return Ok(false);
    }
    let data = path(files, "pg")?;
    fs::create_dir(&data)?;
    must(Command::new("chown").args(["65534:65534", &data]))?;
    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let init = ["initdb", "-D", &data, "-U", "postgres", "-A", "trust", "-N"];
    must(Command::new(nobody[0]).args(&nobody[1..]).args(init))?;
    fs::write(Path::new(&data).join("pg_hba.conf"), "host all all all trust\n")?;
    let settings = ["-c", "listen_addresses=*", "-c", "unix_socket_directories="];
    let serve = [&nobody[..], &["postgres", "-D", &data], &settings].concat();
    neighbour.also(5432, &serve).await?;
    Ok(true)
}

fn path(files: &Path, name: &str) -> Result<String> {
    Ok(files.join(name).to_str().context("a path in UTF-8")?.to_owned())
}

fn must(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let told = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {told}");
    Ok(())
}

/// A bare repository with one commit, which a plain web server can serve.
fn make_repository(directory: &Path) -> Result<()> {
    let git = |at: &Path, arguments: &[&str]| {
        let who = ["-c", "user.name=Ada", "-c", "user.email=ada@example.com"];
        must(Command::new("git").current_dir(at).args(who).args(arguments))
    };
    let work = directory.join("work");
    git(directory, &["init", "-q", "work"])?;
    git(&work, &["commit", "-q", "--allow-empty", "-m", "first"])?;
    git(directory, &["clone", "-q", "--bare", "work", "a.git"])?;
    git(&directory.join("a.git"), &["update-server-info"])
}
