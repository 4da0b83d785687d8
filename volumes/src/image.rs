//! An image archive as `podman save`, `docker save` or `skopeo copy` write it: an OCI layout or Docker's own, in one
//! tar that is not compressed itself. Finds its layers, and checks manifest, configuration and layers by their digests.
//! Of the configuration nothing is used but the platform and those digests. Must not know where files go.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use flate2::read::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use tar::Archive;

/// What Docker and Podman themselves can stack.
const MAX_LAYERS: usize = 128;
const MAX_MEMBERS: usize = 10_000;
/// Longest manifest, index or configuration, bytes.
const MAX_JSON: u64 = 4 << 20;
/// An index may hold an index; more than that is nobody's honest image.
const MAX_DEPTH: usize = 3;

/// An image whose manifest and configuration are what their digests say.
pub struct Image {
    file: File,
    members: HashMap<String, Range>,
    layers: Vec<Layer>,
    /// Of the manifest, or of the configuration where Docker's format has no manifest; hexadecimal.
    pub digest: String,
}

/// Where a member's bytes are in the archive.
#[derive(Debug, Clone, Copy)]
struct Range {
    at: u64,
    length: u64,
}

struct Layer {
    bytes: Range,
    /// SHA-256 of what is stored, where the format says it.
    stored: Option<String>,
    /// SHA-256 of the tar inside.
    unpacked: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Document {
    Index {
        manifests: Vec<Descriptor>,
    },
    Manifest {
        config: Descriptor,
        layers: Vec<Descriptor>,
    },
}

#[derive(Deserialize)]
struct Descriptor {
    digest: String,
    platform: Option<Platform>,
}

#[derive(Deserialize, PartialEq, Eq)]
struct Platform {
    os: String,
    architecture: String,
}

#[derive(Deserialize)]
struct Config {
    #[serde(flatten)]
    platform: Platform,
    rootfs: Rootfs,
}

#[derive(Deserialize)]
struct Rootfs {
    diff_ids: Vec<String>,
}

/// One image of Docker's `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    layers: Vec<String>,
}

impl Image {
    /// Reads what the archive holds; no layer yet.
    pub fn open(file: File) -> io::Result<Self> {
        let members = members(&file)?;
        let mut image = Self {
            file,
            members,
            layers: Vec::new(),
            digest: String::new(),
        };
        if image.members.contains_key("index.json") {
            image.find_oci()?;
        } else if image.members.contains_key("manifest.json") {
            image.find_saved()?;
        } else {
            return wrong("it is no image archive: neither index.json nor manifest.json is in it");
        }
        if image.layers.len() > MAX_LAYERS {
            return wrong(format!(
                "it has {} layers; the most is {MAX_LAYERS}",
                image.layers.len()
            ));
        }
        Ok(image)
    }

    /// How many layers there are, the lowest first.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// What all layers take as they are stored.
    pub fn stored_bytes(&self) -> u64 {
        let lengths = self.layers.iter().map(|layer| layer.bytes.length);
        lengths.fold(0, u64::saturating_add)
    }

    /// Hands the tar of a layer to `take`, and checks that all of it is what its digests say. `left` bounds its bytes.
    pub fn layer(
        &self,
        nth: usize,
        left: &mut u64,
        take: impl FnOnce(&mut dyn Read) -> io::Result<()>,
    ) -> io::Result<()> {
        let layer = &self.layers[nth];
        if let Some(stored) = &layer.stored {
            let mut bytes = Hashed::new(self.slice(layer.bytes), u64::MAX);
            io::copy(&mut bytes, &mut io::sink())?;
            same(&format!("layer {nth} as it is stored"), &bytes.digest(), stored)?;
        }
        let mut tar = Hashed::new(decoded(self.slice(layer.bytes))?, *left);
        take(&mut tar)?;
        io::copy(&mut tar, &mut io::sink())?;
        *left = tar.left;
        same(&format!("layer {nth}"), &tar.digest(), &layer.unpacked)
    }

