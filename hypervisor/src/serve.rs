//! Composes the control plane from its configuration and runs it until it is told to stop.

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::os::fd::FromRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use choir_broker::AddressPolicy;
use choir_proxy::{Answers, Bounds, Forwarder, Pulse, Server};
use choir_runtime::{Podman, PodmanOptions, Process, Runtime, Volumes, VolumesClient};
use choir_store::Store;
use jiff::SignedDuration;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::app::{App, Doors, Plane};
use crate::audit;
use crate::auth::{Auth, AuthDeps, RegistrationMode};
use crate::clock::{Clock, SystemClock};
use crate::config::{Config, Registration, RuntimeKind};
use crate::downloads::Downloads;
use crate::egress::{Deps, Gateway, Outside};
use crate::events::Events;
use crate::gate::Gatekeeper;
use crate::keys::{self, Keys};
use crate::notify::Manager;
use crate::places;
use crate::prove::Searches;
use crate::providers::Providers;
use crate::random::{OsRandom, Random, draw};
use crate::reconcile::{Fleet, Services};
use crate::releases::Releases;
use crate::router::{ControlHost, router};
use crate::snapshots;
use crate::table::Table;

/// How often a claim link is made anew while nobody has registered; it is good for 30 minutes.
const CLAIM_EVERY: Duration = Duration::from_secs(25 * 60);

/// When the log is told what should be mended: Podman takes half a second of both cores to say what it is, and who waited
/// for the start comes first.
const FINDINGS_AFTER: Duration = Duration::from_secs(5);

/// When it is looked again for containers that belong to nobody: the service may still be making what a process asked for
/// that is gone. In seconds.
const LATECOMERS_AFTER: [u64; 4] = [2, 8, 20, 60];

/// The parts that tests replace.
pub struct Parts {
    pub runtime: Arc<dyn Runtime>,
    pub volumes: Arc<dyn Volumes>,
    pub clock: Arc<dyn Clock>,
    pub random: Arc<dyn Random>,
    pub outside: Outside,
}

/// Builds everything from a configuration and its parts; starts nothing but the reconciler's tasks.
pub async fn compose(config: Arc<Config>, parts: Parts) -> anyhow::Result<Arc<App>> {
    let store = Store::open(&config.store.path)?;
    let Parts {
        runtime,
        volumes,
        clock,
        random,
        outside,
    } = parts;
    let key = keys::load(&config.key_file(), &store, &random).await?;
    audit::begin(&store, clock.now()).await;
    let auth = Auth::new(auth_deps(&config, store.clone(), clock.clone(), random.clone(), &key))?;
    let answers = Arc::new(Answers::new(data_encoding::HEXLOWER.encode(&draw::<4>(&*random))));
    let forwarder = Arc::new(Forwarder::new(Arc::new(Doors(runtime.clone())), answers.clone()));
    let events = Events::new(data_encoding::HEXLOWER.encode(&draw::<4>(&*random)));
    let releases = Releases::new(
        store.clone(),
        volumes.clone(),
        clock.clone(),
        random.clone(),
        config.beside_store("uploads"),
        config.limits().disk,
        events.clone(),
    );
    let services = Services {
        config: config.clone(),
        store: store.clone(),
        runtime,
        volumes,
        clock: clock.clone(),
        random: random.clone(),
        releases: releases.clone(),
        events,
        authorities: key.authorities,
    };
    let begun = Instant::now();
    let ticks: choir_proxy::Clock = Arc::new(move || u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX));
    let fleet = Fleet::new(services, Arc::new(Plane(forwarder.clone())), ticks);
    let metrics_token = config.metrics.token_file.as_deref().and_then(|file| {
        places::read_secret(file)
            .inspect_err(|error| tracing::error!("metrics are for this machine only: {error:#}"))
            .ok()
    });
    Ok(Arc::new(App {
        hosts: config.hosts(),
        store,
        clock,
        random,
        auth,
        fleet,
        releases,
        table: Table::default(),
        forwarder,
        answers,
        deployment_ended: watch::Sender::new(()),
        adopted: watch::Sender::new(false),
        stopping: CancellationToken::new(),
        vault: key.vault,
        providers: Arc::new(Providers::new(&config.providers)?),
        outside,
        searches: Searches::default(),
        diffs: Arc::new(Semaphore::new(snapshots::DIFFS_AT_ONCE)),
        carrying: Arc::default(),
        metrics_token,
        downloads: Downloads::of(config.downloads.dir.as_deref()),
        config,
    }))
}

