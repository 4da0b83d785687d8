//! What the hypervisor relies on, for every runtime.

use std::time::Duration;

use choir_core::{Door, Generation, Limits, SandboxId, Slot};
use choir_runtime::{Error, Notice, Seen};

use crate::rig::{self, Kind, Rig, ask_app, await_exit, await_notice, await_ready, await_seen, health, random, run};

const GRACE: Duration = Duration::from_secs(5);

pub async fn a_started_generation_becomes_ready_and_answers_with_its_own_nonce(rig: &Rig) {
    let runtime = rig.runtime();
    let mut notices = runtime.notices().unwrap();
    let spec = rig.spec();
    runtime.create(&spec).await.unwrap();
    assert_eq!(runtime.inspect(&spec.generation).await.unwrap(), Seen::Created);
    runtime.start(&spec.generation).await.unwrap();
    await_ready(&mut notices, &spec.generation).await;
    assert_eq!(runtime.inspect(&spec.generation).await.unwrap(), Seen::Running);
    let health = health(&runtime, &spec.generation).await;
    assert_eq!(health["sandbox_id"], spec.generation.sandbox.as_str());
    assert_eq!(health["generation"], 1);
    assert_eq!(health["nonce"], spec.nonce);
    runtime.remove(&spec.generation).await.unwrap();
}

pub async fn asking_twice_does_it_once(rig: &Rig) {
    let runtime = rig.runtime();
    let mut notices = runtime.notices().unwrap();
    assert!(runtime.notices().is_none());
    let spec = rig.spec();
    let generation = &spec.generation;
    runtime.create(&spec).await.unwrap();
    runtime.create(&spec).await.unwrap();
    runtime.start(generation).await.unwrap();
    runtime.start(generation).await.unwrap();
    await_ready(&mut notices, generation).await;
    let first = rig.identity(generation).await;
    runtime.start(generation).await.unwrap();
    for _ in 0..2 {
        runtime.pause(generation).await.unwrap();
    }
    for _ in 0..2 {
        runtime.unpause(generation).await.unwrap();
    }
    assert_eq!(rig.identity(generation).await, first);
    let exit = runtime.stop(generation, GRACE).await.unwrap();
    assert_eq!(runtime.stop(generation, GRACE).await.unwrap(), exit);
    runtime.remove(generation).await.unwrap();
    runtime.remove(generation).await.unwrap();
}

pub async fn a_stopped_generation_tells_its_exit(rig: &Rig) {
    let runtime = rig.runtime();
    let mut notices = runtime.notices().unwrap();
    let spec = rig.spec();
    run(&runtime, &mut notices, &spec).await;
    let exit = runtime.stop(&spec.generation, GRACE).await.unwrap();
    assert!(!exit.oom_killed);
    assert_eq!(
        runtime.inspect(&spec.generation).await.unwrap(),
        Seen::Exited(exit.clone())
    );
    assert_eq!(await_exit(&mut notices, &spec.generation).await, exit);
    runtime.remove(&spec.generation).await.unwrap();
}

pub async fn a_crash_is_noticed_without_asking(rig: &Rig) {
    let runtime = rig.runtime();
    let mut notices = runtime.notices().unwrap();
    let spec = rig.spec();
    run(&runtime, &mut notices, &spec).await;
    rig.crash(&spec.generation).await;
    assert_eq!(await_exit(&mut notices, &spec.generation).await.code, 137);
    runtime.remove(&spec.generation).await.unwrap();
}

pub async fn running_generations_are_adopted_by_the_next_process(rig: &Rig) {
    let spec = rig.spec();
    let runtime = rig.runtime();
    let mut notices = runtime.notices().unwrap();
    run(&runtime, &mut notices, &spec).await;
    let before = rig.identity(&spec.generation).await;
    drop((runtime, notices));

    let runtime = rig.runtime();
    let mut notices = runtime.notices().unwrap();
    let found = runtime.list().await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!((&found[0].generation, &found[0].nonce), (&spec.generation, &spec.nonce));
    assert_eq!(found[0].seen, Seen::Running);
    runtime.adopt(&spec).await.unwrap();
    await_ready(&mut notices, &spec.generation).await;
    assert_eq!(rig.identity(&spec.generation).await, before);
    assert_eq!(health(&runtime, &spec.generation).await["nonce"], spec.nonce);
    assert!(
        ask_app(&runtime, &spec)
            .await
            .contains(spec.generation.sandbox.as_str())
    );
    runtime.remove(&spec.generation).await.unwrap();
}

