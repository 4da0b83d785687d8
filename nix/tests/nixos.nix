# The options of NixOS that the module sets or reads, with types as strict as theirs, and packages that are only names.
# An option that is not here is one that the module must not set without a look at NixOS first.
{ lib, ... }:
let
  inherit (lib) mkOption types;
  of =
    type: default:
    mkOption {
      inherit type default;
    };
  strings = of (types.listOf types.str) [ ];
  on = of types.bool false;
  maybe = type: of (types.nullOr type) null;
  set = options: of (types.attrsOf (types.submodule { inherit options; })) { };
  # What systemd.unit options take: a list is a setting that comes several times.
  section = of (types.attrsOf (types.either types.str (types.listOf types.str))) { };
  unit = {
    unitConfig = section;
    wantedBy = strings;
    requiredBy = strings;
  };
  services = set (
    unit
    // {
      serviceConfig = section;
      stopIfChanged = of types.bool true;
      path = strings;
    }
  );
  sockets = set (unit // { socketConfig = section; });
  ids =
    start:
    of (types.listOf (
      types.submodule {
        options = {
          ${start} = of types.ints.unsigned 0;
          count = of types.ints.unsigned 1;
        };
      }
    )) [ ];
in
{
  options = {
    assertions = of (types.listOf (
      types.submodule {
        options = {
          assertion = on;
          message = of types.str "";
        };
      }
    )) [ ];
    boot.supportedFilesystems = strings;
    boot.loader.systemd-boot.configurationLimit = maybe types.ints.unsigned;
    boot.loader.grub.configurationLimit = of types.ints.unsigned 100;
    environment.systemPackages = of (types.listOf types.package) [ ];
    environment.etc = set {
      text = maybe types.lines;
      source = maybe types.package;
    };
    fileSystems = set {
      device = maybe types.str;
      fsType = of types.str "auto";
      options = strings;
    };
    networking.firewall.allowedTCPPorts = of (types.listOf (types.ints.between 0 65535)) [ ];
    nix.package = mkOption { type = types.package; };
    nix.gc.automatic = on;
    nix.gc.options = of types.str "";
    security.acme.acceptTerms = on;
    security.acme.certs = set {
      domain = maybe types.str;
      email = maybe types.str;
      dnsProvider = maybe types.str;
      environmentFile = maybe types.str;
      group = of types.str "acme";
      reloadServices = strings;
    };
    services.caddy.enable = on;
    services.caddy.email = maybe types.str;
    services.caddy.virtualHosts = set {
      extraConfig = of types.lines "";
      logFormat = maybe types.lines;
      useACMEHost = maybe types.str;
    };
    services.prometheus.enable = on;
    services.prometheus.port = of (types.ints.between 0 65535) 9090;
    systemd.package = mkOption { type = types.package; };
    systemd.services = services;
    systemd.sockets = sockets;
    systemd.timers = set (unit // { timerConfig = section; });
    systemd.mounts = of (types.listOf (
      types.submodule {
        options = unit // {
          what = of types.str "";
          where = of types.str "";
          type = of types.str "";
          options = of types.str "";
        };
      }
    )) [ ];
    systemd.tmpfiles.rules = strings;
    systemd.user.services = services;
    systemd.user.sockets = sockets;
    users.groups = set { };
    users.users = set {
      isSystemUser = on;
      group = of types.str "";
      home = of types.str "/var/empty";
      linger = maybe types.bool;
      subUidRanges = ids "startUid";
      subGidRanges = ids "startGid";
    };
    virtualisation.containers.enable = on;
  };
}
