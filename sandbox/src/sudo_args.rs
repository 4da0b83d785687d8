//! The arguments of `sudo`. It must not know what becomes of them.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

const HELP: &str = "Usage: sudo [-u USER] [-E] [-n] [-i] [--] [VAR=value…] COMMAND…
Runs a command as root, or as USER, inside this sandbox. There is no password.
  -u USER  run as USER
  -E       keep the whole environment
  -n       accepted, as nothing is ever asked
  -i       login shell of the user, with the command or by itself
Example: sudo apt-get install -y tree";

/// What to run, and how.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    pub user: String,
    pub keep_env: bool,
    pub login: bool,
    pub env: Vec<(OsString, OsString)>,
    pub command: Vec<OsString>,
}

/// What the arguments ask for.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed {
    Run(Options),
    /// Print this and end.
    Say(String),
}

/// Reads the arguments. The error is a sentence for the caller.
pub fn parse(args: Vec<OsString>) -> Result<Parsed, String> {
    let mut options = Options {
        user: "root".to_owned(),
        keep_env: false,
        login: false,
        env: Vec::new(),
        command: Vec::new(),
    };
    let mut args = args.into_iter().peekable();
    while let Some(flags) = args.next_if(|a| a.as_bytes().starts_with(b"-")) {
        let flags = flags.to_string_lossy().into_owned();
        match flags.as_str() {
            "--" => break,
            "--help" => return Ok(Parsed::Say(HELP.to_owned())),
            "-V" => {
                return Ok(Parsed::Say(format!(
                    "sudo of choir-sandbox {}",
                    env!("CARGO_PKG_VERSION")
                )));
            }
            _ => {}
        }
        let mut letters = flags[1..].chars();
        while let Some(letter) = letters.next() {
            match letter {
                'E' => options.keep_env = true,
                'n' => {}
                'i' => options.login = true,
                'u' => {
                    let attached = letters.as_str().to_owned();
                    letters = "".chars();
                    let mut next = || args.next().map(|a| a.to_string_lossy().into_owned());
                    let user = if attached.is_empty() { next() } else { Some(attached) };
                    options.user = user.ok_or("-u needs the name of a user")?;
                }
                _ => return Err(format!("{flags} is not supported in a sandbox; see sudo --help")),
            }
        }
    }
    let is_assignment = |a: &OsString| a.as_bytes().iter().position(|b| *b == b'=').is_some_and(|at| at > 0);
    while let Some(assignment) = args.next_if(is_assignment) {
        let bytes = assignment.as_bytes();
        let at = bytes.iter().position(|b| *b == b'=').unwrap_or(bytes.len());
        let os = |bytes: &[u8]| OsStr::from_bytes(bytes).to_owned();
        options.env.push((os(&bytes[..at]), os(&bytes[at + 1..])));
    }
    options.command = args.collect();
    if options.command.is_empty() && !options.login {
        return Err("say what to run, or -i for a shell; see sudo --help".to_owned());
    }
    Ok(Parsed::Run(options))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &[&str]) -> Result<Parsed, String> {
        parse(args.iter().map(Into::into).collect())
    }

    #[test]
    fn flags_assignments_and_command_are_told_apart() {
        let Ok(Parsed::Run(options)) = parsed(&["-nEu", "postgres", "A=1", "B=x=y", "env", "-u", "C=3"]) else {
            panic!("not parsed");
        };
        assert_eq!(
            (options.user.as_str(), options.keep_env, options.login),
            ("postgres", true, false)
        );
        assert_eq!(options.env, [("A".into(), "1".into()), ("B".into(), "x=y".into())]);
        assert_eq!(options.command, ["env", "-u", "C=3"]);
    }

    #[test]
    fn a_double_dash_ends_the_flags() {
        let Ok(Parsed::Run(options)) = parsed(&["-uada", "--", "-x"]) else {
            panic!("not parsed");
        };
        assert_eq!(
            (options.user.as_str(), &options.command[..]),
            ("ada", &[OsString::from("-x")][..])
        );
    }

    #[test]
    fn what_is_not_supported_is_said_in_a_sentence() {
        for bad in [&["-S", "ls"][..], &["--user=root", "ls"], &["-u"], &[], &["-n"]] {
            assert!(parsed(bad).is_err(), "{bad:?}");
        }
        assert!(parsed(&["-k"]).unwrap_err().contains("-k is not supported"));
        assert!(parsed(&["-i"]).is_ok());
    }
}
