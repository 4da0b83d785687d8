# `nix-instantiate --eval --strict --json nix/tests` runs the tests of the module. It needs neither a store nor nixpkgs.
import ./run.nix { lib = import ./library.nix; }
