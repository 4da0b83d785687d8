//! The command line as a download from one's own hypervisor. For everybody, without signing in: it is the public program,
//! and who wants to sign in with it has no token yet. It must not open a path that a request names: what there is was
//! opened at the start.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path as FilePath;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use data_encoding::HEXLOWER;
use futures_util::stream::{self, Stream};
use maud::{Markup, html};
use rustix::fs::{Mode, OFlags};
use sha2::{Digest, Sha256};
use tokio::sync::OnceCell;
use tokio::task::spawn_blocking;

use crate::app::App;
use crate::auth::routes;
use crate::error::{ApiError, ApiResult};
use crate::pages::Layout;

routes! {
    pub ROUTES, router -> Arc<App>;
    Public GET get "/download" => list;
    Public GET get "/download/{file}" => download;
}

/// More files than this in the directory are a mistake, and each keeps a descriptor.
const MOST: usize = 64;

/// Bytes of a file that are read at once.
const PART: usize = 64 << 10;

/// What can be downloaded, as it was at the start: a file that takes another's place is another's until the next one.
#[derive(Default)]
pub struct Downloads(Vec<Download>);

struct Download {
    name: String,
    bytes: u64,
    content: Arc<File>,
    /// Of the content, in hexadecimal digits; nobody at the start waits for it.
    sha256: OnceCell<String>,
}

impl Downloads {
    /// Of this directory; a box without one, or where it cannot be read, is one without downloads.
    pub fn of(directory: Option<&FilePath>) -> Self {
        let Some(directory) = directory else {
            return Self::default();
        };
        Self::open(directory).unwrap_or_else(|error| {
            tracing::warn!(%error, directory = %directory.display(), "there are no downloads; correct [downloads] dir");
            Self::default()
        })
    }

    /// Opens the plain files of a directory. Links are not followed, and names that would need quoting are left out.
    fn open(directory: &FilePath) -> io::Result<Self> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(directory)? {
            let name = entry?.file_name();
            let Some(name) = name.to_str().filter(|name| is_plain(name)) else {
                continue;
            };
            match Download::open(directory, name) {
                Ok(Some(download)) => found.push(download),
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, name, "this cannot be downloaded"),
            }
            if found.len() > MOST {
                return Err(io::Error::other(format!("it has more than {MOST} files")));
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self(found))
    }

    fn get(&self, name: &str) -> Option<&Download> {
        self.0.iter().find(|download| download.name == name)
    }
}

impl Download {
    /// `None` where it is no plain file.
    fn open(directory: &FilePath, name: &str) -> io::Result<Option<Self>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let content = match rustix::fs::open(directory.join(name), flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(rustix::io::Errno::LOOP) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let about = content.metadata()?;
        Ok(about.is_file().then(|| Self {
            name: name.to_owned(),
            bytes: about.len(),
            content: Arc::new(content),
            sha256: OnceCell::new(),
        }))
    }

    async fn sha256(&self) -> ApiResult<&str> {
        let content = self.content.clone();
        let look = || async move {
            let looked = spawn_blocking(move || sha256_of(&content)).await;
            looked.map_err(ApiError::internal)?.map_err(ApiError::internal)
        };
        self.sha256.get_or_try_init(look).await.map(String::as_str)
    }

    fn content(&self) -> impl Stream<Item = io::Result<Bytes>> + use<> {
        stream::try_unfold((self.content.clone(), 0), |(content, at)| async move {
            let from = content.clone();
            let part = spawn_blocking(move || part_of(&from, at))
                .await
                .map_err(io::Error::other)??;
            let next = at + u64::try_from(part.len()).map_err(io::Error::other)?;
            Ok::<_, io::Error>((!part.is_empty()).then_some((part, (content, next))))
        })
    }
}

fn is_plain(name: &str) -> bool {
    !name.starts_with(['.', '-'])
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

fn part_of(file: &File, at: u64) -> io::Result<Bytes> {
    let mut part = vec![0; PART];
    let read = file.read_at(&mut part, at)?;
    part.truncate(read);
    Ok(part.into())
}

fn sha256_of(file: &File) -> io::Result<String> {
    let (mut sum, mut at) = (Sha256::new(), 0);
    loop {
        let part = part_of(file, at)?;
        if part.is_empty() {
            return Ok(HEXLOWER.encode(&sum.finalize()));
        }
        sum.update(&part);
        at += u64::try_from(part.len()).map_err(io::Error::other)?;
    }
}

async fn download(State(app): State<Arc<App>>, Path(name): Path<String>, asked: HeaderMap) -> ApiResult<Response> {
    let download = app.downloads.get(&name).ok_or_else(ApiError::not_found)?;
    let tag = format!("\"{}\"", download.sha256().await?);
    let known = asked.get(header::IF_NONE_MATCH).and_then(|tags| tags.to_str().ok());
    let is_known = known.is_some_and(|tags| tags.split(',').any(|one| one.trim().trim_start_matches("W/") == tag));
    // Asked for each time, answered in full only when it is another.
    let always = [(header::ETAG, tag), (header::CACHE_CONTROL, "no-cache".to_owned())];
    if is_known {
        return Ok((StatusCode::NOT_MODIFIED, always).into_response());
    }
    let whole = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_LENGTH, download.bytes.to_string()),
        (
            header::CONTENT_DISPOSITION,
            format!("attachment; filename=\"{}\"", download.name),
        ),
    ];
    Ok((always, whole, Body::from_stream(download.content())).into_response())
}

async fn list(State(app): State<Arc<App>>) -> ApiResult<Html<String>> {
    let origin = app.config.control.origin.as_str().trim_end_matches('/');
    let mut sections = Vec::new();
    for download in &app.downloads.0 {
        sections.push(section(download, download.sha256().await?, origin));
    }
    let content = html! {
        @if sections.is_empty() {
            p { "This box has no program to download; ask who runs it." }
        } @else {
            p { code { "choir" } " works with this box from a terminal. Each command below downloads it, sees that it came whole, \
                 and puts it where programs are found. Then sign in: " }
            p.code { "choir login --url " (origin) }
        }
        @for section in &sections { (section) }
    };
    let page = Layout {
        title: "Command line",
        user: None,
        script: None,
    };
    Ok(page.render(&content))
}

fn section(download: &Download, sha256: &str, origin: &str) -> Markup {
    let name = download.name.as_str();
    let check = match name.contains("macos") {
        true => "shasum -a 256 -c",
        false => "sha256sum -c",
    };
    let tenths = download.bytes.div_ceil(100_000);
    html! {
        section aria-labelledby=(name) {
            h2 id=(name) { (platform(name)) }
            p { a href={ "/download/" (name) } { (name) } ", " (tenths / 10) "." (tenths % 10) " MB, SHA-256 " code.codes { (sha256) } }
            p.codes {
                "curl -fsSLO " (origin) "/download/" (name)
                " && echo '" (sha256) "  " (name) "' | " (check)
                " && sudo install -m 0755 " (name) " /usr/local/bin/choir"
            }
        }
    }
}

/// What a program with this name runs on, as a person says it.
fn platform(name: &str) -> String {
    let mut parts = name.splitn(3, '-').skip(1);
    match (parts.next(), parts.next()) {
        (Some("linux"), Some(machine)) => format!("Linux, {machine}"),
        (Some("macos"), Some("aarch64")) => "macOS, Apple silicon".to_owned(),
        (Some("macos"), Some(machine)) => format!("macOS, {machine}"),
        _ => name.to_owned(),
    }
}