    fn find_oci(&mut self) -> io::Result<()> {
        let mut document: Document = parsed("index.json", &self.json("index.json")?)?;
        for _ in 0..MAX_DEPTH {
            match document {
                Document::Index { manifests } => {
                    self.digest = one_for_us(manifests)?;
                    document = parsed("a manifest", &self.blob(&self.digest)?)?;
                }
                Document::Manifest { config, layers } => {
                    let config = self.config(&config.digest)?;
                    let stored = layers.into_iter().map(|layer| digest(&layer.digest));
                    let stored = stored.collect::<io::Result<Vec<_>>>()?;
                    let names: Vec<_> = stored.iter().map(|digest| blob_name(digest)).collect();
                    self.layers = self.stack(&config, &names)?;
                    for (layer, digest) in self.layers.iter_mut().zip(stored) {
                        layer.stored = Some(digest);
                    }
                    return Ok(());
                }
            }
        }
        wrong("its index points to an index again and again")
    }

    fn find_saved(&mut self) -> io::Result<()> {
        let saved: Vec<Saved> = parsed("manifest.json", &self.json("manifest.json")?)?;
        let [saved] = <[Saved; 1]>::try_from(saved)
            .map_err(|all| io::Error::other(format!("it holds {} images; save one alone", all.len())))?;
        let bytes = self.json(&saved.config)?;
        // Docker's format names the configuration by its digest, and that is the image's id.
        self.digest = hex(Sha256::digest(&bytes).as_slice());
        let named = saved
            .config
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .trim_end_matches(".json");
        same("the configuration", &self.digest, named)?;
        let config = for_us(parsed("the configuration", &bytes)?)?;
        self.layers = self.stack(&config, &saved.layers)?;
        Ok(())
    }

    fn stack(&self, config: &Config, names: &[String]) -> io::Result<Vec<Layer>> {
        let unpacked = &config.rootfs.diff_ids;
        if unpacked.len() != names.len() {
            let (stored, told) = (names.len(), unpacked.len());
            return wrong(format!("it has {stored} layers and its configuration tells of {told}"));
        }
        let layer = |(name, unpacked): (&String, &String)| {
            Ok(Layer {
                bytes: self.member(name)?,
                stored: None,
                unpacked: digest(unpacked)?,
            })
        };
        names.iter().zip(unpacked).map(layer).collect()
    }

    fn config(&self, named: &str) -> io::Result<Config> {
        for_us(parsed("the configuration", &self.blob(&digest(named)?)?)?)
    }

    /// A blob that is what its digest says.
    fn blob(&self, digest: &str) -> io::Result<Vec<u8>> {
        let bytes = self.json(&blob_name(digest))?;
        same(
            "a manifest or configuration",
            &hex(Sha256::digest(&bytes).as_slice()),
            digest,
        )?;
        Ok(bytes)
    }

    fn json(&self, name: &str) -> io::Result<Vec<u8>> {
        let range = self.member(name)?;
        if range.length > MAX_JSON {
            return wrong(format!("{name} is longer than 4 MiB"));
        }
        let mut bytes = Vec::new();
        self.slice(range).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn member(&self, name: &str) -> io::Result<Range> {
        let found = self.members.get(name).copied();
        found.ok_or_else(|| io::Error::other(format!("{name} is missing")))
    }

    fn slice(&self, range: Range) -> Slice<'_> {
        Slice {
            file: &self.file,
            at: range.at,
            left: range.length,
        }
    }
}

fn members(file: &File) -> io::Result<HashMap<String, Range>> {
    let mut members = HashMap::new();
    for entry in Archive::new(file).entries_with_seek()? {
        let entry = entry?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        if members.len() == MAX_MEMBERS {
            return wrong("it has more than 10,000 files");
        }
        let name = entry.path()?.to_string_lossy().trim_start_matches("./").to_owned();
        let range = Range {
            at: entry.raw_file_position(),
            length: entry.size(),
        };
        // Of two members of one name different readers would take different ones.
        if members.insert(name.clone(), range).is_some() {
            return wrong(format!("{name} is in it twice"));
        }
    }
    Ok(members)
}

