//! The search itself, on a thread of its own that gives way to everything else: takes bytes place by place, and adds up what
//! was searched and found. It must not know where bytes come from, and lets no text into the report that holds a secret.

use std::collections::HashMap;

use bytes::Bytes;
use choir_api::prove::{Hit, Login, Owner, Place, Progress, Sought};
use choir_broker::prove::{self as broker, Reader, Search};
use choir_core::{Name, UserId};
use tokio::sync::{mpsc, oneshot, watch};

/// Work that may wait for the search: each piece is at most 64 KiB.
const WAITING: usize = 64;
/// Hits and logins that a report lists; all are counted.
const MOST_LISTED: usize = 500;
/// Reasons that a place lists.
const MOST_REASONS: usize = 5;
/// The longest name or reason that is shown. Bytes: what an agent says may be of any length.
const LONGEST: usize = 1024;
/// The largest file that is looked at as a login. Bytes.
const MOST_LOGIN: usize = 64 << 10;
/// After how many bytes a place says how far it is.
const TELL_EVERY: u64 = 4 << 20;
/// Below whatever serves people, and not so low that it never comes to an end.
const NICE: i32 = 10;

/// A place that was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlaceId(usize);

/// What is to be searched, in order.
#[derive(Debug)]
enum Work {
    Open(PlaceId, Owner, String),
    /// A new item begins, and the one before has ended.
    Item(PlaceId, String),
    Bytes(Bytes),
    Hole(u64),
    Unread(String),
    /// All of the place was given, but for the items that could not be read.
    Complete(PlaceId),
    Incomplete(PlaceId, String),
    /// So many of the owners of places are done, of so many.
    Done(u64, u64),
}

/// The search is over before all was given.
#[derive(Debug, thiserror::Error)]
#[error("the search ended early")]
pub struct Ended;

/// Gives places to the search.
pub struct Feed {
    work: mpsc::Sender<Work>,
    next: usize,
}

impl Feed {
    /// A new place of `owner`.
    pub async fn open(&mut self, owner: &Owner, what: &str) -> Result<PlaceId, Ended> {
        let id = PlaceId(self.next);
        self.next += 1;
        self.send(Work::Open(id, owner.clone(), what.to_owned())).await?;
        Ok(id)
    }

    pub async fn item(&self, place: PlaceId, name: impl Into<String>) -> Result<(), Ended> {
        self.send(Work::Item(place, name.into())).await
    }

    pub async fn bytes(&self, bytes: impl Into<Bytes>) -> Result<(), Ended> {
        self.send(Work::Bytes(bytes.into())).await
    }

    pub async fn hole(&self, zeroes: u64) -> Result<(), Ended> {
        self.send(Work::Hole(zeroes)).await
    }

    pub async fn unread(&self, why: impl Into<String>) -> Result<(), Ended> {
        self.send(Work::Unread(why.into())).await
    }

    pub async fn complete(&self, place: PlaceId) -> Result<(), Ended> {
        self.send(Work::Complete(place)).await
    }

    pub async fn incomplete(&self, place: PlaceId, why: impl Into<String>) -> Result<(), Ended> {
        self.send(Work::Incomplete(place, why.into())).await
    }

    pub async fn done(&self, done: usize, of: usize) -> Result<(), Ended> {
        self.send(Work::Done(done as u64, of as u64)).await
    }

    async fn send(&self, work: Work) -> Result<(), Ended> {
        self.work.send(work).await.map_err(|_| Ended)
    }
}

/// What was searched and found.
#[derive(Debug, Default)]
pub struct Tally {
    pub places: Vec<Place>,
    pub bytes: u64,
    pub hits: Vec<Hit>,
    pub hits_total: u64,
    pub logins: Vec<Login>,
    pub logins_total: u64,
}

/// Begins a search; the tally comes once the feed is dropped.
pub fn begin(
    search: Search,
    names: HashMap<UserId, Name>,
    progress: watch::Sender<Progress>,
) -> std::io::Result<(Feed, oneshot::Receiver<Tally>)> {
    let (work, mut given) = mpsc::channel(WAITING);
    let (done, tally) = oneshot::channel();
    let counting = move || {
        // The thread's own priority: in Linux each thread has one.
        if let Err(error) = rustix::process::setpriority_process(None, NICE) {
            tracing::debug!(%error, "the search runs at the priority of everything else");
        }
        let mut counter = Counter {
            contents: search.reader(),
            texts: search.reader(),
            search,
            names,
            progress,
            item: None,
            tally: Tally::default(),
        };
        while let Some(work) = given.blocking_recv() {
            counter.take(work);
        }
        counter.end_item();
        // Whoever asked may have gone.
        let _ = done.send(counter.tally);
    };
    std::thread::Builder::new().name("prove".to_owned()).spawn(counting)?;
    Ok((Feed { work, next: 0 }, tally))
}

