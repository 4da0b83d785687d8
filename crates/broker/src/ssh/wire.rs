//! Messages of the SSH agent protocol (RFC 9987) without their length, and OpenSSH's extension `session-bind` (its file
//! `PROTOCOL.agent`). What comes in is hostile. It must not judge any of it.

use ssh_key::encoding::{Decode as _, Encode as _, Reader as _};

/// The longest message that is read. Data to be signed is short: data itself is hashed before it is signed.
pub const LONGEST: usize = 64 << 10;

/// `SSH_AGENT_FAILURE` and `SSH_AGENT_SUCCESS`, whole.
pub const FAILURE: [u8; 1] = [5];
pub const SUCCESS: [u8; 1] = [6];

const REQUEST_IDENTITIES: u8 = 11;
const IDENTITIES_ANSWER: u8 = 12;
const SIGN_REQUEST: u8 = 13;
const SIGN_RESPONSE: u8 = 14;
const EXTENSION: u8 = 27;
const SESSION_BIND: &[u8] = b"session-bind@openssh.com";

/// What a client may ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    Identities,
    Sign(Sign),
    Bind(Bind),
    /// Anything else, and what cannot be read: refused.
    Other,
}

/// A wish for a signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sign {
    pub key: Vec<u8>,
    pub data: Vec<u8>,
    pub flags: u32,
}

/// What binds the connection to an SSH session: the host's signature over the session's id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    pub host_key: Vec<u8>,
    pub session: Vec<u8>,
    pub signature: Vec<u8>,
    /// Whether the connection is to be handed on to that host.
    pub forwarding: bool,
}

/// Reads one message.
pub fn read(message: &[u8]) -> Asked {
    parse(message).unwrap_or(Asked::Other)
}

fn parse(message: &[u8]) -> Option<Asked> {
    let (kind, mut rest) = message.split_first()?;
    match *kind {
        REQUEST_IDENTITIES if rest.is_empty() => Some(Asked::Identities),
        SIGN_REQUEST => {
            let sign = Sign {
                key: string(&mut rest)?,
                data: string(&mut rest)?,
                flags: u32::decode(&mut rest).ok()?,
            };
            rest.is_empty().then_some(Asked::Sign(sign))
        }
        EXTENSION if string(&mut rest)? == SESSION_BIND => {
            let bind = Bind {
                host_key: string(&mut rest)?,
                session: string(&mut rest)?,
                signature: string(&mut rest)?,
                forwarding: bool::decode(&mut rest).ok()?,
            };
            rest.is_empty().then_some(Asked::Bind(bind))
        }
        _ => None,
    }
}

/// A string of the protocol: a length and so many bytes.
pub(super) fn string(from: &mut &[u8]) -> Option<Vec<u8>> {
    // Never longer than what is there: the length is compared before anything is set aside.
    from.read_prefixed(|inner| {
        let bytes = inner.to_vec();
        *inner = &[];
        Ok::<_, ssh_key::encoding::Error>(bytes)
    })
    .ok()
}

/// The answer that lists public keys, each with the name it goes by.
pub fn identities(keys: &[(Vec<u8>, String)]) -> Vec<u8> {
    let mut answer = vec![IDENTITIES_ANSWER];
    let encoded = (|| {
        keys.len().encode(&mut answer)?;
        for (key, name) in keys {
            key.encode(&mut answer)?;
            name.encode(&mut answer)?;
        }
        Ok::<_, ssh_key::encoding::Error>(())
    })();
    encoded.map_or_else(|_| FAILURE.to_vec(), |()| answer)
}

/// The answer with a signature.
pub fn signed(signature: &[u8]) -> Vec<u8> {
    let mut answer = vec![SIGN_RESPONSE];
    match signature.encode(&mut answer) {
        Ok(()) => answer,
        Err(_) => FAILURE.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(kind: u8, parts: &[&[u8]], tail: &[u8]) -> Vec<u8> {
        let mut message = vec![kind];
        for part in parts {
            part.encode(&mut message).unwrap();
        }
        message.extend_from_slice(tail);
        message
    }

    #[test]
    fn what_an_agent_is_asked_is_read() {
        assert_eq!(read(&[REQUEST_IDENTITIES]), Asked::Identities);
        let sign = message(SIGN_REQUEST, &[b"key", b"data"], &[0, 0, 0, 4]);
        let expected = Sign {
            key: b"key".to_vec(),
            data: b"data".to_vec(),
            flags: 4,
        };
        assert_eq!(read(&sign), Asked::Sign(expected));
        let bind = message(EXTENSION, &[SESSION_BIND, b"key", b"id", b"sig"], &[1]);
        let expected = Bind {
            host_key: b"key".to_vec(),
            session: b"id".to_vec(),
            signature: b"sig".to_vec(),
            forwarding: true,
        };
        assert_eq!(read(&bind), Asked::Bind(expected));
    }

    #[test]
    fn what_changes_an_agent_or_is_not_whole_is_none_of_it() {
        // Add, remove, remove all, smartcards, lock, unlock, constrained forms, and the first protocol's.
        for kind in (0..=10).chain(14..=26).chain(28..=255) {
            assert_eq!(
                read(&message(kind, &[b"key", b"data"], &[0; 4])),
                Asked::Other,
                "{kind}"
            );
        }
        let sign = message(SIGN_REQUEST, &[b"key", b"data"], &[0, 0, 0, 4]);
        for length in 0..sign.len() {
            assert_eq!(read(&sign[..length]), Asked::Other);
        }
        let longer = [&sign[..], b"x"].concat();
        assert_eq!(read(&longer), Asked::Other);
        let huge = [&[SIGN_REQUEST, 0xff, 0xff, 0xff, 0xff][..], &[0; 8]].concat();
        assert_eq!(read(&huge), Asked::Other);
        let other = message(EXTENSION, &[b"query"], &[]);
        assert_eq!(read(&other), Asked::Other);
    }

    proptest! {
        #[test]
        fn no_message_makes_reading_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0_u8..30) {
            let _ = read(&bytes);
            let _ = read(&[&[kind][..], &bytes].concat());
            let _ = read(&message(EXTENSION, &[SESSION_BIND], &bytes));
        }
    }
}
