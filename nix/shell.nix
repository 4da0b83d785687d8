# What a person works with. Everything else `cargo xtask` says it misses.
{ pkgs }:
pkgs.mkShell {
  packages = [
    (import ./toolchain.nix { inherit pkgs; })
    pkgs.git
  ]
  ++ pkgs.lib.optionals pkgs.stdenv.hostPlatform.isLinux [
    pkgs.btrfs-progs
    pkgs.crun
    pkgs.podman
    pkgs.shellcheck
  ]
  ++ [
    pkgs.deadnix
    pkgs.nixfmt
  ];
}
