//! Searches bytes for every secret there is at once, in each form of `scan`, across the borders of chunks. A hit says which
//! secret, in which form and where; never any of the value. It must not know where the bytes come from.

use std::collections::HashMap;
use std::sync::Arc;

use aho_corasick::automaton::OverlappingState;
use aho_corasick::{AhoCorasick, AhoCorasickKind, BuildError, Input, MatchKind, StartKind};
use choir_core::UserId;
use choir_store::KeyIdBytes;
use zeroize::{Zeroize as _, Zeroizing};

use crate::keys::derive;
use crate::scan::{Form, SHORTEST, forms};
use crate::vault::{Vault, VaultError};
use crate::{SecretValue, authority, signer};

/// From here on a secret is looked for by parts of it, so that the automaton stays small. Bytes.
const LONG: usize = 256;
/// How many parts, spread evenly, and how long each is.
const PARTS: usize = 8;
const PART: usize = 32;
/// How many parts in one place are the secret: less may be what many have in common, such as a certificate's frame.
const ENOUGH: u32 = 4;
/// Up to this much to look for, the automaton is a table: twice as fast, and some hundred bytes of memory for each.
const TABLE: usize = 32 << 10;
/// How much is searched at once. Bytes.
const BLOCK: usize = 128 << 10;

/// What kind of secret it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A user's secret.
    User,
    /// One of the box: for a provider, for metrics.
    Platform,
    /// A key that seals, or one derived from such a key.
    Key,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Platform => "platform",
            Self::Key => "key",
        }
    }
}

/// A secret by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sought {
    pub kind: Kind,
    /// The user whose it is; `None` for the box's own.
    pub owner: Option<UserId>,
    pub name: String,
    /// Of a user's secret.
    pub version: Option<u64>,
    /// Whether sandboxes of its owner may have the value itself.
    pub reveal: bool,
}

impl Sought {
    /// One of the box's own.
    pub fn of_the_box(kind: Kind, name: impl Into<String>) -> Self {
        Self {
            kind,
            owner: None,
            name: name.into(),
            version: None,
            reveal: false,
        }
    }
}

/// Why a secret is not looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsought {
    TooShort,
    Damaged,
}

impl Unsought {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TooShort => "it has fewer than 8 bytes, and would be found by chance",
            Self::Damaged => "its sealed value is damaged and cannot be opened",
        }
    }
}

/// A secret was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hit {
    /// Which of [`Search::sought`].
    pub sought: usize,
    pub form: Form,
    /// Where the first part of it begins, in bytes from the start of the place.
    pub offset: u64,
}

/// What is to be looked for.
#[derive(Default)]
pub struct Builder {
    sought: Vec<Sought>,
    unsought: Vec<(Sought, Unsought)>,
    /// In lower case, each wiped when it goes.
    bytes: Vec<Zeroizing<Vec<u8>>>,
    patterns: Vec<Pattern>,
}

#[derive(Debug, Clone, Copy)]
struct Pattern {
    sought: u32,
    form: Form,
    part: u8,
    length: u32,
}

impl Builder {
    /// Adds a secret. One under [`SHORTEST`] bytes cannot be looked for, which the search then says.
    pub fn add(&mut self, sought: Sought, value: &SecretValue) {
        let value = value.expose();
        if value.len() < SHORTEST {
            self.unsought.push((sought, Unsought::TooShort));
            return;
        }
        let index = u32::try_from(self.sought.len()).expect("fewer secrets than a table can have rows");
        let parts: Vec<&[u8]> = if value.len() <= LONG {
            vec![value]
        } else {
            let step = (value.len() - PART) / (PARTS - 1);
            (0..PARTS).map(|n| &value[n * step..n * step + PART]).collect()
        };
        for (part, bytes) in parts.into_iter().enumerate() {
            let mut folded: HashMap<Vec<u8>, Form> = HashMap::new();
            for (mut bytes, form) in forms(bytes) {
                bytes.make_ascii_lowercase();
                let known = folded.entry(bytes).or_insert(form);
                *known = form.min(*known);
            }
            for (bytes, form) in folded {
                self.patterns.push(Pattern {
                    sought: index,
                    form,
                    part: part as u8,
                    length: bytes.len() as u32,
                });
                self.bytes.push(Zeroizing::new(bytes));
            }
        }
        self.sought.push(sought);
    }

