# The default release of the sandboxes with the tools of sandbox/image/packages.txt. The result is a program that writes
# the image to its standard output as `docker load` and `choir releases import` take it. Its store path is the pin: the
# same path gives the same bytes, and a generation of the system names the one that it was switched to with.
{ pkgs }:
let
  inherit (pkgs) lib;
  named =
    name:
    lib.attrByPath (lib.splitString "." name)
      (throw "nixpkgs has no ${name}: change nix/image-packages.nix")
      pkgs;
  tools = map named (lib.unique (lib.concatLists (lib.attrValues (import ./image-packages.nix))));
  tree = pkgs.buildEnv {
    name = "choir-default-tools";
    paths = tools;
    pathsToLink = [
      "/bin"
      "/include"
      "/lib"
      "/share"
    ];
    ignoreCollisions = true;
  };
in
pkgs.dockerTools.streamLayeredImage {
  name = "choir-default";
  tag = "nix";
  contents = [
    tree
    pkgs.dockerTools.caCertificates
  ];
  # Whose is what: the agent runs as root of its namespace, everything of the user's as 1000.
  fakeRootCommands = ''
    mkdir -p etc home/choir root run tmp usr/bin usr/libexec/choir var/tmp
    printf 'root:x:0:0:root:/root:/bin/bash\nchoir:x:1000:1000:ChoirOS user:/home/choir:/bin/bash\nnobody:x:65534:65534::/:/bin/false\n' > etc/passwd
    printf 'root:x:0:\nchoir:x:1000:\nnogroup:x:65534:\n' > etc/group
    printf 'root:!:1::::::\nchoir:!:1::::::\n' > etc/shadow
    chmod 0600 etc/shadow
    echo sandbox > etc/hostname
    : > etc/hosts
    : > etc/resolv.conf
    : > etc/machine-id
    # The agent is mounted over this file; sudo is the agent under another name.
    : > usr/libexec/choir/choir-sandbox
    chmod 0755 usr/libexec/choir/choir-sandbox
    ln -s /usr/libexec/choir/choir-sandbox usr/bin/sudo
    ln -s ${pkgs.coreutils}/bin/env usr/bin/env
    chmod 1777 tmp var/tmp
    chown -R 1000:1000 home/choir
  '';
}