pub async fn an_exit_that_nobody_watched_is_told_at_adoption(rig: &Rig) {
    let spec = rig.spec();
    let runtime = rig.runtime();
    let mut notices = runtime.notices().unwrap();
    run(&runtime, &mut notices, &spec).await;
    drop(notices);
    rig.crash(&spec.generation).await;
    await_seen(&runtime, &spec.generation, |s| matches!(s, Seen::Exited(_))).await;
    drop(runtime);

    let runtime = rig.runtime();
    let found = runtime.list().await.unwrap();
    assert!(matches!(found[0].seen, Seen::Exited(_)), "{found:?}");
    runtime.adopt(&spec).await.unwrap();
    assert!(matches!(
        runtime.inspect(&spec.generation).await.unwrap(),
        Seen::Exited(_)
    ));
    runtime.remove(&spec.generation).await.unwrap();
}

pub async fn a_container_with_another_nonce_is_refused_at_adoption(rig: &Rig) {
    let spec = rig.spec();
    let runtime = rig.runtime();
    let mut notices = runtime.notices().unwrap();
    run(&runtime, &mut notices, &spec).await;
    drop((runtime, notices));

    let runtime = rig.runtime();
    let mut notices = runtime.notices().unwrap();
    let mut other = spec.clone();
    other.nonce = "0".repeat(64);
    runtime.adopt(&other).await.unwrap();
    let reason = await_notice(&mut notices, |n| match n {
        Notice::Refused { generation, reason } if generation == spec.generation => Some(reason),
        Notice::Ready { .. } => panic!("it was let in"),
        _ => None,
    })
    .await;
    assert!(reason.contains("nonce"), "{reason}");
    runtime.remove(&spec.generation).await.unwrap();
}

pub async fn pausing_and_unpausing_keep_the_processes(rig: &Rig) {
    let runtime = rig.runtime();
    let mut notices = runtime.notices().unwrap();
    let spec = rig.spec();
    run(&runtime, &mut notices, &spec).await;
    let before = rig.identity(&spec.generation).await;
    runtime.pause(&spec.generation).await.unwrap();
    assert_eq!(runtime.inspect(&spec.generation).await.unwrap(), Seen::Paused);
    runtime.unpause(&spec.generation).await.unwrap();
    assert_eq!(runtime.inspect(&spec.generation).await.unwrap(), Seen::Running);
    assert!(
        ask_app(&runtime, &spec)
            .await
            .contains(spec.generation.sandbox.as_str())
    );
    assert_eq!(rig.identity(&spec.generation).await, before);
    runtime.pause(&spec.generation).await.unwrap();
    runtime.stop(&spec.generation, GRACE).await.unwrap();
    runtime.remove(&spec.generation).await.unwrap();
}

pub async fn a_port_inside_is_reached_and_a_closed_one_says_so(rig: &Rig) {
    let runtime = rig.runtime();
    let mut notices = runtime.notices().unwrap();
    let spec = rig.spec();
    run(&runtime, &mut notices, &spec).await;
    assert!(
        ask_app(&runtime, &spec)
            .await
            .contains(spec.generation.sandbox.as_str())
    );
    let closed = runtime.open(&spec.generation, Door::Port(9)).await;
    assert!(matches!(closed, Err(Error::NotListening)), "{closed:?}");
    runtime.remove(&spec.generation).await.unwrap();
}

