//! Logins that tools keep in files: which tool, where, and how a token is found in there. One table, for whoever reports
//! them and for whoever leaves them out. It must not read files.

/// A file in which a tool keeps what it is logged in with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Login {
    pub tool: &'static str,
    /// Below a home directory. A `*` at its end stands for any one name.
    pub path: &'static str,
    holds: Holds,
    /// The grant template that puts such a token in at egress, where there is one.
    pub template: Option<&'static str>,
}

/// How a token is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holds {
    /// As the text of one of these members of a JSON object, at any depth; the earlier ones are the better ones.
    Json(&'static [&'static str]),
    /// On a line, behind a name that ends so and this character.
    Line(char, &'static [&'static str]),
    /// Behind the word `password`: netrc(5).
    Netrc,
    /// As the password of a URL.
    Urls,
    /// As a private key in PEM.
    Pem,
}

const fn login(tool: &'static str, path: &'static str, holds: Holds, template: Option<&'static str>) -> Login {
    Login {
        tool,
        path,
        holds,
        template,
    }
}

/// Every login that is recognised.
pub const LOGINS: &[Login] = &[
    login(
        "claude",
        ".claude/.credentials.json",
        Holds::Json(&["accessToken", "refreshToken"]),
        Some("claude"),
    ),
    login(
        "codex",
        ".codex/auth.json",
        Holds::Json(&["access_token", "OPENAI_API_KEY", "refresh_token"]),
        Some("codex"),
    ),
    login(
        "gemini",
        ".gemini/oauth_creds.json",
        Holds::Json(&["access_token", "refresh_token"]),
        None,
    ),
    login(
        "opencode",
        ".local/share/opencode/auth.json",
        Holds::Json(&["key", "access", "refresh"]),
        None,
    ),
    login(
        "copilot",
        ".config/github-copilot/*",
        Holds::Json(&["oauth_token"]),
        None,
    ),
    login(
        "gh",
        ".config/gh/hosts.yml",
        Holds::Line(':', &["oauth_token"]),
        Some("gh"),
    ),
    login(
        "glab",
        ".config/glab-cli/config.yml",
        Holds::Line(':', &["token"]),
        Some("gitlab"),
    ),
    login("git", ".git-credentials", Holds::Urls, None),
    login("git", ".config/git/credentials", Holds::Urls, None),
    login("netrc", ".netrc", Holds::Netrc, None),
    login(
        "npm",
        ".npmrc",
        Holds::Line('=', &["_authToken", "_password", "_auth"]),
        Some("npm"),
    ),
    login("pypi", ".pypirc", Holds::Line('=', &["password"]), Some("pypi")),
    login(
        "cargo",
        ".cargo/credentials.toml",
        Holds::Line('=', &["token"]),
        Some("crates-io"),
    ),
    login(
        "docker",
        ".docker/config.json",
        Holds::Json(&["auth", "identitytoken"]),
        None,
    ),
    login(
        "aws",
        ".aws/credentials",
        Holds::Line('=', &["aws_secret_access_key"]),
        None,
    ),
    login(
        "gcloud",
        ".config/gcloud/application_default_credentials.json",
        Holds::Json(&["refresh_token", "private_key"]),
        None,
    ),
    login(
        "kubectl",
        ".kube/config",
        Holds::Line(':', &["token", "client-key-data"]),
        None,
    ),
    login("ssh", ".ssh/*", Holds::Pem, None),
];

impl Login {
    /// The login that a file at this path would be, by the path alone.
    pub fn at(path: &str) -> Option<&'static Self> {
        LOGINS.iter().find(|login| match login.path.strip_suffix('*') {
            None => below(path, login.path).is_some_and(str::is_empty),
            Some(directory) => below(path, directory).is_some_and(|name| !name.is_empty() && !name.contains('/')),
        })
    }

    /// The first login of a tool.
    pub fn of(tool: &str) -> Option<&'static Self> {
        LOGINS.iter().find(|login| login.tool == tool)
    }

    /// The tokens in such a file, the most useful first. An empty file, or one with settings only, has none.
    pub fn tokens(&self, text: &str) -> Vec<String> {
        let mut found = match self.holds {
            Holds::Json(names) => names.iter().flat_map(|name| members(text, name)).collect(),
            Holds::Line(separator, names) => text.lines().filter_map(|l| behind(l, separator, names)).collect(),
            Holds::Netrc => {
                let words: Vec<&str> = text.split_whitespace().collect();
                let pairs = words.windows(2).filter(|pair| pair[0] == "password");
                pairs.map(|pair| pair[1]).collect()
            }
            Holds::Urls => text.lines().filter_map(password).collect(),
            Holds::Pem if text.contains("PRIVATE KEY-----") => vec![text],
            Holds::Pem => Vec::new(),
        };
        found.retain(|token| !token.is_empty());
        found.into_iter().map(str::to_owned).collect()
    }
}

/// What follows the last `part` of a path that begins a name there.
fn below<'a>(path: &'a str, part: &str) -> Option<&'a str> {
    let (before, after) = path.rsplit_once(part)?;
    (before.is_empty() || before.ends_with('/')).then_some(after)
}

