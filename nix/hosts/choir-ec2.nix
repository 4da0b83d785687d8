# The box of deploy/aws: the official NixOS image on EC2, with the data volume that choir.yaml attaches as /dev/sdf.
# Replace the names that end in `example` and the address before the first switch.
{ modulesPath, pkgs, ... }:
{
  imports = [ "${modulesPath}/virtualisation/amazon-image.nix" ];

  networking.hostName = "choir";
  system.stateVersion = "26.05";

  services.choir = {
    enable = true;
    settings.control.origin = "https://choir.example";
    settings.sandboxes.domain = "choir-apps.example";
    data.device = "/dev/sdf";
    openFirewall = true;
    tls = {
      mode = "public";
      email = "ops@choir.example";
      dnsProvider = "route53";
      # Keys of a user that may change this one zone. The host's own role may not: who breaks out of a sandbox may
      # become it.
      environmentFile = "/etc/choir/dns";
    };
  };
  # Blank when choir.yaml has made it; what has a file system already is left as it is.
  fileSystems."/var/lib/choir".autoFormat = true;

  # 8 GiB are not enough to build: closures come from elsewhere.
  nix.settings.max-jobs = 0;

  services.openssh.settings.PasswordAuthentication = false;
  # Only where choir.yaml was told to allow it has the host the right to.
  services.amazon-ssm-agent.enable = true;

  # The alarm on memory in choir.yaml counts a minute without a number as one without memory.
  systemd.services.choir-aws-memory = {
    path = [
      pkgs.curl
      pkgs.gawk
      pkgs.jq
    ];
    unitConfig.Description = "The host's memory for the alarm of CloudWatch";
    serviceConfig = {
      Type = "oneshot";
      DynamicUser = "yes";
      ExecStart = "${pkgs.runtimeShell} ${../../deploy/aws/choir-aws-memory}";
    };
  };
  systemd.timers.choir-aws-memory = {
    unitConfig.Description = "Each minute the host's memory";
    timerConfig.OnCalendar = "minutely";
    wantedBy = [ "timers.target" ];
  };
}