/// The item that is being searched.
struct Item {
    place: usize,
    /// As it may be shown.
    name: String,
    bytes: u64,
    told: u64,
    login: Option<(&'static choir_core::Login, Vec<u8>)>,
}

struct Counter {
    search: Search,
    contents: Reader,
    /// For names and reasons, which come between the bytes of an item.
    texts: Reader,
    names: HashMap<UserId, Name>,
    progress: watch::Sender<Progress>,
    item: Option<Item>,
    tally: Tally,
}

impl Counter {
    fn take(&mut self, work: Work) {
        match work {
            Work::Open(PlaceId(id), owner, what) => {
                debug_assert_eq!(id, self.tally.places.len());
                self.tally.places.push(Place {
                    owner,
                    what,
                    bytes: 0,
                    items: 0,
                    hits: 0,
                    unread: 0,
                    why: Vec::new(),
                    searched: false,
                });
                self.tell(id);
            }
            Work::Item(PlaceId(place), name) => self.begin_item(place, &name),
            Work::Bytes(bytes) => self.bytes(&bytes),
            Work::Hole(zeroes) => self.contents.skip(zeroes),
            Work::Unread(why) => {
                if let Some(item) = &self.item {
                    let (place, why) = (item.place, format!("{}: {why}", item.name));
                    self.tally.places[place].unread += 1;
                    self.reason(place, &why);
                }
            }
            Work::Complete(PlaceId(place)) => {
                self.end_item();
                let place = &mut self.tally.places[place];
                place.searched = place.unread == 0;
            }
            Work::Incomplete(PlaceId(place), why) => {
                self.end_item();
                self.reason(place, &why);
            }
            Work::Done(done, of) => self.progress.send_modify(|progress| {
                progress.places_done = done;
                progress.places = of;
            }),
        }
    }

    fn begin_item(&mut self, place: usize, name: &str) {
        self.end_item();
        self.tally.places[place].items += 1;
        self.texts.take(name.as_bytes());
        let hits = self.texts.finish();
        let shown = self.veiled(name);
        for hit in hits {
            self.hit(place, &shown, hit, None);
        }
        let files = self.tally.places[place].what == "files";
        self.item = Some(Item {
            place,
            bytes: 0,
            told: 0,
            login: choir_core::Login::at(name)
                .filter(|_| files)
                .map(|login| (login, Vec::new())),
            name: shown,
        });
    }

    fn bytes(&mut self, bytes: &[u8]) {
        let Some(item) = &mut self.item else { return };
        self.contents.take(bytes);
        item.bytes += bytes.len() as u64;
        if let Some((_, kept)) = &mut item.login {
            let room = MOST_LOGIN.saturating_sub(kept.len());
            kept.extend_from_slice(&bytes[..room.min(bytes.len())]);
        }
        self.tally.bytes += bytes.len() as u64;
        let place = item.place;
        self.tally.places[place].bytes += bytes.len() as u64;
        if item.bytes - item.told >= TELL_EVERY {
            item.told = item.bytes;
            self.tell(place);
        }
    }

    fn end_item(&mut self) {
        let Some(item) = self.item.take() else { return };
        for hit in self.contents.finish() {
            self.hit(item.place, &item.name, hit, Some(hit.offset));
        }
        let Some((login, kept)) = item.login else { return };
        let kept = zeroize::Zeroizing::new(kept);
        if login.tokens(&String::from_utf8_lossy(&kept)).is_empty() {
            return;
        }
        self.tally.logins_total += 1;
        if self.tally.logins.len() < MOST_LISTED {
            self.tally.logins.push(Login {
                tool: login.tool.to_owned(),
                owner: self.tally.places[item.place].owner.clone(),
                file: item.name,
                advice: advice(login),
            });
        }
    }

    fn hit(&mut self, place: usize, item: &str, hit: broker::Hit, offset: Option<u64>) {
        let found = &mut self.tally.places[place];
        found.hits += 1;
        self.tally.hits_total += 1;
        self.progress.send_modify(|progress| progress.hits += 1);
        if self.tally.hits.len() >= MOST_LISTED {
            return;
        }
        let sought = &self.search.sought()[hit.sought];
        let secret = shown(sought, &self.names);
        let of_its_owner =
            matches!(&found.owner, Owner::Sandbox { user, .. } if secret.owner.as_deref() == Some(user.as_str()));
        self.tally.hits.push(Hit {
            form: hit.form.as_str().to_owned(),
            owner: found.owner.clone(),
            what: found.what.clone(),
            item: item.to_owned(),
            offset,
            allowed: (sought.reveal && of_its_owner).then(|| "reveal".to_owned()),
            secret,
        });
    }

