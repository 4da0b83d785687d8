//! Reads an answer as it passes, a JSON text or a stream of events (WHATWG, server-sent events): what it says of tokens,
//! and the one event that its reader did not ask for, which is left out. It must not change or delay anything else.

use choir_store::Tokens;
use serde::Deserialize;

use super::json::{Finder, Found};

/// The most of one event that is kept back to judge it, in bytes. The event to be left out has under a kilobyte.
const KEPT_BACK: usize = 16 << 10;
/// No answer has more; what says so is wrong.
const MOST_TOKENS: u64 = 1 << 32;

/// What an answer said of its tokens, the latest of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Usage {
    said: Fields,
    /// Events that carried a piece of the answer.
    pub(super) pieces: u64,
}

/// How the APIs write it. Chat completions and embeddings: `prompt_tokens`, `completion_tokens`. Responses: `input_tokens`,
/// `output_tokens`. Messages: the same, and what the cache gave and took comes on top of the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
struct Fields {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
    prompt_tokens_details: Option<Details>,
    input_tokens_details: Option<Details>,
    cache_read_input_tokens: Option<u64>,
    cache_creation_input_tokens: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
struct Details {
    cached_tokens: Option<u64>,
}

impl Usage {
    /// Takes what one text or event said; whether that was anything.
    fn learn(&mut self, written: Option<&[u8]>) -> bool {
        let Some(new) = written.and_then(|bytes| serde_json::from_slice::<Fields>(bytes).ok()) else {
            return false;
        };
        let old = &mut self.said;
        *old = Fields {
            prompt_tokens: new.prompt_tokens.or(old.prompt_tokens),
            completion_tokens: new.completion_tokens.or(old.completion_tokens),
            input_tokens: new.input_tokens.or(old.input_tokens),
            output_tokens: new.output_tokens.or(old.output_tokens),
            prompt_tokens_details: new.prompt_tokens_details.or(old.prompt_tokens_details),
            input_tokens_details: new.input_tokens_details.or(old.input_tokens_details),
            cache_read_input_tokens: new.cache_read_input_tokens.or(old.cache_read_input_tokens),
            cache_creation_input_tokens: new.cache_creation_input_tokens.or(old.cache_creation_input_tokens),
        };
        true
    }

    /// The input, if anything was said of it.
    pub(super) fn input(&self) -> Option<u64> {
        let of_cache = [self.said.cache_read_input_tokens, self.said.cache_creation_input_tokens];
        let plain = self.said.prompt_tokens.or(self.said.input_tokens)?;
        Some(
            of_cache
                .into_iter()
                .flatten()
                .fold(bounded(plain), |sum, n| sum + bounded(n)),
        )
    }

    /// All of it; what was not said is nothing.
    pub(super) fn tokens(&self) -> Tokens {
        let details = self.said.prompt_tokens_details.or(self.said.input_tokens_details);
        let cached = details
            .and_then(|it| it.cached_tokens)
            .or(self.said.cache_read_input_tokens);
        Tokens {
            input: self.input().unwrap_or_default(),
            cached: bounded(cached.unwrap_or_default()),
            output: bounded(
                self.said
                    .completion_tokens
                    .or(self.said.output_tokens)
                    .unwrap_or_default(),
            ),
        }
    }
}

fn bounded(tokens: u64) -> u64 {
    tokens.min(MOST_TOKENS)
}

/// One answer's body on its way.
pub(super) enum Reader {
    Text { finder: Finder, usage: Usage },
    Events(Events),
}

impl Reader {
    pub(super) fn text() -> Self {
        Self::Text {
            finder: Finder::default(),
            usage: Usage::default(),
        }
    }

    /// `uninvited`: the reader did not ask for the event with the usage of a chat completion.
    pub(super) fn events(uninvited: bool) -> Self {
        Self::Events(Events {
            uninvited,
            ..Events::default()
        })
    }

