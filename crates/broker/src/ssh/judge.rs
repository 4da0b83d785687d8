//! What a granted key may sign. Signing in: only for a session that the connection was bound to by a host of the grant,
//! and only as the grant's users. Signatures over data: only in the grant's namespaces. Everything else is refused, so
//! that no other protocol's message is ever signed. Pure; it must not see a private key.

use choir_core::SshUse;
use signature::Verifier as _;
use ssh_key::encoding::Decode as _;
use ssh_key::public::KeyData;
use ssh_key::{HashAlg, PublicKey, Signature};

use super::wire::{Bind, Sign, string};
use super::{fingerprint, host_key, is_name, key};

/// Sessions that one connection may be bound to; a client uses one.
const MOST_SESSIONS: usize = 16;
/// Bytes of a session's id; it is a hash.
const LONGEST_SESSION: usize = 128;

/// One connection to the agent.
#[derive(Debug, Default)]
pub struct Session {
    bound: Vec<Bound>,
    /// Something was wrong with it once. From then on nothing is listed and nothing signed: what comes now may be a
    /// stranger's, to whom a host handed it on.
    spoilt: bool,
}

#[derive(Debug)]
struct Bound {
    id: Vec<u8>,
    host: KeyData,
}

/// What may be signed, and in whose name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signing {
    data: Vec<u8>,
    hash: Option<HashAlg>,
    what: String,
}

impl Signing {
    pub(super) fn data(&self) -> &[u8] {
        &self.data
    }

    pub(super) fn hash(&self) -> Option<HashAlg> {
        self.hash
    }

    /// For the audit trail: `sign-in git SHA256:…` with the host's fingerprint, or `signature git`.
    pub fn what(&self) -> &str {
        &self.what
    }
}

/// Why it is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    #[error("no grant has a host with the key {}", .host.as_deref().unwrap_or("of this kind"))]
    Host { host: Option<String> },
    #[error("the host did not sign this session's id")]
    Proof,
    #[error("agents are not forwarded")]
    Forwarded,
    #[error("a connection that was refused once is refused for good")]
    Spoilt,
    #[error("the client did not say which session it signs in to; OpenSSH does from version 8.9 on")]
    Unbound,
    #[error("the grant does not have the host of this session")]
    OtherHost,
    #[error("the grant is not for the user {user}")]
    User { user: String },
    #[error("the grant is not for signatures in {namespace}")]
    Namespace { namespace: String },
    #[error("this is neither a sign-in over SSH with the key that was asked for, nor an SSH signature")]
    Form,
    #[error("signatures with SHA-1 are not made")]
    Sha1,
}

impl Denial {
    /// As the audit trail has it.
    pub fn outcome(&self) -> &'static str {
        match self {
            Self::Host { .. } | Self::OtherHost => "host_keys",
            Self::Proof => "unproven",
            Self::Forwarded => "forwarded",
            Self::Spoilt => "spoilt",
            Self::Unbound => "unbound",
            Self::User { .. } => "users",
            Self::Namespace { .. } => "namespaces",
            Self::Form => "form",
            Self::Sha1 => "sha1",
        }
    }

    /// What a wider grant would allow, in words that say what was wanted; `None` where no grant would.
    pub fn wanted(&self) -> Option<String> {
        match self {
            Self::Host { host: Some(host) } => Some(format!("sign in at the host with the key {host}")),
            Self::User { user } if is_name(user) => Some(format!("sign in as {user}")),
            Self::Namespace { namespace } if is_name(namespace) => Some(format!("sign for {namespace}")),
            _ => None,
        }
    }
}

