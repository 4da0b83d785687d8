//! What a COPY copies: files below one directory, found without ever leaving it. It must not change anything, nor know
//! where they go.

use std::fs;
use std::path::{Path, PathBuf};

/// Something to copy.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry {
    pub path: PathBuf,
    /// Where it is among what is copied.
    pub name: PathBuf,
}

/// What the sources of one COPY are together.
#[derive(Debug, Default)]
pub struct Found {
    /// Directories before what is in them; of two with one name the later counts.
    pub entries: Vec<Entry>,
    /// Whether one of them is a directory, whose contents are copied.
    pub has_directory: bool,
}

/// Finds them below `top`, which is canonical.
pub fn find(top: &Path, sources: &[String]) -> Result<Found, String> {
    let mut found = Found::default();
    for source in sources {
        let paths = matching(top, source)?;
        if paths.is_empty() {
            return Err(format!("there is no {source} in {}", top.display()));
        }
        for path in paths {
            // A link's own, not that of what it leads to.
            let name = path.file_name().map(PathBuf::from).unwrap_or_default();
            let path = inside(top, &path).map_err(|why| format!("{source} {why}"))?;
            if path.is_dir() {
                found.has_directory = true;
                walk(&path, Path::new(""), &mut found.entries)?;
            } else {
                add(path, name, &mut found.entries)?;
            }
        }
    }
    Ok(found)
}

/// The path without symbolic links, where it stays below `top`.
pub fn inside(top: &Path, path: &Path) -> Result<PathBuf, String> {
    let real = path.canonicalize().map_err(|e| format!("cannot be read: {e}"))?;
    if real.starts_with(top) {
        Ok(real)
    } else {
        Err(format!("leads out of {}; put what is needed into it", top.display()))
    }
}

/// The paths that a source means; `*` and `?` stand for what is in one directory.
fn matching(top: &Path, source: &str) -> Result<Vec<PathBuf>, String> {
    let mut paths = vec![top.to_owned()];
    for part in source.split('/').filter(|part| !matches!(*part, "" | ".")) {
        if part.contains('[') {
            return Err(format!("{source}: [ is not supported in names; use * or ?"));
        }
        let mut next = Vec::new();
        for path in paths {
            if part.contains(['*', '?']) {
                // Before it is listed, as a link may be on the way.
                let path = inside(top, &path).map_err(|why| format!("{source} {why}"))?;
                let all = children(&path).unwrap_or_default();
                next.extend(all.into_iter().filter(|child| {
                    let name = child.file_name().map(|name| name.to_string_lossy().into_owned());
                    name.is_some_and(|name| fits(part.as_bytes(), name.as_bytes()))
                }));
            } else if part == ".." || path.join(part).symlink_metadata().is_ok() {
                next.push(path.join(part));
            }
        }
        paths = next;
    }
    Ok(paths)
}

fn fits(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), Some((_, shorter))) => fits(rest, name) || fits(pattern, shorter),
        (Some((b'*', rest)), None) => fits(rest, name),
        (Some((p, pattern)), Some((n, name))) => (*p == b'?' || p == n) && fits(pattern, name),
        _ => false,
    }
}

/// Everything in a directory. Links in it are copied as links, so what they lead to is not read.
fn walk(directory: &Path, name: &Path, entries: &mut Vec<Entry>) -> Result<(), String> {
    for path in children(directory)? {
        let name = name.join(path.file_name().unwrap_or_default());
        let is_directory = path.symlink_metadata().is_ok_and(|meta| meta.is_dir());
        add(path.clone(), name.clone(), entries)?;
        if is_directory {
            walk(&path, &name, entries)?;
        }
    }
    Ok(())
}

fn add(path: PathBuf, name: PathBuf, entries: &mut Vec<Entry>) -> Result<(), String> {
    let kind = path.symlink_metadata().map_err(|e| unreadable(&path, &e))?.file_type();
    if !kind.is_dir() && !kind.is_file() && !kind.is_symlink() {
        return Err(format!(
            "{} is neither a file nor a directory; take it away",
            path.display()
        ));
    }
    entries.push(Entry { path, name });
    Ok(())
}

/// In the order of their names.
fn children(directory: &Path) -> Result<Vec<PathBuf>, String> {
    let listed = fs::read_dir(directory).and_then(|entries| {
        entries
            .map(|entry| Ok(entry?.path()))
            .collect::<std::io::Result<Vec<_>>>()
    });
    let mut paths = listed.map_err(|e| unreadable(directory, &e))?;
    paths.sort();
    Ok(paths)
}

fn unreadable(path: &Path, error: &std::io::Error) -> String {
    format!("{} cannot be read: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn place() -> (tempfile::TempDir, PathBuf) {
        let place = tempfile::tempdir().unwrap();
        let top = place.path().join("top");
        fs::create_dir_all(top.join("site/deep")).unwrap();
        for file in ["a.json", "b.json", "c.txt", "site/index.html", "site/deep/x"] {
            fs::write(top.join(file), file).unwrap();
        }
        fs::write(place.path().join("outside"), "outside").unwrap();
        symlink("../outside", top.join("leak")).unwrap();
        symlink("..", top.join("up")).unwrap();
        symlink("../../outside", top.join("site/link")).unwrap();
        let top = top.canonicalize().unwrap();
        (place, top)
    }

    fn names(top: &Path, sources: &[&str]) -> Result<Vec<String>, String> {
        let sources: Vec<_> = sources.iter().map(|s| (*s).to_owned()).collect();
        let found = find(top, &sources)?;
        let name = |entry: Entry| entry.name.to_string_lossy().into_owned();
        Ok(found.entries.into_iter().map(name).collect())
    }

    #[test]
    fn a_file_keeps_its_name_and_of_a_directory_the_contents_are_copied() {
        let (_place, top) = place();
        assert_eq!(
            names(&top, &["/c.txt", "./*.json"]).unwrap(),
            ["c.txt", "a.json", "b.json"]
        );
        assert_eq!(
            names(&top, &["site"]).unwrap(),
            ["deep", "deep/x", "index.html", "link"]
        );
        assert_eq!(names(&top, &["si?e/index*"]).unwrap(), ["index.html"]);
    }

    #[test]
    fn nothing_outside_is_copied() {
        let (_place, top) = place();
        for bad in ["../outside", "leak", "up/outside", "up/*", "/../outside", "up"] {
            let error = names(&top, &[bad]).unwrap_err();
            assert!(error.contains("leads out of"), "{bad}: {error}");
        }
        for missing in ["nothing", "*.md", "[a].json"] {
            assert!(names(&top, &[missing]).is_err(), "{missing}");
        }
    }
}
