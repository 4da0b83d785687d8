//! Finds a few values in JSON that comes in pieces, without keeping the rest. It must not judge what they mean.
//!
//! Own code, because parsers that take pieces keep every string whole, and an answer's strings are as long as its writer
//! wants; this keeps a few kilobytes at most. What is not JSON finds nothing.

/// Where the values are: keys from the top, `.` between two of them.
const WANTED: [(&str, Option<&str>); 4] = [
    ("usage", None),
    ("response", Some("usage")),
    ("message", Some("usage")),
    ("choices", None),
];

/// Nesting beyond this is nobody's answer.
const DEEPEST: usize = 128;
/// Longer than each key above, in bytes.
const LONGEST_KEY: usize = 16;
/// A longer value is none that is looked for, in bytes.
const LONGEST_VALUE: usize = 4096;

/// One JSON text on its way.
#[derive(Default)]
pub(super) struct Finder {
    /// What is open, outermost first: whether it is an object.
    open: Vec<bool>,
    /// The last key of the two outermost objects.
    keys: [Vec<u8>; 2],
    state: State,
    /// Whether a string that begins now is a key.
    key_next: bool,
    taking: Option<Taking>,
    found: Found,
    begun: bool,
}

#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    Between,
    Text {
        key: bool,
        escaped: bool,
    },
    /// A number or a word.
    Word,
    /// Not JSON.
    Lost,
}

/// A wanted value that has begun.
struct Taking {
    /// What was open when it began.
    depth: usize,
    which: usize,
    /// `None` once it is too long.
    bytes: Option<Vec<u8>>,
}

/// The values, as they were written.
#[derive(Default, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// From whichever place.
    pub usage: Option<Vec<u8>>,
    pub choices: Option<Vec<u8>>,
}

