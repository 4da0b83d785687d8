# The programs, linked statically as those of the Debian package are, and what is checked of them. Dependencies are one
# derivation for all.
{ pkgs, crane }:
let
  inherit (pkgs) lib;
  toolchain = import ./toolchain.nix { inherit pkgs; };
  source = import ./source.nix { inherit lib; };
  craneLib = (crane.mkLib pkgs).overrideToolchain toolchain;

  target = "${pkgs.stdenv.hostPlatform.parsed.cpu.name}-unknown-linux-musl";
  underscored = lib.replaceStrings [ "-" ] [ "_" ] target;
  musl = pkgs.pkgsStatic.stdenv.cc;
  tool = name: "${musl}/bin/${musl.targetPrefix}${name}";

  common = {
    pname = "choir";
    inherit ((lib.importTOML ../Cargo.toml).workspace.package) version;
    strictDeps = true;
    # SQLite is compiled by gcc, for the same C library.
    CARGO_BUILD_TARGET = target;
    "CARGO_TARGET_${lib.toUpper underscored}_LINKER" = tool "cc";
    "CC_${underscored}" = tool "cc";
    "AR_${underscored}" = tool "ar";
  };
  shipped = common // {
    src = source.programs;
    # What runs them needs Podman, a browser and root: `cargo xtask test`.
    doCheck = false;
  };
  names = [
    "choir"
    "choir-hypervisor"
    "choir-sandbox"
    "choir-volumes"
  ];
  packages = lib.concatMapStringsSep " " (name: "--package ${name}") names;
  dependencies = craneLib.buildDepsOnly (shipped // { cargoExtraArgs = "--locked ${packages}"; });
  program =
    name: description:
    craneLib.buildPackage (
      shipped
      // {
        pname = name;
        cargoArtifacts = dependencies;
        cargoExtraArgs = "--locked --package ${name}";
        meta = {
          inherit description;
          mainProgram = name;
          license = lib.licenses.asl20;
          platforms = [
            "x86_64-linux"
            "aarch64-linux"
          ];
        };
      }
    );

  everything = common // {
    src = source.everything;
  };
in
rec {
  cli = program "choir" "Command line of ChoirOS";
  hypervisor = program "choir-hypervisor" "Control plane of ChoirOS";
  sandbox = program "choir-sandbox" "Agent in each sandbox of ChoirOS";
  volumes = program "choir-volumes" "Keeper of the disks of ChoirOS sandboxes";

  # Until there is an application to compile, the desktop is what the hypervisor's pages ask a browser to load.
  desktop = pkgs.runCommand "choir-desktop-${common.version}" { } ''
    mkdir -p "$out/share/choir"
    cp -r ${source.assets} "$out/share/choir/assets"
  '';

  # All programs in one directory, which is what services.choir.package wants.
  programs = pkgs.symlinkJoin {
    name = "choir-${common.version}";
    paths = [
      cli
      hypervisor
      sandbox
      volumes
    ];
    meta.mainProgram = "choir";
  };

  checks = {
    clippy = craneLib.cargoClippy (
      everything
      // {
        cargoArtifacts = craneLib.buildDepsOnly (everything // { pname = "choir-all"; });
        cargoClippyExtraArgs = "--workspace --all-targets -- --deny warnings";
      }
    );
    formatting = craneLib.cargoFmt { inherit (everything) pname version src; };
    # These need nothing of the machine.
    tests = craneLib.cargoTest (
      shipped
      // {
        cargoArtifacts = dependencies;
        cargoTestExtraArgs = "--package choir-core --package choir-store";
        doCheck = true;
      }
    );
  };
}