    /// What may go on now.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Vec<u8> {
        match self {
            Self::Text { finder, .. } => {
                finder.take(bytes);
                bytes.to_vec()
            }
            Self::Events(events) => events.take(bytes),
        }
    }

    /// At the end of the body: what was kept back.
    pub(super) fn finish(&mut self) -> Vec<u8> {
        match self {
            Self::Text { finder, usage } => {
                usage.learn(finder.end().usage.as_deref());
                Vec::new()
            }
            Self::Events(events) => {
                // An event without its empty line is none for its reader, and what it says of tokens is good all the same.
                events.judge();
                std::mem::take(&mut events.kept)
            }
        }
    }

    pub(super) fn usage(&self) -> Usage {
        match self {
            Self::Text { usage, .. } => *usage,
            Self::Events(events) => events.usage,
        }
    }
}

/// A stream of events.
#[derive(Default)]
pub(super) struct Events {
    uninvited: bool,
    line: Line,
    /// A line ended with CR, so that LF still belongs to it.
    after_cr: bool,
    finder: Finder,
    usage: Usage,
    /// What was kept back of the present event.
    kept: Vec<u8>,
    /// The present event is too long to be the one that is looked for.
    passing: bool,
    /// The last event was left out.
    left_out: bool,
}

/// Where in a line the next byte is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Line {
    /// So much of `data:` has come.
    Name(usize),
    /// One space may follow the colon.
    Colon,
    Data,
    Other,
}

impl Default for Line {
    fn default() -> Self {
        Self::Name(0)
    }
}

const DATA: &[u8] = b"data:";

impl Events {
    fn take(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes.len() + self.kept.len());
        for byte in bytes {
            self.next(*byte, &mut out);
        }
        if !self.uninvited || self.passing {
            out.append(&mut self.kept);
        }
        out
    }

    fn next(&mut self, byte: u8, out: &mut Vec<u8>) {
        let rest_of_end = std::mem::take(&mut self.after_cr) && byte == b'\n';
        if rest_of_end {
            // It belongs to the event that has just ended, and goes where that went.
            match self.kept.is_empty() {
                true if self.left_out => {}
                true => out.push(byte),
                false => self.kept.push(byte),
            }
            return;
        }
        self.left_out = false;
        self.kept.push(byte);
        if byte != b'\n' && byte != b'\r' {
            self.within_line(byte);
            self.passing |= self.kept.len() > KEPT_BACK;
            return;
        }
        self.after_cr = byte == b'\r';
        let line = std::mem::take(&mut self.line);
        if line != Line::Name(0) {
            // Lines of data are one text, parted by line ends.
            if line != Line::Other {
                self.finder.take(b"\n");
            }
            return;
        }
        let leave_out = self.judge() && self.uninvited && !self.passing;
        if leave_out {
            self.kept.clear();
        }
        out.append(&mut self.kept);
        (self.left_out, self.passing) = (leave_out, false);
    }

    fn within_line(&mut self, byte: u8) {
        self.line = match self.line {
            Line::Name(n) if byte == DATA[n] => match n + 1 == DATA.len() {
                true => Line::Colon,
                false => Line::Name(n + 1),
            },
            Line::Name(_) | Line::Other => Line::Other,
            Line::Colon if byte == b' ' => Line::Data,
            Line::Colon | Line::Data => {
                self.finder.take(&[byte]);
                Line::Data
            }
        };
    }

    /// At the end of an event: learns from it; whether it is the one with nothing but the usage.
    fn judge(&mut self) -> bool {
        let begun = self.finder.has_begun();
        let Found { usage, choices } = self.finder.end();
        let told = self.usage.learn(usage.as_deref());
        self.usage.pieces += u64::from(begun && !told);
        told && choices.is_some_and(|it| it.iter().filter(|b| !b.is_ascii_whitespace()).eq(b"[]"))
    }
}

#[cfg(test)]
mod tests;
