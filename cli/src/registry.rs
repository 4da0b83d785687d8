//! Images in registries, fetched by whoever runs this program, with the logins that `docker login` and `podman login`
//! keep, into an archive that can be imported. It must not know the hypervisor, which never speaks to a registry.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};

use data_encoding::HEXLOWER;
use docker_credential::{CredentialRetrievalError, DockerCredential, get_credential, get_podman_credential};
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::manifest::{
    IMAGE_MANIFEST_LIST_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE, OCI_IMAGE_MEDIA_TYPE,
    OciDescriptor, OciImageManifest, OciManifest,
};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::failure::Failure;

const KINDS: [&str; 4] = [
    OCI_IMAGE_MEDIA_TYPE,
    OCI_IMAGE_INDEX_MEDIA_TYPE,
    IMAGE_MANIFEST_MEDIA_TYPE,
    IMAGE_MANIFEST_LIST_MEDIA_TYPE,
];

/// An image as it was fetched.
pub struct Pulled {
    /// OCI's image layout as a tar, read from its start.
    pub archive: File,
    /// What was asked for, pinned: `registry/repository@sha256:…`.
    pub pinned: String,
    /// Short enough for people.
    pub name: String,
}

/// Fetches an image for Linux on this architecture.
pub async fn pull(text: &str, architecture: &str) -> Result<Pulled, Failure> {
    let image: Reference = text.parse().map_err(|e| {
        Failure::Usage(format!(
            "{text} names no image ({e}); write it like docker.io/library/debian:12"
        ))
    })?;
    let client = client(&image);
    let auth = login(image.registry())?;
    let failed = |e: OciDistributionError| Failure::Failed(told(&image, &e));
    let (mut bytes, mut digest) = client.pull_manifest_raw(&image, &auth, &KINDS).await.map_err(failed)?;
    is_what_it_says(&bytes, image.digest().unwrap_or(&digest))?;
    let pinned = format!("{}/{}@{digest}", image.registry(), image.repository());
    let manifest = loop {
        match parsed(&bytes)? {
            OciManifest::Image(manifest) => break manifest,
            OciManifest::ImageIndex(index) => {
                let fits = |entry: &&oci_client::manifest::ImageIndexEntry| {
                    let platform = entry.platform.as_ref();
                    platform.is_some_and(|p| p.os.to_string() == "linux" && p.architecture.to_string() == architecture)
                };
                let chosen = index.manifests.iter().find(fits).ok_or_else(|| {
                    Failure::Failed(format!(
                        "{text} has no image for linux/{architecture}; name another with --arch"
                    ))
                })?;
                digest.clone_from(&chosen.digest);
                let one = image.clone_with_digest(digest.clone());
                (bytes, _) = client.pull_manifest_raw(&one, &auth, &KINDS).await.map_err(failed)?;
                is_what_it_says(&bytes, &digest)?;
            }
        }
    };
    let archive = write(&client, &image, &bytes, &digest, &manifest).await?;
    let tag = image.tag().map(|tag| format!(":{tag}")).unwrap_or_default();
    let name = format!("{}{tag}", image.repository().trim_start_matches("library/"));
    Ok(Pulled { archive, pinned, name })
}

fn client(image: &Reference) -> Client {
    // The second time it is there already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let registry = image.resolve_registry();
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    let local = matches!(host, "localhost" | "127.0.0.1" | "[::1]");
    Client::new(ClientConfig {
        // As everywhere: nobody can listen in between this machine and itself.
        protocol: match local {
            true => ClientProtocol::HttpsExcept(vec![registry.to_owned()]),
            false => ClientProtocol::Https,
        },
        user_agent: concat!("choir/", env!("CARGO_PKG_VERSION")),
        ..ClientConfig::default()
    })
}

/// What this user has logged in with, if anything.
fn login(registry: &str) -> Result<RegistryAuth, Failure> {
    // As Docker has called its own since before there were others.
    let docker = match registry {
        "docker.io" => "https://index.docker.io/v1/",
        other => other,
    };
    for found in [get_credential(docker), get_podman_credential(registry)] {
        match found {
            Ok(DockerCredential::UsernamePassword(user, password)) => return Ok(RegistryAuth::Basic(user, password)),
            Ok(DockerCredential::IdentityToken(token)) => return Ok(RegistryAuth::Bearer(token)),
            Err(
                CredentialRetrievalError::NoCredentialConfigured
                | CredentialRetrievalError::ConfigNotFound
                | CredentialRetrievalError::ConfigReadError,
            ) => {}
            Err(error) => {
                let told = format!("the login for {registry} cannot be used ({error}); log in again");
                return Err(Failure::Failed(told));
            }
        }
    }
    Ok(RegistryAuth::Anonymous)
}

