//! Finds a secret in what comes back, in every form in which a server might repeat it, across the borders of chunks.
//! Holds back only bytes that may be the beginning of one, so that streams stay streams. It must not know HTTP.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use aho_corasick::automaton::{Automaton, StateID};
use aho_corasick::nfa::contiguous::NFA;
use aho_corasick::{Anchored, MatchKind};
use data_encoding::{BASE64_NOPAD, BASE64URL_NOPAD, HEXLOWER};
use sha2::{Digest as _, Sha256};

use crate::{SecretValue, inject};

/// The shortest secret that can be looked for: a shorter one would be found by chance.
pub const SHORTEST: usize = 8;

/// The longest secret that is looked for. What finds it takes 0.2 ms to make for 40 bytes, 26 ms and 1 MB for this many,
/// and 355 ms and 28 MB for 64 KiB (measured, optimised).
pub const LONGEST: usize = 4096;

/// The secret, or a form of it, is in the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the answer contains the secret that was sent with the request")]
pub struct Reflected;

/// What finds the secrets of the calls that are under way: calls at the same time share it, and it goes with the last of
/// them, so that no secret stays in memory for its sake.
#[derive(Default)]
pub struct Scanners(Mutex<HashMap<[u8; 32], Weak<Needle>>>);

impl Scanners {
    /// `None` for a secret under [`SHORTEST`] or over [`LONGEST`] bytes.
    pub fn of(&self, secret: &SecretValue) -> Option<Scanner> {
        let digest = Sha256::digest(secret.expose()).into();
        let shared = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = shared().get(&digest).and_then(Weak::upgrade);
        let needle = match found {
            Some(needle) => needle,
            None => {
                // Made outside the lock: others need not wait for it.
                let made = Arc::new(Needle::new(secret)?);
                let mut shared = shared();
                shared.retain(|_, needle| needle.strong_count() > 0);
                shared.insert(digest, Arc::downgrade(&made));
                made
            }
        };
        Some(Scanner {
            state: needle.start,
            needle,
            held: Vec::new(),
        })
    }
}

/// Finds one secret in all its forms.
struct Needle {
    automaton: NFA,
    /// How many bytes of some form a state has seen.
    depths: HashMap<StateID, usize>,
    start: StateID,
}

impl Needle {
    fn new(secret: &SecretValue) -> Option<Self> {
        let secret = secret.expose();
        if !(SHORTEST..=LONGEST).contains(&secret.len()) {
            return None;
        }
        let forms: Vec<Vec<u8>> = forms(secret).into_keys().collect();
        // Upper and lower case alike: hexadecimal digits come in both, and header names in lower case only.
        let automaton = NFA::builder()
            .match_kind(MatchKind::Standard)
            .ascii_case_insensitive(true)
            .prefilter(false)
            .build(&forms)
            .ok()?;
        let start = automaton.start_state(Anchored::No).ok()?;
        let mut depths = HashMap::from([(start, 0)]);
        for form in &forms {
            let mut state = start;
            for (at, byte) in form.iter().enumerate() {
                state = automaton.next_state(Anchored::No, state, *byte);
                // From the start along one form, each state has seen exactly this much of it.
                depths.insert(state, at + 1);
            }
        }
        Some(Self {
            automaton,
            depths,
            start,
        })
    }

    fn next(&self, state: StateID, byte: u8) -> StateID {
        self.automaton.next_state(Anchored::No, state, byte)
    }

    fn is_found(&self, state: StateID) -> bool {
        self.automaton.is_special(state) && self.automaton.is_match(state)
    }
}

/// Looks for one secret in one answer.
pub struct Scanner {
    needle: Arc<Needle>,
    state: StateID,
    /// What was held back: as many bytes as the state has seen.
    held: Vec<u8>,
}

