# A machine with the module in QEMU: from the first boot over a swap, a kill, a reboot, a backup brought back and an older
# generation of the system. It needs a binary cache to be built; docs/verification.md says whether it has ever run.
{ pkgs, module }:
pkgs.testers.runNixOSTest {
  name = "choir";
  nodes.box = {
    imports = [ module ];
    virtualisation = {
      cores = 2;
      memorySize = 4096;
      diskSize = 16384;
    };
    services.choir = {
      enable = true;
      data.fileSize = "8G";
      settings.backup.recipients = [ "age1praw4k9u5wx2cptum38elepzv6kfjk8dsu4f8dltvcd5mrefl5ssjzamw0" ];
      backup.enable = true;
    };
    # Made for this test; nothing else was ever encrypted to it.
    environment.etc."identity".text = ''
      AGE-SECRET-KEY-1AZ95W9Q6323M2DVPQWPYMX43SP60E3VZAA4RDL5739U920E5F0RQTK0GAG
    '';
    # A second generation, to go back from.
    specialisation.next.configuration.services.choir.settings.log.level = "debug";
  };
  testScript = ''
    url = "http://localhost:9090"

    def ready():
        box.wait_for_unit("choir-hypervisor.service")
        box.wait_until_succeeds(f"curl --fail --silent {url}/readyz", timeout=900)

    def invite():
        return box.succeed("choir-hypervisor claim").strip().split("invite=")[1]

    box.start()
    with subtest("the first boot ends with a link and the default release"):
        ready()
        box.wait_for_file("/var/lib/choir/hypervisor/claim-link")

    with subtest("claim, login, both sandboxes, a task in each, a websocket, a swap"):
        box.succeed(f"choir smoke --url {url} --invite {invite()} --keep >&2")

    with subtest("the container owner reads nothing of the hypervisor's"):
        for path in ["hypervisor/key", "hypervisor/choir.db", "backups"]:
            box.succeed(f"test -e /var/lib/choir/{path}")
            box.fail(f"runuser -u choir-sandbox -- test -r /var/lib/choir/{path}")
        box.succeed("runuser -u choir-sandbox -- test -r /etc/passwd")

    with subtest("a killed hypervisor comes back, and sandboxes run on"):
        count = "ls /run/choir/sandboxes | wc -l"
        before = box.succeed(count)
        box.succeed("systemctl kill --signal KILL choir-hypervisor.service")
        ready()
        assert box.succeed(count) == before

    with subtest("everything returns after a reboot"):
        box.shutdown()
        box.start()
        ready()
        box.succeed("choir-hypervisor fsck >&2")

    with subtest("a backup is written, encrypted, and comes back"):
        box.succeed("systemctl start choir-backup.service")
        box.succeed("head -c 21 /var/lib/choir/backups/*.age | grep age-encryption.org")
        box.succeed("choir-hypervisor restore /var/lib/choir/backups/*.age --into /tmp/back --identity /etc/identity")
        box.succeed("test -s /tmp/back/choir.db")

    with subtest("a newer generation and back"):
        box.succeed("/run/current-system/specialisation/next/bin/switch-to-configuration test >&2")
        ready()
        box.succeed("grep debug /etc/choir/hypervisor.toml")
        box.succeed("/run/booted-system/bin/switch-to-configuration test >&2")
        ready()
        box.fail("grep debug /etc/choir/hypervisor.toml")
  '';
}
