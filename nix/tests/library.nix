# The real library where CHOIR_NIXPKGS says where nixpkgs is, else the one that stands in for it.
let
  nixpkgs = builtins.getEnv "CHOIR_NIXPKGS";
in
if nixpkgs == "" then import ./lib.nix else import "${nixpkgs}/lib"