impl Scanner {
    /// Takes the next bytes; returns those that may go on.
    pub fn take(&mut self, bytes: &[u8]) -> Result<Vec<u8>, Reflected> {
        for byte in bytes {
            self.state = self.needle.next(self.state, *byte);
            if self.needle.is_found(self.state) {
                return Err(Reflected);
            }
        }
        let keep = self.needle.depths.get(&self.state).copied().unwrap_or_default();
        let mut pass = std::mem::take(&mut self.held);
        pass.extend_from_slice(bytes);
        self.held = pass.split_off(pass.len() - keep);
        Ok(pass)
    }

    /// After the last bytes: what was held back and turned out to be harmless.
    pub fn finish(&mut self) -> Vec<u8> {
        self.state = self.needle.start;
        std::mem::take(&mut self.held)
    }

    /// Whether text that is complete in itself, such as a header, has the secret in it.
    pub fn is_in(&self, text: &[u8]) -> bool {
        let mut state = self.needle.start;
        text.iter().any(|byte| {
            state = self.needle.next(state, *byte);
            self.needle.is_found(state)
        })
    }
}

/// How a value is written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Form {
    Clear,
    Hex,
    Base64,
    Url,
    Json,
}

impl Form {
    /// The form's name for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Clear => "clear",
            Self::Hex => "hex",
            Self::Base64 => "base64",
            Self::Url => "url",
            Self::Json => "json",
        }
    }
}

/// The ways in which a server may repeat a value: as it is, in hexadecimal, in base64 at the three places where it can
/// begin in a longer text and in both alphabets, encoded for URLs and forms, and inside a JSON string. Where two are the
/// same bytes, the plainer name counts.
pub(crate) fn forms(secret: &[u8]) -> BTreeMap<Vec<u8>, Form> {
    let mut forms = BTreeMap::from([
        (HEXLOWER.encode(secret).into_bytes(), Form::Hex),
        (secret.to_vec(), Form::Clear),
    ]);
    let mut add = |bytes: Vec<u8>, form| {
        forms.entry(bytes).or_insert(form);
    };
    for offset in 0..3 {
        let inner = inner_base64(secret, offset);
        let url_safe = BASE64URL_NOPAD.encode(&[&vec![0; offset], secret].concat());
        add(url_safe.as_bytes()[kept(secret.len(), offset)].to_vec(), Form::Base64);
        // The URL-safe alphabet differs in two characters; JSON may write `/` with a backslash before it.
        add(inner.replace('/', "\\/").into_bytes(), Form::Base64);
        add(inject::encode(inner.as_bytes()).into_bytes(), Form::Base64);
        add(inner.into_bytes(), Form::Base64);
    }
    let encoded = inject::encode(secret);
    add(encoded.replace("%20", "+").into_bytes(), Form::Url);
    // What the URL standard leaves alone in a path, and what forms encode beyond RFC 3986.
    add(percent(secret, b"-._~!$&'()*+,;=:@/"), Form::Url);
    add(percent(secret, b"-._~!'()*"), Form::Url);
    add(percent(secret, b"-._*"), Form::Url);
    add(encoded.into_bytes(), Form::Url);
    if let Ok(text) = std::str::from_utf8(secret) {
        for (beyond_ascii, in_html) in [(false, false), (true, false), (false, true), (true, true)] {
            let quoted = escaped(&json(text), beyond_ascii, in_html);
            add(quoted.replace('/', "\\/").into_bytes(), Form::Json);
            add(quoted.into_bytes(), Form::Json);
        }
    }
    forms
}

/// What base64 makes of a secret that begins `offset` bytes (mod 3) into a text, without the characters that also
/// depend on its neighbours.
fn inner_base64(secret: &[u8], offset: usize) -> String {
    BASE64_NOPAD.encode(&[&vec![0; offset], secret].concat())[kept(secret.len(), offset)].to_owned()
}

/// Three bytes make four characters; a character that has bits of a neighbour is left out.
fn kept(length: usize, offset: usize) -> std::ops::Range<usize> {
    (offset * 8).div_ceil(6)..(offset + length) * 8 / 6
}

fn percent(secret: &[u8], plain: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for byte in secret {
        if byte.is_ascii_alphanumeric() || plain.contains(byte) {
            out.push(*byte);
        } else {
            out.extend_from_slice(format!("%{byte:02X}").as_bytes());
        }
    }
    out
}

