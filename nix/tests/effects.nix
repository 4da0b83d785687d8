# What each option does to the system.
{ evaluated, fired }:
let
  inherit (evaluated) lib;
  with' = value: evaluated.of { services.choir = value; };
  test = name: got: expected: { inherit name got expected; };
  hypervisor = config: config.systemd.services.choir-hypervisor;
  # The configuration file, from the script that has it checked.
  file =
    config:
    builtins.fromJSON (
      builtins.head (
        builtins.match ".*--config ([{].*[}]) check-config.*"
          config.environment.etc."choir/hypervisor.toml".source.script
      )
    );
  names = set: builtins.attrNames set;
  plain = with' { };
  public = with' {
    settings.control.origin = "https://choir.example.com";
    settings.sandboxes.domain = "choir-apps.example";
    openFirewall = true;
    tls = {
      mode = "public";
      email = "ops@example.com";
      dnsProvider = "route53";
      environmentFile = "/etc/choir/dns";
    };
  };
  internal = with' {
    settings.control.origin = "https://choir.lan";
    settings.sandboxes.domain = "choir-apps.lan";
    tls.mode = "internal";
  };
  all = with' {
    operatorTokenFile = "/run/keys/operator";
    alert.command = [
      "/bin/mail"
      "the operator"
    ];
    backup.enable = true;
    drill.enable = true;
    doctor.enable = true;
    secrets.required.openai = "/run/keys/openai";
  };
  shipped = builtins.fromTOML (builtins.readFile ../../deploy/debian/hypervisor.toml);
  image = "/var/lib/choir/image/default-00000000000000000000000000000000.tar";
  isSet = value: value != null;
