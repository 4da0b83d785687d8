# Packages that are only names. A generated file's path is what it holds, so that tests can read it where it is used.
let
  package = name: {
    type = "derivation";
    inherit name;
    outPath = "/nix/store/00000000000000000000000000000000-${name}";
  };
in
{
  inherit package;
  btrfs-progs = package "btrfs-progs";
  coreutils = package "coreutils";
  e2fsprogs = package "e2fsprogs";
  findutils = package "findutils";
  gnutar = package "gnutar";
  jq = package "jq";
  podman = package "podman";
  util-linux = package "util-linux";
  runtimeShell = "/nix/store/00000000000000000000000000000000-bash/bin/bash";
  formats.toml = { }: {
    generate = _: value: { outPath = builtins.toJSON value; };
  };
  linkFarm = name: entries: package name // { inherit entries; };
  runCommand =
    name: _: script:
    package name // { inherit script; };
  writeShellScript = name: script: package name // { inherit script; };
  writeText = name: text: package name // { inherit text; };
}