    fn reason(&mut self, place: usize, why: &str) {
        let why = self.veiled(why);
        let place = &mut self.tally.places[place];
        if place.why.len() < MOST_REASONS && !place.why.contains(&why) {
            place.why.push(why);
        }
    }

    /// The text without those of its parts that hold a secret, and not too long.
    fn veiled(&mut self, text: &str) -> String {
        let mut veiled = self.without_secrets(text);
        veiled.truncate(veiled.floor_char_boundary(LONGEST));
        veiled
    }

    fn without_secrets(&mut self, text: &str) -> String {
        let mut holds = |text: &str| {
            self.texts.take(text.as_bytes());
            !self.texts.finish().is_empty()
        };
        if !holds(text) {
            return text.to_owned();
        }
        let parts: Vec<&str> = text
            .split('/')
            .map(|part| if holds(part) { "…" } else { part })
            .collect();
        let veiled = parts.join("/");
        if holds(&veiled) { "…".to_owned() } else { veiled }
    }

    fn tell(&self, place: usize) {
        let place = &self.tally.places[place];
        self.progress.send_modify(|progress| {
            progress.place = format!("{} of {}", place.what, name_of(&place.owner));
            progress.bytes = self.tally.bytes;
        });
    }
}

/// An owner of places, for people.
fn name_of(owner: &Owner) -> String {
    match owner {
        Owner::Box => "the box".to_owned(),
        Owner::Sandbox {
            user, workspace, slot, ..
        } => format!("{slot} ({user}/{workspace})"),
        Owner::Volume { id } => id.clone(),
    }
}

/// A secret as a report names it.
pub fn shown(sought: &broker::Sought, names: &HashMap<UserId, Name>) -> Sought {
    let owner = |id: &UserId| names.get(id).map_or_else(|| id.to_string(), Name::to_string);
    Sought {
        kind: sought.kind.as_str().to_owned(),
        owner: sought.owner.as_ref().map(owner),
        name: sought.name.clone(),
        version: sought.version,
    }
}

fn advice(login: &choir_core::Login) -> String {
    match login.template {
        Some(template) => format!(
            "move the token into the vault (`choir secrets import-login {}`), grant it with `--template {template}`, and log \
             {0} out in the sandbox",
            login.tool
        ),
        None => {
            "whoever runs code in this sandbox can read it: log out there, or use a token that can do little".to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use choir_broker::SecretValue;
    use choir_broker::prove::{Builder, Kind, Sought as Wanted};

    const SECRET: &str = "canary-7c1b-of-a-tally";

    async fn tally(give: impl AsyncFnOnce(&mut Feed)) -> Tally {
        let mut builder = Builder::default();
        builder.add(
            Wanted::of_the_box(Kind::Platform, "token"),
            &SecretValue::new(SECRET.as_bytes().to_vec()),
        );
        let progress = watch::Sender::new(Progress {
            place: String::new(),
            bytes: 0,
            places_done: 0,
            places: 0,
            hits: 0,
        });
        let (mut feed, tally) = begin(builder.build().unwrap(), HashMap::new(), progress).unwrap();
        give(&mut feed).await;
        drop(feed);
        tally.await.unwrap()
    }

    #[tokio::test]
    async fn a_name_that_holds_the_secret_is_a_hit_and_is_not_repeated() {
        let tally = tally(async |feed| {
            let place = feed.open(&Owner::Box, "files").await.unwrap();
            feed.item(place, format!("/home/choir/{SECRET}/notes")).await.unwrap();
            feed.bytes(format!("and {SECRET} within").into_bytes()).await.unwrap();
            feed.unread(format!("cannot open {SECRET}")).await.unwrap();
            feed.complete(place).await.unwrap();
        })
        .await;
        assert_eq!(tally.hits_total, 2);
        assert_eq!(tally.hits[0].item, "/home/choir/…/notes");
        assert_eq!((tally.hits[0].offset, tally.hits[1].offset), (None, Some(4)));
        assert!(!tally.places[0].searched, "something of it could not be read");
        assert!(!format!("{tally:?}").contains(SECRET));
    }

    #[tokio::test]
    async fn a_place_is_searched_only_once_somebody_says_that_it_was_all() {
        let tally = tally(async |feed| {
            for what in ["broke off", "whole", "not there"] {
                let place = feed.open(&Owner::Box, what).await.unwrap();
                feed.item(place, "one").await.unwrap();
                feed.bytes(&b"some"[..]).await.unwrap();
                match what {
                    "whole" => feed.complete(place).await.unwrap(),
                    "not there" => feed.incomplete(place, "nobody answers").await.unwrap(),
                    _ => {}
                }
            }
        })
        .await;
        let searched: Vec<bool> = tally.places.iter().map(|place| place.searched).collect();
        assert_eq!(searched, [false, true, false]);
        assert_eq!(tally.places[2].why, ["nobody answers"]);
        assert_eq!(tally.bytes, 12);
    }
}
