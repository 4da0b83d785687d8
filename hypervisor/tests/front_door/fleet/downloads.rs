//! The command line as a download: for strangers, whole, and nothing beside it.

use std::os::unix::fs::symlink;
use std::path::Path;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use data_encoding::HEXLOWER;
use sha2::{Digest, Sha256};

use super::Box;
use crate::support::Answer;

const LINUX: &str = "choir-linux-x86_64";
const MACOS: &str = "choir-macos-aarch64";

/// More than what is read at once, and different everywhere.
fn program() -> Vec<u8> {
    (0_u32..50_000).flat_map(u32::to_le_bytes).collect()
}

fn sum(bytes: &[u8]) -> String {
    HEXLOWER.encode(&Sha256::digest(bytes))
}

/// A box with two programs, and beside them what is not to be had.
async fn filled(directory: &Path) -> Box {
    std::fs::write(directory.join(LINUX), program()).unwrap();
    std::fs::write(directory.join(MACOS), "another").unwrap();
    std::fs::write(directory.join(".hidden"), "hidden").unwrap();
    std::fs::write(directory.join("with space"), "spaced").unwrap();
    std::fs::create_dir(directory.join("below")).unwrap();
    std::fs::write(directory.join("below/deep"), "deep").unwrap();
    symlink("/etc/hostname", directory.join("link")).unwrap();
    symlink(LINUX, directory.join("choir")).unwrap();
    Box::with(|config| config.downloads.dir = Some(directory.to_owned())).await
}

async fn ask(start: &Box, method: &str, path: &str, known: Option<&str>) -> Answer {
    let mut request = Request::builder().method(method).uri(path);
    if let Some(tag) = known {
        request = request.header("if-none-match", tag);
    }
    start.browser().send(request.body(Body::empty()).unwrap()).await
}

fn header<'a>(answer: &'a Answer, name: &str) -> &'a str {
    answer.headers[name].to_str().unwrap()
}

#[tokio::test]
async fn strangers_find_each_program_with_its_sum_and_get_it_whole() {
    let directory = tempfile::tempdir().unwrap();
    let start = filled(directory.path()).await;
    let page = ask(&start, "GET", "/download", None).await;
    page.expect_page();
    let text = page.text();
    for (name, content) in [(LINUX, program()), (MACOS, b"another".to_vec())] {
        assert!(
            text.contains(&format!("http://localhost:9090/download/{name} ")),
            "{text}"
        );
        assert!(text.contains(&sum(&content)), "{text}");
        let path = format!("/download/{name}");
        let whole = ask(&start, "GET", &path, None).await;
        assert_eq!(whole.status, StatusCode::OK);
        assert!(whole.body == content, "{name} came as {} bytes", whole.body.len());
        let head = ask(&start, "HEAD", &path, None).await;
        assert!(head.status == StatusCode::OK && head.body.is_empty());
        for answer in [&whole, &head] {
            assert_eq!(header(answer, "content-length"), content.len().to_string());
            assert_eq!(header(answer, "etag"), format!("\"{}\"", sum(&content)));
            assert_eq!(header(answer, "content-type"), "application/octet-stream");
        }
        let known = ask(&start, "GET", &path, Some(header(&whole, "etag"))).await;
        assert!(known.status == StatusCode::NOT_MODIFIED && known.body.is_empty());
        let older = ask(&start, "GET", &path, Some("\"older\"")).await;
        assert_eq!(older.status, StatusCode::OK);
    }
    assert!(
        text.contains("macOS, Apple silicon") && text.contains("shasum -a 256 -c"),
        "{text}"
    );
    for absent in [".hidden", "below", "link", "with space"] {
        assert!(!text.contains(&format!("/download/{absent}")), "{text}");
    }
}

#[tokio::test]
async fn nothing_but_the_plain_files_of_the_directory_can_be_had() {
    let directory = tempfile::tempdir().unwrap();
    let start = filled(directory.path()).await;
    for path in [
        "/download/link",
        "/download/choir",
        "/download/below",
        "/download/below%2Fdeep",
        "/download/.hidden",
        "/download/with%20space",
        "/download/..",
        "/download/%2e%2e",
        "/download/..%2F..%2Fetc%2Fhostname",
        "/download/%2Fetc%2Fhostname",
        "/download/.%2Fchoir-linux-x86_64",
        "/download/choir-linux-x86_64%00",
        "/download/CHOIR-LINUX-X86_64",
    ] {
        let answer = ask(&start, "GET", path, None).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{path}: {}", answer.text());
    }
    // What comes after the start is not listed, and the controls are.
    std::fs::write(directory.path().join("late"), "late").unwrap();
    let late = ask(&start, "GET", "/download/late", None).await;
    assert_eq!(late.status, StatusCode::NOT_FOUND);
    for name in [LINUX, MACOS] {
        let there = ask(&start, "GET", &format!("/download/{name}"), None).await;
        assert_eq!(there.status, StatusCode::OK);
    }
}

#[tokio::test]
async fn a_program_that_is_replaced_while_the_hypervisor_runs_still_fits_its_sum() {
    let directory = tempfile::tempdir().unwrap();
    let start = filled(directory.path()).await;
    let new = directory.path().join("new");
    std::fs::write(&new, "the next version").unwrap();
    std::fs::rename(&new, directory.path().join(MACOS)).unwrap();
    let old = ask(&start, "GET", "/download/choir-macos-aarch64", None).await;
    assert_eq!(old.text(), "another");
    assert_eq!(header(&old, "etag"), format!("\"{}\"", sum(b"another")));
    let next = start.restarted().await;
    let new = ask(&next, "GET", "/download/choir-macos-aarch64", None).await;
    assert_eq!(new.text(), "the next version");
}

#[tokio::test]
async fn a_box_without_downloads_says_so_and_runs() {
    let nowhere = Box::with(|config| config.downloads.dir = Some("/nowhere/at/all".into())).await;
    for start in [Box::new().await, nowhere] {
        let page = ask(&start, "GET", "/download", None).await;
        page.expect_page();
        assert!(page.text().contains("no program to download"), "{}", page.text());
        let none = ask(&start, "GET", "/download/choir-linux-x86_64", None).await;
        none.refused(StatusCode::NOT_FOUND, "not_found");
    }
}
