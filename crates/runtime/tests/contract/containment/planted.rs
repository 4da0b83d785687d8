//! What a hostile volume may hold: a setuid program, one with a capability, a device. Two things stop each, and each
//! of the two is shown to do so alone.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::fs::{CWD, Dev, FileType, Mode, makedev, mknodat};
use serde_json::{Value, json};

use super::{inside_of, quoted, unguarded};
use crate::rig::{IDS, Rig};
use crate::root::lend;

/// Takes the named protections away from a template: `nosuid` and `nodev` of the home, `no-new-privileges`.
fn without<'a>(protections: &'a [&'a str]) -> impl FnOnce(&mut Value) + 'a {
    move |container| {
        for protection in protections {
            if *protection == "no-new-privileges" {
                container["no_new_privileges"] = json!(false);
                continue;
            }
            for option in container["mounts"][0]["options"].as_array_mut().unwrap() {
                if option == protection {
                    *option = json!(protection.trim_start_matches("no"));
                }
            }
        }
    }
}

/// What the planted program says of itself when a user runs it in containers that lack one protection or more. `setup`
/// is run as root before.
async fn tried(rig: &Rig, setup: &str, protections: &[&str]) -> String {
    let spec = rig.spec();
    lend(&rig.volume(&spec.generation), "cat");
    lend(&rig.volume(&spec.generation), "perl");
    let line = format!("{setup}; busybox su choir -c '/home/choir/planted /proc/self/status'");
    unguarded(rig, &spec, without(protections), &line).await
}

/// The values of one line of `/proc/self/status`.
fn status<'a>(output: &'a str, name: &str) -> Vec<&'a str> {
    let line = output.lines().find_map(|l| l.strip_prefix(name));
    line.unwrap_or_default().split_whitespace().collect()
}