/// OCI's image layout, with this image alone.
async fn write(
    client: &Client,
    image: &Reference,
    bytes: &[u8],
    digest: &str,
    manifest: &OciImageManifest,
) -> Result<File, Failure> {
    let cannot = |e: std::io::Error| Failure::Failed(format!("the image cannot be written down: {e}"));
    let mut archive = tar::Builder::new(tempfile::tempfile().map_err(cannot)?);
    let index = json!({"schemaVersion": 2, "manifests": [{
        "mediaType": manifest.media_type.as_deref().unwrap_or(OCI_IMAGE_MEDIA_TYPE),
        "digest": digest,
        "size": bytes.len(),
    }]});
    let layout = json!({"imageLayoutVersion": "1.0.0"}).to_string();
    add(&mut archive, "oci-layout", layout.as_bytes()).map_err(cannot)?;
    add(&mut archive, "index.json", index.to_string().as_bytes()).map_err(cannot)?;
    add(&mut archive, &blob(digest), bytes).map_err(cannot)?;
    let mut written: Vec<&str> = Vec::new();
    for part in std::iter::once(&manifest.config).chain(&manifest.layers) {
        if written.contains(&part.digest.as_str()) {
            continue;
        }
        written.push(&part.digest);
        let mut file = fetched(client, image, part).await?;
        let mut header = tar::Header::new_gnu();
        header.set_size(file.metadata().map_err(cannot)?.len());
        header.set_mode(0o644);
        archive
            .append_data(&mut header, blob(&part.digest), &mut file)
            .map_err(cannot)?;
    }
    let mut file = archive.into_inner().map_err(cannot)?;
    file.flush()
        .and_then(|()| file.seek(SeekFrom::Start(0)))
        .map_err(cannot)?;
    Ok(file)
}

/// One part, which is what its digest says.
async fn fetched(client: &Client, image: &Reference, part: &OciDescriptor) -> Result<File, Failure> {
    let cannot = |e: std::io::Error| Failure::Failed(format!("the image cannot be written down: {e}"));
    let mut file = tempfile::tempfile().map_err(cannot)?;
    let into = tokio::fs::File::from_std(file.try_clone().map_err(cannot)?);
    let pulled = client.pull_blob(image, part, into).await;
    pulled.map_err(|e| Failure::Failed(told(image, &e)))?;
    file.seek(SeekFrom::Start(0)).map_err(cannot)?;
    Ok(file)
}

fn add(archive: &mut tar::Builder<File>, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    archive.append_data(&mut header, name, bytes)
}

fn blob(digest: &str) -> String {
    format!("blobs/{}", digest.replacen(':', "/", 1))
}

fn parsed(bytes: &[u8]) -> Result<OciManifest, Failure> {
    serde_json::from_slice(bytes).map_err(|e| Failure::Failed(format!("the registry's manifest is not valid: {e}")))
}

fn is_what_it_says(bytes: &[u8], digest: &str) -> Result<(), Failure> {
    let is = format!("sha256:{}", HEXLOWER.encode(&Sha256::digest(bytes)));
    if is == digest {
        return Ok(());
    }
    let told = format!("the registry sent a manifest that is {is} where {digest} was named; nothing was imported");
    Err(Failure::Failed(told))
}

fn told(image: &Reference, error: &OciDistributionError) -> String {
    let registry = image.resolve_registry();
    match error {
        OciDistributionError::AuthenticationFailure(_) | OciDistributionError::UnauthorizedError { .. } => format!(
            "{registry} does not let this user have {image}; log in with `podman login {registry}` or `docker login {registry}`"
        ),
        OciDistributionError::ImageManifestNotFoundError(_) => format!("{registry} has no {image}"),
        other => format!("{image} could not be fetched: {other}"),
    }
}
