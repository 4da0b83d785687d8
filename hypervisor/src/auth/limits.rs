//! A bucket of requests per peer, by the injected clock. It must not know what the requests are.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Mutex;

use jiff::Timestamp;

/// Peers that are remembered at once; the fullest buckets are forgotten first.
const PEERS: usize = 10_000;

pub(super) struct Limiter {
    /// How many requests a peer may make at once.
    burst: f64,
    /// How many more each second.
    per_s: f64,
    buckets: Mutex<HashMap<IpAddr, (f64, Timestamp)>>,
}

impl Limiter {
    pub fn new(burst: f64, per_s: f64) -> Self {
        Self {
            burst,
            per_s,
            buckets: Mutex::default(),
        }
    }

    /// Takes one request, or tells after how many seconds there is one.
    pub fn take(&self, peer: IpAddr, now: Timestamp) -> Result<(), u64> {
        let mut buckets = self.buckets.lock().expect("no holder of this lock panics");
        if buckets.len() >= PEERS {
            buckets.retain(|_, bucket| self.filled(*bucket, now) < self.burst);
            if buckets.len() >= PEERS {
                buckets.clear();
            }
        }
        let bucket = buckets.entry(network(peer)).or_insert((self.burst, now));
        let left = self.filled(*bucket, now);
        let allowed = left >= 1.0;
        *bucket = (if allowed { left - 1.0 } else { left }, now);
        if allowed {
            Ok(())
        } else {
            Err(((1.0 - left) / self.per_s).ceil() as u64)
        }
    }

    fn filled(&self, (left, at): (f64, Timestamp), now: Timestamp) -> f64 {
        let seconds = now.duration_since(at).as_secs_f64().max(0.0);
        (left + seconds * self.per_s).min(self.burst)
    }
}

/// An IPv6 customer has at least a /64, so that is one peer.
fn network(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6) & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::SignedDuration;

    #[test]
    fn a_peer_that_used_its_burst_waits_and_others_do_not() {
        let limiter = Limiter::new(2.0, 0.5);
        let (one, two) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        let now = Timestamp::UNIX_EPOCH;
        assert_eq!(limiter.take(one, now), Ok(()));
        assert_eq!(limiter.take(one, now), Ok(()));
        assert_eq!(limiter.take(one, now), Err(2));
        assert_eq!(limiter.take(two, now), Ok(()));
        assert_eq!(limiter.take(one, now + SignedDuration::from_secs(2)), Ok(()));
    }

    #[test]
    fn addresses_of_one_ipv6_network_are_one_peer() {
        let limiter = Limiter::new(1.0, 1.0);
        let now = Timestamp::UNIX_EPOCH;
        assert!(limiter.take("2001:db8::1".parse().unwrap(), now).is_ok());
        assert!(limiter.take("2001:db8::2".parse().unwrap(), now).is_err());
        assert!(limiter.take("2001:db8:0:1::1".parse().unwrap(), now).is_ok());
    }
}
