//! The proxies of `docs/recipes`: the pages' own blocks, with addresses of the test in the place of the examples, and the
//! real programs that read them. It must not know what is asked through them.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use choir_e2e::waiting::until;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tokio::net::TcpStream;

/// Names that are this machine to every client here, and two sites to a browser.
pub const CONTROL: &str = "choir.localhost";
pub const SANDBOXES: &str = "apps.localhost";

/// What a page of `docs/recipes` has in its blocks of this language, in order.
pub fn blocks(page: &str, language: &str) -> Result<Vec<String>> {
    let pages = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/recipes");
    let text = fs::read_to_string(pages.join(page)).with_context(|| format!("there is no recipe {page}"))?;
    let begin = format!("```{language}\n");
    let found = text.split(&begin).skip(1);
    Ok(found
        .filter_map(|rest| Some(rest.split_once("```")?.0.to_owned()))
        .collect())
}

/// A proxy that runs; it ends with this.
pub struct Proxy {
    process: Child,
    /// The certificates that its visitors have to trust, PEM.
    pub trusted: PathBuf,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ended = self.process.kill();
        let _reaped = self.process.wait();
    }
}

/// Where the proxies of one test are, one at a time, with certificates of an authority of the test.
pub struct Place {
    directory: TempDir,
    /// The hypervisor's.
    upstream: u16,
    /// Where TLS is spoken.
    pub port: u16,
    plain: u16,
    relay: u16,
}

impl Place {
    /// Before the hypervisor at this port.
    pub fn new(upstream: u16) -> Result<Self> {
        let [port, plain, relay] = free_ports()?;
        let place = Self {
            directory: tempfile::tempdir()?,
            upstream,
            port,
            plain,
            relay,
        };
        place.make_certificates()?;
        Ok(place)
    }

    /// A block of a page with the test's addresses in it.
    pub fn block(&self, page: &str, language: &str, index: usize) -> Result<String> {
        let block = blocks(page, language)?.into_iter().nth(index);
        let block = block.with_context(|| format!("{page} has too few blocks of {language}"))?;
        Ok(self.with_own_addresses(block))
    }

