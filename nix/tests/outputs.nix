# The names that people and CI rely on, without building or fetching anything.
{ lib, fired }:
let
  test = name: got: expected: { inherit name got expected; };
  fakes = {
    lib = {
      inherit (lib) genAttrs;
      getExe = _: "";
      nixosSystem = { modules }: modules;
    };
    legacyPackages = lib.genAttrs [
      "x86_64-linux"
      "aarch64-linux"
      "x86_64-darwin"
      "aarch64-darwin"
    ] (_: { });
  };
  flake = import ../../flake.nix;
  self = flake.outputs {
    inherit self;
    nixpkgs = fakes;
    crane = { };
  };
  part = directory: (import (../.. + "/${directory}/flake.nix"));
  of = directory: (part directory).outputs { root = self; };
  names = builtins.attrNames;
  component = directory: name: [
    (test "${directory} has its package, its check and a shell, and the root's inputs"
      {
        packages = builtins.mapAttrs (_: names) (of directory).packages;
        checks = builtins.mapAttrs (_: names) (of directory).checks;
        shells = builtins.mapAttrs (_: names) (of directory).devShells;
        inputs = (part directory).inputs;
      }
      {
        packages = lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] (
          _:
          builtins.sort builtins.lessThan [
            name
            "default"
          ]
        );
        checks = lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] (_: [ name ]);
        shells = lib.genAttrs [ "x86_64-linux" "aarch64-linux" "x86_64-darwin" "aarch64-darwin" ] (_: [
          "default"
        ]);
        inputs.root.url = "path:..";
      }
    )
  ];
  listed = builtins.filter builtins.isString (
    builtins.split "\n" (builtins.readFile ../../sandbox/image/packages.txt)
  );
  isPackage = line: line != "" && !lib.hasPrefix "#" line;
  quick = (import ../quick-start.nix).outputs {
    choir = {
      inputs.nixpkgs.lib.nixosSystem = { modules, ... }: modules;
      nixosModules.default = "the module";
    };
  };
  settings = builtins.filter builtins.isAttrs quick.nixosConfigurations.box;
  lines =
    builtins.length (
      builtins.filter builtins.isString (builtins.split "\n" (builtins.readFile ../quick-start.nix))
    )
    - 1;
in
component "sandbox" "sandbox"
++ component "dioxus-desktop" "desktop"
++ component "hypervisor" "hypervisor"
++ [
  (test "the root has everything"
    {
      outputs = names self;
      packages = names self.packages.x86_64-linux;
      hosts = names self.nixosConfigurations;
      inputs = names flake.inputs;
      module = (of "hypervisor") ? nixosModules && names self.nixosModules == [ "default" ];
      vm = names self.apps.x86_64-linux;
    }
    {
      outputs = [
        "apps"
        "checks"
        "devShells"
        "nixosConfigurations"
        "nixosModules"
        "packages"
      ];
      packages = [
        "cli"
        "default"
        "desktop"
        "hypervisor"
        "image"
        "sandbox"
        "volumes"
      ];
      hosts = [
        "choir-ec2"
        "choir-vm"
      ];
      inputs = [
        "crane"
        "nixpkgs"
      ];
      module = true;
      vm = [ "vm" ];
    }
  )
  (test "both images hold the same tools" (names (import ../image-packages.nix)) (
    builtins.sort builtins.lessThan (builtins.filter isPackage listed)
  ))
  (test "the toolchain is that of rust-toolchain.toml, for every system"
    {
      inherit (builtins.fromJSON (builtins.readFile ../toolchain.json)) channel;
      systems = names (builtins.fromJSON (builtins.readFile ../toolchain.json)).systems;
    }
    {
      inherit ((builtins.fromTOML (builtins.readFile ../../rust-toolchain.toml)).toolchain) channel;
      systems = names fakes.legacyPackages;
    }
  )
  (test "the quick start has at most 15 lines" (lines <= 15) true)
  (test "the quick start is a system to which nothing is to be said" (map fired settings) [ [ ] ])
]
