//! One certificate authority a generation, by which the gateway may answer its programs in a granted host's name. Both
//! keys of one are derived from the box's own, so nothing is stored and nothing of them leaves this crate but in a TLS
//! handshake. It must not know which hosts are granted.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use choir_core::HostName;
use jiff::{SignedDuration, Timestamp, tz::TimeZone};
use p256::pkcs8::EncodePrivateKey as _;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SerialNumber,
};
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::SecretValue;
use crate::keys::{Key, derive_from};
use crate::prove::{Builder, Kind, Sought};

/// How long a leaf is good for, and when it is made anew.
const LEAF_LIFE: SignedDuration = SignedDuration::from_hours(30 * 24);
const LEAF_RENEWED: SignedDuration = SignedDuration::from_hours(20 * 24);
/// Leaves kept of one authority; grants of one slot name fewer hosts.
const MOST_LEAVES: usize = 256;

const ISSUER: &str = "issuer";
const LEAF: &str = "leaf";
const ROLES: [&str; 2] = [ISSUER, LEAF];

/// What all of them are derived under.
pub(crate) const LABEL: &str = "choir egress authorities";

/// What the authorities of all generations come from.
pub struct Authorities(Zeroizing<[u8; 32]>);

impl Authorities {
    pub fn new(own: &Key) -> Self {
        Self(Zeroizing::new(crate::derive(own, LABEL)))
    }

    /// The authority of one generation, by the name that no other generation ever has; the same at each call.
    ///
    /// # Errors
    /// Never for keys that derivation gives.
    pub fn of(&self, generation: &str) -> Result<Authority, AuthorityError> {
        let mut params = CertificateParams::default();
        let mut name = DistinguishedName::new();
        name.push(DnType::CommonName, format!("ChoirOS egress of {generation}"));
        params.distinguished_name = name;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        // It is believed in one generation only, and is gone with it.
        params.not_before = rcgen::date_time_ymd(2025, 1, 1);
        params.not_after = rcgen::date_time_ymd(2049, 12, 31);
        let key = self.key(generation, ISSUER)?;
        params.serial_number = Some(serial(generation));
        let certificate = params.self_signed(&key)?;
        Ok(Authority {
            pem: certificate.pem(),
            issuer: Issuer::new(params, key),
            leaf: self.key(generation, LEAF)?,
            leaves: Mutex::default(),
        })
    }

    /// Has both private keys of a generation looked for.
    pub fn seek(&self, generation: &str, into: &mut Builder) {
        for role in ROLES {
            let sought = Sought::of_the_box(Kind::Key, format!("egress {role} key of {generation}"));
            into.add(sought, &SecretValue::new(self.scalar(generation, role).to_vec()));
        }
    }

    fn scalar(&self, generation: &str, role: &str) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(derive_from(&self.0, &format!("{role} {generation}")))
    }

    fn key(&self, generation: &str, role: &str) -> Result<KeyPair, AuthorityError> {
        let scalar = self.scalar(generation, role);
        let secret = p256::SecretKey::from_slice(&*scalar).map_err(|_| AuthorityError::Key)?;
        let der = secret.to_pkcs8_der().map_err(|_| AuthorityError::Key)?;
        let wrapped = PrivatePkcs8KeyDer::from(der.as_bytes());
        Ok(KeyPair::from_pkcs8_der_and_sign_algo(
            &wrapped,
            &PKCS_ECDSA_P256_SHA256,
        )?)
    }
}

/// Why there is no authority, or no leaf of one.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("a derived number is no key")]
    Key,
    #[error("a certificate cannot be made: {0}")]
    Certificate(#[from] rcgen::Error),
    #[error("a certificate cannot be shown: {0}")]
    Tls(#[from] rustls::Error),
}

/// One generation's authority.
pub struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
    leaf: KeyPair,
    leaves: Mutex<HashMap<HostName, (Timestamp, Arc<ServerConfig>)>>,
}

impl Authority {
    /// The certificate that programs must believe, in PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// How to speak TLS in this host's name: HTTP/1.1 only.
    ///
    /// # Errors
    /// The name fits into no certificate.
    pub fn leaf(&self, host: &HostName, now: Timestamp) -> Result<Arc<ServerConfig>, AuthorityError> {
        let mut leaves = self.leaves.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((made, config)) = leaves.get(host)
            && (*made..*made + LEAF_RENEWED).contains(&now)
        {
            return Ok(config.clone());
        }
        let config = Arc::new(self.make(host, now)?);
        if leaves.len() >= MOST_LEAVES {
            leaves.clear();
        }
        leaves.insert(host.clone(), (now, config.clone()));
        Ok(config)
    }

