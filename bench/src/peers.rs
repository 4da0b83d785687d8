//! Other people's proxies in front of the same app, each bound to one processor as the hypervisor is. It must not
//! measure. What a peer needs to be fast (kept connections, no logs) is set.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use data_encoding::HEXLOWER;
use sha2::{Digest, Sha256};

use crate::setup::Setup;
use crate::stage::until;
use crate::wire::Wire;

/// The processor of whatever authenticates and proxies.
pub const PROXY: usize = 0;
/// The processor of the client and the app.
pub const LOAD: usize = 1;
/// The session cookie that the peers' check knows, by name and value.
pub const COOKIE: (&str, &str) = ("session", "kI3vBq7wJw0d5tSxkM6G9uXcQz1aYb8rTnEoLhPfVgD");

/// A program that ends with us.
pub struct Running(Child);

impl Running {
    pub fn new(child: Child) -> Self {
        Self(child)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// All peers, and the ports where each is.
pub struct Peers {
    pub nginx_auth: u16,
    /// The same, with the check bound to the load's processor.
    pub nginx_helped: u16,
    pub nginx_return: u16,
    pub caddy: u16,
    pub node: u16,
    /// The app itself, without anything in front.
    pub app: u16,
    _running: Vec<Running>,
}

impl Peers {
    /// Starts them in `directory`, and waits until each answers.
    pub async fn start(setup: &Setup, directory: &Path) -> Result<Self> {
        let [nginx_auth, nginx_helped, nginx_return, caddy, node, node_api, app] = free_ports()?;
        let at = |name: &str| directory.join(name).display().to_string();
        fs::write(
            at("nginx.conf"),
            nginx(&at(""), [nginx_auth, nginx_helped, nginx_return]),
        )?;
        fs::write(at("Caddyfile"), caddyfile(&at(""), caddy))?;
        let start = |processor: usize, program: &Path, arguments: &[&str]| {
            let log = File::options().create(true).append(true).open(at("peers.log"))?;
            // They end with us even where we are killed.
            let mut command = Command::new("setpriv");
            command
                .args(["--pdeathsig", "KILL", "taskset", "--cpu-list"])
                .arg(processor.to_string());
            command.arg(program).args(arguments);
            command.env("GOMAXPROCS", "1").env("HOME", directory);
            command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
            let child = command.spawn().context("cannot start a peer")?;
            anyhow::Ok(Running(child))
        };
        let [socket, tcp, check, helper] = [
            format!("unix:{}", at("app.sock")),
            format!("tcp:127.0.0.1:{app}"),
            format!("unix:{}", at("check.sock")),
            format!("unix:{}", at("helper.sock")),
        ];
        let hash = HEXLOWER.encode(&Sha256::digest(COOKIE.1));
        let ports = [format!("--port={node}"), format!("--api-port={node_api}")];
        let target = format!("--default-target=http://127.0.0.1:{app}");
        let mut node_arguments = vec!["--ip=127.0.0.1", "--api-ip=127.0.0.1", "--log-level=error"];
        node_arguments.extend([&ports[0], &ports[1], &target].map(String::as_str));
        let script = setup.node_proxy.display().to_string();
        node_arguments.insert(0, &script);
        let running = vec![
            start(LOAD, &setup.app, &["serve", &socket, &tcp])?,
            start(PROXY, &setup.app, &["auth", &check, COOKIE.0, &hash])?,
            start(LOAD, &setup.app, &["auth", &helper, COOKIE.0, &hash])?,
            start(
                PROXY,
                "nginx".as_ref(),
                &["-c", &at("nginx.conf"), "-e", &at("nginx.log")],
            )?,
            start(
                PROXY,
                "caddy".as_ref(),
                &["run", "--adapter", "caddyfile", "--config", &at("Caddyfile")],
            )?,
            start(PROXY, "node".as_ref(), &node_arguments)?,
        ];
        let cookie = format!("{}={}", COOKIE.0, COOKIE.1);
        let answers = |port: &u16| {
            let answer = Wire::connect(*port, "localhost", Some(&cookie)).and_then(|mut wire| wire.get());
            answer.is_ok_and(|(status, _)| status == 200)
        };
        let all = [app, nginx_auth, nginx_helped, nginx_return, caddy, node];
        let waited = until("not all peers answer", async || Ok(all.iter().all(answers))).await;
        waited.with_context(|| fs::read_to_string(at("peers.log")).unwrap_or_default())?;
        Ok(Self {
            nginx_auth,
            nginx_helped,
            nginx_return,
            caddy,
            node,
            app,
            _running: running,
        })
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

/// One worker; the ports ask the check beside it, the check on the other processor, and a constant.
fn nginx(directory: &str, [beside, helped, constant]: [u16; 3]) -> String {
    let server = |port: u16, check: &str| {
        format!(
            "server {{ listen 127.0.0.1:{port} backlog=4096;
               location / {{ auth_request /check; proxy_pass http://app; {FORWARD} }}
               location = /check {{ internal; {check} }} }}\n"
        )
    };
    let ask = |check: &str| {
        format!(
            "proxy_pass http://{check}; proxy_pass_request_body off; {FORWARD} proxy_set_header Content-Length \"\";"
        )
    };
    let servers = [
        server(beside, &ask("check")),
        server(helped, &ask("helper")),
        server(constant, "return 204;"),
    ]
    .concat();
    let upstreams = ["app", "check", "helper"]
        .map(|name| {
            let socket = format!("server unix:{directory}{name}.sock");
            format!("upstream {name} {{ {socket}; keepalive 128; keepalive_requests 1000000000; }}\n")
        })
        .concat();
    let places = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|place| format!("{place}_temp_path {directory}{place};\n"))
        .concat();
    format!(
        "user root; daemon off; master_process off; worker_processes 1; pid {directory}nginx.pid;
         events {{ worker_connections 1024; }}
         http {{ access_log off; keepalive_requests 1000000000; {places} {upstreams} {servers} }}\n"
    )
}

const FORWARD: &str = "proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_set_header Host $host; \
    proxy_set_header X-Forwarded-For $remote_addr; proxy_set_header X-Forwarded-Proto $scheme;";

fn caddyfile(directory: &str, port: u16) -> String {
    format!(
        "{{
           admin off
           auto_https off
         }}
         http://:{port} {{
           bind 127.0.0.1
           forward_auth unix/{directory}check.sock {{
             uri /check
           }}
           reverse_proxy unix/{directory}app.sock
         }}\n"
    )
}
