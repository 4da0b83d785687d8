# Every key of the configuration file, with a value that is allowed. A key without one here fails a test.
{
  listen.trusted_proxies = [ "127.0.0.1/32" ];
  control = {
    origin = "https://choir.example.com";
    rp_id = "choir.example.com";
    allow_shared_domain = false;
  };
  sandboxes = {
    domain = "choir-apps.example";
    socket = "/run/choir/podman/podman.sock";
    volumes_socket = "/run/choir/volumes.sock";
    volumes = "/var/lib/choir/volumes";
    run = "/run/choir/sandboxes";
    default_image = "/var/lib/choir/image/default.tar";
    oci_runtime = "crun";
    limits = {
      memory = 2147483648;
      cpus = 1.5;
      pids = 2048;
      disk = 10737418240;
    };
    awake = {
      cron = "0 8 * * 1-5";
      tz = "Europe/Berlin";
    };
    idle_pause_s = 900;
    idle_stop_s = 1800;
    snapshot_every_s = 3600;
    max_running = 8;
    memory_reserve = 536870912;
  };
  auth = {
    registration = "invite";
    session_idle_s = 3600;
    session_absolute_s = 86400;
  };
  store.path = "/var/lib/choir/hypervisor/choir.db";
  keys.file = "/var/lib/choir/hypervisor/key";
  egress.allow_networks = [ "192.0.2.0/24" ];
  providers.llm = {
    kind = "openai";
    upstream = "https://llm.example:8443/v1";
    key = "key";
    daily_requests = 10;
    daily_tokens = 1000;
    sandbox_daily_requests = 5;
    sandbox_daily_tokens = 500;
  };
  backup.recipients = [ "age1praw4k9u5wx2cptum38elepzv6kfjk8dsu4f8dltvcd5mrefl5ssjzamw0" ];
  backup.keep = 30;
  downloads.dir = "/srv/downloads";
  audit.keep_days = 400;
  metrics.token_file = "/run/credentials/choir-hypervisor.service/secrets_metrics";
  log = {
    format = "json";
    level = "info";
  };
}
