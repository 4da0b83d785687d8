# A machine to try ChoirOS in: `nix run .#vm`, then http://localhost:9090. It keeps its disk in choir.qcow2 beside where it
# was started. Not for other people: everybody who reaches its console is root.
{ lib, modulesPath, ... }:
{
  imports = [ "${modulesPath}/virtualisation/qemu-vm.nix" ];

  networking.hostName = "choir";
  system.stateVersion = "26.05";

  services.choir = {
    enable = true;
    settings.sandboxes.max_running = 4;
    data.fileSize = "20G";
  };

  virtualisation = {
    cores = 2;
    memorySize = 4096;
    diskSize = 32768;
    graphics = false;
    forwardPorts = [
      {
        from = "host";
        host.address = "127.0.0.1";
        host.port = 9090;
        guest.port = 9090;
      }
    ];
  };
  # What QEMU forwards comes in at the address that it gave the machine, and not at loopback.
  systemd.sockets.choir-hypervisor.socketConfig.ListenStream = [ "10.0.2.15:9090" ];
  networking.firewall.allowedTCPPorts = [ 9090 ];

  services.getty.autologinUser = "root";
  services.getty.helpLine = lib.mkForce "The link that claims this machine: choir-hypervisor claim";
}
