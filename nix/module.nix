# ChoirOS on NixOS: services.choir. The units are those of deploy/units.json, which the Debian package has, too; here is
# what the package's postinst does there: users, ids, the disk, and what stands in front.
{
  config,
  lib,
  ...
}:
let
  cfg = config.services.choir;
in
{
  imports = [
    ./module/options.nix
    ./module/assertions.nix
    ./module/units.nix
    ./module/front.nix
  ];

  config = lib.mkIf cfg.enable {
    environment.systemPackages = [ cfg.package ];

    users.users.choir = {
      isSystemUser = true;
      group = "choir";
      home = "/var/lib/choir/hypervisor";
    };
    users.groups.choir = { };
    users.users.choir-sandbox = {
      isSystemUser = true;
      group = "choir-sandbox";
      home = "/var/lib/choir/podman";
      # Its own manager, below which Podman and all sandboxes run, is there without a login.
      linger = true;
      # As IdRange in crates/core: 65,536 for each of a hundred users.
      subUidRanges = [
        {
          startUid = 1000000;
          count = 6553600;
        }
      ];
      subGidRanges = [
        {
          startGid = 1000000;
          count = 6553600;
        }
      ];
    };
    users.groups.choir-sandbox = { };
    virtualisation.containers.enable = true;
    boot.supportedFilesystems = [ "btrfs" ];

    fileSystems = lib.mkIf (cfg.data.device != null) {
      "/var/lib/choir" = {
        inherit (cfg.data) device;
        fsType = "btrfs";
        options = [
          "noatime"
          "nosuid"
          "nodev"
        ];
      };
    };

    # A count, not an age: after some quiet weeks the last one that worked is old.
    boot.loader.systemd-boot.configurationLimit = lib.mkDefault cfg.generations;
    boot.loader.grub.configurationLimit = lib.mkDefault cfg.generations;

    environment.etc."systemd/journald.conf.d/50-choir.conf".text = ''
      [Journal]
      SystemMaxUse=${cfg.journalSize}
    '';
  };
}