in
[
  (test "switched off, nothing is there" (
    let
      off = with' { enable = false; };
    in
    names off.systemd.services
    ++ names off.users.users
    ++ names off.environment.etc
    ++ fired { services.choir.enable = false; }
  ) [ ])
  (test "as it comes, the file is the Debian package's but for what Nix makes" (file plain) (
    builtins.removeAttrs shipped [ "downloads" ]
    // {
      sandboxes = shipped.sandboxes // {
        agent = "/nix/store/00000000000000000000000000000000-choir/bin/choir-sandbox";
        default_image = image;
      };
    }
  ))
  (test "the file is checked by the program that reads it" (lib.hasInfix
    "/bin/choir-hypervisor --config "
    plain.environment.etc."choir/hypervisor.toml".source.script
  ) true)
  (test "the hypervisor reads that file"
    (lib.hasInfix "--config ${plain.environment.etc."choir/hypervisor.toml".source}" (hypervisor plain)
    .serviceConfig.ExecStart)
    true
  )
  (test "the hypervisor has its profile"
    {
      inherit ((hypervisor plain).serviceConfig) NoNewPrivileges CapabilityBoundingSet ProcSubset;
    }
    {
      NoNewPrivileges = "yes";
      CapabilityBoundingSet = "";
      ProcSubset = "all";
    }
  )
  (test "a switch does not close the hypervisor's socket" (hypervisor plain).stopIfChanged false)
  (test "the two users are apart, and one of them has ids"
    {
      groups = map (name: plain.users.users.${name}.group) [
        "choir"
        "choir-sandbox"
      ];
      ids = map (name: plain.users.users.${name}.subUidRanges) [
        "choir"
        "choir-sandbox"
      ];
      inherit (plain.users.users.choir-sandbox) linger;
    }
    {
      groups = [
        "choir"
        "choir-sandbox"
      ];
      ids = [
        [ ]
        [
          {
            startUid = 1000000;
            count = 6553600;
          }
        ]
      ];
      linger = true;
    }
  )
  (test "Podman is a unit of its owner's manager"
    {
      inherit (plain.systemd.user.sockets.choir-podman) unitConfig wantedBy;
      system = plain.systemd.services ? choir-podman;
    }
    {
      unitConfig = {
        Description = "Where the ChoirOS control plane asks for containers";
        ConditionUser = "choir-sandbox";
      };
      wantedBy = [ "sockets.target" ];
      system = false;
    }
  )
  (test "without a device, sandboxes are on a file that is mounted"
    {
      where = map (mount: mount.where) plain.systemd.mounts;
      made = plain.systemd.services.choir-disk.requiredBy;
      fileSystems = names plain.fileSystems;
    }
    {
      where = [ "/var/lib/choir/volumes" ];
      made = [ "var-lib-choir-volumes.mount" ];
      fileSystems = [ ];
    }
  )
  (test "the file is made before its mount, and not after all mounts, which would be a cycle at boot"
    {
      inherit (plain.systemd.services.choir-disk.unitConfig)
        DefaultDependencies
        RequiresMountsFor
        Conflicts
        Before
        ;
    }
    {
      DefaultDependencies = "no";
      RequiresMountsFor = "/var/lib/choir";
      Conflicts = "shutdown.target";
      Before = [
        "var-lib-choir-volumes.mount"
        "shutdown.target"
      ];
    }
  )
  (test "with a device, everything is on it and nothing is on a file"
    (
      let
        config = with' { data.device = "/dev/sdf"; };
      in
      {
        inherit (config.fileSystems."/var/lib/choir") device fsType;
        mounts = config.systemd.mounts;
        made = config.systemd.services ? choir-disk;
        ordered = (hypervisor config).unitConfig.RequiresMountsFor;
      }
    )
    {
      device = "/dev/sdf";
      fsType = "btrfs";
      mounts = [ ];
      made = false;
      ordered = "/var/lib/choir/hypervisor";
    }
  )
  (test "required credentials come on top of the directory of optional ones"
    {
      required = (hypervisor all).serviceConfig.LoadCredential;
      plain = (hypervisor plain).serviceConfig.LoadCredential;
      missing = (hypervisor all).serviceConfig.SetCredential;
    }
    {
      required = [
        "secrets:/etc/choir/secrets"
        "openai:/run/keys/openai"
      ];
      plain = "secrets:/etc/choir/secrets";
      missing = "secrets:none";
    }
  )
  (test "nothing of ours stands before the port unless asked for"
    {
      caddy = plain.services.caddy.enable;
      ports = plain.networking.firewall.allowedTCPPorts;
      trusted = (file plain) ? listen;
    }
    {
      caddy = false;
      ports = [ ];
      trusted = false;
    }
  )
  (test "in public, Caddy has a certificate for all sandboxes by DNS"
    {
      hosts = map (host: host.useACMEHost) (builtins.attrValues public.services.caddy.virtualHosts);
      names = names public.services.caddy.virtualHosts;
      inherit (public.security.acme.certs."choir-apps.example") domain dnsProvider group;
      ports = public.networking.firewall.allowedTCPPorts;
      trusted = (file public).listen.trusted_proxies;
    }
    {
      hosts = [
        "choir-apps.example"
        null
      ];
      names = [
        "*.choir-apps.example"
        "choir.example.com"
      ];
      domain = "*.choir-apps.example";
      dnsProvider = "route53";
      group = "caddy";
      ports = [
        80
        443
      ];
      trusted = [
        "127.0.0.1/32"
        "::1/128"
      ];
    }
  )
  (test "in a LAN, Caddy is its own authority and the firewall stays shut"
    {
      own = map (host: lib.hasPrefix "tls internal" host.extraConfig) (
        builtins.attrValues internal.services.caddy.virtualHosts
      );
      certificates = names internal.security.acme.certs;
      ports = internal.networking.firewall.allowedTCPPorts;
    }
    {
      own = [
        true
        true
      ];
      certificates = [ ];
      ports = [ ];
    }
  )
  (test "backup, drill and doctor are there when asked for, with the token"
    {
      timers = names all.systemd.timers;
      none = names plain.systemd.timers;
      token = all.systemd.services.choir-drill.serviceConfig.LoadCredential;
      wanted = all.systemd.timers.choir-backup.wantedBy;
    }
    {
      timers = [
        "choir-backup"
        "choir-doctor"
        "choir-drill"
        "choir-generations"
      ];
      none = [ "choir-generations" ];
      token = "token:/run/keys/operator";
      wanted = [ "timers.target" ];
    }
  )
  (test "a failure of every service of ours is told, also where it is started again"
    (
      let
        services = all.systemd.services;
        once = name: isSet (services.${name}.unitConfig.OnFailure or null);
        again =
          name: services.${name}.serviceConfig ? ExecStopPost && services.${name}.serviceConfig ? Restart;
      in
      {
        told = builtins.filter (name: once name || again name) (names services);
        command = services."choir-alert@".serviceConfig.ExecStart;
        own = plain.systemd.services."choir-alert@".serviceConfig.ExecStart;
      }
    )
    {
      told = [
        "choir-backup"
        "choir-doctor"
        "choir-drill"
        "choir-hypervisor"
        "choir-image"
        "choir-volumes"
      ];
      command = "/nix/store/00000000000000000000000000000000-choir-alert %i";
      own = "/etc/choir/alert %i";
    }
  )
  (test "who owns the containers is kept from the metadata service before the first sandbox"
    {
      wanted = plain.systemd.services.choir-boundary.requiredBy;
      first = plain.systemd.services.choir-boundary.unitConfig.Before;
      denied = (hypervisor plain).serviceConfig.IPAddressDeny;
    }
    {
      wanted = [ "choir-hypervisor.service" ];
      first = "choir-hypervisor.service";
      denied = "169.254.0.0/16 fe80::/10 fd00:ec2::/32";
    }
  )
  (test "another image is another release, and an archive of one's own makes none"
    {
      made = plain.systemd.services.choir-image.unitConfig.ConditionPathExists;
      own =
        let
          config = with' {
            image = null;
            settings.sandboxes.default_image = "/srv/own.tar";
          };
        in
        {
          inherit ((file config).sandboxes) default_image;
          made = config.systemd.services ? choir-image;
          runs = lib.hasInfix "choir-hypervisor" (hypervisor config).serviceConfig.ExecStart;
        };
    }
    {
      made = "!${image}";
      own = {
        default_image = "/srv/own.tar";
        made = false;
        runs = true;
      };
    }
  )
  (test "generations are kept by count, in the boot menu and in the store"
    (
      let
        config = with' { generations = 3; };
      in
      {
        menu = config.boot.loader.systemd-boot.configurationLimit;
        grub = config.boot.loader.grub.configurationLimit;
        own =
          (evaluated.of {
            services.choir.generations = 3;
            boot.loader.grub.configurationLimit = 7;
          }).boot.loader.grub.configurationLimit;
        runs = config.systemd.timers.choir-generations.wantedBy;
      }
    )
    {
      menu = 3;
      grub = 3;
      own = 7;
      runs = [ "timers.target" ];
    }
  )
  (test "every key of the file is among those that choir-hypervisor is asked about" (
    let
      keys = builtins.mapAttrs (_: names) (removeAttrs plain.services.choir.settings [ "providers" ]);
    in
    # The agent is the package's.
    keys // { sandboxes = builtins.filter (name: name != "agent") keys.sandboxes; }
  ) (builtins.mapAttrs (_: names) (removeAttrs (import ./every-setting.nix) [ "providers" ])))
  (test "the journal has a bound" plain.environment.etc."systemd/journald.conf.d/50-choir.conf".text
    ''
      [Journal]
      SystemMaxUse=1G
    ''
  )
  (test "an empty section is not in the file, and a schedule is"
    (
      let
        config = with' {
          settings.sandboxes.awake = {
            cron = "0 8 * * 1-5";
            tz = "Europe/Berlin";
          };
          settings.sandboxes.limits.cpus = 1.5;
        };
      in
      {
        sections = names (file config);
        inherit ((file config).sandboxes) awake limits;
      }
    )
    {
      sections = [
        "backup"
        "control"
        "providers"
        "sandboxes"
        "store"
      ];
      awake = {
        cron = "0 8 * * 1-5";
        tz = "Europe/Berlin";
      };
      limits.cpus = 1.5;
    }
  )
]
