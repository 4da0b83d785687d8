{
  inputs.choir.url = "github:OWNER/choir"; # a clone: "git+file:///home/you/choir"
  outputs = { choir, ... }: {
    nixosConfigurations.box = choir.inputs.nixpkgs.lib.nixosSystem {
      system = "x86_64-linux";
      modules = [ ./hardware-configuration.nix choir.nixosModules.default {
        services.choir.enable = true;
        services.choir.settings.control.origin = "https://choir.example.com";
        services.choir.settings.sandboxes.domain = "choir-apps.example";
        services.choir.tls = { mode = "public"; email = "ops@example.com"; dnsProvider = "route53"; environmentFile = "/etc/choir/dns"; };
        services.choir.openFirewall = true;
      } ];
    };
  };
}
