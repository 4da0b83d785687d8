//! Starts the real binary on a loop-mounted btrfs or on plain directories, and talks to it. Must
//! not know what is tested.

use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;
use tempfile::TempDir;

/// The binary under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_choir-volumes");

/// A place for volumes that goes away with the test.
pub struct Pool {
    temporary: TempDir,
    pub plain: bool,
}

impl Pool {
    /// Plain directories.
    pub fn plain() -> Self {
        let temporary = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir(temporary.path().join("volumes")).expect("the pool");
        Self { temporary, plain: true }
    }

    /// A loop-mounted btrfs of 4 GiB, or `None` where there cannot be one; with full quotas, or as the server makes it.
    pub fn btrfs(full: bool) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: a btrfs can be mounted by root only");
            return None;
        }
        if run("mkfs.btrfs", &["--version"]).is_err() {
            eprintln!("skipped: mkfs.btrfs is not installed (package btrfs-progs)");
            return None;
        }
        let mut pool = Self::plain();
        let image = pool.temporary.path().join("image");
        let (image, dir) = (image.to_str().expect("a path"), pool.dir());
        let dir = dir.to_str().expect("a path");
        run("truncate", &["-s", "4G", image]).expect("an image");
        run("mkfs.btrfs", &["-q", "--nodesize", "4096", image]).expect("a file system");
        run("mount", &["-o", "loop,nodev", image, dir]).expect("a mount");
        pool.plain = false;
        if full {
            run("btrfs", &["quota", "enable", dir]).expect("quotas");
        }
        Some(pool)
    }

    /// Where the volumes are.
    pub fn dir(&self) -> PathBuf {
        self.temporary.path().join("volumes")
    }

    /// A path beside the pool.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.temporary.path().join(name)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if !self.plain
            && let Err(error) = run("umount", &[self.dir().to_str().expect("a path")])
        {
            eprintln!("left mounted: {error}");
        }
    }
}

/// Runs a program; its complaint is the error.
pub fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin:/run/current-system/sw/bin")
        .output()
        .map_err(|e| format!("{program}: {e}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// A running choir-volumes, socket-activated, killed when dropped.
pub struct Server {
    pub pool: Pool,
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// Starts on a pool for the user of the test.
    pub fn start(pool: Pool) -> Self {
        Self::start_for(pool, rustix::process::geteuid().as_raw())
    }

    /// Starts on a pool for one user.
    pub fn start_for(pool: Pool, uid: u32) -> Self {
        let socket = pool.beside("socket");
        if socket.exists() {
            std::fs::remove_file(&socket).expect("the old socket goes");
        }
        let listener = UnixListener::bind(&socket).expect("a socket");
        let mut command = Command::new("sh");
        // Only the shell knows the process id that LISTEN_PID must name.
        command
            .args([
                "-c",
                "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\"",
            ])
            .args([BINARY, "serve", "--allow-uid", &uid.to_string(), "--dir"])
            .arg(pool.dir())
            .stdin(Stdio::from(OwnedFd::from(listener)));
        if pool.plain {
            command.arg("--plain");
        }
        let child = command.spawn().expect("choir-volumes starts");
        Self { pool, child, socket }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills it without warning and gives the pool back.
    pub fn kill(mut self) -> Pool {
        self.stop();
        std::mem::replace(&mut self.pool, Pool::plain())
    }

    fn stop(&mut self) {
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it ends");
    }

    /// A new connection.
    pub fn connect(&self) -> Client {
        Client::connect(&self.socket)
    }

    /// One request on a connection of its own.
    pub fn ask(&self, request: &Value) -> Value {
        self.connect().ask(request)
    }

    /// One request that must succeed.
    pub fn done(&self, request: &Value) -> Value {
        let answer = self.ask(request);
        assert!(answer.get("error").is_none(), "{request} -> {answer}");
        answer
    }

    /// The error code of one request that must fail.
    pub fn code(&self, request: &Value) -> String {
        code(&self.ask(request))
    }

    /// A path in a volume.
    pub fn path(&self, path: &str) -> PathBuf {
        self.pool.dir().join(path)
    }

    /// Makes a btrfs commit, so that counts are up to date.
    pub fn commit(&self) {
        let dir = File::open(self.pool.dir()).expect("the pool");
        rustix::fs::syncfs(dir).expect("a commit");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Already dead when killed on purpose.
        if self.child.try_wait().ok().flatten().is_none() {
            self.stop();
        }
    }
}

/// The code of an error answer.
pub fn code(answer: &Value) -> String {
    answer["error"]["code"]
        .as_str()
        .unwrap_or_else(|| panic!("not an error: {answer}"))
        .to_owned()
}

/// One connection.
pub struct Client {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Client {
    /// Connects to a socket.
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).expect("a connection");
        let reader = BufReader::new(stream.try_clone().expect("a second handle"));
        Self { stream, reader }
    }

    /// Sends a request and awaits its answer.
    pub fn ask(&mut self, request: &Value) -> Value {
        self.say(format!("{request}\n").as_bytes());
        self.hear().expect("an answer")
    }

    /// Sends bytes; the other side may already have hung up.
    pub fn say(&mut self, bytes: &[u8]) {
        if let Err(error) = self.stream.write_all(bytes) {
            eprintln!("not all was heard: {error}");
        }
    }

    /// Sends a request with a descriptor.
    pub fn say_with(&mut self, request: &Value, descriptor: impl AsFd) {
        let line = format!("{request}\n");
        let descriptors: [BorrowedFd<'_>; 1] = [descriptor.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
        let bytes = [IoSlice::new(line.as_bytes())];
        sendmsg(&self.stream, &bytes, &mut ancillary, SendFlags::empty()).expect("sent");
    }

    /// The next answer, or `None` at the end.
    pub fn hear(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) | Err(_) => None,
            Ok(_) => Some(serde_json::from_str(&line).expect("JSON")),
        }
    }
}

/// Runs one test on plain directories and, where possible, on btrfs.
pub fn on_each_backend(test: impl Fn(Server)) {
    test(Server::start(Pool::plain()));
    if let Some(pool) = Pool::btrfs(false) {
        test(Server::start(pool));
    }
}
