{
  description = "ChoirOS: the hypervisor, from the flake above this directory";

  # Without a lock of its own: what it is built with is the root's.
  inputs.root.url = "path:..";

  outputs =
    { root, ... }:
    {
      packages = builtins.mapAttrs (_: all: {
        inherit (all) hypervisor;
        default = all.hypervisor;
      }) root.packages;
      checks = builtins.mapAttrs (_: all: { inherit (all) hypervisor; }) root.checks;
      inherit (root) devShells;
      inherit (root) nixosModules;
    };
}
