# What cannot work or would not be safe, each with what to do about it. What the program judges by itself is found by its
# check-config when the system is built; here is what nixpkgs knows, and what would stop the evaluation without a reason.
{
  config,
  lib,
  options,
  ...
}:
let
  cfg = config.services.choir;
  inherit (cfg) settings tls;
  host = import ./host.nix settings.control.origin;
  known = host != null;
  inherit (settings.sandboxes) domain;
  isAddress = name: builtins.match "[0-9.]+" name != null;
  isBelow = name: parent: lib.hasSuffix ".${parent}" name;
  local = known && host.name == "localhost" && domain == "localhost";
  proxied = settings.listen.trusted_proxies != null && settings.listen.trusted_proxies != [ ];

  names = builtins.attrNames cfg.secrets.required;
  isCredential = name: builtins.match "[A-Za-z0-9_.-]+" name != null && name != "secrets";
  keys = builtins.filter (key: key != null) (
    map (provider: provider.key) (builtins.attrValues settings.providers)
  );
  lost = builtins.filter (key: !(builtins.elem key names || lib.hasPrefix "secrets_" key)) keys;

  first = 1000000;
  last = 7553599;
  others = removeAttrs config.users.users [ "choir-sandbox" ];
  overlaps =
    user:
    lib.any (range: range.startUid <= last && first < range.startUid + range.count) user.subUidRanges;
  taken = builtins.attrNames (lib.filterAttrs (_: overlaps) others);

  holdsPort =
    options.services ? prometheus
    && config.services.prometheus.enable
    && config.services.prometheus.port == 9090;

  check = assertion: message: {
    inherit assertion;
    message = "services.choir: ${message}";
  };
in
{
  config = lib.mkIf cfg.enable {
    assertions = [
      (check known "settings.control.origin must look like https://choir.example.com, in lower case and without a path.")
      (check (!known || !isAddress host.name)
        "settings.control.origin must name a host, not an IP address: passkeys cannot be bound to an address."
      )
      (check (
        !known || host.scheme == "https" || host.name == "localhost"
      ) "settings.control.origin must be https unless it is http://localhost.")
      (check (
        !isAddress domain && !lib.hasPrefix "." domain && !lib.hasSuffix "." domain
      ) "settings.sandboxes.domain must be the name of a host, such as choir-apps.example.")
      (check (!known || local || domain != host.name)
        "settings.sandboxes.domain is the control host itself: give sandboxes a registrable domain of their own."
      )
      (check (!known || !isBelow domain host.name)
        "settings.sandboxes.domain is below the control host, whose passkeys a sandbox could ask for: give sandboxes a registrable domain of their own."
      )
      (check (!known || !isBelow host.name domain)
        "settings.control.origin is below settings.sandboxes.domain, from where a sandbox could set its cookies: give sandboxes a registrable domain of their own."
      )
      (check (
        settings.control.rp_id == null || !known || settings.control.rp_id == host.name
      ) "settings.control.rp_id must be the control host itself; leave it out.")
      (check (cfg.image != null || settings.sandboxes.default_image != "/var/lib/choir/image/default.tar")
        "image is null, so settings.sandboxes.default_image must name the archive that new workspaces start from."
      )
      (check (builtins.all isCredential names) "secrets.required: the name of a credential is made of letters, digits and `_.-`, and is not `secrets`.")
      (check (lost == [ ])
        "settings.providers: the key `${toString lost}` is neither in secrets.required nor `secrets_NAME`, a file NAME in secrets.directory."
      )
      (check
        (!cfg.backup.enable || (settings.backup.recipients != null && settings.backup.recipients != [ ]))
        "backup.enable needs settings.backup.recipients: make an identity with age-keygen on another machine, and name its public key."
      )
      (check (
        !cfg.drill.enable || cfg.operatorTokenFile != null
      ) "drill.enable needs operatorTokenFile: make a token with `choir tokens create`.")
      (check (
        !cfg.doctor.enable || cfg.operatorTokenFile != null
      ) "doctor.enable needs operatorTokenFile: make a token with `choir tokens create`.")
      (check (cfg.alert.command != [ ]) "alert.command must name a program; null for none.")
      (check (tls.mode == "none" || (known && host.scheme == "https" && host.port == null))
        "tls.mode puts Caddy at port 443, so settings.control.origin must be https:// with a name and no port."
      )
      (check (
        tls.mode != "public" || tls.email != null
      ) "tls.mode = \"public\" needs tls.email, to which the authority writes about certificates.")
      (check (tls.mode != "public" || (tls.dnsProvider != null && tls.environmentFile != null))
        "tls.mode = \"public\" needs tls.dnsProvider and tls.environmentFile: the certificate for all sandbox hosts is had by DNS only."
      )
      (check (tls.mode != "none" || !known || host.scheme != "https" || proxied)
        "with an https origin and tls.mode = \"none\", settings.listen.trusted_proxies must name the proxy that speaks TLS."
      )
      (check (!cfg.openFirewall || tls.mode != "none")
        "openFirewall opens 80 and 443, where nothing listens with tls.mode = \"none\"; port 9090 stays on loopback."
      )
      (check (taken == [ ])
        "users.users.${toString taken} has some of the subordinate ids ${toString first} to ${toString last}, which are those of sandboxes: move that range."
      )
      (check (
        !holdsPort
      ) "services.prometheus has port 9090, which is the control plane's: give Prometheus another one.")
      (check (!(config.nix.gc.automatic && lib.hasInfix "older-than" config.nix.gc.options))
        "nix.gc.options removes generations by age, and with it what a rollback goes back to; generations are kept by services.choir.generations."
      )
    ];
  };
}