/// What the auth service needs of a configuration.
pub fn auth_deps(
    config: &Config,
    store: Store,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
    key: &Keys,
) -> AuthDeps {
    let seconds = |s: u64| SignedDuration::from_secs(i64::try_from(s).unwrap_or(i64::MAX));
    AuthDeps {
        store,
        clock,
        random,
        origin: config.control.origin.clone(),
        rp_id: config.control_host().to_owned(),
        hosts: config.hosts(),
        pepper: key.pepper,
        session_idle: seconds(config.auth.session_idle_s),
        session_absolute: seconds(config.auth.session_absolute_s),
        registration: match config.auth.registration {
            Registration::Invite => RegistrationMode::Invite,
            Registration::Open => RegistrationMode::Open,
        },
    }
}

/// Ends open deployments, takes over what runs, and publishes every route. If it fails, it can be tried again.
pub async fn take_over(app: &Arc<App>) -> anyhow::Result<()> {
    // Before the database is asked for anything: it is the service that may not be there yet.
    let runtime = &app.fleet.services.runtime;
    runtime.list().await.context("the container service")?;
    let ahead = app.recover_deployments().await?;
    app.clear_snapshots().await?;
    app.releases.clear().await?;
    app.fleet.clear_trials().await?;
    let views = app.store.all_workspaces().await?;
    let found = runtime.list().await.context("the container service")?;
    // The runtime's notices can be taken once: nothing may fail from here on.
    let (inside, from_inside) = mpsc::unbounded_channel();
    let notices = app
        .fleet
        .services
        .runtime
        .notices()
        .context("the runtime's notices were taken already")?;
    tokio::spawn(app.fleet.clone().listen(notices, inside));
    let allow = app.config.egress.allow_networks.clone();
    let own = places::own_addresses();
    let gateway = Gateway::new(Deps {
        store: app.store.clone(),
        clock: app.clock.clone(),
        random: app.random.clone(),
        vault: app.vault.clone(),
        authorities: app.fleet.services.authorities.clone(),
        providers: app.providers.clone(),
        addresses: AddressPolicy { allow, own },
        outside: app.outside.clone(),
    });
    tokio::spawn(gateway.clone().tell_repeats(app.stopping.clone()));
    tokio::spawn(gateway.run(from_inside));
    tokio::spawn(app.auth.clone().run());
    app.fleet.adopt(&views, found).await;
    for view in &views {
        app.publish(view).await;
    }
    app.adopted.send_replace(true);
    for deployment in ahead {
        tokio::spawn(app.clone().roll_forward(deployment));
    }
    app.resume_guards().await;
    let app = app.clone();
    tokio::spawn(async move {
        tokio::time::sleep(FINDINGS_AFTER).await;
        let stats = app.stats().await;
        for finding in stats.findings.iter().chain(&stats.advice) {
            tracing::warn!("{finding}");
        }
    });
    Ok(())
}

/// Runs the hypervisor until SIGTERM or SIGINT.
pub async fn serve(config: Config) -> anyhow::Result<()> {
    let config = Arc::new(config);
    let listeners = listeners(&config)?;
    let manager = Arc::new(Manager::of_environment());
    let parts = Parts {
        runtime: runtime(&config)?,
        volumes: Arc::new(VolumesClient::new(config.sandboxes.volumes_socket.clone())),
        clock: Arc::new(SystemClock),
        random: Arc::new(OsRandom),
        outside: Outside::system(),
    };
    let app = compose(config.clone(), parts).await?;
    let stop = app.stopping.clone();
    let pulse = Arc::new(Pulse::default());
    let server = Arc::new(Server {
        bounds: Bounds {
            connections: places::most_connections(),
            ..Bounds::default()
        },
        hosts: config.hosts(),
        trusted_proxies: config.listen.trusted_proxies.clone(),
        control: ControlHost(router(&app)),
        gate: Gatekeeper::new(app.clone()),
        forwarder: app.forwarder.clone(),
        answers: app.answers.clone(),
        pulse: pulse.clone(),
    });
    let served = CancellationToken::new();
    let anchoring = tokio::spawn(audit::anchor(app.store.clone(), served.clone()));
    let keep_days = config.audit.keep_days;
    tokio::spawn(audit::keep(
        app.store.clone(),
        app.clock.clone(),
        keep_days,
        stop.clone(),
    ));
    tokio::spawn(app.clone().mind_memory(stop.clone()));
    tokio::spawn(app.clone().keep_snapshots(stop.clone()));
    let serving = tokio::spawn(server.serve(listeners, stop.clone()));
    // Who is told that it serves may tell it to stop at once.
    let told_to_stop = told_to_stop()?;
    manager.ready();
    tokio::spawn(manager.clone().vouch(app.store.clone(), pulse, stop.clone()));
    tokio::spawn(settle(app.clone(), stop.clone()));
    told_to_stop.await;
    manager.stopping();
    tracing::info!("stopping: requests under way are finished, sandboxes keep running");
    stop.cancel();
    serving.await?;
    served.cancel();
    anchoring.await?;
    Ok(())
}