/// The text inside the quotes of a JSON string (RFC 8259, section 7).
fn json(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out
}

/// The same JSON, with characters outside ASCII, or those that are unsafe in HTML, as escapes: libraries differ.
fn escaped(json: &str, beyond_ascii: bool, in_html: bool) -> String {
    let mut units = [0; 2];
    let mut out = String::new();
    for c in json.chars() {
        if (beyond_ascii && !c.is_ascii()) || (in_html && "<>&'".contains(c)) {
            for unit in c.encode_utf16(&mut units) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use data_encoding::{BASE64, BASE64URL, HEXUPPER};
    use proptest::prelude::*;

    fn scanner(secret: &[u8]) -> Scanner {
        Scanners::default().of(&SecretValue::new(secret.to_vec())).unwrap()
    }

    /// Everything that gets through when `text` comes in chunks of these sizes, and whether it was cut.
    fn through(secret: &[u8], text: &[u8], sizes: &[usize]) -> (Vec<u8>, bool) {
        let mut scanner = scanner(secret);
        let mut passed = Vec::new();
        let mut rest = text;
        for size in sizes.iter().copied().chain(std::iter::repeat(7)) {
            if rest.is_empty() {
                break;
            }
            let (chunk, tail) = rest.split_at(size.clamp(1, rest.len()));
            rest = tail;
            match scanner.take(chunk) {
                Ok(bytes) => passed.extend(bytes),
                Err(Reflected) => return (passed, true),
            }
        }
        passed.extend(scanner.finish());
        (passed, false)
    }

    /// Whether a plain search, which knows one form only, finds it.
    fn plainly(secret: &[u8], text: &[u8]) -> bool {
        text.windows(secret.len()).any(|window| window == secret)
    }

    #[test]
    fn every_form_is_found_at_every_place_and_across_every_border() {
        let secret = "s3cr3t/+\"\\ \u{e4}&=?%end".as_bytes();
        let text = std::str::from_utf8(secret).unwrap();
        let json = format!("{{\"x\":{:?}}}", text).replace("\\u{e4}", "\u{e4}");
        let all: Vec<(&str, Vec<u8>)> = vec![
            ("clear", secret.to_vec()),
            ("hex", HEXLOWER.encode(secret).into_bytes()),
            ("HEX", HEXUPPER.encode(secret).into_bytes()),
            ("base64", BASE64.encode(secret).into_bytes()),
            (
                "base64 of a pair",
                BASE64.encode(&[b"u:", secret, b"\n"].concat()).into_bytes(),
            ),
            (
                "base64 further in",
                BASE64.encode(&[b"x", secret, b"tail"].concat()).into_bytes(),
            ),
            ("base64url", BASE64URL.encode(&[b"ab", secret].concat()).into_bytes()),
            ("url", inject::encode(secret).into_bytes()),
            (
                "url in lower case",
                inject::encode(secret).to_ascii_lowercase().into_bytes(),
            ),
            ("form", inject::encode(secret).replace("%20", "+").into_bytes()),
            ("json", json.into_bytes()),
            ("json in ascii", escaped(&super::json(text), true, false).into_bytes()),
            ("upper case", secret.to_ascii_uppercase()),
        ];
        for (form, bytes) in all {
            let around = [b"before ".as_slice(), &bytes, b" after"].concat();
            for border in 1..around.len() {
                let (passed, cut) = through(secret, &around, &[border, around.len()]);
                assert!(cut, "{form} with a border at {border}");
                assert!(passed.len() <= 7 + bytes.len(), "{form}");
                assert!(!plainly(&bytes, &passed), "{form}");
            }
            // One byte at a time.
            assert!(through(secret, &around, &vec![1; around.len()]).1, "{form}");
        }
    }

    #[test]
    fn nothing_of_a_secret_is_let_out_before_it_is_known_to_be_none() {
        let secret = b"abcdefgh-secret";
        let mut scanner = scanner(secret);
        assert_eq!(scanner.take(b"data: abcdefgh").unwrap(), b"data: ");
        assert_eq!(scanner.take(b"-secre").unwrap(), b"");
        assert_eq!(scanner.take(b"t"), Err(Reflected));
    }

    #[test]
    fn an_event_that_could_not_begin_a_secret_goes_on_at_once() {
        let mut scanner = scanner(b"zzzz-secret-zzzz");
        let event = b"data: {\"delta\":\"hello\"}\n\n";
        assert_eq!(scanner.take(event).unwrap(), event);
        assert_eq!(scanner.take(b"buzz").unwrap(), b"bu");
        assert_eq!(scanner.take(b"er").unwrap(), b"zzer");
        assert_eq!(scanner.finish(), b"");
    }

    #[test]
    fn calls_at_the_same_time_share_what_finds_their_secret_and_it_goes_with_the_last() {
        let scanners = Scanners::default();
        let secret = SecretValue::new(b"one-secret".to_vec());
        let (mut first, second) = (scanners.of(&secret).unwrap(), scanners.of(&secret).unwrap());
        assert!(Arc::ptr_eq(&first.needle, &second.needle));
        // What one has seen is its own.
        assert_eq!(first.take(b"one-sec").unwrap(), b"");
        assert!(!second.is_in(b"ret"));
        let other = scanners.of(&SecretValue::new(b"another-one".to_vec())).unwrap();
        assert!(!Arc::ptr_eq(&first.needle, &other.needle));
        let needle = Arc::downgrade(&first.needle);
        drop((first, second));
        assert!(needle.upgrade().is_none());
    }

    #[test]
    fn a_secret_that_is_too_short_or_too_long_cannot_be_looked_for() {
        for (length, can) in [(7, false), (8, true), (LONGEST, true), (LONGEST + 1, false)] {
            let secret: Vec<u8> = (0..length).map(|n| (n % 251) as u8).collect();
            assert_eq!(
                Scanners::default().of(&SecretValue::new(secret)).is_some(),
                can,
                "{length}"
            );
        }
    }

    proptest! {
        #[test]
        fn what_has_no_form_of_the_secret_passes_unchanged(
            text in proptest::collection::vec(any::<u8>(), 0..400), sizes in proptest::collection::vec(1usize..50, 0..20),
            secret in proptest::collection::vec(any::<u8>(), 12..40),
        ) {
            prop_assert_eq!(through(&secret, &text, &sizes), (text, false));
        }

        #[test]
        fn text_made_of_pieces_of_the_secret_passes_unchanged_or_is_cut_rightly(
            pieces in proptest::collection::vec((0usize..12, 0usize..12), 0..30), sizes in proptest::collection::vec(1usize..9, 0..40),
        ) {
            let secret = b"abababacabad";
            let text: Vec<u8> = pieces.iter().flat_map(|(a, b)| secret[*a.min(b)..*a.max(b)].to_vec()).collect();
            let (passed, cut) = through(secret, &text, &sizes);
            prop_assert_eq!(cut, plainly(secret, &text));
            prop_assert!(!plainly(secret, &passed));
            let right = if cut { text.starts_with(&passed) } else { passed == text };
            prop_assert!(right);
        }

        #[test]
        fn any_secret_is_found_in_each_encoding_wherever_it_stands(
            secret in proptest::collection::vec(any::<u8>(), SHORTEST..60), before in proptest::collection::vec(any::<u8>(), 0..9),
            after in proptest::collection::vec(any::<u8>(), 0..9), sizes in proptest::collection::vec(1usize..30, 0..20),
        ) {
            let whole = [before.as_slice(), &secret, &after].concat();
            for text in [
                whole.clone(), BASE64.encode(&whole).into_bytes(), BASE64URL_NOPAD.encode(&whole).into_bytes(),
                HEXUPPER.encode(&whole).into_bytes(), inject::encode(&whole).into_bytes(),
            ] {
                prop_assert!(through(&secret, &text, &sizes).1);
            }
        }
    }
}