    /// Notes a secret that cannot be looked for.
    pub fn leave_out(&mut self, sought: Sought, why: Unsought) {
        self.unsought.push((sought, why));
    }

    /// # Errors
    /// There is more to look for than an automaton can hold.
    pub fn build(self) -> Result<Search, BuildError> {
        let total: usize = self.bytes.iter().map(|bytes| bytes.len()).sum();
        let kind = if total <= TABLE {
            AhoCorasickKind::DFA
        } else {
            AhoCorasickKind::ContiguousNFA
        };
        let automaton = AhoCorasick::builder()
            .kind(Some(kind))
            .match_kind(MatchKind::Standard)
            .start_kind(StartKind::Unanchored)
            .build(self.bytes.iter().map(|bytes| bytes.as_slice()))?;
        let mut parts = vec![0; self.sought.len()];
        for pattern in &self.patterns {
            let most: &mut u32 = &mut parts[pattern.sought as usize];
            *most = (*most).max(u32::from(pattern.part) + 1);
        }
        Ok(Search(Arc::new(Inner {
            automaton,
            longest: self.bytes.iter().map(|bytes| bytes.len()).max().unwrap_or(1),
            needed: parts.into_iter().map(|parts| parts.min(ENOUGH)).collect(),
            patterns: self.patterns,
            sought: self.sought,
            unsought: self.unsought,
        })))
    }
}

/// A search for many secrets; clones share it.
#[derive(Clone)]
pub struct Search(Arc<Inner>);

struct Inner {
    automaton: AhoCorasick,
    /// The longest pattern. Bytes.
    longest: usize,
    patterns: Vec<Pattern>,
    /// How many parts must be in one place, by secret.
    needed: Vec<u32>,
    sought: Vec<Sought>,
    unsought: Vec<(Sought, Unsought)>,
}

impl Search {
    /// The secrets that are looked for.
    pub fn sought(&self) -> &[Sought] {
        &self.0.sought
    }

    /// Those that are not, and why.
    pub fn unsought(&self) -> &[(Sought, Unsought)] {
        &self.0.unsought
    }

    /// How much memory the automaton takes. Bytes.
    pub fn memory(&self) -> usize {
        self.0.automaton.memory_usage()
    }

    /// Something that can be fed one place after the other.
    pub fn reader(&self) -> Reader {
        Reader {
            search: self.clone(),
            window: Zeroizing::new(Vec::with_capacity(BLOCK + self.0.longest)),
            searched: 0,
            offset: 0,
            seen: HashMap::new(),
        }
    }
}

/// Takes the bytes of one place after the other.
pub struct Reader {
    search: Search,
    /// In lower case; the bytes before `searched` are there for what began in them.
    window: Zeroizing<Vec<u8>>,
    searched: usize,
    /// Where the window begins in the place.
    offset: u64,
    /// Which parts of which secret were there, and where the first began.
    seen: HashMap<(u32, Form), (u32, u64)>,
}

