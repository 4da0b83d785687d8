//! A stored secret is nowhere that a sandbox, or an operator who only looks, can find it (D01): not in environments,
//! command lines, files, container descriptions, the database or the hypervisor's log. It is granted to nobody here. This
//! looks by itself from outside, and by `choir prove` from the broker's side; both must find what the owner leaks.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use choir_api::client::{Client, SlotVerb};
use choir_api::prove::{Owner, Report, Signed, Verdict};
use choir_api::sandbox::{Command as Line, CreateTask};
use choir_api::secrets::{PutSecret, SecretText};
use choir_core::Slot;
use choir_e2e::instance::Instance;
use choir_e2e::person::{self, run, workspace};
use choir_e2e::skip;
use choir_e2e::waiting::{PATIENCE, step, until};

/// Kept as a secret should be.
const KEPT: &str = "canary-kept-9d1f0c53a7be4426";
/// The control: also a secret, but its owner leaks it in every way there is.
const LEAKED: &str = "canary-leaked-5b20e8f1c94d7a63";

/// Where the owner's leaks must be found; a look that misses one would prove nothing about the other secret.
const LEAKS: [&str; 4] = ["command lines outside", "environments outside", "files", "inside dev"];

#[tokio::test]
async fn a_stored_secret_is_nowhere_in_or_around_a_sandbox() -> Result<()> {
    if skip::cannot_run("secrets") {
        return Ok(());
    }
    let instance = Instance::up(&[])?;
    let (client, token) = person::sign_in_with_token(&instance).await?;
    client.create_workspace(&workspace()).await?;
    for (name, value) in [("KEPT", KEPT), ("LEAKED", LEAKED)] {
        let put = PutSecret {
            value: SecretText::new(value.to_owned()),
            reveal: false,
        };
        client.put_secret(&name.parse()?, &put).await?;
    }
    for slot in Slot::ALL {
        step(&format!("start {slot}"), person::start(&client, slot)).await?;
    }
    let clean = step("prove before the leak", prove(&instance, &token, "clean", true, 0)).await?;
    is_clean(&clean)?;
    step("leak", leak(&client)).await?;

    let mut places = step("look around", around(&instance)).await?;
    for slot in Slot::ALL {
        places.insert(format!("inside {slot}"), inside(&client, slot).await?);
        let sandbox = client
            .workspace(&workspace())
            .await?
            .slots
            .get(slot)
            .sandbox
            .to_string();
        let container = instance.container(&sandbox).await?;
        let described = instance.podman("GET", &format!("/containers/{container}/json")).await?;
        places.insert(format!("description of {slot}"), described.body.into_bytes());
    }
    places.insert("files".to_owned(), files(&instance)?);

    let found = |value: &str| -> Vec<&str> {
        let forms = forms(value);
        let holds = |bytes: &[u8]| forms.iter().any(|form| contains(bytes, form));
        let hits = places.iter().filter(|(_, bytes)| holds(bytes));
        hits.map(|(place, _)| place.as_str()).collect()
    };
    let empty: Vec<_> = places.iter().filter(|(_, bytes)| bytes.is_empty()).collect();
    ensure!(empty.is_empty(), "there was nothing to look at: {empty:?}");
    ensure!(found(KEPT).is_empty(), "it is in: {:?}", found(KEPT));
    ensure!(found(LEAKED) == LEAKS, "the control was found in: {:?}", found(LEAKED));

    let leaky = step("prove after it", prove(&instance, &token, "leaky", true, 1)).await?;
    finds_the_leaks(&leaky, "dev")?;
    client
        .ask_slot(&workspace(), Slot::Dev, SlotVerb::Stop, PATIENCE)
        .await?;
    let at_rest = step("prove with dev at rest", prove(&instance, &token, "at-rest", false, 1)).await?;
    let files: Vec<_> = at_rest
        .hits
        .iter()
        .map(|hit| (hit.what.as_str(), hit.item.as_str()))
        .collect();
    ensure!(files == [("files", "/home/leak")], "found at rest: {files:?}");
    signatures(&instance, &token)
}

/// The report of `choir prove`, for the whole box or for the person's own, which must end with this exit code.
async fn prove(instance: &Instance, token: &str, name: &str, all: bool, code: i32) -> Result<Report> {
    let file = instance.path(&format!("{name}.json"));
    let mut choir = instance.choir(token)?;
    choir.args(["prove", "--out"]).arg(&file);
    if all {
        choir.arg("--all");
    }
    let output = tokio::task::spawn_blocking(move || choir.output()).await??;
    let told = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    println!("{told}");
    ensure!(
        output.status.code() == Some(code),
        "`choir prove` ended with {}",
        output.status
    );
    for value in [KEPT, LEAKED] {
        ensure!(!told.contains(value), "the report has a value in it");
    }
    let signed: Signed = serde_json::from_slice(&fs::read(&file)?)?;
    Ok(signed.verify(&signed.signature.key)?)
}

/// Nothing was found, and everything that there is was searched.
fn is_clean(report: &Report) -> Result<()> {
    let unsearched: Vec<_> = report.places.iter().filter(|place| !place.searched).collect();
    ensure!(unsearched.is_empty(), "not searched: {unsearched:?}");
    ensure!(
        report.verdict == Verdict::Clean,
        "{}: {:?}",
        report.summary,
        report.hits
    );
    for (what, least) in [
        ("files", 100 << 20),
        ("environment", 100),
        ("command lines", 20),
        ("sockets", 100),
    ] {
        let of = report.places.iter().filter(|place| place.what == what);
        let small: Vec<_> = of
            .filter(|place| matches!(place.owner, Owner::Sandbox { .. }) && place.bytes < least)
            .collect();
        ensure!(small.is_empty(), "hardly anything was looked at: {small:?}");
    }
    Ok(())
}

