//! Failpoints: named places between two effects, where a test has the process die, the effect fail or never end. They are
//! compiled in with the feature `failpoints` only. Nothing may depend on one.

/// All of them.
pub const POINTS: [&str; 31] = [
    "create.derived",
    "desire.recorded",
    "start.recorded",
    "start.created",
    "start.started",
    "stop.stopped",
    "remove.removed",
    "pause.frozen",
    "thaw.thawed",
    "deployment.begun",
    "exchange.verified",
    "exchange.kept",
    "exchange.switched",
    "exchange.published",
    "exchange.frozen",
    "contents.switched",
    "contents.returning",
    "refill.begun",
    "refill.kept",
    "refill.deleted",
    "refill.filled",
    "refill.recorded",
    "deployment.ending",
    "deployment.ended",
    "snapshot.begun",
    "snapshot.copied",
    "prune.marked",
    "prune.deleted",
    "release.taken",
    "release.retired",
    "release.cleared",
];

/// Passes the point, unless `CHOIR_FAIL` says otherwise.
#[cfg(not(feature = "failpoints"))]
#[expect(clippy::unused_async, reason = "with failpoints it may never return")]
#[inline]
pub async fn point(_name: &'static str) -> Result<(), String> {
    Ok(())
}

/// Passes the point, unless `CHOIR_FAIL` says `NAME:kill`, `NAME:err` or `NAME:hang`, or names as `@FILE` a file that does;
/// such a file is used up by the first that it concerns.
#[cfg(feature = "failpoints")]
pub async fn point(name: &'static str) -> Result<(), String> {
    debug_assert!(POINTS.contains(&name), "{name} is in no table");
    let Some(how) = asked(name) else {
        return Ok(());
    };
    tracing::warn!(point = name, how, "a failpoint was reached");
    match how.as_str() {
        "kill" => {
            let own = rustix::process::getpid();
            let _dead = rustix::process::kill_process(own, rustix::process::Signal::KILL);
            std::future::pending().await
        }
        "hang" => std::future::pending().await,
        _ => Err(format!("the failpoint {name} was reached")),
    }
}

/// What is to happen at this point.
#[cfg(feature = "failpoints")]
fn asked(name: &str) -> Option<String> {
    let asked = std::env::var("CHOIR_FAIL").ok()?;
    let Some(file) = asked.strip_prefix('@') else {
        return matching(&asked, name);
    };
    let how = matching(std::fs::read_to_string(file).ok()?.trim(), name)?;
    std::fs::remove_file(file).ok()?;
    Some(how)
}

#[cfg(feature = "failpoints")]
fn matching(asked: &str, name: &str) -> Option<String> {
    let (point, how) = asked.split_once(':')?;
    (point == name).then(|| how.to_owned())
}
