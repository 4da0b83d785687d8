//! Keys from `ssh-keygen`, and messages as a client of an agent writes them.

use std::path::PathBuf;
use std::process::Command;

use choir_broker::SecretValue;
use choir_broker::ssh::{self, Asked, Bind, Sign};
use choir_core::SshUse;
use signature::Signer as _;
use ssh_key::encoding::Encode as _;
use ssh_key::{PrivateKey, PublicKey};

/// A pair of files that `ssh-keygen` made, and a directory for more.
pub struct Key {
    pub directory: tempfile::TempDir,
    private: Vec<u8>,
    pub public: PublicKey,
}

impl Key {
    /// `kind` is what follows `-t`.
    pub fn new(kind: &[&str]) -> Self {
        Self::with_passphrase(kind, "")
    }

    pub fn with_passphrase(kind: &[&str], passphrase: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("key");
        let mut keygen = Command::new("ssh-keygen");
        keygen
            .args(["-q", "-N", passphrase, "-C", "a comment", "-t"])
            .args(kind);
        assert!(keygen.arg("-f").arg(&file).status().unwrap().success());
        let public = std::fs::read_to_string(file.with_extension("pub")).unwrap();
        Self {
            private: std::fs::read(&file).unwrap(),
            public: PublicKey::from_openssh(&public).unwrap(),
            directory,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn secret(&self) -> SecretValue {
        SecretValue::new(self.private.clone())
    }

    /// `ssh-ed25519 AAAA…`, without a comment.
    pub fn line(&self) -> String {
        let bare = PublicKey::from(self.public.key_data().clone());
        bare.to_openssh().unwrap()
    }

    pub fn blob(&self) -> Vec<u8> {
        self.public.to_bytes().unwrap()
    }

    /// What this key, as a host's, says of a session.
    pub fn binds(&self, session: &[u8]) -> Bind {
        let private = PrivateKey::from_openssh(&self.private).unwrap();
        Bind {
            host_key: self.blob(),
            session: session.to_vec(),
            signature: private.try_sign(session).unwrap().encode_vec().unwrap(),
            forwarding: false,
        }
    }

    /// A grant of this key for signing in at these hosts.
    pub fn granted_at(&self, hosts: &[&Key]) -> SshUse {
        SshUse {
            host_keys: hosts.iter().map(|host| host.line()).collect(),
            public_key: ssh::public_key(&self.secret()).unwrap(),
            ..SshUse::default()
        }
    }

    /// A wish to sign in to this session.
    pub fn signs_in(&self, session: &[u8], user: &str) -> Sign {
        let scheme = if self.public.algorithm().is_rsa() {
            "rsa-sha2-512"
        } else {
            self.public.algorithm().as_str().to_owned().leak()
        };
        let parts: [&[u8]; 3] = [user.as_bytes(), b"ssh-connection", b"publickey"];
        self.asks(&sign_in(session, &parts, scheme, &self.blob()), 4)
    }

    pub fn asks(&self, data: &[u8], flags: u32) -> Sign {
        let mut message = vec![13];
        self.blob().encode(&mut message).unwrap();
        data.encode(&mut message).unwrap();
        flags.encode(&mut message).unwrap();
        match ssh::read(&message) {
            Asked::Sign(sign) => sign,
            other => panic!("{other:?}"),
        }
    }
}

/// RFC 4252, section 7.
pub fn sign_in(session: &[u8], user_service_method: &[&[u8]; 3], scheme: &str, key: &[u8]) -> Vec<u8> {
    let mut data = Vec::new();
    session.encode(&mut data).unwrap();
    data.push(50);
    for part in user_service_method {
        part.encode(&mut data).unwrap();
    }
    data.push(1);
    scheme.encode(&mut data).unwrap();
    key.encode(&mut data).unwrap();
    data
}

/// What `ssh-keygen -Y sign -n` asks to have signed.
pub fn to_sign_for(namespace: &str) -> Vec<u8> {
    let mut data = b"SSHSIG".to_vec();
    for part in [namespace.as_bytes(), b"", b"sha512", &[7; 64]] {
        part.encode(&mut data).unwrap();
    }
    data
}
