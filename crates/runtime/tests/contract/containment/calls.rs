//! System calls that the seccomp profile refuses, told apart from what the kernel itself refuses: most are made with
//! arguments on which the kernel, asked, gives another error.

use libc::{E2BIG, EAFNOSUPPORT, EFAULT, EINVAL, ENOENT, ENOSYS, EOPNOTSUPP, EPERM};
use serde_json::{Value, json};

use super::{inside_of, table, unguarded};
use crate::rig::Rig;
use crate::root::lend;

/// One call: its name, as Perl makes it, the error it has inside, and the kernel's own (0: it succeeds).
struct Call {
    name: &'static str,
    perl: String,
    refused: i32,
    kernel: i32,
}

fn call(name: &'static str, number: libc::c_long, arguments: &str, refused: i32, kernel: i32) -> Call {
    let perl = format!("syscall({number}, {arguments})");
    Call {
        name,
        perl,
        refused,
        kernel,
    }
}

fn calls() -> Vec<Call> {
    // A type that no family has is looked at before the family is.
    let no_type = 12;
    let socket = |name, family| {
        call(
            name,
            libc::SYS_socket,
            &format!("{family}, {no_type}, 0"),
            EAFNOSUPPORT,
            EINVAL,
        )
    };
    let new_user = libc::CLONE_NEWUSER;
    let fork_user = new_user | libc::SIGCHLD;
    vec![
        call("unshare", libc::SYS_unshare, &new_user.to_string(), EPERM, 0),
        call("clone", libc::SYS_clone, &format!("{fork_user}, 0, 0, 0, 0"), EPERM, 0),
        // ENOSYS, so that programs fall back to clone, whose flags can be read.
        call("clone3", libc::SYS_clone3, "0, 0", ENOSYS, EINVAL),
        call("mount", libc::SYS_mount, "0, 0, 0, 0, 0", EPERM, EFAULT),
        call("bpf", libc::SYS_bpf, "0, 0, 1 << 20", EPERM, E2BIG),
        call(
            "perf_event_open",
            libc::SYS_perf_event_open,
            "0, 0, -1, -1, -1",
            EPERM,
            EINVAL,
        ),
        call("keyctl", libc::SYS_keyctl, "9999, 0, 0, 0, 0", EPERM, EOPNOTSUPP),
        // UFFD_USER_MODE_ONLY
        call("userfaultfd", libc::SYS_userfaultfd, "1", EPERM, 0),
        call("io_uring_setup", libc::SYS_io_uring_setup, "1, 0", EPERM, EFAULT),
        socket("AF_ALG", libc::AF_ALG),
        socket("AF_VSOCK", libc::AF_VSOCK),
        ioctl("BTRFS_IOC_SUBVOL_CREATE", 14, "$here", "q a4088", "0, \"sub\"", 0),
        ioctl(
            "BTRFS_IOC_SNAP_CREATE_V2",
            23,
            "$here",
            "q x48 a4040",
            "$sub, \"snap\"",
            0,
        ),
        // What is not there, the kernel says so before it asks who wants to delete it.
        ioctl("BTRFS_IOC_SNAP_DESTROY", 15, "$here", "q a4088", "0, \"none\"", ENOENT),
    ]
}

/// `_IOW(0x94, number, 4096 bytes)`.
fn ioctl(name: &'static str, number: u32, on: &str, layout: &str, fields: &str, kernel: i32) -> Call {
    let request = 0x5000_9400 | number;
    let arguments = format!("{on}, {request}, my $a = pack(\"{layout}\", {fields})");
    call(name, libc::SYS_ioctl, &arguments, EPERM, kernel)
}

/// A program that makes each call in a process of its own and says its error.
fn program() -> String {
    let open = |path: &str| format!("syscall({}, -100, my $p = \"{path}\", 0)", libc::SYS_openat);
    let one = |c: &Call| {
        format!(
            "if (my $child = fork) {{ waitpid $child, 0 }} else {{ \
             my $here = {here}; my $sub = {sub}; $sub = $here if $sub < 0; \
             my $r = {call}; my $e = $r == -1 ? $!+0 : 0; \
             syswrite(STDOUT, \"{name} $e\\n\") unless \"$r {name}\" eq \"0 clone\"; exit }}",
            here = open("."),
            sub = open("sub"),
            call = c.perl,
            name = c.name,
        )
    };
    calls().iter().map(one).collect::<Vec<_>>().join("\n")
}

fn expect(output: &str, right: impl Fn(&Call, i32) -> bool) {
    let errors = table(output);
    for call in calls() {
        let error = errors.get(call.name).and_then(|e| e.parse().ok()).expect(call.name);
        assert!(right(&call, error), "{} has error {error}: {output}", call.name);
    }
}

/// E21: what would open the kernel's rarely walked parts.
pub async fn forbidden_system_calls_are_refused(rig: &Rig) {
    let spec = rig.spec();
    lend(&rig.volume(&spec.generation), "perl");
    let program = program();
    let inside = inside_of(rig, spec).await;
    let script = format!("cat > ~/calls <<'END'\n{program}\nEND");
    inside.ok(&script).await;
    expect(&inside.ok("cd; perl calls").await, |c, error| error == c.refused);
    expect(&inside.ok("cd; sudo -n perl calls").await, |c, error| {
        error == c.refused
    });
    for command in ["unshare -U true", "unshare -n true", "unshare -m true"] {
        let why = inside.refused(command).await;
        assert!(why.contains("not permitted"), "{command}: {why}");
        inside.refused(&format!("sudo -n {command}")).await;
    }
    for command in [
        "mount -t tmpfs none /mnt",
        "mount -t proc proc /mnt",
        "mount --bind /tmp /mnt",
        "chroot / mount -t sysfs s /mnt",
    ] {
        inside.refused(&format!("sudo -n {command}")).await;
    }
    inside.ok("sudo -n chroot / true").await;
    let mut spec = inside.spec.clone();
    inside.end().await;

    // The same files, as the same user, in containers that differ in the filter alone.
    let as_user = "cd /home/choir; busybox su choir -c 'perl calls'";
    spec.generation.number = 2;
    let unconfined = |c: &mut Value| c["seccomp_profile_path"] = json!("unconfined");
    let control = unguarded(rig, &spec, unconfined, as_user).await;
    // A kernel may be built without some of them.
    expect(&control, |c, error| {
        error == c.kernel || (error == ENOSYS && c.refused != ENOSYS)
    });
    spec.generation.number = 3;
    let default = |c: &mut Value| c["seccomp_profile_path"] = json!("/usr/share/containers/seccomp.json");
    let control = unguarded(rig, &spec, default, as_user).await;
    for name in ["unshare", "clone"] {
        assert_eq!(
            table(&control)[name],
            "0",
            "Podman's own profile lets {name} through: {control}"
        );
    }
}
