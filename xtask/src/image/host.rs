//! What a default release takes over from the machine it is built on: Debian release and mirror,
//! extra certificate authorities, and package registries. Settings that could hold a password are
//! never copied.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command;

/// Where Debian keeps the authorities that programs trust; inside and outside alike.
const BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";
const AUTHORITIES: &str = "/usr/local/share/ca-certificates";
/// Where `mirror+file:` leads to, as in Debian's cloud images.
const MIRRORS: &str = "/etc/apt/mirrors";

/// The host's own Debian release, so that its mirror and keys are known to work.
pub fn suite() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let name = name.map(|name| name.trim_matches('"').to_owned());
    name.context("/etc/os-release names no Debian release (VERSION_CODENAME)")
}

/// The host's sources of that release: deb822 stanzas, then one-line entries.
pub fn sources(suite: &str) -> Result<(String, String)> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        for entry in entries {
            files.push(entry?.path());
        }
    }
    files.sort();
    let (mut stanzas, mut lines) = (String::new(), String::new());
    for file in files {
        let extension = file.extension().and_then(|extension| extension.to_str());
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match extension {
            Some("sources") => stanzas.push_str(&debian_stanzas(&text, suite)),
            Some("list") => lines.push_str(&debian_lines(&text, suite)),
            _ => {}
        }
    }
    Ok((stanzas, lines))
}

/// apt settings that decide whether the host's mirror is accepted.
pub fn apt_options() -> Result<Vec<String>> {
    let dump = command::capture(Command::new("apt-config").arg("dump"))?;
    let mut options = vec!["APT::Install-Recommends \"false\"".to_owned()];
    options.extend(mirror_settings(&dump));
    // Only for the build: customize.sh removes them again, because they may hold a password.
    let proxies = dump
        .lines()
        .filter(|line| line.starts_with("Acquire::http::Proxy ") || line.starts_with("Acquire::https::Proxy "));
    options.extend(proxies.map(|line| line.trim_end_matches(';').to_owned()));
    Ok(options)
}

/// Writes the host's settings as files below `tree`, as they shall be in the release.
pub fn write_files(tree: &Path) -> Result<()> {
    let write = |name: &str, text: &[u8]| -> Result<()> {
        let path = tree.join(name);
        fs::create_dir_all(path.parent().context("a file has a directory")?)?;
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    for (name, certificate) in authorities(Path::new(AUTHORITIES))? {
        write(&format!("usr/local/share/ca-certificates/{name}"), &certificate)?;
    }
    for (name, mirrors) in mirror_lists(Path::new(MIRRORS))? {
        write(&format!("etc/apt/mirrors/{name}"), mirrors.as_bytes())?;
    }
    let apt = mirror_settings(&command::capture(Command::new("apt-config").arg("dump"))?);
    if !apt.is_empty() {
        write(
            "etc/apt/apt.conf.d/81host",
            format!("{};\n", apt.join(";\n")).as_bytes(),
        )?;
    }
    let home = PathBuf::from(std::env::var_os("HOME").unwrap_or_default());
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();

    let mut pip = format!("[global]\ncert = {BUNDLE}\n");
    for file in [
        Path::new("/etc/pip.conf"),
        &home.join(".pip/pip.conf"),
        &home.join(".config/pip/pip.conf"),
    ] {
        pip.push_str(&pip_settings(&read(file)));
    }
    write("etc/pip.conf", last_of_each_key(&pip).as_bytes())?;

    let mut npm = format!("cafile={BUNDLE}\n");
    for file in [Path::new("/etc/npmrc"), &home.join(".npmrc")] {
        npm.push_str(&npm_settings(&read(file)));
    }
    write("etc/npmrc", last_of_each_key(&npm).as_bytes())?;

    let cargo_home = std::env::var_os("CARGO_HOME").map_or(home.join(".cargo"), PathBuf::from);
    let cargo = cargo_settings(&read(&cargo_home.join("config.toml")));
    if !cargo.is_empty() {
        // Cargo looks in every directory above the one it runs in; it has no file in /etc.
        write(".cargo/config.toml", cargo.as_bytes())?;
    }
    Ok(())
}

fn authorities(directory: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(directory) else {
        return Ok(found);
    };
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            let below = authorities(&path)?;
            found.extend(below.into_iter().map(|(file, text)| (format!("{name}/{file}"), text)));
        } else if name.ends_with(".crt") {
            let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            found.push((name, text));
        }
    }
    Ok(found)
}