/// What the planted file says of itself when a stranger on the host runs it.
fn tried_on_the_host(volume: &Path) -> String {
    let mut cat = Command::new(volume.join("home/planted"));
    let output = cat
        .arg("/proc/self/status")
        .uid(STRANGER)
        .gid(STRANGER)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// A user of the host who owns nothing.
const STRANGER: u32 = 65_534;

/// `id` would not do: busybox gives its rights back before it runs that.
const SETUID: &str = "cp /bin/cat /home/choir/planted; chown 0:0 /home/choir/planted; chmod 4755 /home/choir/planted";

/// E08: a setuid file of the sandbox's root has the bit, and gives its caller nothing.
pub async fn a_setuid_program_on_the_volume_gives_nothing(rig: &Rig) {
    let spec = rig.spec();
    lend(&rig.volume(&spec.generation), "cat");
    let inside = inside_of(rig, spec).await;
    inside.ok(&format!("sudo -n sh -c '{SETUID}'")).await;
    let volume = rig.volume(&inside.spec.generation);
    let planted = fs::metadata(volume.join("home/planted")).unwrap();
    assert_eq!(
        (planted.mode() & 0o4000, planted.uid()),
        (0o4000, IDS.base),
        "the bit is there"
    );
    let output = tried_on_the_host(&volume);
    let [real, effective, ..] = status(&output, "Uid:")[..] else {
        panic!("{output}")
    };
    assert_eq!(
        (real, effective),
        (&*STRANGER.to_string(), &*IDS.base.to_string()),
        "on the host it gives an id that owns nothing"
    );
    let output = inside.ok("~/planted /proc/self/status").await;
    assert_eq!(status(&output, "Uid:"), ["1000"; 4]);
    inside
        .ok("sudo -n sh -c 'mkdir /planted; cp -p /home/choir/planted /planted/; ls -l /planted | grep -q rws'")
        .await;
    let output = inside.ok("/planted/planted /proc/self/status").await;
    assert_eq!(
        status(&output, "Uid:"),
        ["1000"; 4],
        "no-new-privileges stops it where setuid files may be"
    );
    assert_eq!(
        inside.ok("sudo -n id -u").await.trim(),
        "0",
        "the way that is meant works"
    );
    inside.end().await;

    let root = ["1000", "0", "0", "0"];
    let control = tried(rig, SETUID, &["nosuid", "no-new-privileges"]).await;
    assert_eq!(status(&control, "Uid:"), root, "without both it is root: {control}");
    for alone in ["nosuid", "no-new-privileges"] {
        let control = tried(rig, SETUID, &[alone]).await;
        assert_eq!(
            status(&control, "Uid:"),
            ["1000"; 4],
            "without {alone} the other stops it: {control}"
        );
    }
}

/// CAP_CHOWN, permitted and effective, as the attribute of a file (capabilities(7), revision 2).
fn capability() -> String {
    let set = format!(
        "syscall({}, my $f = \"/home/choir/planted\", my $n = \"security.capability\", \
         my $v = pack(\"V5\", 0x02000001, 1, 0, 0, 0), 20, 0) == 0 or die $!",
        libc::SYS_setxattr
    );
    format!("cp /bin/cat /home/choir/planted; chown 0:0 /home/choir/planted; perl -e '\\''{set}'\\''")
}

/// E08: so has a file with a capability.
pub async fn a_file_capability_on_the_volume_gives_nothing(rig: &Rig) {
    let spec = rig.spec();
    lend(&rig.volume(&spec.generation), "cat");
    lend(&rig.volume(&spec.generation), "perl");
    let inside = inside_of(rig, spec).await;
    inside.ok(&format!("sudo -n sh -c '{}'", capability())).await;
    let volume = rig.volume(&inside.spec.generation);
    let planted = volume.join("home/planted");
    let mut value = [0; 64];
    let length = rustix::fs::getxattr(&planted, "security.capability", &mut value).unwrap();
    assert_eq!(length, 24, "the kernel has bound it to the sandbox's ids");
    assert_eq!(status(&tried_on_the_host(&volume), "CapEff:"), ["0000000000000000"]);
    let output = inside.ok("~/planted /proc/self/status").await;
    assert_eq!(status(&output, "CapEff:"), ["0000000000000000"]);
    inside.end().await;

    let setup = capability().replace("'\\''", "'");
    let control = tried(rig, &setup, &["nosuid", "no-new-privileges"]).await;
    assert_eq!(
        status(&control, "CapEff:"),
        ["0000000000000001"],
        "without both it counts: {control}"
    );
    for alone in ["nosuid", "no-new-privileges"] {
        let control = tried(rig, &setup, &[alone]).await;
        assert_eq!(
            status(&control, "CapEff:"),
            ["0000000000000000"],
            "without {alone}: {control}"
        );
    }
}

/// A character device that everybody may open.
fn plant(at: &Path, device: Dev) {
    mknodat(CWD, at, FileType::CharacterDevice, Mode::from_raw_mode(0o666), device).unwrap();
    fs::set_permissions(at, fs::Permissions::from_mode(0o666)).unwrap();
    lchown(at, Some(IDS.base + 1000), Some(IDS.base + 1000)).unwrap();
}

/// E08: devices that somebody put on the volume from outside; inside, nobody can make one.
pub async fn a_device_node_on_the_volume_cannot_be_opened(rig: &Rig) {
    let planted = || {
        let spec = rig.spec();
        let volume = rig.volume(&spec.generation);
        // /dev/zero, which a container's device list has, so that the mount alone refuses; and /dev/loop-control below
        // the root, which is not mounted `nodev` here, so that the list alone does.
        plant(&volume.join("home/zero"), makedev(1, 5));
        plant(&volume.join("root/loop"), makedev(10, 237));
        spec
    };
    let open = |path: &str| format!(": < {path} && echo opened");
    let inside = inside_of(rig, planted()).await;
    for (path, why) in [("/home/choir/zero", "Permission denied"), ("/loop", "not permitted")] {
        for open in [open(path), format!("sudo -n {}", quoted(&open(path)))] {
            let output = inside.refused(&open).await;
            assert!(output.to_lowercase().contains(&why.to_lowercase()), "{path}: {output}");
        }
    }
    inside.ok(&open("/dev/zero")).await;
    inside.refused("mknod ~/own c 1 5").await;
    inside.refused("sudo -n mknod /own c 1 5").await;
    inside.end().await;

    let control = unguarded(rig, &planted(), without(&["nodev"]), &open("/home/choir/zero")).await;
    assert_eq!(control.trim(), "opened", "without nodev");
    let privileged = |c: &mut Value| {
        c["userns"] = json!({"nsmode": "host"});
        c["privileged"] = json!(true);
    };
    let control = unguarded(rig, &planted(), privileged, &open("/loop")).await;
    assert_eq!(control.trim(), "opened", "where every device is on the list");
}
