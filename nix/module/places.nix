# What stands for each name between at signs in deploy/units.json on this host, and the files that are made for it.
{
  config,
  lib,
  pkgs,
}:
let
  cfg = config.services.choir;
  isSet = value: value != null && value != { };
  # What is null is not in the file, whatever depth it is at.
  withoutNulls =
    value:
    if builtins.isAttrs value then
      lib.filterAttrs (_: isSet) (builtins.mapAttrs (_: withoutNulls) value)
    else
      value;

  state = "/var/lib/choir";
  # The release is called after this file, so that another image is another release.
  archive =
    if cfg.image == null then
      cfg.settings.sandboxes.default_image
    else
      "${state}/image/default-${builtins.substring 11 32 "${cfg.image}"}.tar";
  contents = withoutNulls (
    cfg.settings
    // {
      sandboxes = cfg.settings.sandboxes // {
        agent = "${cfg.package}/bin/choir-sandbox";
        default_image = archive;
      };
      providers = cfg.settings.providers // {
        secrets_dir = "/run/credentials/choir-hypervisor.service";
      };
    }
  );
  unchecked = (pkgs.formats.toml { }).generate "hypervisor.toml" contents;
  # Building the system fails where starting it would.
  checked = pkgs.runCommand "hypervisor.toml" { } ''
    ${cfg.package}/bin/choir-hypervisor --config ${unchecked} check-config
    cp ${unchecked} "$out"
  '';

  # A stack of layers becomes one plain tree. The present and the last one stay.
  makeImage = pkgs.writeShellScript "make-image" ''
    set -eu
    PATH=${
      lib.makeBinPath [
        pkgs.coreutils
        pkgs.findutils
        pkgs.gnutar
        pkgs.jq
      ]
    }
    out=${state}/image
    rm -rf "$out"/work.*
    work=$(mktemp -d "$out/work.XXXXXX")
    trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
    mkdir "$work/layers" "$work/tree"
    ${toString cfg.image} | tar --extract --directory="$work/layers"
    jq --raw-output '.[0].Layers[]' "$work/layers/manifest.json" | while read -r layer; do
      tar --extract --preserve-permissions --numeric-owner --file="$work/layers/$layer" --directory="$work/tree"
    done
    tar --create --sort=name --mtime=@1 --numeric-owner --file="$work/default.tar" --directory="$work/tree" .
    chmod 0644 "$work/default.tar"
    (cd "$work" && sha256sum default.tar) > ${archive}.sha256
    # A loss of power must not leave half of one under a name that counts as made.
    sync "$work/default.tar"
    mv "$work/default.tar" ${archive}
    find "$out" -name 'default-*.tar' -printf '%T@ %p\n' | sort --numeric-sort --reverse | tail -n +3 |
      while read -r _ old; do rm -f "$old" "$old.sha256"; done
  '';

  programs = [
    "choir-hypervisor"
    "choir-volumes"
  ];
  program = name: {
    inherit name;
    path = "${cfg.package}/bin/${name}";
  };
in
{
  inherit checked;
  places = {
    alert =
      if cfg.alert.command == null then
        "/etc/choir/alert"
      else
        "${pkgs.writeShellScript "choir-alert" "exec ${lib.escapeShellArgs cfg.alert.command} \"$@\""}";
    bin = "${cfg.package}/bin";
    config = "${checked}";
    containers_conf = "${pkgs.writeText "containers.conf" (
      builtins.readFile ../../deploy/debian/containers.conf
    )}";
    id = "${pkgs.coreutils}/bin/id";
    image = archive;
    libexec = "${pkgs.linkFarm "choir-libexec" (
      map program programs
      ++ lib.optional (cfg.image != null) {
        name = "make-image";
        path = makeImage;
      }
    )}";
    podman = "${pkgs.podman}/bin/podman";
    sh = "${pkgs.runtimeShell}";
    systemctl = "${config.systemd.package}/bin/systemctl";
    url = cfg.settings.control.origin;
  };
}