    /// nginx as its page has it, without what one of its lines says.
    pub async fn nginx(&self, without: Option<&str>) -> Result<Proxy> {
        let proxying = self.block("nginx.md", "nginx", 1)?;
        let kept: Vec<&str> = proxying
            .lines()
            .filter(|line| without.is_none_or(|out| !line.contains(out)))
            .collect();
        let left_out = proxying.lines().count() - kept.len();
        ensure!(
            left_out == usize::from(without.is_some()),
            "{without:?} is on {left_out} lines"
        );
        fs::write(self.path("choir-proxy.conf"), kept.join("\n"))?;
        fs::write(self.path("choir.conf"), self.block("nginx.md", "nginx", 0)?)?;
        let directory = self.directory.path().display();
        let places = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|place| format!("{place}_temp_path {directory}/{place};\n"))
            .concat();
        let main = format!(
            "user root; daemon off; master_process off; pid {directory}/nginx.pid; events {{ worker_connections 256; }}\n\
             http {{ access_log off;\n{places} include {directory}/choir.conf; }}\n"
        );
        fs::write(self.path("nginx.conf"), main)?;
        let mut nginx = Command::new("nginx");
        nginx
            .arg("-c")
            .arg(self.path("nginx.conf"))
            .arg("-e")
            .arg(self.path("log"));
        self.run(nginx, None).await
    }

    /// Caddy as a page has it in one of its blocks, with its own authority in the place of one on the internet.
    pub async fn caddy(&self, page: &str, index: usize) -> Result<Proxy> {
        let block = self.block(page, "caddyfile", index)?;
        let (global, sites) = match block.strip_prefix("{\n") {
            Some(rest) => rest.split_once("\n}\n").context("its global options do not end")?,
            None => ("", block.as_str()),
        };
        // This machine's own store stays as it is.
        let trust = if global.contains("skip_install_trust") {
            ""
        } else {
            "skip_install_trust"
        };
        let (plain, port) = (self.plain, self.port);
        let text = format!(
            "{{\nadmin off\nlocal_certs\n{trust}\nhttp_port {plain}\nhttps_port {port}\ndefault_bind 127.0.0.1\n{global}\n}}\n{sites}"
        );
        fs::write(self.path("Caddyfile"), text)?;
        let mut caddy = Command::new("caddy");
        caddy
            .args(["run", "--adapter", "caddyfile", "--config"])
            .arg(self.path("Caddyfile"));
        caddy
            .env("XDG_DATA_HOME", self.path("data"))
            .env("XDG_CONFIG_HOME", self.path("config"));
        let root = self.path("data/caddy/pki/authorities/local/root.crt");
        self.run(caddy, Some(&root)).await
    }

    /// Traefik as its page has it.
    pub async fn traefik(&self) -> Result<Proxy> {
        fs::write(
            self.path("traefik.toml"),
            self.block("traefik.md", "traefik-static", 0)?,
        )?;
        fs::write(self.path("choir.toml"), self.block("traefik.md", "traefik-dynamic", 0)?)?;
        let mut traefik = Command::new("traefik");
        traefik.arg(format!("--configFile={}", self.path("traefik.toml").display()));
        self.run(traefik, None).await
    }

    /// Starts a proxy, and waits until it listens and its own authority's certificate is there.
    async fn run(&self, mut command: Command, authority: Option<&Path>) -> Result<Proxy> {
        let log = File::create(self.path("output"))?;
        command.env("HOME", self.directory.path());
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let program = command.get_program().to_owned();
        let process = command
            .spawn()
            .with_context(|| format!("{program:?} is not there: run `cargo xtask test`"))?;
        let proxy = Proxy {
            process,
            trusted: self.path("trusted.pem"),
        };
        let ready = until("the proxy to listen", async || {
            TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await?;
            let mut trusted = fs::read_to_string(self.path("authority.pem"))?;
            if let Some(authority) = authority {
                trusted += &fs::read_to_string(authority)?;
            }
            fs::write(&proxy.trusted, trusted)?;
            Ok(Some(()))
        });
        ready
            .await
            .with_context(|| fs::read_to_string(self.path("output")).unwrap_or_default())?;
        Ok(proxy)
    }

    fn with_own_addresses(&self, block: String) -> String {
        let (port, plain) = (self.port, self.plain);
        let own = |name: &str| self.path(name).display().to_string();
        let control = format!("{CONTROL}:{port}");
        let mut own_addresses = vec![
            ("127.0.0.1:9090", format!("127.0.0.1:{}", self.upstream)),
            ("127.0.0.1:9180", format!("127.0.0.1:{}", self.relay)),
            ("listen [::]:80;", String::new()),
            ("listen [::]:443 ssl http2;", String::new()),
            ("listen 80;", format!("listen 127.0.0.1:{plain};")),
            ("listen 443 ssl", format!("listen 127.0.0.1:{port} ssl")),
            ("\":80\"", format!("\"127.0.0.1:{plain}\"")),
            ("\":443\"", format!("\"127.0.0.1:{port}\"")),
            ("100.64.0.7", "127.0.0.1".to_owned()),
            ("/etc/nginx/choir-proxy.conf", own("choir-proxy.conf")),
            ("/etc/traefik/choir.toml", own("choir.toml")),
        ];
        let certificates = [
            ("/etc/letsencrypt/live/choir.example.com/fullchain.pem", "choir.pem"),
            ("/etc/letsencrypt/live/choir.example.com/privkey.pem", "choir.key"),
            (
                "/etc/letsencrypt/live/choir-apps.example.net/fullchain.pem",
                "choir-apps.pem",
            ),
            (
                "/etc/letsencrypt/live/choir-apps.example.net/privkey.pem",
                "choir-apps.key",
            ),
            ("/etc/caddy/choir.pem", "choir.pem"),
            ("/etc/caddy/choir.key", "choir.key"),
            ("/etc/caddy/choir-apps.pem", "choir-apps.pem"),
            ("/etc/caddy/choir-apps.key", "choir-apps.key"),
            ("/etc/traefik/choir.pem", "choir.pem"),
            ("/etc/traefik/choir.key", "choir.key"),
            ("/etc/traefik/choir-apps.pem", "choir-apps.pem"),
            ("/etc/traefik/choir-apps.key", "choir-apps.key"),
        ];
        own_addresses.extend(certificates.map(|(example, name)| (example, own(name))));
        // The names come last: they are in some of the above.
        own_addresses.extend([
            ("Host choir.example.com", format!("Host {control}")),
            ("https://choir.example.com", format!("https://{control}")),
            ("https://choir.home.arpa", format!("https://{control}")),
            ("choir.example.com", CONTROL.to_owned()),
            ("choir.home.arpa", CONTROL.to_owned()),
            ("choir-apps.example.net", SANDBOXES.to_owned()),
            ("choir-apps[.]example[.]net", SANDBOXES.replace('.', "[.]")),
            ("choir-apps.home.arpa", SANDBOXES.to_owned()),
        ]);
        let replaced = own_addresses.iter();
        replaced.fold(block, |text, (example, own)| text.replace(*example, own))
    }

    fn make_certificates(&self) -> Result<()> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::<String>::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "An authority of the recipes");
        fs::write(self.path("authority.pem"), params.self_signed(&key)?.pem())?;
        let issuer = Issuer::new(params, key);
        for (file, name) in [("choir", CONTROL.to_owned()), ("choir-apps", format!("*.{SANDBOXES}"))] {
            let key = KeyPair::generate()?;
            let certificate = CertificateParams::new(vec![name])?.signed_by(&key, &issuer)?;
            fs::write(self.path(&format!("{file}.pem")), certificate.pem())?;
            fs::write(self.path(&format!("{file}.key")), key.serialize_pem())?;
        }
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// All at once, so that they differ.
fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let mut ports = [0; N];
    let mut held = Vec::new();
    for port in &mut ports {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        *port = listener.local_addr()?.port();
        held.push(listener);
    }
    Ok(ports)
}
