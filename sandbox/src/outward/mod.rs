//! The way out for programs that know of no proxy: a resolver of our own gives each public name an address on loopback,
//! and what connects there goes to the egress port under that name. It must not know what is allowed.
//!
//! ```text
//! program ──A db.example.com?──▶ 127.0.0.53:53 ──▶ 127.77.0.1 ──connect──▶ 127.77.0.1:5432 (the agent)
//!                                                                 ──CONNECT db.example.com:5432──▶ 127.0.0.1:9092
//! ```

use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use rustix::process::{Resource, getrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::agent::Ports;
use crate::log;
use names::{Given, Names};

mod dns;
mod names;
mod tunnel;

/// What `/etc/resolv.conf` names. A user's own server on loopback or on all addresses but for port 53 is not in its way.
const RESOLVER: (Ipv4Addr, u16) = (Ipv4Addr::new(127, 0, 0, 53), 53);

/// Where names can be reached: SSH, the web, mail to and from its user, databases, brokers and Git. Left out are 25,
/// which is for servers, and 3000, 5000, 8000 and 8080, which the user's own programs take on every address.
const PORTS: [u16; 16] = [
    22, 80, 443, 465, 587, 993, 1433, 3306, 5432, 5671, 6379, 6380, 6543, 8443, 9418, 27017,
];

/// Names with an address at once, where there are descriptors enough: their doors cost the agent 1 MiB.
const MAX_NAMES: usize = 128;

/// Connections at once; further ones wait. The gateway takes 64 of a sandbox: the rest is for those that know of it.
const MAX_CONNECTIONS: usize = 48;

/// Connections to the resolver at once, and how long each may take over a question.
const MAX_ASKING: usize = 16;
const ASK: Duration = Duration::from_secs(10);

/// After a failure to accept: out of descriptors, most likely, and trying again at once would only spin.
const PAUSE: Duration = Duration::from_millis(50);

struct Outward {
    gateway: SocketAddr,
    table: Mutex<Table>,
    places: Arc<Semaphore>,
    /// A name got doors, which will have to be closed.
    changed: Notify,
}

/// Doors are open exactly for the addresses of which `names` says so.
struct Table {
    names: Names,
    doors: HashMap<Ipv4Addr, Doors>,
}

/// Those who listen on one address; dropped, nobody does. Connections go on.
struct Doors(JoinHandle<()>);

impl Drop for Doors {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Begins to answer. Where the resolver's address is taken, names stay unresolved, which is said and never fatal.
pub async fn start(ports: &Ports) -> io::Result<()> {
    let gateway = ports.egress.local_addr()?;
    let (udp, tcp) = match (UdpSocket::bind(RESOLVER).await, TcpListener::bind(RESOLVER).await) {
        (Ok(udp), Ok(tcp)) => (udp, tcp),
        (Err(e), _) | (_, Err(e)) => {
            log::say(&format!("names cannot be resolved, programs need the proxy: {e}"));
            return Ok(());
        }
    };
    let outward = Arc::new(Outward {
        gateway,
        table: Mutex::new(Table {
            names: Names::new(room()),
            doors: HashMap::new(),
        }),
        places: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        changed: Notify::new(),
    });
    tokio::spawn(Arc::clone(&outward).answer_datagrams(udp));
    tokio::spawn(Arc::clone(&outward).answer_connections(tcp));
    tokio::spawn(async move { outward.close_idle_doors().await });
    Ok(())
}

/// How many names there may be: doors take at most a quarter of the agent's descriptors.
fn room() -> usize {
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let doors = usize::try_from(descriptors / 4).unwrap_or(usize::MAX);
    (doors / PORTS.len()).clamp(1, MAX_NAMES)
}

impl Outward {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn answer_datagrams(self: Arc<Self>, socket: UdpSocket) {
        let mut buffer = [0; dns::MAX_MESSAGE];
        loop {
            match socket.recv_from(&mut buffer).await {
                Ok((length, from)) => {
                    if let Some(reply) = dns::answer(&buffer[..length], |name| self.resolve(name)) {
                        // Whoever does not take it asks again.
                        let _ = socket.try_send_to(&reply, from);
                    }
                }
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
            // A question may open many doors: a flood of them must not keep the agent from anything else.
            tokio::task::yield_now().await;
        }
    }

    async fn answer_connections(self: Arc<Self>, listener: TcpListener) {
        let places = Arc::new(Semaphore::new(MAX_ASKING));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((mut stream, _)) => {
                    let outward = Arc::clone(&self);
                    tokio::spawn(async move {
                        while let Ok(Ok(())) = tokio::time::timeout(ASK, outward.answer_one(&mut stream)).await {}
                        drop(place);
                    });
                }
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    }

    /// RFC 1035, section 4.2.2: each message after its length.
    async fn answer_one(self: &Arc<Self>, stream: &mut TcpStream) -> io::Result<()> {
        let length = usize::from(stream.read_u16().await?);
        if length > dns::MAX_MESSAGE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut message = vec![0; length];
        stream.read_exact(&mut message).await?;
        let reply = dns::answer(&message, |name| self.resolve(name)).ok_or(io::ErrorKind::InvalidData)?;
        let mut framed = (reply.len() as u16).to_be_bytes().to_vec();
        framed.extend(reply);
        stream.write_all(&framed).await
    }

    /// The address of a name, whose doors are open on return.
    fn resolve(self: &Arc<Self>, name: &str) -> Option<Ipv4Addr> {
        let mut table = self.table();
        let given = table.names.ask(name, Instant::now())?;
        if let Some(old) = given.close_doors {
            table.doors.remove(&old);
        }
        if given.open_doors {
            let doors = self.open_doors(&given);
            table.doors.insert(given.address, doors);
            self.changed.notify_one();
        }
        Some(given.address)
    }

    /// Listens on every port that nobody else has on all addresses.
    fn open_doors(self: &Arc<Self>, given: &Given) -> Doors {
        let bind = |port: u16| {
            let listener = std::net::TcpListener::bind((given.address, port))?;
            listener.set_nonblocking(true)?;
            Ok((port, TcpListener::from_std(listener)?))
        };
        let bound = PORTS.into_iter().map(bind);
        let listeners: Vec<_> = bound.filter_map(|door: io::Result<_>| door.ok()).collect();
        let (outward, address, name) = (Arc::clone(self), given.address, Arc::clone(&given.name));
        Doors(tokio::spawn(outward.attend(address, name, listeners)))
    }

    async fn attend(self: Arc<Self>, address: Ipv4Addr, name: Arc<str>, listeners: Vec<(u16, TcpListener)>) {
        loop {
            let Ok((stream, port)) = next_visitor(&listeners).await else {
                tokio::time::sleep(PAUSE).await;
                continue;
            };
            let visit = Visit::new(&self, address);
            let Ok(place) = Arc::clone(&self.places).acquire_owned().await else {
                return;
            };
            let name = Arc::clone(&name);
            tokio::spawn(async move {
                tunnel::carry(stream, visit.outward.gateway, &name, port).await;
                drop((visit, place));
            });
        }
    }

    async fn close_idle_doors(&self) {
        loop {
            let next = self.table().names.next_expiry();
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => self.changed.notified().await,
            }
            let table = &mut *self.table();
            for address in table.names.expire(Instant::now()) {
                table.doors.remove(&address);
            }
        }
    }
}

async fn next_visitor(listeners: &[(u16, TcpListener)]) -> io::Result<(TcpStream, u16)> {
    poll_fn(|cx| {
        for (port, listener) in listeners {
            if let Poll::Ready(accepted) = listener.poll_accept(cx) {
                return Poll::Ready(accepted.map(|(stream, _)| (stream, *port)));
            }
        }
        Poll::Pending
    })
    .await
}

/// A connection to an address, which keeps its name meanwhile.
struct Visit {
    outward: Arc<Outward>,
    address: Ipv4Addr,
}

impl Visit {
    fn new(outward: &Arc<Outward>, address: Ipv4Addr) -> Self {
        outward.table().names.opened(address, Instant::now());
        Self {
            outward: Arc::clone(outward),
            address,
        }
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.outward.table().names.closed(self.address, Instant::now());
    }
}