/// What the owner leaked, by name and place, and the kept secret nowhere.
fn finds_the_leaks(report: &Report, slot: &str) -> Result<()> {
    let place = |hit: &choir_api::prove::Hit| match &hit.owner {
        Owner::Sandbox { slot, .. } => format!("{} of {slot}", hit.what),
        _ => hit.what.clone(),
    };
    let of = |name: &str| -> BTreeSet<String> {
        report
            .hits
            .iter()
            .filter(|hit| hit.secret.name == name)
            .map(place)
            .collect()
    };
    ensure!(of("KEPT").is_empty(), "the kept one was found in: {:?}", of("KEPT"));
    let leaks = ["files", "environment", "command lines"].map(|what| format!("{what} of {slot}"));
    let mut expected = BTreeSet::from(leaks);
    expected.insert("command lines of the host".to_owned());
    ensure!(
        of("LEAKED") == expected,
        "the leaked one was found in: {:?}",
        of("LEAKED")
    );
    ensure!(report.verdict == Verdict::Hits, "{}", report.summary);
    Ok(())
}

/// A report that was kept is checked against the box, and a changed one is refused.
fn signatures(instance: &Instance, token: &str) -> Result<()> {
    let verify = |name: &str| -> Result<Option<i32>> {
        let mut choir = instance.choir(token)?;
        choir.args(["prove", "--verify"]).arg(instance.path(name));
        Ok(choir.output()?.status.code())
    };
    ensure!(verify("clean.json")? == Some(0), "a genuine report was refused");
    let forged = fs::read_to_string(instance.path("leaky.json"))?.replace("LEAKED", "KEPT");
    fs::write(instance.path("forged.json"), forged)?;
    ensure!(
        verify("forged.json")? == Some(1),
        "a changed report was taken for genuine"
    );
    Ok(())
}

/// What nothing protects from: the owner writes a value into a file, a command line and an environment.
async fn leak(client: &Client) -> Result<()> {
    let line = format!("echo {LEAKED} > ~/leak; sleep infinity; : {LEAKED}");
    let task = CreateTask {
        command: Line::Line(line),
        cwd: None,
        env: [("LEAK".to_owned(), LEAKED.to_owned())].into(),
        timeout_ms: None,
    };
    client.sandbox(&workspace(), Slot::Dev).create_task(&task).await?;
    until("the leak", async || {
        let there = person::exec(client, Slot::Dev, "test -s ~/leak").await?;
        Ok((there.exit.exit_code == 0).then_some(()))
    })
    .await
}

/// What a program in a slot sees of itself and of the others, the superuser's included.
async fn inside(client: &Client, slot: Slot) -> Result<Vec<u8>> {
    let look = "env; sudo sh -c 'cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline /proc/[0-9]*/mountinfo; \
                cat /run/choir/* /run/choir-agent/* /etc/hosts /etc/resolv.conf' 2>/dev/null | tr '\\0' '\\n'";
    Ok(run(client, slot, look).await?.into_bytes())
}

/// What the host shows of every process, and Podman of everything it has.
async fn around(instance: &Instance) -> Result<BTreeMap<String, Vec<u8>>> {
    let (mut lines, mut environments) = (Vec::new(), Vec::new());
    for process in fs::read_dir("/proc")? {
        let process = process?.path();
        // Processes end while they are looked at.
        lines.extend(fs::read(process.join("cmdline")).unwrap_or_default());
        environments.extend(fs::read(process.join("environ")).unwrap_or_default());
    }
    let mut listed = Vec::new();
    for path in [
        "/containers/json?all=true",
        "/images/json",
        "/secrets/json",
        "/volumes/json",
    ] {
        listed.extend(instance.podman("GET", path).await?.body.into_bytes());
    }
    Ok([
        ("command lines outside", lines),
        ("environments outside", environments),
        ("lists of the container service", listed),
    ]
    .map(|(place, bytes)| (place.to_owned(), bytes))
    .into())
}

/// All lines of all files of the box that hold either value in any form: database, log, volumes, everything.
fn files(instance: &Instance) -> Result<Vec<u8>> {
    let patterns: Vec<Vec<u8>> = [KEPT, LEAKED].into_iter().flat_map(forms).collect();
    let list = tempfile::NamedTempFile::new()?;
    fs::write(list.path(), patterns.join(&b'\n'))?;
    // The volumes are read where they are mounted, not in the image that holds them.
    let mut grep = Command::new("grep");
    grep.args([
        "--recursive",
        "--text",
        "--fixed-strings",
        "--only-matching",
        "--no-messages",
    ]);
    grep.args(["--devices=skip", "--exclude=volumes.btrfs", "--file"])
        .arg(list.path())
        .arg(instance.path(""));
    let output = grep.output().context("grep")?;
    Ok(output.stdout)
}

/// A value in clear, in hexadecimal, and in base64 at each of the three offsets that it may begin at.
fn forms(value: &str) -> Vec<Vec<u8>> {
    let mut forms = vec![
        value.as_bytes().to_vec(),
        data_encoding::HEXLOWER.encode(value.as_bytes()).into_bytes(),
    ];
    for offset in 0..3 {
        let shifted = &value.as_bytes()[(3 - offset) % 3..];
        let whole = &shifted[..shifted.len() / 3 * 3];
        forms.push(data_encoding::BASE64.encode(whole).into_bytes());
    }
    forms
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    let first = part.first();
    let starts = bytes.iter().enumerate().filter(|(_, byte)| Some(*byte) == first);
    starts.into_iter().any(|(at, _)| bytes[at..].starts_with(part))
}
