//! Waiting for a value, never for time. It must not decide what is good.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::time::Instant;

/// How long anything but an installation may take on a busy machine with two cores.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How often a value that nothing announces is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// With `--slow` as much as the figures ask for.
pub fn rounds<T>(quick: T, slow: T) -> T {
    let is_slow = std::env::var_os("CHOIR_SLOW").is_some_and(|v| v == "1");
    if is_slow { slow } else { quick }
}

/// Asks until there is a value; an error that lasts is reported with what was waited for.
pub async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = ask().await;
        match answer {
            Ok(Some(value)) => return Ok(value),
            Ok(None) if Instant::now() >= deadline => bail!("waited {} s for {what}", PATIENCE.as_secs()),
            Err(error) if Instant::now() >= deadline => {
                return Err(error).with_context(|| format!("waited {} s for {what}", PATIENCE.as_secs()));
            }
            _ => tokio::time::sleep(LOOK).await,
        }
    }
}

/// One named part of a test, with the time it took.
pub async fn step<T>(name: &str, part: impl Future<Output = Result<T>>) -> Result<T> {
    let begun = Instant::now();
    let done = part.await.with_context(|| name.to_owned())?;
    eprintln!("{:>7.1} s  {name}", begun.elapsed().as_secs_f32());
    Ok(done)
}
