# All tests of the module: { library, passed, failed }.
{ lib }:
let
  evaluated = import ./evaluated.nix { inherit lib; };
  inherit (builtins) filter map;

  fired = config: map (it: it.message) (filter (it: !it.assertion) (evaluated.of config).assertions);
  # All that the module makes of a configuration.
  whole = config: builtins.tryEval (builtins.deepSeq (rendered (evaluated.of config)) true);
  rendered = config: {
    inherit (config.systemd)
      services
      sockets
      timers
      mounts
      ;
    inherit (config.services) choir caddy;
    inherit (config.environment) etc;
    inherit (config) users fileSystems;
    user = config.systemd.user;
  };

  asserted =
    {
      name,
      says,
      wrong,
      right,
    }:
    [
      {
        inherit name;
        got = map (lib.hasInfix says) (fired wrong);
        expected = [ true ];
      }
      {
        name = "${name} (and not more)";
        got = fired right;
        expected = [ ];
      }
    ];
  refused =
    {
      name,
      wrong,
      right,
    }:
    [
      {
        name = "${name} is refused";
        got = (whole wrong).success;
        expected = false;
      }
      {
        name = "${name} is refused (and not more)";
        got = {
          inherit (whole right) success;
          fired = fired right;
        };
        expected = {
          success = true;
          fired = [ ];
        };
      }
    ];

  tests =
    builtins.concatMap asserted (import ./assertions.nix)
    ++ builtins.concatMap refused (import ./refusals.nix)
    ++ import ./effects.nix { inherit evaluated fired; }
    ++ import ./outputs.nix { inherit lib fired; };
  failed = filter (test: test.got != test.expected) tests;
in
{
  library = if builtins.getEnv "CHOIR_NIXPKGS" == "" then "ours" else "nixpkgs";
  passed = builtins.length tests - builtins.length failed;
  inherit failed;
}
