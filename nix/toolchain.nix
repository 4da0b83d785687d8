# The Rust toolchain of rust-toolchain.toml, from the project's own archives. Their hashes are in toolchain.json, copied
# from the release's manifest; so there is no third input, and nixpkgs may have another Rust.
{ pkgs }:
let
  inherit (pkgs) lib stdenv;
  release = lib.importJSON ./toolchain.json;
  wanted = (lib.importTOML ../rust-toolchain.toml).toolchain.channel;
  archives = release.systems.${stdenv.hostPlatform.system};
  fetch =
    name: sha256:
    pkgs.fetchurl {
      url = "https://static.rust-lang.org/dist/${release.date}/${name}";
      inherit sha256;
    };
in
assert lib.assertMsg (release.channel == wanted)
  "nix/toolchain.json has the hashes of Rust ${release.channel}, and rust-toolchain.toml asks for ${wanted}: copy those of ${wanted} from its manifest.";
stdenv.mkDerivation {
  pname = "rust-toolchain";
  version = release.channel;
  srcs = lib.mapAttrsToList fetch archives;
  sourceRoot = ".";
  strictDeps = true;
  nativeBuildInputs = lib.optional stdenv.hostPlatform.isLinux pkgs.autoPatchelfHook;
  buildInputs = lib.optionals stdenv.hostPlatform.isLinux [
    pkgs.zlib
    (lib.getLib stdenv.cc.cc)
  ];
  dontConfigure = true;
  dontBuild = true;
  # They are stripped already, and the metadata in them must stay.
  dontStrip = true;
  installPhase = ''
    runHook preInstall
    for component in */install.sh; do
      bash "$component" --prefix="$out" --disable-ldconfig
    done
    # rustc has gcc call this for programs of the build itself; the linker of nixpkgs alone knows where libraries are.
    for linker in "$out"/lib/rustlib/*/bin/gcc-ld/ld.lld; do
      [ ! -e "$linker" ] || ln -sf ${stdenv.cc.bintools}/bin/ld "$linker"
    done
    runHook postInstall
  '';
  meta.mainProgram = "cargo";
}
