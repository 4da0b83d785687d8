{
  description = "ChoirOS: the sandbox, from the flake above this directory";

  # Without a lock of its own: what it is built with is the root's.
  inputs.root.url = "path:..";

  outputs =
    { root, ... }:
    {
      packages = builtins.mapAttrs (_: all: {
        inherit (all) sandbox;
        default = all.sandbox;
      }) root.packages;
      checks = builtins.mapAttrs (_: all: { inherit (all) sandbox; }) root.checks;
      inherit (root) devShells;
    };
}
