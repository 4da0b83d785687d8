# The tests of the module as a check of the flake, on the library of nixpkgs. They are done when this is evaluated.
{ pkgs }:
let
  result = import ./run.nix { inherit (pkgs) lib; };
  names = map (test: test.name) result.failed;
in
if names == [ ] then
  pkgs.runCommand "choir-options" { } ''echo "${toString result.passed} passed" > "$out"''
else
  throw "nix/tests: ${builtins.concatStringsSep "; " names}"
