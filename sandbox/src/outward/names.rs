//! Which name a synthetic address stands for, and when that ends. It must not open anything: time comes in, and what is
//! to be opened and closed goes out.
//!
//! Addresses are handed out in turn through the whole block. So one that a program still remembers comes to mean another
//! name only after as many others as the block has.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

/// The block, 127.77.0.0/16: local in every network namespace, and nobody's habit.
const BLOCK: [u8; 2] = [127, 77];
/// How long an answer may be remembered, in seconds.
pub const TTL: u32 = 15;
/// How long after its last use a name keeps its doors open. Longer than a Java machine remembers an answer (30 s); as
/// short as somebody waits who wants one of the ports on every address.
pub const IDLE: Duration = Duration::from_secs(60);
/// A name that was asked for within this time does not give way to another: whoever asked has not connected yet.
const FRESH: Duration = Duration::from_secs(5);

/// The names that have an address, at most `bound`.
#[derive(Debug)]
pub struct Names {
    entries: Vec<Entry>,
    bound: usize,
    /// The next address to try, as its place in the block.
    next: u16,
}

#[derive(Debug)]
struct Entry {
    name: Arc<str>,
    address: Ipv4Addr,
    used: Instant,
    /// Connections that go on.
    open: usize,
    /// Whether somebody listens on the address.
    doors: bool,
}

/// The address of a name, and what must follow from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    pub address: Ipv4Addr,
    pub name: Arc<str>,
    /// Nobody listens there yet.
    pub open_doors: bool,
    /// The address of a name that gave way.
    pub close_doors: Option<Ipv4Addr>,
}

impl Names {
    pub fn new(bound: usize) -> Self {
        Self {
            entries: Vec::new(),
            bound,
            next: 1,
        }
    }

    /// Nothing where all that there may be are in use.
    pub fn ask(&mut self, name: &str, now: Instant) -> Option<Given> {
        if let Some(entry) = self.entries.iter_mut().find(|e| *e.name == *name) {
            entry.used = now;
            return Some(Given {
                address: entry.address,
                name: Arc::clone(&entry.name),
                open_doors: !std::mem::replace(&mut entry.doors, true),
                close_doors: None,
            });
        }
        let close_doors = if self.entries.len() < self.bound {
            None
        } else {
            Some(self.make_room(now)?)
        };
        let address = self.next_address();
        let name: Arc<str> = name.into();
        self.entries.push(Entry {
            name: Arc::clone(&name),
            address,
            used: now,
            open: 0,
            doors: true,
        });
        Some(Given {
            address,
            name,
            open_doors: true,
            close_doors,
        })
    }

    /// Forgets the name that nobody has used for the longest time.
    fn make_room(&mut self, now: Instant) -> Option<Ipv4Addr> {
        let idle = self.entries.iter().enumerate().filter(|(_, e)| e.open == 0);
        let (place, _) = idle
            .min_by_key(|(_, e)| e.used)
            .filter(|(_, e)| e.used + FRESH <= now)?;
        Some(self.entries.swap_remove(place).address)
    }

    /// The next that no name has; there are more than there may be names.
    fn next_address(&mut self) -> Ipv4Addr {
        loop {
            let [high, low] = self.next.to_be_bytes();
            let address = Ipv4Addr::new(BLOCK[0], BLOCK[1], high, low);
            // The first and the last of a block are nobody's by custom.
            self.next = if self.next == u16::MAX - 1 { 1 } else { self.next + 1 };
            if !self.entries.iter().any(|e| e.address == address) {
                return address;
            }
        }
    }

    /// A connection to an address begins, which therefore keeps its name until `closed`.
    pub fn opened(&mut self, address: Ipv4Addr, now: Instant) {
        if let Some(entry) = self.entry(address) {
            entry.open += 1;
            entry.used = now;
        }
    }

    pub fn closed(&mut self, address: Ipv4Addr, now: Instant) {
        if let Some(entry) = self.entry(address) {
            entry.open -= 1;
            entry.used = now;
        }
        self.entries.retain(|e| e.doors || e.open > 0);
    }

