{
  description = "ChoirOS: the desktop, from the flake above this directory";

  # Without a lock of its own: what it is built with is the root's.
  inputs.root.url = "path:..";

  outputs =
    { root, ... }:
    {
      packages = builtins.mapAttrs (_: all: {
        inherit (all) desktop;
        default = all.desktop;
      }) root.packages;
      checks = builtins.mapAttrs (_: all: { inherit (all) desktop; }) root.checks;
      inherit (root) devShells;
    };
}
