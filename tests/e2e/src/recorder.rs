//! A web server on another port of `localhost`: it serves one empty page, which under `/open` any origin may read, and
//! writes down what browsers send it. To a browser's cookies it is the control host, because cookies ignore ports.

use std::sync::{Arc, Mutex};

use anyhow::Result;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;

/// One request.
#[derive(Debug, Clone)]
pub struct Seen {
    pub method: String,
    pub path: String,
    /// The value of `Cookie`, empty where none came.
    pub cookie: String,
}

/// Listens until it is dropped.
pub struct Recorder {
    port: u16,
    seen: Arc<Mutex<Vec<Seen>>>,
    accepting: AbortHandle,
}

impl Recorder {
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let seen = Arc::<Mutex<Vec<Seen>>>::default();
        let log = seen.clone();
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, log.clone()));
            }
        });
        Ok(Self {
            port,
            seen,
            accepting: accepting.abort_handle(),
        })
    }

    pub fn origin(&self) -> String {
        format!("http://localhost:{}", self.port)
    }

    /// What came in for paths that begin so.
    pub fn seen(&self, prefix: &str) -> Vec<Seen> {
        let seen = self.seen.lock().expect("no holder of this lock panics");
        seen.iter().filter(|it| it.path.starts_with(prefix)).cloned().collect()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// One request a connection. A browser that goes away has told enough.
async fn serve(stream: TcpStream, seen: Arc<Mutex<Vec<Seen>>>) -> Result<()> {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line).await?;
    let mut words = line.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (mut cookie, mut origin, mut length) = (String::new(), String::new(), 0);
    loop {
        line.clear();
        stream.read_line(&mut line).await?;
        let Some((name, value)) = line.trim().split_once(':') else {
            break;
        };
        match name.to_ascii_lowercase().as_str() {
            "cookie" => cookie = value.trim().to_owned(),
            "origin" => origin = value.trim().to_owned(),
            "content-length" => length = value.trim().parse()?,
            _ => {}
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    let readable = match path.starts_with("/open") {
        true => format!("\r\nAccess-Control-Allow-Credentials: true\r\nAccess-Control-Allow-Origin: {origin}"),
        false => String::new(),
    };
    seen.lock()
        .expect("no holder of this lock panics")
        .push(Seen { method, path, cookie });
    let page = "<!doctype html><title>another site</title>";
    let head = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/html";
    let answer = format!("{head}{readable}\r\nContent-Length: {}\r\n\r\n{page}", page.len());
    stream.write_all(answer.as_bytes()).await?;
    Ok(())
}