/// The digest of the one manifest that this machine could run.
fn one_for_us(manifests: Vec<Descriptor>) -> io::Result<String> {
    let here = here();
    let fits = |d: &Descriptor| d.platform.as_ref().is_none_or(|platform| *platform == here);
    let fitting: Vec<_> = manifests.into_iter().filter(fits).collect();
    match fitting.as_slice() {
        [one] => digest(&one.digest),
        [] => wrong(format!("it holds no image for {}/{}", here.os, here.architecture)),
        many => wrong(format!("it holds {} images; save one alone", many.len())),
    }
}

fn for_us(config: Config) -> io::Result<Config> {
    let Platform { os, architecture } = &config.platform;
    if config.platform == here() {
        return Ok(config);
    }
    wrong(format!("it is for {os}/{architecture}, and this machine is not"))
}

fn here() -> Platform {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    Platform {
        os: "linux".to_owned(),
        architecture: architecture.to_owned(),
    }
}

fn blob_name(digest: &str) -> String {
    format!("blobs/sha256/{digest}")
}

/// The hexadecimal part of a SHA-256 digest.
fn digest(text: &str) -> io::Result<String> {
    match text.strip_prefix("sha256:") {
        Some(hex) if hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()) => Ok(hex.to_lowercase()),
        _ => wrong(format!("{text} is not a SHA-256 digest")),
    }
}

fn same(what: &str, found: &str, named: &str) -> io::Result<()> {
    if found == named {
        return Ok(());
    }
    wrong(format!("{what} is not what its digest says ({named}); it is {found}"))
}

fn parsed<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> io::Result<T> {
    serde_json::from_slice(bytes).map_err(|e| io::Error::other(format!("{what} cannot be read: {e}")))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn wrong<T>(what: impl Into<String>) -> io::Result<T> {
    Err(io::Error::other(what.into()))
}

/// Bytes of a file, whatever else is read of it meanwhile.
struct Slice<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Slice<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(into.len());
        let read = self.file.read_at(&mut into[..most], self.at)?;
        self.at += read as u64;
        self.left -= read as u64;
        Ok(read)
    }
}

/// The tar inside a layer, by how its bytes begin.
fn decoded<'a>(layer: Slice<'a>) -> io::Result<Box<dyn Read + 'a>> {
    let mut first = [0; 4];
    let read = layer.file.read_at(&mut first, layer.at)?;
    Ok(match first {
        [0x1f, 0x8b, ..] if read >= 2 => Box::new(MultiGzDecoder::new(layer)),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(Zstd {
            source: layer,
            frame: FrameDecoder::new(),
        }),
        _ => Box::new(layer),
    })
}

/// Zstandard frames one after the other; some writers add frames that are to be skipped.
struct Zstd<'a> {
    source: Slice<'a>,
    frame: FrameDecoder,
}

impl Read for Zstd<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            while self.frame.can_collect() == 0 && !self.frame.is_finished() {
                let some = BlockDecodingStrategy::UptoBlocks(1);
                let decoded = self.frame.decode_blocks(&mut self.source, some);
                decoded.map_err(io::Error::other)?;
            }
            let read = self.frame.read(into)?;
            if read > 0 || into.is_empty() || self.source.left == 0 {
                return Ok(read);
            }
            match self.frame.reset(&mut self.source) {
                Ok(()) => {}
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                    let length = u64::from(length).min(self.source.left);
                    self.source.at += length;
                    self.source.left -= length;
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
    }
}

/// Hashes what is read of it, and ends with an error where that is more than allowed.
struct Hashed<R> {
    inner: R,
    hash: Sha256,
    left: u64,
}

impl<R: Read> Hashed<R> {
    fn new(inner: R, most: u64) -> Self {
        Self {
            inner,
            hash: Sha256::new(),
            left: most,
        }
    }

    fn digest(self) -> String {
        hex(self.hash.finalize().as_slice())
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(into)?;
        self.hash.update(&into[..read]);
        match self.left.checked_sub(read as u64) {
            Some(left) => self.left = left,
            None => return wrong("it is larger than a volume may be, or than there is room for, when it is unpacked"),
        }
        Ok(read)
    }
}
