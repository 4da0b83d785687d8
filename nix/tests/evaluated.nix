# The module among the options of NixOS that it sets.
{ lib }:
let
  packages = import ./packages.nix;
  base = {
    nix.package = packages.package "nix";
    systemd.package = packages.package "systemd";
    services.choir = {
      enable = lib.mkDefault true;
      package = packages.package "choir";
      image = lib.mkDefault (packages.package "choir-default");
    };
  };
in
{
  inherit lib packages;
  of =
    config:
    (lib.evalModules {
      modules = [
        ./nixos.nix
        ../module.nix
        base
        config
      ];
      specialArgs.pkgs = packages;
    }).config;
}