/// What must happen for the hypervisor to become ready, tried until it works.
async fn settle(app: Arc<App>, stop: CancellationToken) {
    let mut wait = Duration::from_millis(100);
    while let Err(error) = take_over(&app).await {
        tracing::error!(error = format!("{error:#}"), "not ready yet; trying again");
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => wait = (wait * 2).min(Duration::from_secs(5)),
        }
    }
    tokio::spawn(offer_claim(app.clone(), stop.clone()));
    tokio::spawn(clear_latecomers(app.clone(), stop.clone()));
    let image = match &app.config.sandboxes.default_image {
        // A link leads to the newest; the release is called after the file itself.
        Some(image) => match image.canonicalize() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return app.releases.do_without(image).await,
            known => Ok(known.unwrap_or_else(|_| image.clone())),
        },
        None => places::empty_archive(&app.config.beside_store("empty.tar")),
    };
    match image {
        Ok(image) => app.releases.ensure_default(&image).await,
        Err(error) => tracing::error!(error = format!("{error:#}"), "no default release"),
    }
}

async fn clear_latecomers(app: Arc<App>, stop: CancellationToken) {
    for wait in LATECOMERS_AFTER {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(Duration::from_secs(wait)) => {}
        }
        if let Err(error) = app.remove_stray_containers().await {
            tracing::warn!(
                error = format!("{error:#}"),
                "containers that belong to nobody may be there"
            );
        }
    }
}

/// Keeps a valid claim link in a file of its own while nobody has registered.
async fn offer_claim(app: Arc<App>, stop: CancellationToken) {
    let file = app.config.beside_store("claim-link");
    loop {
        match app.auth.ensure_claim().await {
            Ok(Some(token)) => {
                let link = app.auth.register_url(&token);
                if let Err(error) = places::write_private(&file, &format!("{link}\n")) {
                    tracing::error!(error = format!("{error:#}"), "the claim link could not be written");
                }
            }
            Ok(None) => {
                let _ = std::fs::remove_file(&file);
                return;
            }
            Err(error) => tracing::error!(?error, "no claim link could be made"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = claimed(&app) => {}
            () = tokio::time::sleep(CLAIM_EVERY) => {}
        }
    }
}

/// Returns once there is a user.
async fn claimed(app: &App) {
    while !app.store.has_users().await.unwrap_or(false) {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

pub(crate) fn runtime(config: &Config) -> anyhow::Result<Arc<dyn Runtime>> {
    let places = choir_runtime::Places {
        volumes: absolute(&config.volumes_dir())?,
        run: absolute(&config.run_dir())?,
        agent: absolute(&config.sandboxes.agent)?,
    };
    std::fs::create_dir_all(&places.run).with_context(|| format!("cannot make {}", places.run.display()))?;
    if !places.agent.is_file() {
        bail!(
            "there is no agent at {}; set [sandboxes] agent to the choir-sandbox binary",
            places.agent.display()
        );
    }
    Ok(match config.sandboxes.runtime {
        RuntimeKind::Podman => {
            let options = PodmanOptions {
                socket: absolute(&config.sandboxes.socket)?,
                oci_runtime: config.sandboxes.oci_runtime.clone().unwrap_or_default(),
            };
            Arc::new(Podman::new(places, options)?)
        }
        RuntimeKind::Process => Arc::new(Process::new(places)),
    })
}

fn absolute(path: &Path) -> anyhow::Result<std::path::PathBuf> {
    std::path::absolute(path).with_context(|| format!("{} is not a usable path", path.display()))
}

/// The sockets handed over by systemd or `up`, else one of our own.
fn listeners(config: &Config) -> anyhow::Result<Vec<TcpListener>> {
    let mut listeners = Vec::new();
    for fd in places::inherited_sockets() {
        // SAFETY: the starter hands over these descriptors, each once, and nothing else here uses them.
        let listener = unsafe { StdListener::from_raw_fd(fd) };
        listener.set_nonblocking(true)?;
        listeners.push(TcpListener::from_std(listener)?);
    }
    if listeners.is_empty() {
        let address = SocketAddr::new(config.listen.address, config.listen.port);
        let listener = StdListener::bind(address).with_context(|| {
            format!("cannot listen on {address}; another program may have this port: set [listen] port to another one")
        })?;
        listener.set_nonblocking(true)?;
        listeners.push(TcpListener::from_std(listener)?);
    }
    Ok(listeners)
}

/// Catches SIGTERM and SIGINT from now on, and ends at the first.
fn told_to_stop() -> anyhow::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    })
}