/// The texts of the members of this name. One with an escape is no token.
fn members<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
    let quoted = format!("\"{name}\"");
    let values = text.match_indices(&quoted).filter_map(|(at, _)| {
        let rest = text[at + quoted.len()..].trim_start().strip_prefix(':')?;
        let (value, _) = rest.trim_start().strip_prefix('"')?.split_once('"')?;
        (!value.contains('\\')).then_some(value)
    });
    values.collect()
}

fn behind<'a>(line: &'a str, separator: char, names: &[&str]) -> Option<&'a str> {
    let (name, value) = line.split_once(separator)?;
    let name = name.trim();
    let is_name = |wanted: &&str| {
        let before = name.strip_suffix(*wanted);
        before.is_some_and(|before| before.is_empty() || before.ends_with(':'))
    };
    names.iter().any(is_name).then_some(())?;
    Some(value.trim().trim_matches(['"', '\'']))
}

fn password(url: &str) -> Option<&str> {
    let (_, rest) = url.split_once("://")?;
    let (who, _) = rest.split_once('@')?;
    Some(who.split_once(':').map_or(who, |(_, password)| password))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(path: &str, text: &str) -> Vec<String> {
        Login::at(path)
            .unwrap_or_else(|| panic!("{path} is no login"))
            .tokens(text)
    }

    #[test]
    fn each_tools_file_is_recognised_and_gives_its_token() {
        let claude = r#"{"claudeAiOauth": {"refreshToken": "r-1", "accessToken" : "a-1", "expiresAt": 1}}"#;
        assert_eq!(tokens("/home/choir/.claude/.credentials.json", claude), ["a-1", "r-1"]);
        let codex = r#"{"OPENAI_API_KEY":null,"tokens":{"access_token":"a-2","refresh_token":"r-2"}}"#;
        assert_eq!(tokens("/home/ada/.codex/auth.json", codex), ["a-2", "r-2"]);
        let gh = "github.com:\n    user: ada\n    oauth_token: gho_3\n    git_protocol: https\n";
        assert_eq!(tokens("/home/choir/.config/gh/hosts.yml", gh), ["gho_3"]);
        let netrc = "machine a login ada password p-4\nmachine b\n  login ada\n  password p-5\n";
        assert_eq!(tokens("/home/choir/.netrc", netrc), ["p-4", "p-5"]);
        let npm = "registry=https://npm.a.example/\n//npm.a.example/:_authToken=npm_6\n";
        assert_eq!(tokens("/home/choir/.npmrc", npm), ["npm_6"]);
        let git = "https://ada:ghp_7@github.com\nhttps://ghp_8@github.com\n";
        assert_eq!(tokens("/home/choir/.git-credentials", git), ["ghp_7", "ghp_8"]);
        let docker = r#"{"auths":{"https://index.docker.io/v1/":{"auth":"YTpi"}},"credsStore":""}"#;
        assert_eq!(tokens("/home/choir/.docker/config.json", docker), ["YTpi"]);
        let cargo = "[registry]\ntoken = \"cio_9\"\n";
        assert_eq!(tokens("/home/choir/.cargo/credentials.toml", cargo), ["cio_9"]);
        let aws = "[default]\naws_access_key_id = AKIA\naws_secret_access_key = s-10\n";
        assert_eq!(tokens("/home/choir/.aws/credentials", aws), ["s-10"]);
        let key = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl\n-----END OPENSSH PRIVATE KEY-----\n";
        assert_eq!(tokens("/home/choir/.ssh/id_ed25519", key), [key]);
    }

    #[test]
    fn settings_without_a_token_are_no_login() {
        for (path, text) in [
            ("/home/choir/.npmrc", "registry=https://npm.a.example/\n"),
            ("/home/choir/.npmrc", "//npm.a.example/:_authToken=\n"),
            ("/home/choir/.docker/config.json", "{\"auths\":{}}"),
            ("/home/choir/.codex/auth.json", "{\"OPENAI_API_KEY\":null}"),
            ("/home/choir/.ssh/id_ed25519.pub", "ssh-ed25519 AAAA ada\n"),
            ("/home/choir/.ssh/known_hosts", "github.com ssh-ed25519 AAAA\n"),
            ("/home/choir/.git-credentials", ""),
            ("/home/choir/.config/gh/hosts.yml", "github.com:\n    user: ada\n"),
        ] {
            assert_eq!(tokens(path, text), [""; 0], "{path}");
        }
    }

    #[test]
    fn other_files_are_not_taken_for_one() {
        for path in [
            "/home/choir/npmrc",
            "/home/choir/x.npmrc",
            "/home/choir/.npmrc.bak",
            "/home/choir/.ssh/",
            "/home/choir/.ssh/deep/key",
            "/home/choir/.claude/settings.json",
            "",
        ] {
            assert_eq!(Login::at(path), None, "{path}");
        }
        assert_eq!(Login::of("gh").map(|login| login.path), Some(".config/gh/hosts.yml"));
        assert_eq!(Login::of("nothing"), None);
    }
}
