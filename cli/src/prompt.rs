//! Asking a person at a terminal for what must not be shown. It must not know what becomes of it.

use std::fs;
use std::io::{self, BufRead as _, IsTerminal as _};
use std::path::Path;

use age::secrecy::SecretString;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::failure::Failure;

/// What is typed at the terminal, unseen, without the end of its line.
pub fn hidden(question: &str) -> Result<String, Failure> {
    let mut text = String::new();
    let hidden = Hidden::enter()?;
    eprint!("{question} (not shown): ");
    let read = io::stdin().lock().read_line(&mut text);
    drop(hidden);
    eprintln!();
    read?;
    end_cut(&mut text);
    Ok(text)
}

/// A passphrase, out of the file or typed; a new one is typed twice.
pub fn passphrase(file: Option<&Path>, new: bool) -> Result<SecretString, Failure> {
    let text = match file {
        Some(file) => {
            let cannot = |e| Failure::Failed(format!("cannot read {}: {e}", file.display()));
            let mut text = fs::read_to_string(file).map_err(cannot)?;
            end_cut(&mut text);
            text
        }
        None if io::stdin().is_terminal() => {
            let text = hidden("Passphrase")?;
            if new && hidden("The same once more")? != text {
                return Err(Failure::Failed(
                    "the two passphrases are not the same; nothing was done".to_owned(),
                ));
            }
            text
        }
        None => {
            let message =
                "there is no terminal to ask for a passphrase at; name a file that holds it with --passphrase-file";
            return Err(Failure::Usage(message.to_owned()));
        }
    };
    if text.is_empty() {
        return Err(Failure::Usage(
            "the passphrase is empty; choose a longer one".to_owned(),
        ));
    }
    Ok(SecretString::from(text))
}

/// Takes off the line end that typing, editors and `echo` add.
pub fn end_cut(text: &mut String) {
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
}

/// The terminal shows nothing of what is typed until this is dropped.
struct Hidden {
    before: Termios,
}

impl Hidden {
    fn enter() -> Result<Self, Failure> {
        let wrong = |e: rustix::io::Errno| Failure::Failed(format!("cannot hide what is typed: {e}"));
        let before = tcgetattr(io::stdin()).map_err(wrong)?;
        let mut hidden = before.clone();
        hidden.local_modes.remove(LocalModes::ECHO);
        tcsetattr(io::stdin(), OptionalActions::Flush, &hidden).map_err(wrong)?;
        Ok(Self { before })
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing back.
        let _gone = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}
