# What stands before port 9090: Caddy with its certificates, and the firewall.
{ config, lib, ... }:
let
  cfg = config.services.choir;
  inherit (cfg.settings) control sandboxes;
  isPublic = cfg.tls.mode == "public";
  host = import ./host.nix control.origin;
  # Answers are sent on as they come: events and terminals are streams. The hypervisor closes an idle connection after 10 s.
  proxy = ''
    reverse_proxy 127.0.0.1:9090 {
      flush_interval -1
      transport http {
        keepalive 5s
      }
    }
  '';
  site = extra: {
    extraConfig = extra + proxy;
    # To the journal, which has its bounds.
    logFormat = "output stderr";
  };
  internal = "tls internal\n";
in
{
  config = lib.mkIf (cfg.enable && cfg.tls.mode != "none") {
    services.choir.settings.listen.trusted_proxies = [
      "127.0.0.1/32"
      "::1/128"
    ];
    services.caddy = {
      enable = true;
      email = lib.mkIf isPublic cfg.tls.email;
      virtualHosts = {
        ${host.name} = site (lib.optionalString (!isPublic) internal);
        "*.${sandboxes.domain}" =
          site (lib.optionalString (!isPublic) internal)
          // lib.optionalAttrs isPublic { useACMEHost = sandboxes.domain; };
      };
    };
    security.acme = lib.mkIf isPublic {
      acceptTerms = true;
      certs.${sandboxes.domain} = {
        domain = "*.${sandboxes.domain}";
        inherit (cfg.tls) email dnsProvider environmentFile;
        group = "caddy";
        reloadServices = [ "caddy.service" ];
      };
    };
    networking.firewall.allowedTCPPorts = lib.mkIf cfg.openFirewall [
      80
      443
    ];
  };
}
