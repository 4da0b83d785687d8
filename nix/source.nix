# What the programs are built from, and nothing else: a change of a document, a script or a test of the whole system
# rebuilds none of them.
{ lib }:
let
  inherit (lib) fileset;
  root = ../.;
  extensions = [
    "css"
    "js"
    "json"
    "py"
    "rs"
    "sql"
    "svg"
    "toml"
  ];
  code = fileset.fileFilter (file: lib.any file.hasExt extensions);
  manifests = fileset.unions [
    ../Cargo.lock
    ../Cargo.toml
    ../clippy.toml
    ../rust-toolchain.toml
  ];
  programs = fileset.unions [
    manifests
    (code ../crates)
    (code ../hypervisor)
    (code ../sandbox)
    (code ../volumes)
    (code ../cli)
    # Cargo wants every member of the workspace to be there; of these no more than it looks for.
    ../xtask/Cargo.toml
    ../xtask/src/main.rs
    ../tests/e2e/Cargo.toml
    ../tests/e2e/src/lib.rs
    ../bench/Cargo.toml
    ../bench/src/app/main.rs
    ../bench/src/main.rs
  ];
in
{
  programs = fileset.toSource {
    inherit root;
    fileset = programs;
  };
  # For the lints, which read every program and test.
  everything = fileset.toSource {
    inherit root;
    fileset = fileset.unions [
      programs
      (code ../xtask)
      (code ../tests)
      (code ../bench)
      ../deploy/debian
      ../deploy/units.json
      ../docs/runbook/rollback.md
      ../README.md
      ./quick-start.nix
      ./source.nix
      ../rustfmt.toml
    ];
  };
  # What a browser is sent.
  assets = fileset.toSource {
    root = ../hypervisor/src/pages/assets;
    fileset = ../hypervisor/src/pages/assets;
  };
}
