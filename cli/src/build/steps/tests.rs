//! What becomes of whole Dockerfiles. It must not run any of them.

use super::*;

fn planned(text: &str, given: &[(&str, &str)]) -> Result<Plan, String> {
    let given = given.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
    let file = Dockerfile::parse("Dockerfile", text)?;
    plan(&file, &given, &ReleaseConfig::default())
}

fn action(plan: &Plan, n: usize) -> (&[String], &str, &str, &Values) {
    match &plan.steps[n].action {
        Action::Run {
            argv,
            user,
            directory,
            env,
        } => (argv, user, directory, env),
        Action::Copy { .. } => panic!("step {n} copies"),
    }
}

fn copied(line: &str) -> Result<(Vec<String>, String, bool, String), String> {
    let plan = planned(&format!("FROM a\nARG D=/opt\nWORKDIR /srv/app\n{line}\n"), &[])?;
    match plan.steps.into_iter().nth(1).map(|step| step.action) {
        Some(Action::Copy {
            sources,
            destination,
            into,
            owner,
            ..
        }) => Ok((sources, destination, into, owner)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_base_is_named_with_the_arguments_above_it() {
    let file = Dockerfile::parse("Dockerfile", "ARG V=3\nARG I=python:$V\nFROM ${I}-slim\n").unwrap();
    let given = |pairs: &[(&str, &str)]| pairs.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
    let named = |values: &Values| base(&file, values).unwrap();
    assert_eq!(
        named(&given(&[])),
        ("Dockerfile:3".to_owned(), "python:3-slim".to_owned())
    );
    assert_eq!(named(&given(&[("V", "4")])).1, "python:4-slim");
}

#[test]
fn commands_run_as_root_at_the_top_until_something_else_is_said() {
    let text = "ARG V=1\nFROM a\nARG V\nARG W=$V-2\nENV A=x B=\"$W y\"\nRUN one\nWORKDIR /srv\nWORKDIR app\nUSER ada\nRUN [\"two\", \"$A\"]\n";
    let plan = planned(text, &[("V", "9")]).unwrap();
    let (argv, user, directory, env) = action(&plan, 0);
    assert_eq!(
        (argv, user, directory),
        (&["/bin/sh", "-c", "one"].map(str::to_owned)[..], "root", "/")
    );
    let env: Vec<_> = env.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    assert_eq!(env, [("A", "x"), ("B", "9-2 y"), ("V", "9"), ("W", "9-2")]);
    assert_eq!(action(&plan, 2).0, ["mkdir", "-p", "--", "/srv/app"]);
    let (argv, user, directory, _) = action(&plan, 3);
    assert_eq!(
        (argv, user, directory),
        (&["two", "$A"].map(str::to_owned)[..], "ada", "/srv/app")
    );
    assert_eq!(plan.steps[3].at, "Dockerfile:10");
    assert_eq!(plan.config.env.keys().collect::<Vec<_>>(), ["A", "B"]);
}

#[test]
fn an_older_form_of_env_takes_the_rest_of_the_line_and_path_can_be_added_to() {
    let plan = planned("FROM a\nENV MOTTO hello  there\nENV PATH=/opt/bin:$PATH\n", &[]).unwrap();
    assert_eq!(plan.config.env["MOTTO"], "hello  there");
    assert!(plan.config.env["PATH"].starts_with("/opt/bin:/usr/local/sbin:"));
}

#[test]
fn copies_know_their_sources_their_destination_and_its_owner() {
    let words = |all: &[&str]| all.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
    let root = "0:0".to_owned();
    assert_eq!(
        copied("COPY a .").unwrap(),
        (words(&["a"]), "/srv/app".to_owned(), true, root.clone())
    );
    assert_eq!(
        copied("COPY a ../b").unwrap(),
        (words(&["a"]), "/srv/b".to_owned(), false, root.clone())
    );
    assert_eq!(
        copied("COPY a b $D").unwrap(),
        (words(&["a", "b"]), "/opt".to_owned(), true, root)
    );
    for (given, owner) in [("1000", "1000:1000"), ("choir", "choir:"), ("a:b", "a:b")] {
        assert_eq!(
            copied(&format!("COPY --chown={given} [\"x y\", \"/z/\"]")).unwrap().3,
            owner
        );
    }
    for bad in [
        "COPY a",
        "COPY a /home/choir/a",
        "COPY a /run",
        "COPY --chmod=u+x a /b",
        "COPY --chown=-R a /b",
        "ADD https://example.com/x /x",
        "ADD x.tar.gz /x",
    ] {
        let error = copied(bad).unwrap_err();
        assert!(error.starts_with("Dockerfile:4: "), "{bad}: {error}");
    }
}

#[test]
fn what_is_started_is_the_entry_point_followed_by_the_command() {
    for (text, line) in [
        ("CMD a && b", "exec /bin/sh -c 'a && b'"),
        ("CMD [\"a\", \"b c\"]", "exec a 'b c'"),
        ("ENTRYPOINT [\"a\"]\nCMD [\"b\"]", "exec a b"),
        ("ENTRYPOINT [\"a\"]\nCMD b", "exec a /bin/sh -c b"),
        ("CMD [\"b\"]\nENTRYPOINT a", "exec /bin/sh -c a"),
        ("WORKDIR /a b\nCMD [\"c\"]", "cd '/a b' && exec c"),
        ("WORKDIR /home/choir\nCMD [\"c\"]", "cd /home/choir && exec c"),
    ] {
        let plan = planned(&format!("FROM a\n{text}\n"), &[]).unwrap();
        assert_eq!(plan.config.start.as_deref(), Some(line), "{text}");
    }
}

#[test]
fn the_first_port_that_can_be_is_the_apps() {
    let plan = planned("FROM a\nEXPOSE 9091 53/udp\nARG P=5173\nEXPOSE $P/tcp 80\n", &[]).unwrap();
    assert_eq!(plan.config.app_port, Some(5173));
    assert_eq!(plan.notes.len(), 1);
}

#[test]
fn what_the_base_says_stays_where_nothing_replaces_it() {
    let base = ReleaseConfig {
        start: Some("exec old".to_owned()),
        app_port: Some(4000),
        env: [("OLD".to_owned(), "1".to_owned())].into(),
        ..ReleaseConfig::default()
    };
    let file = Dockerfile::parse("Dockerfile", "FROM a\nENV NEW=$OLD\nRUN x\n").unwrap();
    let plan = plan(&file, &Values::new(), &base).unwrap();
    assert_eq!((plan.config.start, plan.config.app_port), (base.start, base.app_port));
    assert_eq!(plan.config.env["NEW"], "1");
}

#[test]
fn what_cannot_be_done_is_refused() {
    for bad in [
        "USER 1000",
        "USER a:b",
        "USER $NOBODY",
        "WORKDIR /home/choir/app",
        "EXPOSE web",
        "ENV A=1 B",
        "ENV A",
        "ENV CHOIR_X=1",
        "ARG 1=2",
    ] {
        let error = planned(&format!("FROM a\n{bad}\n"), &[]).unwrap_err();
        assert!(error.starts_with("Dockerfile:2: "), "{bad}: {error}");
    }
    let error = planned("FROM a\n", &[("X", "1")]).unwrap_err();
    assert!(error.contains("--arg X"), "{error}");
}