    fn entry(&mut self, address: Ipv4Addr) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|e| e.address == address)
    }

    /// When `expire` has something to say next.
    pub fn next_expiry(&self) -> Option<Instant> {
        let open = self.entries.iter().filter(|e| e.doors);
        open.map(|e| e.used + IDLE).min()
    }

    /// The addresses whose doors are to be closed. A name whose connections go on keeps its address all the same.
    pub fn expire(&mut self, now: Instant) -> Vec<Ipv4Addr> {
        let mut closed = Vec::new();
        for entry in self.entries.iter_mut().filter(|e| e.doors && e.used + IDLE <= now) {
            entry.doors = false;
            closed.push(entry.address);
        }
        self.entries.retain(|e| e.doors || e.open > 0);
        closed
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn asked(names: &mut Names, name: &str, now: Instant) -> Ipv4Addr {
        names.ask(name, now).expect("there is room").address
    }

    #[test]
    fn a_name_keeps_its_address_and_its_doors_are_opened_once() {
        let (mut names, now) = (Names::new(4), Instant::now());
        let first = names.ask("a.example", now).unwrap();
        assert!(first.open_doors && first.address == Ipv4Addr::new(127, 77, 0, 1));
        let again = names.ask("a.example", now + TICK).unwrap();
        assert_eq!((again.address, again.open_doors), (first.address, false));
        assert_ne!(asked(&mut names, "b.example", now), first.address);
    }

    #[test]
    fn an_unused_name_closes_its_doors_and_comes_back_at_another_address() {
        let (mut names, now) = (Names::new(4), Instant::now());
        let first = asked(&mut names, "a.example", now);
        assert_eq!(names.next_expiry(), Some(now + IDLE));
        assert!(names.expire(now + IDLE - TICK).is_empty());
        assert_eq!(names.expire(now + IDLE), [first]);
        assert_eq!(names.next_expiry(), None);
        let again = names.ask("a.example", now + IDLE).unwrap();
        assert!(again.open_doors && again.address != first);
    }

    #[test]
    fn a_connection_keeps_the_address_while_the_doors_close() {
        let (mut names, now) = (Names::new(4), Instant::now());
        let first = asked(&mut names, "a.example", now);
        names.opened(first, now);
        assert_eq!(names.expire(now + IDLE), [first]);
        let again = names.ask("a.example", now + IDLE).unwrap();
        assert_eq!((again.address, again.open_doors), (first, true));
        names.expire(now + IDLE * 2);
        names.closed(first, now + IDLE * 2);
        assert_ne!(asked(&mut names, "a.example", now + IDLE * 2), first);
    }

    #[test]
    fn at_the_bound_the_longest_unused_gives_way_and_what_is_in_use_or_fresh_does_not() {
        let (mut names, now) = (Names::new(2), Instant::now());
        let used = asked(&mut names, "used.example", now);
        names.opened(used, now);
        let idle = asked(&mut names, "idle.example", now + TICK);
        assert_eq!(names.ask("c.example", now + FRESH), None, "both may still be wanted");
        let c = names.ask("c.example", now + FRESH + TICK).unwrap();
        assert_eq!(c.close_doors, Some(idle));
        assert_eq!(asked(&mut names, "used.example", now + FRESH + TICK), used);
    }

    const TICK: Duration = Duration::from_secs(1);

    #[derive(Debug, Clone)]
    enum Step {
        Ask(u8),
        Open(u8),
        Close(u8),
        Wait(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..12_u8).prop_map(Step::Ask),
            (0..12_u8).prop_map(Step::Open),
            (0..12_u8).prop_map(Step::Close),
            (0..40_u8).prop_map(Step::Wait),
        ]
    }

    proptest! {
        /// Doors as somebody outside would keep them, connections as a program would: no address with either ever
        /// means another name, and the bound holds.
        #[test]
        fn an_address_in_use_means_one_name(steps in proptest::collection::vec(step(), 1..200), next in any::<u16>()) {
            const BOUND: usize = 5;
            let mut names = Names::new(BOUND);
            names.next = next.clamp(1, u16::MAX - 1);
            let mut now = Instant::now();
            let mut doors: HashMap<Ipv4Addr, Arc<str>> = HashMap::new();
            let mut connections: Vec<(Ipv4Addr, Arc<str>)> = Vec::new();
            for step in steps {
                match step {
                    Step::Ask(n) => {
                        let name = format!("{n}.example");
                        let Some(given) = names.ask(&name, now) else {
                            prop_assert!(names.entries.len() == BOUND);
                            continue;
                        };
                        prop_assert!(given.address.octets()[..2] == BLOCK && *given.name == *name);
                        if let Some(closed) = given.close_doors {
                            doors.remove(&closed);
                            prop_assert!(connections.iter().all(|(at, _)| *at != closed));
                        }
                        if given.open_doors {
                            prop_assert!(doors.insert(given.address, Arc::clone(&given.name)).is_none());
                        }
                        prop_assert_eq!(&doors[&given.address], &given.name);
                        prop_assert!(connections.iter().all(|(at, of)| (*at == given.address) <= (*of == given.name)));
                    }
                    Step::Open(n) => {
                        let name = format!("{n}.example");
                        if let Some((at, of)) = doors.iter().find(|(_, of)| ***of == *name) {
                            names.opened(*at, now);
                            connections.push((*at, Arc::clone(of)));
                        }
                    }
                    Step::Close(n) => {
                        if !connections.is_empty() {
                            let (at, _) = connections.swap_remove(usize::from(n) % connections.len());
                            names.closed(at, now);
                        }
                    }
                    Step::Wait(seconds) => {
                        now += TICK * u32::from(seconds);
                        for closed in names.expire(now) {
                            prop_assert!(doors.remove(&closed).is_some());
                        }
                        prop_assert!(names.next_expiry().is_none_or(|at| at > now));
                    }
                }
                prop_assert!(names.entries.len() <= BOUND && doors.len() <= BOUND);
            }
        }
    }
}
