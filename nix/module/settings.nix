# The options below services.choir.settings: every key of the configuration file, under its own name and with its type.
# What is null is left out of the file, so that the program's own default counts. Defaults are those of the Debian
# package's file, which is for the same units.
{ lib }:
let
  inherit (lib) mkOption types;
  shipped = builtins.fromTOML (builtins.readFile ../../deploy/debian/hypervisor.toml);

  key =
    type: description: section: name:
    let
      default = shipped.${section}.${name} or null;
    in
    mkOption {
      type = if default == null then types.nullOr type else type;
      inherit default description;
    };
  submodule = options: types.submodule { inherit options; };
  plain =
    description: type:
    mkOption {
      type = types.nullOr type;
      default = null;
      inherit description;
    };
  group =
    section: keys:
    mkOption {
      type = submodule (builtins.mapAttrs (name: make: make section name) keys);
      default = { };
      description = "The section [${section}] of the configuration.";
    };

  count = types.ints.unsigned;
  hostName = types.strMatching "[a-z0-9.-]+";
  limits = submodule {
    memory = plain "Bytes of memory." count;
    cpus = plain "Processors; may be a fraction." types.number;
    pids = plain "Processes." count;
    disk = plain "Bytes on disk." count;
  };
  schedule = submodule {
    cron = mkOption {
      type = types.str;
      description = "Minute, hour, day of the month, month, day of the week: `0 8 * * 1-5`.";
    };
    tz = mkOption {
      type = types.str;
      description = "Time zone by its IANA name.";
    };
  };
  provider = submodule {
    kind = plain "Whose API it speaks." (
      types.enum [
        "openai"
        "anthropic"
      ]
    );
    upstream = plain "`https://HOST`, perhaps with a port and a path." (types.strMatching "https://.+");
    key = plain "Name of the credential with the box's key; see services.choir.secrets." types.str;
    daily_requests = plain "Requests of one user in a day with the box's key." count;
    daily_tokens = plain "Tokens of one user in a day with the box's key." count;
    sandbox_daily_requests = plain "Requests of one sandbox in a day." count;
    sandbox_daily_tokens = plain "Tokens of one sandbox in a day." count;
  };
in
{
  # Address and port are the socket unit's.
  listen = group "listen" {
    trusted_proxies = key (types.listOf types.str) "Networks of proxies whose word about the client counts.";
  };
  control = group "control" {
    origin = key types.str "What people type into the browser: `https://choir.example.com`.";
    rp_id = key hostName "The passkeys' relying party; may only be the control host itself.";
    allow_shared_domain = key types.bool "Start although sandboxes share the control host's registrable domain.";
  };
  # There is no `runtime`: the other one isolates nothing.
  sandboxes = group "sandboxes" {
    domain = key hostName "Every sandbox has a host below it; a registrable domain of its own.";
    socket = key types.str "Podman's socket.";
    volumes_socket = key types.str "The socket of choir-volumes.";
    volumes = key types.str "Where the disks of sandboxes are.";
    run = key types.str "Where the sockets of sandboxes are.";
    agent = key types.str "The agent that is mounted into each sandbox.";
    default_image = key types.str "The archive that new workspaces start from.";
    oci_runtime = key types.str "What Podman starts containers with.";
    limits = key limits "Limits of each sandbox.";
    awake = key (types.either (types.enum [
      "always"
      "on_demand"
    ]) schedule) "When sandboxes run.";
    idle_pause_s = key count "Seconds without a request until a sandbox is paused; 0 for never.";
    idle_stop_s = key count "Seconds without a request until a sandbox is stopped; 0 for never.";
    snapshot_every_s = key count "Seconds between snapshots of a slot that runs; 0 for none.";
    max_running = key types.ints.positive "How many sandboxes may run at once.";
    memory_reserve = key count "Bytes of memory that are to stay available.";
  };
  auth = group "auth" {
    registration = key (types.enum [
      "invite"
      "open"
    ]) "Who may register.";
    session_idle_s = key types.ints.positive "Seconds without a request until a session ends.";
    session_absolute_s = key types.ints.positive "Seconds until a session ends.";
  };
  store = group "store" {
    path = key types.str "The database.";
  };
  keys = group "keys" {
    file = key types.str "The master key.";
  };
  egress = group "egress" {
    allow_networks = key (types.listOf types.str) "Networks that sandboxes may reach although they are not public.";
  };
  # Every other name is a provider.
  providers = mkOption {
    type = types.attrsOf provider;
    default = { };
    description = "Model providers by name, with the box's own keys.";
  };
  backup = group "backup" {
    recipients = key (types.listOf (types.strMatching "age1[0-9a-z]+")) "Public keys of who can read backups.";
    keep = key types.ints.unsigned "Backups that stay in their directory; 0 for all.";
  };
  # Nix brings no command line for other machines.
  downloads = group "downloads" {
    dir = _: _: plain "Files that everybody may download at /download." types.str;
  };
  audit = group "audit" {
    keep_days = key (types.ints.between 0 36500) "Days that the audit trail is kept; 0 for ever.";
  };
  metrics = group "metrics" {
    token_file = key types.str "A file with the token for reading /metrics from elsewhere.";
  };
  log = group "log" {
    format = key (types.enum [
      "text"
      "json"
    ]) "How lines of the log look.";
    level = key types.str "`error`, `warn`, `info`, `debug`, or a list of `target=level`.";
  };
}
