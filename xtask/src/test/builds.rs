//! `.ci/compare-builds`, run as CI runs it: when a repeated build counts as one that the cache made faster.

use std::path::Path;
use std::process::{Command, Output};

const BUILT_WITH_A_CACHE: &str = "seconds 800\nbuilt 40\ncopied 300\ncache success\n";

fn compare(first: &str, repeat: &str) -> Output {
    let directory = tempfile::tempdir().unwrap();
    let files = [("first.txt", first), ("repeat.txt", repeat)].map(|(name, text)| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    });
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.ci/compare-builds");
    Command::new(script).args(files).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_repeated_build_that_built_less_and_was_faster_passes_with_its_ratio() {
    let output = compare(BUILT_WITH_A_CACHE, "seconds 80\nbuilt 0\ncopied 340\n");
    assert!(output.status.success(), "{output:?}");
    assert!(said(&output).ends_with("10.0 times as fast\n"), "{output:?}");
}

#[test]
fn a_repeated_build_that_was_not_faster_fails() {
    for seconds in [800, 900] {
        let output = compare(BUILT_WITH_A_CACHE, &format!("seconds {seconds}\nbuilt 0\ncopied 340\n"));
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(said(&output).contains("was not faster"), "{output:?}");
    }
}

#[test]
fn a_repeated_build_that_built_everything_again_fails_however_fast_it_was() {
    let output = compare(BUILT_WITH_A_CACHE, "seconds 80\nbuilt 40\ncopied 300\n");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(said(&output).contains("kept nothing"), "{output:?}");
}

#[test]
fn without_a_cache_or_without_anything_to_build_it_says_that_nothing_was_compared() {
    let repeat = "seconds 900\nbuilt 40\ncopied 300\n";
    for first in [
        BUILT_WITH_A_CACHE.replace("success", "failure"),
        BUILT_WITH_A_CACHE.replace("built 40", "built 0"),
    ] {
        let output = compare(&first, repeat);
        assert!(output.status.success(), "{output:?}");
        assert!(said(&output).contains("not compared"), "{output:?}");
    }
}

#[test]
fn a_result_that_lacks_a_number_is_no_success() {
    let output = compare(BUILT_WITH_A_CACHE, "built 0\ncopied 340\n");
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}