impl Session {
    /// Binds the connection to a session with a host of one of these grants.
    ///
    /// # Errors
    /// It is not, and the connection is of no more use.
    pub fn bind<'g>(&mut self, bind: &Bind, granted: impl Iterator<Item = &'g SshUse>) -> Result<(), Denial> {
        let bound = self.bound_by(bind, granted);
        match bound {
            Ok(bound) => {
                self.bound.push(bound);
                Ok(())
            }
            Err(denial) => {
                self.spoilt = true;
                Err(denial)
            }
        }
    }

    fn bound_by<'g>(&self, bind: &Bind, mut granted: impl Iterator<Item = &'g SshUse>) -> Result<Bound, Denial> {
        if self.spoilt {
            return Err(Denial::Spoilt);
        }
        if bind.forwarding {
            return Err(Denial::Forwarded);
        }
        let host = PublicKey::from_bytes(&bind.host_key).map_err(|_| Denial::Host { host: None })?;
        let host = host.key_data();
        if !granted.any(|granted| has_host(granted, host)) {
            return Err(Denial::Host {
                host: fingerprint(&bind.host_key),
            });
        }
        let mut rest = bind.signature.as_slice();
        let signature = Signature::decode(&mut rest).map_err(|_| Denial::Proof)?;
        let proven = rest.is_empty() && host.verify(&bind.session, &signature).is_ok();
        let fits = (1..=LONGEST_SESSION).contains(&bind.session.len()) && self.bound.len() < MOST_SESSIONS;
        // One id stands for one session with one host.
        let fresh = self.bound.iter().all(|bound| bound.id != bind.session);
        if proven && fits && fresh {
            Ok(Bound {
                id: bind.session.clone(),
                host: host.clone(),
            })
        } else {
            Err(Denial::Proof)
        }
    }

    /// Whether a key is offered on this connection: on one that is bound, only where it could be used.
    pub fn offers(&self, granted: &SshUse) -> bool {
        !self.spoilt && (self.bound.is_empty() || self.bound.iter().any(|bound| has_host(granted, &bound.host)))
    }

    /// Whether this may be signed with the key of this grant, which is the one that was asked for.
    pub fn judge(&self, sign: &Sign, granted: &SshUse) -> Result<Signing, Denial> {
        if self.spoilt {
            return Err(Denial::Spoilt);
        }
        let own = PublicKey::from_bytes(&sign.key).map_err(|_| Denial::Form)?;
        let (scheme, hash) = key::scheme(&own.algorithm(), sign.flags).ok_or(Denial::Sha1)?;
        let what = if let Some(namespace) = namespace(&sign.data) {
            if !granted.namespaces.contains(&namespace) {
                return Err(Denial::Namespace { namespace });
            }
            format!("signature {namespace}")
        } else {
            let sign_in = SignIn::read(&sign.data).ok_or(Denial::Form)?;
            if sign_in.key != sign.key || sign_in.scheme != scheme.as_bytes() {
                return Err(Denial::Form);
            }
            let bound = self.bound.iter().find(|bound| bound.id == sign_in.session);
            let bound = bound.ok_or(Denial::Unbound)?;
            if !has_host(granted, &bound.host) {
                return Err(Denial::OtherHost);
            }
            let named = sign_in.host.as_deref().map(PublicKey::from_bytes);
            if named.is_some_and(|named| !named.is_ok_and(|key| *key.key_data() == bound.host)) {
                return Err(Denial::OtherHost);
            }
            let user = String::from_utf8_lossy(&sign_in.user).into_owned();
            if !granted.users.contains(&user) {
                return Err(Denial::User { user });
            }
            format!("sign-in {user} {}", bound.host.fingerprint(HashAlg::Sha256))
        };
        Ok(Signing {
            data: sign.data.clone(),
            hash,
            what,
        })
    }
}

fn has_host(granted: &SshUse, host: &KeyData) -> bool {
    let mut keys = granted.host_keys.iter().filter_map(|text| host_key(text));
    keys.any(|key| key.key_data() == host)
}

/// `SSH_MSG_USERAUTH_REQUEST` with a public key, as it is signed (RFC 4252, section 7), and OpenSSH's form of it that
/// names the host's key, too.
struct SignIn {
    session: Vec<u8>,
    user: Vec<u8>,
    scheme: Vec<u8>,
    key: Vec<u8>,
    host: Option<Vec<u8>>,
}

impl SignIn {
    fn read(data: &[u8]) -> Option<Self> {
        const USERAUTH_REQUEST: u8 = 50;
        let mut rest = data;
        let session = string(&mut rest)?;
        let message = u8::decode(&mut rest).ok()?;
        let (user, service, method) = (string(&mut rest)?, string(&mut rest)?, string(&mut rest)?);
        let signed = u8::decode(&mut rest).ok()?;
        let (scheme, key) = (string(&mut rest)?, string(&mut rest)?);
        let host = match method.as_slice() {
            b"publickey" => None,
            b"publickey-hostbound-v00@openssh.com" => Some(string(&mut rest)?),
            _ => return None,
        };
        let whole = rest.is_empty() && message == USERAUTH_REQUEST && signed == 1 && service == b"ssh-connection";
        whole.then_some(Self {
            session,
            user,
            scheme,
            key,
            host,
        })
    }
}

/// The namespace of an SSH signature (OpenSSH's `PROTOCOL.sshsig`), if this is what one is made over. No session's id is
/// as long as these letters would say, so it is never a sign-in as well.
fn namespace(data: &[u8]) -> Option<String> {
    let mut rest = data.strip_prefix(b"SSHSIG")?;
    let namespace = string(&mut rest)?;
    let (reserved, hash, digest) = (string(&mut rest)?, string(&mut rest)?, string(&mut rest)?);
    let length = match hash.as_slice() {
        b"sha256" => 32,
        b"sha512" => 64,
        _ => return None,
    };
    let whole = rest.is_empty() && reserved.is_empty() && digest.len() == length;
    whole.then(|| String::from_utf8_lossy(&namespace).into_owned())
}
