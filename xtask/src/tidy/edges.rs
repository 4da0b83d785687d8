//! Which crate may use which: a crate exists because of what its `Cargo.toml` must not have.

use std::fs;

use crate::tidy::Violation;
use crate::workspace::{Package, Workspace};

struct Rule {
    name: &'static str,
    /// Our own crates that it may use.
    ours: &'static [&'static str],
    /// Other people's crates that it must not use, not even in tests.
    never: &'static [&'static str],
}

const DATABASES: &[&str] = &["rusqlite", "sqlx"];
const HTTP: &[&str] = &["axum", "hyper", "hyper-util", "reqwest"];

const RULES: &[Rule] = &[
    Rule {
        name: "choir-core",
        ours: &[],
        never: &["axum", "hyper", "reqwest", "rusqlite", "rustix", "sqlx", "tokio"],
    },
    Rule {
        name: "choir-api",
        ours: &["choir-core"],
        never: &["libc", "rusqlite", "rustix", "sqlx"],
    },
    Rule {
        name: "choir-store",
        ours: &["choir-core"],
        never: HTTP,
    },
    Rule {
        name: "choir-link",
        ours: &["choir-core"],
        never: &["axum", "rusqlite", "sqlx"],
    },
    Rule {
        name: "choir-runtime",
        ours: &["choir-core", "choir-link"],
        never: &["axum", "rusqlite", "sqlx"],
    },
    Rule {
        name: "choir-proxy",
        ours: &["choir-core"],
        never: DATABASES,
    },
    Rule {
        name: "choir-broker",
        ours: &["choir-core", "choir-store"],
        never: &["axum"],
    },
    Rule {
        name: "choir-hypervisor",
        ours: &[
            "choir-core",
            "choir-api",
            "choir-store",
            "choir-runtime",
            "choir-proxy",
            "choir-broker",
        ],
        never: &[],
    },
    Rule {
        name: "choir-sandbox",
        ours: &["choir-core", "choir-api", "choir-link"],
        never: &["openssl", "ring", "rusqlite", "rustls", "sqlx"],
    },
    Rule {
        name: "choir-volumes",
        ours: &["choir-core"],
        never: &["axum", "hyper", "tokio"],
    },
    Rule {
        name: "choir",
        ours: &["choir-api", "choir-core"],
        never: DATABASES,
    },
    Rule {
        name: "choir-desktop",
        ours: &["choir-api", "choir-core"],
        never: DATABASES,
    },
    Rule {
        name: "choir-e2e",
        ours: &["choir-api", "choir-core", "choir-hypervisor"],
        never: &[],
    },
    Rule {
        name: "choir-bench",
        ours: &["choir-api", "choir-core", "choir-e2e"],
        never: DATABASES,
    },
    Rule {
        name: "xtask",
        ours: &[],
        never: &[],
    },
];

pub fn check(workspace: &Workspace) -> Vec<Violation> {
    let ours: Vec<_> = workspace.packages.iter().map(|package| package.name.as_str()).collect();
    workspace
        .packages
        .iter()
        .flat_map(|package| check_package(package, &ours))
        .collect()
}

fn check_package(package: &Package, ours: &[&str]) -> Vec<Violation> {
    let violation = |needle: &str, sentence: String| Violation {
        file: package.manifest_path.clone(),
        line: line_of(package, needle),
        sentence,
    };
    let Some(rule) = RULES.iter().find(|rule| rule.name == package.name) else {
        let sentence = format!(
            "crate {} is not in the table of xtask/src/tidy/edges.rs: say there what it may use",
            package.name
        );
        return vec![violation("name", sentence)];
    };
    let broken = package.dependencies.iter().filter_map(|dependency| {
        let name = dependency.name.as_str();
        let is_ours = ours.contains(&name) && name != package.name;
        if is_ours && !rule.ours.contains(&name) {
            let kind = dependency
                .kind
                .as_deref()
                .map_or(String::new(), |kind| format!("{kind}-"));
            Some((
                name,
                format!("{} must not have {name} as a {kind}dependency", package.name),
            ))
        } else if rule.never.contains(&name) {
            Some((name, format!("{} must not use {name}", package.name)))
        } else {
            None
        }
    });
    broken.map(|(name, sentence)| violation(name, sentence)).collect()
}

fn line_of(package: &Package, needle: &str) -> usize {
    let text = fs::read_to_string(&package.manifest_path).unwrap_or_default();
    let found = text.lines().position(|line| line.starts_with(needle));
    found.map_or(1, |index| index + 1)
}

#[cfg(test)]
mod tests {
    use super::{RULES, check};
    use crate::workspace::{Dependency, Package, Workspace};

    fn package(name: &str, dependencies: &[&str]) -> Package {
        let dependencies = dependencies
            .iter()
            .map(|name| Dependency {
                name: (*name).into(),
                kind: None,
            })
            .collect();
        Package {
            name: name.into(),
            manifest_path: "Cargo.toml".into(),
            dependencies,
        }
    }

    fn sentences(packages: Vec<Package>) -> Vec<String> {
        let workspace = Workspace {
            workspace_root: "/".into(),
            target_directory: "/".into(),
            packages,
        };
        check(&workspace)
            .into_iter()
            .map(|violation| violation.sentence)
            .collect()
    }

    #[test]
    fn an_edge_outside_the_table_is_named() {
        let found = sentences(vec![
            package("choir-core", &["serde"]),
            package("choir-store", &["choir-core", "rusqlite"]),
            package("choir-proxy", &["choir-core", "choir-store"]),
        ]);
        assert_eq!(found, ["choir-proxy must not have choir-store as a dependency"]);
    }

    #[test]
    fn the_core_does_no_io() {
        assert_eq!(
            sentences(vec![package("choir-core", &["tokio"])]),
            ["choir-core must not use tokio"]
        );
    }

    #[test]
    fn a_crate_without_a_rule_is_refused() {
        assert!(sentences(vec![package("choir-extra", &[])])[0].contains("choir-extra"));
    }

    #[test]
    fn the_rules_name_no_crate_that_uses_itself() {
        assert!(RULES.iter().all(|rule| !rule.ours.contains(&rule.name)));
    }
}