pub async fn two_sandboxes_answer_for_themselves(rig: &Rig) {
    let runtime = rig.runtime();
    let mut notices = runtime.notices().unwrap();
    let (one, two) = (rig.spec(), rig.spec());
    run(&runtime, &mut notices, &one).await;
    run(&runtime, &mut notices, &two).await;
    for spec in [&one, &two] {
        assert!(ask_app(&runtime, spec).await.contains(spec.generation.sandbox.as_str()));
        assert_eq!(health(&runtime, &spec.generation).await["nonce"], spec.nonce);
    }
    assert_eq!(runtime.list().await.unwrap().len(), 2);
    runtime.remove(&one.generation).await.unwrap();
    let left = runtime.list().await.unwrap();
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].generation, two.generation);
    assert!(ask_app(&runtime, &two).await.contains(two.generation.sandbox.as_str()));
    runtime.remove(&two.generation).await.unwrap();
}

pub async fn limits_can_be_changed_while_it_runs(rig: &Rig) {
    let runtime = rig.runtime();
    let mut notices = runtime.notices().unwrap();
    let spec = rig.spec();
    run(&runtime, &mut notices, &spec).await;
    let limits = Limits {
        memory: 512 << 20,
        pids: 256,
        ..spec.limits
    };
    runtime.limit(&spec.generation, &limits, Slot::Dev).await.unwrap();
    let stats = runtime.stats(&spec.generation).await.unwrap();
    assert!(stats.memory > 0 && stats.pids > 0, "{stats:?}");
    if !matches!(rig.kind, Kind::Process) {
        assert_eq!(stats.memory_limit, limits.memory);
    }
    runtime.remove(&spec.generation).await.unwrap();
}

pub async fn the_log_has_what_was_asked_for_and_no_more(rig: &Rig) {
    let runtime = rig.runtime();
    let mut notices = runtime.notices().unwrap();
    let spec = rig.spec();
    run(&runtime, &mut notices, &spec).await;
    for tail in [0, 1] {
        let mut lines = runtime.logs(&spec.generation, tail, false).await.unwrap();
        let mut count = 0;
        while let Some(line) = tokio::time::timeout(rig::PATIENCE, lines.recv()).await.unwrap() {
            assert!(matches!(line.stream.as_str(), "stdout" | "stderr"));
            count += 1;
        }
        assert!(count <= tail, "{count} lines instead of {tail}");
    }
    runtime.remove(&spec.generation).await.unwrap();
}

pub async fn what_was_removed_is_gone_and_may_be_removed_again(rig: &Rig) {
    let runtime = rig.runtime();
    let mut notices = runtime.notices().unwrap();
    let spec = rig.spec();
    run(&runtime, &mut notices, &spec).await;
    runtime.remove(&spec.generation).await.unwrap();
    assert_eq!(runtime.inspect(&spec.generation).await.unwrap(), Seen::Absent);
    assert!(runtime.list().await.unwrap().is_empty());
    let left = std::fs::read_dir(&rig.places.run).into_iter().flatten().flatten();
    let left: Vec<_> = left.filter(|e| e.path().is_dir()).collect();
    assert!(left.is_empty(), "{left:?}");
    runtime.remove(&spec.generation).await.unwrap();
    // The next generation of the same sandbox starts as if nothing had been.
    let mut next = spec.clone();
    next.generation.number = 2;
    next.agent.generation = 2;
    run(&runtime, &mut notices, &next).await;
    runtime.remove(&next.generation).await.unwrap();
}

pub async fn what_is_not_there_is_not_found(rig: &Rig) {
    let runtime = rig.runtime();
    let nobody = Generation {
        sandbox: SandboxId::from_random(random()),
        number: 7,
    };
    assert_eq!(runtime.inspect(&nobody).await.unwrap(), Seen::Absent);
    assert!(matches!(runtime.start(&nobody).await, Err(Error::NotFound)));
    assert!(matches!(runtime.stop(&nobody, GRACE).await, Err(Error::NotFound)));
    assert!(matches!(
        runtime.stats(&nobody).await,
        Err(Error::NotFound | Error::Busy(_))
    ));
    assert!(runtime.open(&nobody, Door::Agent).await.is_err());
    runtime.remove(&nobody).await.unwrap();
}