/// Of those that hold no password.
fn mirror_lists(directory: &Path) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(directory) else {
        return Ok(found);
    };
    for entry in entries {
        let entry = entry?;
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        if !text.is_empty() && !has_password(&text) {
            found.push((entry.file_name().to_string_lossy().into_owned(), text));
        }
    }
    Ok(found)
}

fn debian_stanzas(text: &str, suite: &str) -> String {
    let stanzas = text.split("\n\n").map(str::trim).filter(|stanza| {
        let field = |name: &str| {
            stanza
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .unwrap_or("")
        };
        let signer = field("Signed-By").trim();
        field("Types").split_whitespace().any(|kind| kind == "deb")
            && field("Suites").split_whitespace().any(|name| is_of(suite, name))
            && (signer.is_empty() || signer.contains("-archive-keyring"))
            && !field("Enabled").trim().eq_ignore_ascii_case("no")
            && !has_password(field("URIs"))
    });
    stanzas.map(|stanza| format!("{stanza}\n\n")).collect()
}

fn debian_lines(text: &str, suite: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| {
        let Some(rest) = line.strip_prefix("deb ") else {
            return false;
        };
        let (options, rest) = match rest
            .trim_start()
            .strip_prefix('[')
            .and_then(|rest| rest.split_once(']'))
        {
            Some((options, rest)) => (options, rest),
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let address = words.next().unwrap_or("");
        let signed_by_debian = match options.split_once("signed-by=") {
            Some((_, key)) => key.contains("-archive-keyring"),
            None => true,
        };
        signed_by_debian && !has_password(address) && words.next().is_some_and(|name| is_of(suite, name))
    });
    lines.map(|line| format!("{line}\n")).collect()
}

/// `bookworm`, `bookworm-updates`, `bookworm-security`, `bookworm/updates`.
fn is_of(suite: &str, name: &str) -> bool {
    name.strip_prefix(suite)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '/']))
}

/// A URL with user information, or a value that apt, pip or npm would fill in from elsewhere.
fn has_password(urls: &str) -> bool {
    urls.split_whitespace().any(|url| {
        let authority = url
            .split_once("://")
            .map_or("", |(_, rest)| rest.split('/').next().unwrap_or(""));
        authority.contains('@')
    })
}

fn mirror_settings(dump: &str) -> Vec<String> {
    let keys = [
        "Acquire::Check-Valid-Until ",
        "Acquire::Check-Date ",
        "Acquire::Retries ",
    ];
    let lines = dump.lines().filter(|line| keys.iter().any(|key| line.starts_with(key)));
    lines.map(|line| line.trim_end_matches(';').to_owned()).collect()
}

fn pip_settings(text: &str) -> String {
    settings(
        text,
        |key| matches!(key, "index-url" | "extra-index-url" | "trusted-host"),
        " = ",
    )
}

fn npm_settings(text: &str) -> String {
    settings(text, |key| key == "registry" || key.ends_with(":registry"), "=")
}

fn settings(text: &str, wanted: impl Fn(&str) -> bool, separator: &str) -> String {
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    pairs
        .map(|(key, value)| (key.trim(), value.trim()))
        .filter(|(key, value)| wanted(key) && !has_password(value) && !value.contains("${"))
        .map(|(key, value)| format!("{key}{separator}{value}\n"))
        .collect()
}

/// Later files win, as they do for pip and npm themselves.
fn last_of_each_key(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    let key = |line: &str| line.split('=').next().unwrap_or("").trim().to_owned();
    let kept = lines
        .iter()
        .enumerate()
        .filter(|(index, line)| !lines[index + 1..].iter().any(|later| key(later) == key(line)));
    kept.map(|(_, line)| format!("{line}\n")).collect()
}

fn cargo_settings(text: &str) -> String {
    let Ok(host) = text.parse::<toml::Table>() else {
        return String::new();
    };
    let mut kept = toml::Table::new();
    for name in ["source", "registries"] {
        let Some(toml::Value::Table(entries)) = host.get(name) else {
            continue;
        };
        let mut entries = entries.clone();
        entries.retain(|_, entry| entry.as_table().is_some_and(is_public_registry));
        if !entries.is_empty() {
            kept.insert(name.into(), toml::Value::Table(entries));
        }
    }
    if kept.is_empty() {
        String::new()
    } else {
        kept.to_string()
    }
}

