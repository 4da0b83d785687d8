//! TLS in front of an instance, as every box that is not one's own machine has it: a certificate for `*.choir.test`,
//! one upstream connection a request, and a note of what passed. It must not refuse or repair anything.
//!
//! All hosts below `choir.test` are one site to a browser, which those of `localhost` are not.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result, ensure};
use data_encoding::BASE64;
use rcgen::{CertifiedKey, KeyPair, PublicKeyData as _};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

/// The control host.
pub const CONTROL: &str = "control.choir.test";
/// What sandbox hosts end with.
pub const SANDBOXES: &str = "apps.choir.test";

/// One request, as the browser sent it, and the status it got.
#[derive(Debug, Clone)]
pub struct Passed {
    pub host: String,
    pub method: String,
    pub path: String,
    /// The value of `Cookie`, empty where none came.
    pub cookie: String,
    /// `Origin`, `Sec-Fetch-Site` and `Sec-Fetch-Dest`: who asked, by the browser's account, and what for.
    pub origin: String,
    pub site: String,
    pub dest: String,
    pub upgrade: bool,
    /// 0 where the connection ended without an answer.
    pub status: u16,
}

/// Listens until it is dropped.
pub struct Front {
    port: u16,
    key_hash: String,
    notes: Arc<Notes>,
    accepting: AbortHandle,
}

#[derive(Default)]
struct Notes {
    passed: Mutex<Vec<Passed>>,
    mute: AtomicBool,
}

impl Front {
    /// In front of the instance at this port on loopback.
    pub async fn start(upstream: u16) -> Result<Self> {
        let names = ["*.choir.test", "*.apps.choir.test"].map(str::to_owned);
        let CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed(names)?;
        let acceptor = TlsAcceptor::from(Arc::new(tls(&cert, &signing_key)?));
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let notes = Arc::<Notes>::default();
        let shared = notes.clone();
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(acceptor.clone(), stream, upstream, shared.clone()));
            }
        });
        Ok(Self {
            port,
            key_hash: BASE64.encode(&Sha256::digest(signing_key.subject_public_key_info())),
            notes,
            accepting: accepting.abort_handle(),
        })
    }

    /// What a browser needs to find these hosts here, and to trust the one certificate; to it the pages are then as
    /// secure as any.
    pub fn flags(&self) -> [String; 2] {
        [
            "--host-resolver-rules=MAP *.choir.test 127.0.0.1".to_owned(),
            format!("--ignore-certificate-errors-spki-list={}", self.key_hash),
        ]
    }

    /// The configuration of an instance behind this front.
    pub fn configure(&self, config: &mut toml::Table) {
        let control = [
            ("origin", self.control().into()),
            ("rp_id", CONTROL.into()),
            ("allow_shared_domain", true.into()),
        ];
        section(config, "control").extend(control.map(|(key, value)| (key.to_owned(), value)));
        section(config, "sandboxes").insert("domain".to_owned(), SANDBOXES.into());
        let proxies = vec![toml::Value::from("127.0.0.1/32")];
        section(config, "listen").insert("trusted_proxies".to_owned(), proxies.into());
    }

    /// The control host's origin.
    pub fn control(&self) -> String {
        format!("https://{CONTROL}:{}", self.port)
    }

    /// The origin of a slot's app.
    pub fn app(&self, slot: &str, workspace: &str, user: &str) -> String {
        format!("https://{slot}--{workspace}--{user}.{SANDBOXES}:{}", self.port)
    }

    /// What passed for paths of this origin that begin so.
    pub fn passed(&self, origin: &str, prefix: &str) -> Vec<Passed> {
        let host = origin.trim_start_matches("https://");
        let passed = self.notes.passed.lock().expect("no holder of this lock panics");
        let asked = passed
            .iter()
            .filter(|it| it.host == host && it.path.starts_with(prefix));
        asked.cloned().collect()
    }

    /// How many requests passed so far.
    pub fn count(&self) -> usize {
        self.notes.passed.lock().expect("no holder of this lock panics").len()
    }

    /// From here on, whether upstream is kept from what browsers say of who asked: with that, whatever refuses
    /// requests of other sites is off.
    pub fn keep_origins_back(&self, mute: bool) {
        self.notes.mute.store(mute, Ordering::Relaxed);
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

fn section<'t>(config: &'t mut toml::Table, name: &str) -> &'t mut toml::Table {
    let section = config.entry(name).or_insert_with(|| toml::Table::new().into());
    section.as_table_mut().expect("a section is a table")
}

fn tls(certificate: &rcgen::Certificate, key: &KeyPair) -> Result<ServerConfig> {
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
    Ok(ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)?)
}

/// One request, or one websocket. Who goes away early is not written down.
async fn serve(acceptor: TlsAcceptor, stream: TcpStream, upstream: u16, notes: Arc<Notes>) -> Result<()> {
    let mut client = BufReader::new(acceptor.accept(stream).await?);
    let (head, mut passed) = head(&mut client, notes.mute.load(Ordering::Relaxed)).await?;
    let mut server = BufReader::new(TcpStream::connect(("127.0.0.1", upstream)).await?);
    server.write_all(head.as_bytes()).await?;
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_server, mut to_server) = tokio::io::split(server);
    let answer = async {
        let mut line = [0; 12];
        let read = from_server.read_exact(&mut line).await;
        passed.status = String::from_utf8_lossy(&line[9..]).parse().unwrap_or_default();
        notes.passed.lock().expect("no holder of this lock panics").push(passed);
        read?;
        to_client.write_all(&line).await?;
        tokio::io::copy(&mut from_server, &mut to_client).await?;
        to_client.shutdown().await
    };
    // The server ends each connection after its answer; a browser that goes away ends it, too.
    tokio::select! {
        ended = answer => ended?,
        ended = tokio::io::copy(&mut from_client, &mut to_server) => drop(ended?),
    }
    Ok(())
}

/// The head as it is passed on, and what is noted of it.
async fn head(client: &mut (impl AsyncBufRead + Unpin), mute: bool) -> Result<(String, Passed)> {
    let mut line = String::new();
    client.read_line(&mut line).await?;
    let mut words = line.split(' ').map(str::to_owned);
    let mut passed = Passed {
        method: words.next().unwrap_or_default(),
        path: words.next().context("no request")?,
        host: String::new(),
        cookie: String::new(),
        origin: String::new(),
        site: String::new(),
        dest: String::new(),
        upgrade: false,
        status: 0,
    };
    let mut head = format!("{line}X-Forwarded-Proto: https\r\n");
    loop {
        line.clear();
        ensure!(client.read_line(&mut line).await? > 0, "the head broke off");
        if line.trim_end().is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').context("no header")?;
        let value = value.trim().to_owned();
        let name = name.to_ascii_lowercase();
        match name.as_str() {
            "host" => passed.host = value,
            "cookie" => passed.cookie = value,
            "origin" => passed.origin = value,
            "sec-fetch-site" => passed.site = value,
            "sec-fetch-dest" => passed.dest = value,
            "upgrade" => passed.upgrade = true,
            "connection" if value.eq_ignore_ascii_case("keep-alive") => continue,
            _ => {}
        }
        if !(mute && (name == "origin" || name.starts_with("sec-fetch-"))) {
            head.push_str(&line);
        }
    }
    if !passed.upgrade {
        head.push_str("Connection: close\r\n");
    }
    Ok((head + "\r\n", passed))
}