impl Finder {
    pub(super) fn take(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.next(*byte);
        }
    }

    /// Whether anything came.
    pub(super) fn has_begun(&self) -> bool {
        self.begun
    }

    /// What was found; the next text may begin.
    pub(super) fn end(&mut self) -> Found {
        // A number at the very end is complete only now.
        if self.state == State::Word {
            self.value_ended();
        }
        std::mem::take(self).found
    }

    fn next(&mut self, byte: u8) {
        match self.state {
            State::Lost => {}
            State::Text { key, escaped } => self.text(byte, key, escaped),
            State::Word if !b" \t\r\n,]}".contains(&byte) => self.keep(byte),
            State::Word => {
                self.state = State::Between;
                self.value_ended();
                self.between(byte);
            }
            State::Between => self.between(byte),
        }
    }

    fn between(&mut self, byte: u8) {
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' => return,
            b'"' if self.key_next => {
                self.key_next = false;
                if let Some(key) = self.keys.get_mut(self.open.len() - 1) {
                    key.clear();
                }
                self.state = State::Text {
                    key: true,
                    escaped: false,
                };
                self.keep(byte);
            }
            b'"' => {
                self.value_begins();
                self.state = State::Text {
                    key: false,
                    escaped: false,
                };
                self.keep(byte);
            }
            b'{' | b'[' => {
                self.value_begins();
                self.keep(byte);
                if let Some(key) = self.keys.get_mut(self.open.len()) {
                    key.clear();
                }
                self.open.push(byte == b'{');
                self.key_next = byte == b'{';
                if self.open.len() > DEEPEST {
                    self.state = State::Lost;
                }
            }
            b'}' | b']' => {
                if self.open.pop() != Some(byte == b'}') {
                    self.state = State::Lost;
                    return;
                }
                self.key_next = false;
                self.keep(byte);
                self.value_ended();
            }
            b',' => {
                self.keep(byte);
                self.key_next = self.open.last() == Some(&true);
            }
            b':' => self.keep(byte),
            _ => {
                self.value_begins();
                self.state = State::Word;
                self.keep(byte);
            }
        }
        self.begun = true;
    }

    fn text(&mut self, byte: u8, key: bool, escaped: bool) {
        self.keep(byte);
        if byte == b'"' && !escaped {
            self.state = State::Between;
            if !key {
                self.value_ended();
            }
            return;
        }
        self.state = State::Text {
            key,
            escaped: byte == b'\\' && !escaped,
        };
        if let Some(name) = self.keys.get_mut(self.open.len().wrapping_sub(1)).filter(|_| key)
            && name.len() < LONGEST_KEY
        {
            name.push(byte);
        }
    }

    fn keep(&mut self, byte: u8) {
        if let Some(taking) = &mut self.taking
            && let Some(bytes) = &mut taking.bytes
        {
            bytes.push(byte);
            if bytes.len() > LONGEST_VALUE {
                taking.bytes = None;
            }
        }
    }

    fn value_begins(&mut self) {
        let depth = self.open.len();
        if self.taking.is_some() || !self.open.iter().all(|object| *object) {
            return;
        }
        let is = |key: &[u8], wanted: &str| key == wanted.as_bytes();
        let here = |(outer, inner): &(&str, Option<&str>)| match inner {
            None => depth == 1 && is(&self.keys[0], outer),
            Some(inner) => depth == 2 && is(&self.keys[0], outer) && is(&self.keys[1], inner),
        };
        self.taking = WANTED.iter().position(here).map(|which| Taking {
            depth,
            which,
            bytes: Some(Vec::new()),
        });
    }

    fn value_ended(&mut self) {
        let depth = self.open.len();
        let Some(taken) = self.taking.take_if(|taking| taking.depth == depth) else {
            return;
        };
        match WANTED[taken.which].0 {
            "choices" => self.found.choices = taken.bytes,
            _ => self.found.usage = taken.bytes.or(self.found.usage.take()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    /// What is found when the text comes in two pieces, parted here.
    fn parted(text: &[u8], border: usize) -> Found {
        let mut finder = Finder::default();
        finder.take(&text[..border]);
        finder.take(&text[border..]);
        finder.end()
    }

    fn value(bytes: &Option<Vec<u8>>) -> Option<Value> {
        bytes.as_ref().map(|bytes| serde_json::from_slice(bytes).unwrap())
    }

    #[test]
    fn a_value_is_found_wherever_the_pieces_part_and_only_at_its_place() {
        let usage = json!({"total": 3, "of": ["}", "\"", {"x": "\\"}]});
        let decoy = json!({"usage": {"no": 1}, "text": "\"usage\":{\"no\":2}"});
        for (text, wanted) in [
            (json!({"id": "a", "usage": usage, "z": decoy}), Some(&usage)),
            (json!({"choices": [decoy, decoy], "usage": usage}), Some(&usage)),
            (
                json!({"type": "x", "response": {"a": decoy, "usage": usage}}),
                Some(&usage),
            ),
            (json!({"message": {"content": [decoy], "usage": usage}}), Some(&usage)),
            (json!({"a": decoy, "choices": [decoy]}), None),
            (json!([{"usage": usage}]), None),
            (json!({"other": {"usage": usage}}), None),
        ] {
            for text in [text.to_string(), serde_json::to_string_pretty(&text).unwrap()] {
                for border in 0..=text.len() {
                    let found = parted(text.as_bytes(), border);
                    assert_eq!(value(&found.usage).as_ref(), wanted, "{text} parted at {border}");
                }
            }
        }
    }

    #[test]
    fn an_endless_value_or_nesting_keeps_nothing() {
        let mut finder = Finder::default();
        finder.take(b"{\"usage\":\"");
        finder.take(&vec![b'a'; 1 << 20]);
        finder.take(b"\",\"choices\":[]}");
        assert_eq!(
            (finder.found.usage.as_ref(), finder.found.choices.as_deref()),
            (None, Some(&b"[]"[..]))
        );
        let mut finder = Finder::default();
        finder.take(&vec![b'['; 1 << 20]);
        assert!(finder.open.len() <= DEEPEST + 1);
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let key = prop_oneof![
            4 => Just("usage".to_owned()), 2 => Just("choices".to_owned()), 2 => Just("response".to_owned()),
            2 => Just("message".to_owned()), 2 => "\\PC{0,6}",
        ];
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "\\PC{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(5, 40, 5, move |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::vec((key.clone(), inner), 0..5)
                    .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1500))]

        #[test]
        fn it_finds_what_a_whole_parser_finds(value in any_json(), pretty in any::<bool>(), at in any::<prop::sample::Index>()) {
            let text = if pretty { serde_json::to_string_pretty(&value).unwrap() } else { value.to_string() };
            // Read back, because a number may not be read as it was written.
            let value: Value = serde_json::from_str(&text).unwrap();
            let found = parted(text.as_bytes(), at.index(text.len() + 1));
            let places = ["/usage", "/response/usage", "/message/usage"];
            let there: Vec<&Value> = places.iter().filter_map(|place| value.pointer(place)).filter(|_| value.is_object()).collect();
            // Of several the last one written counts; which that is depends on the order of keys.
            let usage = found.usage.map(|bytes| serde_json::from_slice::<Value>(&bytes).unwrap());
            match &usage {
                Some(usage) => prop_assert!(there.contains(&usage), "{text}"),
                None => prop_assert!(there.is_empty(), "{text}"),
            }
            let choices = found.choices.map(|bytes| serde_json::from_slice::<Value>(&bytes).unwrap());
            prop_assert_eq!(choices.as_ref(), value.pointer("/choices").filter(|_| value.is_object()));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(prop_oneof![
            prop::sample::select(b"{}[]\",:\\ \nusage01".to_vec()), any::<u8>()], 0..200)) {
            let mut finder = Finder::default();
            finder.take(&bytes);
            finder.end();
        }
    }
}
