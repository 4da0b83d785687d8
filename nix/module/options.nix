# What services.choir can be told.
{ lib, ... }:
let
  inherit (lib) mkEnableOption mkOption types;
  # A secret in the store could be read by everybody.
  outsideStore = types.pathWith {
    absolute = true;
    inStore = false;
  };
  optional =
    type: description:
    mkOption {
      type = types.nullOr type;
      default = null;
      inherit description;
    };
in
{
  options.services.choir = {
    enable = mkEnableOption "ChoirOS, a private host for coding sandboxes";
    package = mkOption {
      type = types.package;
      description = "The programs, all in one directory `bin`.";
    };
    image = optional types.package "A program that writes the default release as an image; null where settings.sandboxes.default_image names an archive of one's own.";

    settings = mkOption {
      type = types.submodule { options = import ./settings.nix { inherit lib; }; };
      default = { };
      description = "The configuration file, key by key. It is checked when the system is built.";
    };

    secrets = {
      required = mkOption {
        type = types.attrsOf outsideStore;
        default = { };
        description = "Files by the name of their credential. The hypervisor does not start without them.";
      };
      directory = mkOption {
        type = outsideStore;
        default = "/etc/choir/secrets";
        description = "A directory of files that may be missing: NAME in it is the credential secrets_NAME.";
      };
    };

    data = {
      device = optional types.str "A btrfs file system for /var/lib/choir, best made with `--nodesize 4096`: database, keys and sandboxes. Where null, sandboxes are on a btrfs in a file.";
      fileSize = mkOption {
        type = types.strMatching "[1-9][0-9]*[GT]";
        default = "60G";
        description = "The largest size of that file. It takes all of its room when it is made, and at most four fifths of what is free beyond 4 GiB.";
      };
    };

    tls = {
      mode = mkOption {
        type = types.enum [
          "none"
          "internal"
          "public"
        ];
        default = "none";
        description = "What stands before port 9090: nothing of ours, Caddy with its own authority, or Caddy with certificates that the world trusts.";
      };
      email = optional types.str "Who is written to about certificates.";
      dnsProvider = optional types.str "Where the sandbox domain's zone is, as lego calls it. A certificate for all its hosts is had by DNS only.";
      environmentFile = optional outsideStore "What lego wants to know for that, as variables.";
    };
    openFirewall = mkEnableOption "ports 80 and 443 for everybody";

    operatorTokenFile = optional outsideStore "A token of the operator's (`choir tokens create`), for the drill and the doctor.";
    backup.enable = mkEnableOption "a backup of the database every day, in /var/lib/choir/backups";
    drill.enable = mkEnableOption "a rehearsal of a rollback every week";
    doctor.enable = mkEnableOption "a check of everything every week";
    alert.command = optional (types.listOf types.str) "A program and its arguments, run with the name of a unit of ChoirOS that failed as the last one. Where null, it is /etc/choir/alert, if that is there.";

    generations = mkOption {
      type = types.ints.between 2 100;
      default = 10;
      description = "How many generations of the system are kept to go back to, however old.";
    };
    journalSize = mkOption {
      type = types.strMatching "[1-9][0-9]*[MG]";
      default = "1G";
      description = "The most that logs take on disk.";
    };
  };
}
