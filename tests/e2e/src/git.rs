//! A git server as companies run it, behind an [`Upstream`](crate::upstream::Upstream). It must not decide who is let in.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use http::StatusCode;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::upstream::{Answer, Seen, whole};

/// Large files' API, and for the rest Git's own server program, spoken to as the Common Gateway Interface says (RFC 3875).
pub async fn smart_http(seen: &Seen, repositories: &Path) -> Result<Answer> {
    if let Some(answer) = large_files(seen, repositories)? {
        return Ok(answer);
    }
    let mut command = Command::new("git");
    command.arg("http-backend").env_clear();
    for (name, value) in [
        ("PATH", std::env::var("PATH")?.as_str()),
        ("GIT_PROJECT_ROOT", &repositories.display().to_string()),
        ("GIT_HTTP_EXPORT_ALL", "1"),
        ("REMOTE_USER", "ada"),
        ("REQUEST_METHOD", &seen.method),
        ("PATH_INFO", seen.path()),
        (
            "QUERY_STRING",
            seen.target.split_once('?').map_or("", |(_, query)| query),
        ),
        (
            "CONTENT_TYPE",
            seen.header("content-type").first().copied().unwrap_or_default(),
        ),
        ("CONTENT_LENGTH", &seen.body.len().to_string()),
        (
            "HTTP_CONTENT_ENCODING",
            seen.header("content-encoding").first().copied().unwrap_or_default(),
        ),
        (
            "GIT_PROTOCOL",
            seen.header("git-protocol").first().copied().unwrap_or_default(),
        ),
    ] {
        command.env(name, value);
    }
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    let body = seen.body.clone();
    // It may answer before it has read everything.
    let feeding = tokio::spawn(async move {
        stdin.write_all(&body).await?;
        stdin.shutdown().await
    });
    let told = child.wait_with_output().await?.stdout;
    let _hung_up = feeding.await?;
    let end = told
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .context("no head")?;
    let head = std::str::from_utf8(&told[..end])?;
    let mut answer = whole(StatusCode::OK, "text/plain", told[end + 4..].to_vec());
    for line in head.lines() {
        let (name, value) = line.split_once(": ").context("no header")?;
        if name.eq_ignore_ascii_case("status") {
            *answer.status_mut() = value.split(' ').next().unwrap_or_default().parse()?;
        } else {
            answer
                .headers_mut()
                .insert(http::HeaderName::try_from(name)?, value.parse()?);
        }
    }
    Ok(answer)
}

/// The batch API of Git LFS with its basic transfers; `None` for what is none of it.
fn large_files(seen: &Seen, repositories: &Path) -> Result<Option<Answer>> {
    let kept = repositories.join("lfs");
    if let Some(oid) = seen.path().strip_prefix("/lfs/") {
        let file = kept.join(oid);
        if seen.method == "PUT" {
            fs::create_dir_all(&kept)?;
            fs::write(&file, &seen.body)?;
        }
        return Ok(Some(whole(StatusCode::OK, "application/octet-stream", fs::read(file)?)));
    }
    if seen.path().ends_with("/info/lfs/objects/batch") {
        let asked: Value = serde_json::from_slice(&seen.body)?;
        let operation = asked["operation"].as_str().context("no operation")?;
        let objects = asked["objects"].as_array().context("no objects")?.iter().map(|object| {
            let href = format!(
                "https://{}/lfs/{}",
                seen.host,
                object["oid"].as_str().unwrap_or_default()
            );
            json!({"oid": object["oid"], "size": object["size"], "actions": {operation: {"href": href}}})
        });
        let answer = json!({"transfer": "basic", "objects": objects.collect::<Vec<_>>()});
        let kind = "application/vnd.git-lfs+json";
        return Ok(Some(whole(StatusCode::OK, kind, answer.to_string())));
    }
    // Locks are an option of the protocol.
    let other = seen.path().contains("/info/lfs/");
    Ok(other.then(|| whole(StatusCode::NOT_FOUND, "application/json", "{}")))
}

/// `private.git`, a bare repository that takes pushes and has `part.git` as its submodule.
pub async fn make_repositories(directory: &Path, url: &str) -> Result<()> {
    let work = directory.join("work");
    at(directory, &["init", "-q", "-b", "main", "part"]).await?;
    let part = directory.join("part");
    fs::write(part.join("README"), "part\n")?;
    at(&part, &["add", "README"]).await?;
    at(&part, &["commit", "-q", "-m", "part"]).await?;
    let commit = at(&part, &["rev-parse", "HEAD"]).await?;
    at(directory, &["clone", "-q", "--bare", "part", "part.git"]).await?;

    at(directory, &["init", "-q", "-b", "main", "work"]).await?;
    fs::write(work.join("README"), "private\n")?;
    let module = format!("[submodule \"part\"]\n\tpath = part\n\turl = {url}/part.git\n");
    fs::write(work.join(".gitmodules"), module)?;
    at(&work, &["add", "README", ".gitmodules"]).await?;
    let entry = format!("160000,{},part", commit.trim());
    at(&work, &["update-index", "--add", "--cacheinfo", &entry]).await?;
    at(&work, &["commit", "-q", "-m", "first"]).await?;
    at(directory, &["clone", "-q", "--bare", "work", "private.git"]).await?;
    at(&directory.join("private.git"), &["config", "http.receivepack", "true"]).await?;
    Ok(())
}

/// Runs `git` in a directory; what it says.
pub async fn at(directory: &Path, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new("git");
    command
        .current_dir(directory)
        .args(["-c", "user.name=Ada", "-c", "user.email=ada@example.com"]);
    let output = command.args(arguments).output().await.context("cannot run git")?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "git {}: {told}", arguments.join(" "));
    Ok(String::from_utf8(output.stdout)?)
}
