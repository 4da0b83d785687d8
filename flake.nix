{
  description = "ChoirOS: a private host for coding sandboxes in live and dev pairs";

  # Their lock, flake.lock, is the only one of the repository.
  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";
    crane.url = "github:ipetkov/crane/v0.23.4";
  };

  outputs =
    {
      self,
      nixpkgs,
      crane,
    }:
    let
      inherit (nixpkgs) lib;
      linux = [
        "x86_64-linux"
        "aarch64-linux"
      ];
      darwin = [
        "x86_64-darwin"
        "aarch64-darwin"
      ];
      over = systems: make: lib.genAttrs systems (system: make system nixpkgs.legacyPackages.${system});
      built = over linux (_: pkgs: import ./nix/programs.nix { inherit pkgs crane; });
      host =
        system: module:
        lib.nixosSystem {
          modules = [
            self.nixosModules.default
            module
            { nixpkgs.hostPlatform = system; }
          ];
        };
    in
    {
      packages = over linux (
        system: pkgs: {
          inherit (built.${system})
            cli
            desktop
            hypervisor
            sandbox
            volumes
            ;
          image = import ./nix/image.nix { inherit pkgs; };
          default = built.${system}.programs;
        }
      );

      devShells = over (linux ++ darwin) (
        _: pkgs: { default = import ./nix/shell.nix { inherit pkgs; }; }
      );

      checks = over linux (
        system: pkgs:
        {
          inherit (self.packages.${system})
            cli
            desktop
            hypervisor
            sandbox
            volumes
            image
            ;
          options = import ./nix/tests/check.nix { inherit pkgs; };
          vm = import ./nix/vm-test.nix {
            inherit pkgs;
            module = self.nixosModules.default;
          };
        }
        // built.${system}.checks
      );

      nixosModules.default =
        { lib, pkgs, ... }:
        let
          own = self.packages.${pkgs.stdenv.hostPlatform.system};
        in
        {
          imports = [ ./nix/module.nix ];
          services.choir.package = lib.mkDefault own.default;
          services.choir.image = lib.mkDefault own.image;
        };

      nixosConfigurations = {
        choir-ec2 = host "x86_64-linux" ./nix/hosts/choir-ec2.nix;
        choir-vm = host "x86_64-linux" ./nix/hosts/choir-vm.nix;
      };

      apps.x86_64-linux.vm = {
        type = "app";
        program = lib.getExe self.nixosConfigurations.choir-vm.config.system.build.vm;
        meta.description = "A machine with ChoirOS to try out, at http://localhost:9090";
      };
    };
}