impl Reader {
    /// Takes the next bytes of the place.
    pub fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = BLOCK - (self.window.len() - self.searched);
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            let start = self.window.len();
            self.window.extend_from_slice(now);
            self.window[start..].make_ascii_lowercase();
            if self.window.len() - self.searched >= BLOCK {
                self.search_window();
            }
            bytes = later;
        }
    }

    /// Takes zeroes that nobody wrote: a hole in a file.
    pub fn skip(&mut self, zeroes: u64) {
        // No form of a secret goes on over so many, unless it is made of them.
        let written = zeroes.min(2 * self.search.0.longest as u64);
        self.take(&vec![0; usize::try_from(written).unwrap_or_default()]);
        self.search_window();
        self.offset = self.offset.saturating_add(zeroes - written);
    }

    /// The end of the place: what was found in it. What comes next is another place.
    pub fn finish(&mut self) -> Vec<Hit> {
        self.search_window();
        self.window.zeroize();
        (self.searched, self.offset) = (0, 0);
        let needed = &self.search.0.needed;
        let enough = |sought: u32, parts: u32| parts.count_ones() >= needed[sought as usize];
        let mut hits: Vec<Hit> = self
            .seen
            .drain()
            .filter(|((sought, _), (parts, _))| enough(*sought, *parts))
            .map(|((sought, form), (_, offset))| Hit {
                sought: sought as usize,
                form,
                offset,
            })
            .collect();
        hits.sort();
        hits
    }

    /// Searches what was not searched, and keeps what a pattern may have begun in.
    fn search_window(&mut self) {
        let inner = &*self.search.0;
        let mut state = OverlappingState::start();
        loop {
            inner.automaton.find_overlapping(Input::new(&**self.window), &mut state);
            let Some(found) = state.get_match() else { break };
            if found.end() <= self.searched {
                continue;
            }
            let pattern = inner.patterns[found.pattern().as_usize()];
            let end = self.offset.saturating_add(found.end() as u64);
            let begins = end.saturating_sub(u64::from(pattern.length));
            let (parts, first) = self.seen.entry((pattern.sought, pattern.form)).or_insert((0, begins));
            *parts |= 1 << pattern.part;
            *first = begins.min(*first);
        }
        let keep = self.window.len().min(inner.longest - 1);
        let gone = self.window.len() - keep;
        self.offset = self.offset.saturating_add(gone as u64);
        self.window.copy_within(gone.., 0);
        self.window[keep..].zeroize();
        self.window.truncate(keep);
        self.searched = keep;
    }
}

impl Vault {
    /// Adds a user's secrets, each as it is now: of earlier values nothing is kept.
    ///
    /// # Errors
    /// Sealed, or the database failed.
    pub async fn seek_secrets(&self, of: &UserId, into: &mut Builder) -> Result<(), VaultError> {
        for secret in self.list(of).await? {
            let sought = Sought {
                kind: Kind::User,
                owner: Some(of.clone()),
                name: secret.name.to_string(),
                version: Some(secret.version),
                reveal: secret.reveal,
            };
            match self.open(of, &secret.name).await {
                Ok(opened) => into.add(
                    Sought {
                        version: Some(opened.version),
                        reveal: opened.reveal,
                        ..sought
                    },
                    &opened.value,
                ),
                Err(VaultError::NotFound) => {}
                Err(VaultError::Damaged) => into.leave_out(sought, Unsought::Damaged),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Adds the master keys, the box's own key, the keys of users' secrets, and those derived from the box's own: the one
    /// that signs, the one of the authorities, and those under `labels`.
    ///
    /// # Errors
    /// Sealed, or the database failed.
    pub async fn seek_keys(&self, labels: &[&str], into: &mut Builder) -> Result<(), VaultError> {
        let key = |name: String| Sought::of_the_box(Kind::Key, name);
        let value = |bytes: &[u8]| SecretValue::new(bytes.to_vec());
        let hex = |id: KeyIdBytes| data_encoding::HEXLOWER.encode(&id);
        let own = self.own_key().await?;
        for master in self.ring()?.all() {
            into.add(key(format!("master key {}", hex(master.id()))), &value(master.bytes()));
        }
        into.add(key("the box's own key".to_owned()), &value(own.bytes()));
        for label in labels.iter().chain([&signer::LABEL, &authority::LABEL]) {
            let derived = Zeroizing::new(derive::<32>(&own, label));
            into.add(key((*label).to_owned()), &value(&*derived));
        }
        // No master key has a name of zeroes, so these are all.
        for row in self
            .store()
            .data_keys_not_under(KeyIdBytes::default(), u32::MAX)
            .await?
        {
            let sought = Sought {
                owner: Some(row.user.clone()),
                ..key(format!("data key {}", hex(row.id)))
            };
            match self.data_key(&row) {
                Ok(opened) => into.add(sought, &value(opened.bytes())),
                Err(VaultError::Damaged) => into.leave_out(sought, Unsought::Damaged),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
