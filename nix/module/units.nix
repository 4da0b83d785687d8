# Renders the units for this host, with the files that they name.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.choir;
  inherit (import ./places.nix { inherit config lib pkgs; }) places checked;

  state = "/var/lib/choir";
  # Of the room that postinst takes on Debian, and as it does: sandboxes can fill it, and fill nothing else.
  makeDisk = pkgs.writeShellScript "make-disk" ''
    set -eu
    PATH=${
      lib.makeBinPath [
        pkgs.btrfs-progs
        pkgs.coreutils
        pkgs.e2fsprogs
        pkgs.util-linux
      ]
    }
    disk=${state}/volumes.btrfs
    # Bytes that making the default release takes beside it, for a while, and of the smallest and the largest disk.
    making=$((4 << 30))
    smallest=$((4 << 30))
    largest=$(numfmt --from=iec ${cfg.data.fileSize})
    # Early in a boot nobody else has made it.
    install -d -m 0755 ${state}
    # Under another name until it is whole: what has the name is mounted, not made again. What is left of one that was cut
    # off takes room.
    rm -f "$disk.partial"
    free=$(df --output=avail --block-size=1 ${state} | tail -n 1)
    least=$((making + smallest * 5 / 4))
    if [ "$free" -lt "$least" ]; then
      echo "${state} has $((free >> 20)) MiB free, and $((least >> 20)) are needed: make room, then run \`systemctl start choir-volumes\`" >&2
      exit 1
    fi
    # A full volume must leave room for the database, too.
    size=$(((free - making) * 4 / 5))
    [ "$size" -lt "$largest" ] || size=$largest
    install -m 0600 /dev/null "$disk.partial"
    # On btrfs what is written anew would want room beyond the file's; elsewhere nothing has to be said.
    chattr +C "$disk.partial" 2> /dev/null || true
    # Not every file system can.
    fallocate --length "$size" "$disk.partial" 2> /dev/null || truncate --size="$size" "$disk.partial"
    mkfs.btrfs --quiet --force --nodiscard --nodesize 4096 "$disk.partial"
    sync "$disk.partial"
    mv "$disk.partial" "$disk"
  '';
  keepGenerations = pkgs.writeShellScript "keep-generations" ''
    set -eu
    ${config.nix.package}/bin/nix-env --profile /nix/var/nix/profiles/system --delete-generations +${toString cfg.generations}
    ${config.nix.package}/bin/nix-collect-garbage
  '';

  # Who breaks out of a container reaches no metadata service either; postinst does the same on Debian.
  denied = units.system.services.choir-hypervisor.serviceConfig.IPAddressDeny;
  boundary = pkgs.writeShellScript "choir-boundary" ''
    set -eu
    owner=$(${pkgs.coreutils}/bin/id -u choir-sandbox)
    ${config.systemd.package}/bin/systemctl set-property --runtime "user-$owner.slice" IPAddressDeny= IPAddressDeny="${denied}"
  '';

  token = name: { ${name}.Service.LoadCredential = "token:${cfg.operatorTokenFile}"; };
  required = lib.mapAttrsToList (name: file: "${name}:${file}") cfg.secrets.required;
  credentials."choir-hypervisor.service".Service.LoadCredential = [
    "secrets:${cfg.secrets.directory}"
  ]
  ++ required;
  changes = lib.foldl' lib.recursiveUpdate { } (
    lib.optional (
      cfg.secrets.required != { } || cfg.secrets.directory != "/etc/choir/secrets"
    ) credentials
    ++ lib.optionals (cfg.operatorTokenFile != null) (
      map token [
        "choir-drill.service"
        "choir-doctor.service"
      ]
    )
  );
  units = import ../units.nix { inherit places changes; };

  # What cannot work is not there; what waits for its operator on Debian is switched on by an option here.
  wanted = {
    choir-backup = cfg.backup.enable;
    choir-doctor = cfg.doctor.enable;
    choir-drill = cfg.drill.enable;
    choir-image = cfg.image != null;
  };
  present = lib.filterAttrs (name: _: wanted.${name} or true);
in
{
  config = lib.mkIf cfg.enable {
    systemd.sockets = units.system.sockets;
    systemd.timers = present units.system.timers // {
      choir-generations = {
        unitConfig.Description = "Weekly removal of old generations of the system";
        timerConfig = {
          OnCalendar = "Sat 05:00";
          Persistent = "yes";
        };
        wantedBy = [ "timers.target" ];
      };
    };
    systemd.mounts = lib.optionals (cfg.data.device == null) units.system.mounts;
    systemd.services = lib.mkMerge [
      (present units.system.services)
      {
        # Started again in one step: its socket stays open, and nobody is refused meanwhile.
        choir-hypervisor.stopIfChanged = false;
        choir-volumes.stopIfChanged = false;
        choir-boundary = {
          unitConfig = {
            Description = "What the owner of ChoirOS containers may not reach";
            Before = "choir-hypervisor.service";
          };
          serviceConfig = {
            Type = "oneshot";
            RemainAfterExit = "yes";
            ExecStart = "${boundary}";
          };
          requiredBy = [ "choir-hypervisor.service" ];
        };
        choir-generations = {
          unitConfig.Description = "Removal of all but the newest generations of the system";
          serviceConfig = {
            Type = "oneshot";
            ExecStart = "${keepGenerations}";
          };
        };
      }
      (lib.mkIf (cfg.data.device == null) {
        choir-disk = {
          unitConfig = {
            Description = "Disk of ChoirOS sandboxes in a file, made once";
            ConditionPathExists = "!${state}/volumes.btrfs";
            # The mount is before local-fs.target where something wants it at boot, and by default a service is after that.
            DefaultDependencies = "no";
            RequiresMountsFor = state;
            After = "systemd-remount-fs.service";
            Conflicts = "shutdown.target";
            Before = [
              "var-lib-choir-volumes.mount"
              "shutdown.target"
            ];
          };
          serviceConfig = {
            Type = "oneshot";
            ExecStart = "${makeDisk}";
          };
          requiredBy = [ "var-lib-choir-volumes.mount" ];
        };
      })
    ];

    systemd.user.sockets = units.user.sockets;
    systemd.user.services = lib.mkMerge [
      units.user.services
      # Podman looks for the programs there that give it its ids.
      { choir-podman.path = [ "/run/wrappers" ]; }
    ];

    systemd.tmpfiles.rules = units.tmpfiles ++ [
      "d ${state} 0755 root root -"
      "d ${state}/hypervisor 0700 choir choir -"
      "d ${state}/backups 0700 choir choir -"
      "d ${state}/podman 0700 choir-sandbox choir-sandbox -"
      "d ${state}/volumes 0711 root root -"
      "d ${cfg.secrets.directory} 0700 root root -"
    ];
    # For its owner to read, and for choir-hypervisor's own commands.
    environment.etc."choir/hypervisor.toml".source = checked;
  };
}