    fn make(&self, host: &HostName, now: Timestamp) -> Result<ServerConfig, AuthorityError> {
        let mut params = CertificateParams::new(vec![host.to_string()])?;
        let mut name = DistinguishedName::new();
        name.push(DnType::CommonName, host.as_str().chars().take(64).collect::<String>());
        params.distinguished_name = name;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let day = |at: Timestamp| {
            let date = TimeZone::UTC.to_datetime(at).date();
            let (month, day) = (date.month().unsigned_abs(), date.day().unsigned_abs());
            rcgen::date_time_ymd(i32::from(date.year()), month, day)
        };
        params.not_before = day(now - SignedDuration::from_hours(24));
        params.not_after = day(now + LEAF_LIFE);
        params.serial_number = Some(serial(&format!("{host} {now}")));
        let certificate = params.signed_by(&self.leaf, &self.issuer)?;
        let key = PrivateKeyDer::Pkcs8(self.leaf.serialize_der().into());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }
}

/// The same text always has the same number, and no two texts share one.
fn serial(of: &str) -> SerialNumber {
    let digest = Sha256::digest(of.as_bytes());
    let mut bytes = digest[..16].to_vec();
    // Positive, and not zero (RFC 5280, section 4.1.2.2).
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, ServerName};
    use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConnection};

    use super::*;

    fn authority(generation: &str) -> Authority {
        let own = Key::named(Default::default(), |bytes| bytes.fill(42));
        Authorities::new(&own).of(generation).unwrap()
    }

    #[test]
    fn the_private_keys_of_a_generation_are_looked_for_and_no_others() {
        let own = Key::named(Default::default(), |bytes| bytes.fill(42));
        let mut builder = Builder::default();
        Authorities::new(&own).seek("a/1", &mut builder);
        let search = builder.build().unwrap();
        let found = |generation: &str| {
            let mut reader = search.reader();
            reader.take(&authority(generation).leaf.serialize_der());
            reader.finish().len()
        };
        assert_eq!((found("a/1"), found("a/2")), (1, 0));
    }

    fn host(name: &str) -> HostName {
        name.parse().unwrap()
    }

    /// Whether a client that believes one authority takes what is shown for the host it asked.
    fn believes(believed: &Authority, shown: Arc<ServerConfig>, asked: &str) -> bool {
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(believed.pem().as_bytes()).unwrap())
            .unwrap();
        let client = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from(asked.to_owned()).unwrap();
        let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
        let mut server = ServerConnection::new(shown).unwrap();
        let (mut near, mut far) = UnixStream::pair().unwrap();
        // What the server says after the handshake may find nobody.
        let serving = std::thread::spawn(move || drop(server.complete_io(&mut far)));
        let shaken = client.complete_io(&mut near).is_ok();
        drop(near);
        serving.join().unwrap();
        shaken
    }

    /// The clients of these tests go by the real clock.
    #[expect(clippy::disallowed_methods, reason = "certificates are checked against today")]
    fn now() -> Timestamp {
        Timestamp::now()
    }

    #[test]
    fn a_program_believes_the_leaves_of_its_own_generation_for_their_one_host() {
        let (one, two) = (authority("sb1-1"), authority("sb1-2"));
        let leaf = one.leaf(&host("api.a.example"), now()).unwrap();
        assert!(believes(&one, leaf.clone(), "api.a.example"));
        assert!(!believes(&one, leaf.clone(), "api.b.example"));
        assert!(!believes(&two, leaf, "api.a.example"));
    }

    #[test]
    fn after_a_restart_the_authority_is_the_one_that_programs_believe() {
        let (before, after) = (authority("sb1-1"), authority("sb1-1"));
        let leaf = after.leaf(&host("api.a.example"), now()).unwrap();
        assert!(believes(&before, leaf, "api.a.example"));
    }

    #[test]
    fn a_leaf_is_kept_until_it_is_two_thirds_through_its_life() {
        let authority = authority("sb1-1");
        let at = |hours| {
            authority
                .leaf(&host("a.example"), now() + SignedDuration::from_hours(hours))
                .unwrap()
        };
        let first = at(0);
        assert!(Arc::ptr_eq(&first, &at(19 * 24)));
        assert!(!Arc::ptr_eq(&first, &at(21 * 24)));
    }
}