/// Neither a local path nor anything with a token in it.
fn is_public_registry(entry: &toml::Table) -> bool {
    entry.iter().all(|(key, value)| match key.as_str() {
        "registry" | "index" => value
            .as_str()
            .is_some_and(|url| !has_password(url) && url.contains("://")),
        "replace-with" => true,
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{
        cargo_settings, debian_lines, debian_stanzas, last_of_each_key, mirror_lists, npm_settings, pip_settings,
    };

    const DEBIAN: &str = "Types: deb\nURIs: http://mirror.test/debian\nSuites: bookworm bookworm-updates\n\
        Components: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg";

    #[test]
    fn the_hosts_debian_mirror_is_taken_and_other_vendors_are_not() {
        let vendor =
            "Types: deb\nURIs: https://vendor.test/apt\nSuites: bookworm\nSigned-By: /etc/apt/keyrings/vendor.asc";
        let text = format!("{DEBIAN}\n\n{vendor}\n");
        assert_eq!(debian_stanzas(&text, "bookworm"), format!("{DEBIAN}\n\n"));
        assert_eq!(debian_stanzas(&text, "trixie"), "");
    }

    #[test]
    fn one_line_sources_are_read_too() {
        let text = "# comment\ndeb [arch=amd64] http://mirror.test/debian bookworm main\n\
            deb-src http://mirror.test/debian bookworm main\n\
            deb [signed-by=/etc/apt/keyrings/v.asc] https://vendor.test bookworm stable\n\
            deb https://vendor.test cloud-bookworm main\n";
        assert_eq!(
            debian_lines(text, "bookworm"),
            "deb [arch=amd64] http://mirror.test/debian bookworm main\n"
        );
    }

    #[test]
    fn a_source_with_a_password_stays_on_the_host() {
        assert_eq!(
            debian_stanzas(&DEBIAN.replace("//mirror", "//me:secret@mirror"), "bookworm"),
            ""
        );
        assert_eq!(
            debian_lines("deb http://me:secret@mirror.test/debian bookworm main", "bookworm"),
            ""
        );
        let mirrors = tempfile::tempdir().unwrap();
        let public = "https://mirror.test/debian\tpriority:1\n".to_owned();
        fs::write(mirrors.path().join("debian.list"), &public).unwrap();
        fs::write(mirrors.path().join("own.list"), public.replace("//", "//me:secret@")).unwrap();
        assert_eq!(
            mirror_lists(mirrors.path()).unwrap(),
            [("debian.list".to_owned(), public)]
        );
        assert_eq!(pip_settings("index-url = https://me:secret@pypi.test/simple"), "");
        assert_eq!(npm_settings("registry=https://me:secret@npm.test/"), "");
    }

    #[test]
    fn only_registry_addresses_are_copied() {
        let pip = "[global]\nindex-url = https://pypi.test/simple\npassword = x\nfind-links = /srv\n";
        assert_eq!(pip_settings(pip), "index-url = https://pypi.test/simple\n");
        let npm = "registry=https://npm.test/\n//npm.test/:_authToken=x\n@a:registry=https://a.test/\n";
        assert_eq!(
            npm_settings(npm),
            "registry=https://npm.test/\n@a:registry=https://a.test/\n"
        );
        let cargo = "[source.crates-io]\nreplace-with = \"m\"\n[source.m]\nregistry = \"sparse+https://m.test/\"\n\
            [source.local]\ndirectory = \"/srv\"\n[registries.p]\nindex = \"https://p.test\"\ntoken = \"x\"\n[net]\ngit-fetch-with-cli = true\n";
        let kept = cargo_settings(cargo);
        assert!(kept.contains("sparse+https://m.test/") && kept.contains("replace-with"));
        assert!(!kept.contains("/srv") && !kept.contains("token") && !kept.contains("net"));
    }

    #[test]
    fn a_later_file_overrides_an_earlier_one() {
        assert_eq!(
            last_of_each_key("[global]\na = 1\nb = 2\na = 3\n"),
            "[global]\nb = 2\na = 3\n"
        );
    }
}
