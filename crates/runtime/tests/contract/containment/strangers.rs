//! Two sandboxes of one owner: what each finds of the other, and who the hypervisor takes each for.

use std::sync::Arc;

use choir_runtime::{ListenerKind, Notice};
use tokio::io::AsyncReadExt;

use super::{Inside, inside, inside_of, quoted};
use crate::rig::{PATIENCE, Rig, await_notice, run, sh};
use crate::root::lend;

/// E02: nothing is shared, not even with the same owner's other sandbox.
pub async fn another_sandbox_is_out_of_reach(rig: &Rig) {
    let (spec, two) = (rig.spec(), rig.spec());
    lend(&rig.volume(&spec.generation), "perl");
    lend(&rig.volume(&two.generation), "perl");
    let mut one = inside_of(rig, spec).await;
    run(&one.runtime, &mut one.notices, &two).await;
    one.ok("echo here > /dev/shm/mark; echo here > /tmp/mark; echo here > ~/mark")
        .await;
    one.ok("(sleep 4242 >/dev/null 2>&1 &); (busybox nc -ll -p 4243 -e /bin/true >/dev/null 2>&1 &)")
        .await;
    // An abstract socket's address has no path: only the network namespace keeps it apart.
    let listen = "socket(S, 1, 1, 0); bind(S, pack(\"Sa*\", 1, \"\\0abstract\")) && listen(S, 9); sleep 4244";
    one.ok(&format!("(perl -e '{listen}' >/dev/null 2>&1 &)")).await;
    let connect = "perl -e 'socket(S, 1, 1, 0); exit !connect(S, pack(\"Sa*\", 1, \"\\0abstract\"))'";
    let scan = "for at in $(ip -o addr | awk '{sub(\"/.*\", \"\", $4); print $4}'); \
                do busybox timeout 3 busybox nc -w 2 $at 4243 -e /bin/true && exit 0; done; exit 1";
    let finds = [
        "cat /dev/shm/mark",
        "cat /tmp/mark",
        "cat ~/mark",
        "ps | grep -q '[s]leep 4242'",
        "grep -q @abstract /proc/net/unix",
        connect,
        scan,
    ];
    for find in finds {
        let patient = format!("until {{ {find}; }}; do sleep 0.05; done");
        one.ok(&format!("timeout 10 {}", quoted(&patient))).await;
        for find in [find.to_owned(), format!("sudo -n {}", quoted(find))] {
            let (code, output) = sh(&one.runtime, &two.generation, &find).await;
            assert_ne!(code, 0, "{find}: {output}");
        }
    }
    let (_, addresses) = sh(&one.runtime, &two.generation, "ip -o addr").await;
    assert!(addresses.lines().all(|l| l.contains(" lo ")), "{addresses}");
    let (code, _) = sh(&one.runtime, &two.generation, "test -S /run/choir/hypervisor.sock").await;
    assert_eq!(code, 0);
    one.runtime.remove(&two.generation).await.unwrap();
    one.end().await;
}

/// Whoever calls the broker or the egress port is who holds the connection, whatever it says of itself.
pub async fn a_call_comes_from_the_sandbox_whose_connection_it_is(rig: &Rig) {
    let mut one = inside(rig).await;
    let two = rig.spec();
    run(&one.runtime, &mut one.notices, &two).await;
    let both = [one.spec.generation.clone(), two.generation.clone()];
    for (caller, claimed) in [(0, 1), (1, 0)] {
        for (port, wanted) in [(9091, ListenerKind::Broker), (9092, ListenerKind::Egress)] {
            let lie = format!("X-Choir-Sandbox: {}\n", both[claimed].sandbox);
            let call = format!("printf '{lie}' | busybox timeout 5 busybox nc -w 2 127.0.0.1 {port} >/dev/null 2>&1");
            let (runtime, generation) = (Arc::clone(&one.runtime), both[caller].clone());
            let calling = tokio::spawn(async move { sh(&runtime, &generation, &call).await });
            let (generation, kind, stream) = await_notice(&mut one.notices, |n| match n {
                Notice::Inside {
                    generation,
                    kind,
                    stream,
                } => Some((generation, kind, stream)),
                _ => None,
            })
            .await;
            assert_eq!((&generation, kind), (&both[caller], wanted));
            let mut said = vec![0; lie.len()];
            let mut stream = stream;
            stream.read_exact(&mut said).await.unwrap();
            assert_eq!(String::from_utf8(said).unwrap(), lie, "it is this call");
            drop(stream);
            calling.await.unwrap();
        }
    }
    one.runtime.remove(&two.generation).await.unwrap();
    one.end().await;
}

/// Which command lines and environments of all threads hold it, as far as the user and `sudo` may look.
async fn processes_with(inside: &Inside, text: &str) -> String {
    // What searches must not find itself.
    let (first, rest) = text.split_at(1);
    let search = format!(
        "for f in /proc/[0-9]*/task/[0-9]*/cmdline /proc/[0-9]*/task/[0-9]*/environ; do \
         tr '\\0' '\\n' 2>/dev/null < $f | grep -q '[{first}]{rest}' && echo $f; done 2>/dev/null; true"
    );
    inside.ok(&search).await + &inside.ok(&format!("sudo -n {}", quoted(&search))).await
}

/// The nonce is in a file, and nowhere that every process may look.
pub async fn no_command_line_or_environment_holds_the_nonce(rig: &Rig) {
    let inside = inside(rig).await;
    assert_eq!(inside.ok("cat /run/choir/nonce").await.trim(), inside.spec.nonce);
    assert_eq!(processes_with(&inside, &inside.spec.nonce).await, "");
    // One in an environment, one on a command line, one that is root's.
    for start in [
        "feed=1234 sleep 4242",
        "sh -c 'sleep 4242; : feed=1234'",
        "sudo -n env feed=1234 sleep 4242",
    ] {
        inside.ok(&format!("({start} >/dev/null 2>&1 &)")).await;
    }
    let seen = async {
        while {
            let found = processes_with(&inside, "feed=1234").await;
            found.matches("/cmdline").count() < 2 || found.matches("/environ").count() < 2
        } {}
    };
    tokio::time::timeout(PATIENCE, seen)
        .await
        .expect("the search finds what is there");
    assert!(
        processes_with(&inside, "PATH=")
            .await
            .contains("/proc/1/task/1/environ"),
        "and looks at the agent"
    );
    inside.end().await;
}
