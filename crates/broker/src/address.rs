//! Which addresses a sandbox may be connected to, after its names were resolved. It must not resolve or dial.
//! Sources: the IANA special-purpose registries for IPv4 and IPv6 (RFC 6890), RFC 6052, 3056 and 4380.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// The rules of one box.
#[derive(Debug, Clone, Default)]
pub struct AddressPolicy {
    /// Networks allowed although they lie in a refused range. Loopback, link-local, unspecified, multicast and the
    /// box's own addresses stay refused.
    pub allow: Vec<IpNet>,
    /// The box's own addresses.
    pub own: Vec<IpAddr>,
}

/// Why an address is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{addr} is {why} ({range}) and may not be reached from a sandbox")]
pub struct Refusal {
    pub addr: IpAddr,
    /// The refused network, or the address itself where it is the box's own.
    pub range: String,
    pub why: &'static str,
}

/// A refused range.
struct Range {
    net: &'static str,
    why: &'static str,
    /// Whether `allow` may open a part of it.
    openable: bool,
}

const fn never(net: &'static str, why: &'static str) -> Range {
    Range {
        net,
        why,
        openable: false,
    }
}

const fn unless_allowed(net: &'static str, why: &'static str) -> Range {
    Range {
        net,
        why,
        openable: true,
    }
}

/// Ranges that no exception opens come first, so that they win over the wider ones around them.
const V4: [Range; 15] = [
    never("127.0.0.0/8", "a loopback address"),
    never(
        "169.254.0.0/16",
        "a link-local address, where clouds keep their metadata",
    ),
    never("0.0.0.0/8", "an unspecified address"),
    never("224.0.0.0/4", "a multicast address"),
    never("255.255.255.255/32", "the broadcast address"),
    unless_allowed("10.0.0.0/8", "a private address"),
    unless_allowed("172.16.0.0/12", "a private address"),
    unless_allowed("192.168.0.0/16", "a private address"),
    unless_allowed("100.64.0.0/10", "a carrier's internal address"),
    unless_allowed("192.0.0.0/24", "a protocol assignment"),
    unless_allowed("192.0.2.0/24", "a documentation address"),
    unless_allowed("198.51.100.0/24", "a documentation address"),
    unless_allowed("203.0.113.0/24", "a documentation address"),
    unless_allowed("198.18.0.0/15", "a benchmarking address"),
    unless_allowed("240.0.0.0/4", "a reserved address"),
];

const V6: [Range; 13] = [
    never("::/128", "an unspecified address"),
    never("::1/128", "a loopback address"),
    never("fe80::/10", "a link-local address"),
    never("ff00::/8", "a multicast address"),
    never("fd00:ec2::/32", "where a cloud keeps its metadata"),
    never("fd20:ce::/32", "where a cloud keeps its metadata"),
    unless_allowed("fc00::/7", "a private address"),
    unless_allowed("fec0::/10", "a private address"),
    unless_allowed("100::/64", "a discard address"),
    unless_allowed("2001::/23", "a protocol assignment"),
    unless_allowed("2001:db8::/32", "a documentation address"),
    unless_allowed("3fff::/20", "a documentation address"),
    unless_allowed("64:ff9b:1::/48", "a local translation address"),
];

impl AddressPolicy {
    /// Whether this address may be dialled.
    pub fn check(&self, addr: IpAddr) -> Result<(), Refusal> {
        let refusal = |range: String, why| Refusal { addr, range, why };
        let inner = match addr {
            IpAddr::V6(v6) => embedded(v6),
            IpAddr::V4(_) => None,
        };
        if [Some(addr), inner].into_iter().flatten().any(|a| self.is_own(a)) {
            return Err(refusal(addr.to_string(), "an address of this box itself"));
        }
        if let Some(inner) = inner {
            return self.check(inner).map_err(|r| refusal(r.range, r.why));
        }
        let table: &[Range] = match addr {
            IpAddr::V4(_) => &V4,
            IpAddr::V6(_) => &V6,
        };
        let allowed = self.allow.iter().any(|net| net.contains(&addr));
        let refused = table
            .iter()
            .filter(|range| !(allowed && range.openable))
            .find(|range| contains(range.net, addr));
        refused.map_or(Ok(()), |range| Err(refusal(range.net.to_owned(), range.why)))
    }

    /// Of the addresses a name resolved to, those that may be dialled. A name that leads to none is refused for its
    /// first address. Dial what this returns and resolve no second time.
    pub fn pick(&self, addrs: &[IpAddr]) -> Result<Vec<IpAddr>, Refusal> {
        let mut picked = Vec::new();
        let mut first = None;
        for addr in addrs {
            match self.check(*addr) {
                Ok(()) => picked.push(*addr),
                Err(refusal) => first = first.or(Some(refusal)),
            }
        }
        match first {
            Some(refusal) if picked.is_empty() => Err(refusal),
            _ => Ok(picked),
        }
    }

    fn is_own(&self, addr: IpAddr) -> bool {
        self.own.iter().any(|own| own.to_canonical() == addr.to_canonical())
    }
}

fn contains(net: &str, addr: IpAddr) -> bool {
    net.parse::<IpNet>().is_ok_and(|net| net.contains(&addr))
}

/// The IPv4 address that a translator or tunnel would send this to.
fn embedded(addr: Ipv6Addr) -> Option<IpAddr> {
    let bits = u128::from(addr);
    // The cast keeps the 32 bits wanted.
    let low = |shift: u32| Ipv4Addr::from((bits >> shift) as u32);
    let v4 = match addr.segments() {
        // `::` and `::1` are themselves.
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => return None,
        // Mapped and compatible, and the translated form of RFC 2765.
        [0, 0, 0, 0, 0, 0 | 0xffff, ..] | [0, 0, 0, 0, 0xffff, 0, ..] => low(0),
        // NAT64.
        [0x64, 0xff9b, 0, 0, 0, 0, ..] => low(0),
        // 6to4.
        [0x2002, ..] => low(80),
        // Teredo: the client's address, inverted.
        [0x2001, 0, ..] => Ipv4Addr::from(!(bits as u32)),
        _ => return None,
    };
    Some(v4.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn every_table_entry_is_a_network() {
        for range in V4.iter().chain(&V6) {
            let net: IpNet = range.net.parse().unwrap();
            assert_eq!(net, net.trunc(), "{}", range.net);
        }
    }

    #[test]
    fn addresses_that_are_not_the_internet_are_refused() {
        let policy = AddressPolicy {
            own: vec![ip("3.3.3.3"), ip("2600:1::7")],
            ..Default::default()
        };
        for refused in [
            "127.0.0.1",
            "127.255.255.254",
            "10.1.2.3",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.0.1",
            "169.254.169.254",
            "169.254.170.2",
            "100.64.0.1",
            "100.127.255.255",
            "0.0.0.0",
            "0.1.2.3",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "192.0.2.1",
            "198.51.100.1",
            "203.0.113.1",
            "198.18.0.1",
            "198.19.255.255",
            "3.3.3.3",
            "::",
            "::1",
            "fe80::1",
            "febf::1",
            "fc00::1",
            "fd00:ec2::254",
            "ff02::1",
            "2001:db8::1",
            "2600:1::7",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::127.0.0.1",
            "::ffff:0:10.0.0.1",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::a00:1",
            "2002:7f00:1::",
            "2002:a9fe:a9fe::1",
            "2001:0:1:2:3:4:80ff:fffe",
            "::ffff:3.3.3.3",
            "64:ff9b::303:303",
        ] {
            assert!(policy.check(ip(refused)).is_err(), "{refused}");
        }
        for fine in [
            "1.1.1.1",
            "8.8.8.8",
            "172.15.255.255",
            "172.32.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "198.17.255.255",
            "198.20.0.0",
            "2606:4700::1111",
            "64:ff9b::808:808",
            "::ffff:8.8.8.8",
            "2002:808:808::1",
        ] {
            assert_eq!(policy.check(ip(fine)), Ok(()), "{fine}");
        }
    }

    #[test]
    fn an_exception_opens_private_ranges_and_never_the_box() {
        let policy = AddressPolicy {
            allow: vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()],
            own: vec![ip("10.0.0.5")],
        };
        for open in [
            "10.0.0.6",
            "192.0.2.1",
            "100.64.0.1",
            "fc00::1",
            "2001:db8::1",
            "::ffff:10.0.0.6",
        ] {
            assert_eq!(policy.check(ip(open)), Ok(()), "{open}");
        }
        for shut in [
            "127.0.0.1",
            "169.254.169.254",
            "0.0.0.0",
            "255.255.255.255",
            "224.0.0.1",
            "::1",
            "::",
            "fe80::1",
            "fd00:ec2::254",
            "10.0.0.5",
            "::ffff:10.0.0.5",
            "::ffff:127.0.0.1",
            "64:ff9b::7f00:1",
        ] {
            assert!(policy.check(ip(shut)).is_err(), "{shut}");
        }
        let narrow = AddressPolicy {
            allow: vec!["10.1.0.0/16".parse().unwrap()],
            ..Default::default()
        };
        assert_eq!(narrow.check(ip("10.1.0.1")), Ok(()));
        assert_eq!(narrow.check(ip("10.2.0.1")).unwrap_err().range, "10.0.0.0/8");
    }

    #[test]
    fn only_addresses_that_pass_are_picked() {
        let policy = AddressPolicy::default();
        assert_eq!(policy.pick(&[ip("127.0.0.1"), ip("1.1.1.1")]), Ok(vec![ip("1.1.1.1")]));
        assert_eq!(
            policy.pick(&[ip("10.0.0.1"), ip("::1")]).unwrap_err().addr,
            ip("10.0.0.1")
        );
        assert_eq!(policy.pick(&[]), Ok(vec![]));
    }

    /// The same rules, written a second time with the standard library's and plain comparisons.
    fn plainly_refused(addr: Ipv4Addr) -> bool {
        let [a, b, c, _] = addr.octets();
        addr.is_loopback()
            || addr.is_private()
            || addr.is_link_local()
            || addr.is_documentation()
            || addr.is_multicast()
            || addr.is_broadcast()
            || a == 0
            || a >= 240
            || (a == 100 && (64..128).contains(&b))
            || (a == 198 && (b == 18 || b == 19))
            || (a == 192 && b == 0 && c == 0)
    }

    /// Mostly the neighbourhood of interesting ranges.
    fn v4() -> impl Strategy<Value = Ipv4Addr> {
        let first = prop_oneof![
            any::<u8>(),
            proptest::sample::select(vec![0, 10, 100, 127, 169, 172, 192, 198, 203, 224, 240])
        ];
        let second = prop_oneof![
            any::<u8>(),
            proptest::sample::select(vec![0, 15, 16, 18, 19, 31, 51, 63, 64, 127, 168, 254])
        ];
        (
            first,
            second,
            prop_oneof![any::<u8>(), Just(0), Just(2), Just(100), Just(113)],
            any::<u8>(),
        )
            .prop_map(|(a, b, c, d)| Ipv4Addr::new(a, b, c, d))
    }

    proptest! {
        #[test]
        fn v4_agrees_with_an_independent_table(addr in v4()) {
            prop_assert_eq!(AddressPolicy::default().check(addr.into()).is_err(), plainly_refused(addr));
        }

        #[test]
        fn wrapping_an_address_in_v6_changes_nothing(addr in v4(), junk: u64) {
            let [a, b, c, d] = addr.octets();
            let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
            let junk: [u16; 4] = std::array::from_fn(|i| (junk >> (16 * i)) as u16);
            let refused = plainly_refused(addr);
            for wrapped in [
                Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, high, low),
                Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, low),
                Ipv6Addr::new(0x2002, high, low, junk[0], junk[1], junk[2], junk[3], 1),
                Ipv6Addr::new(0x2001, 0, junk[0], junk[1], junk[2], junk[3], !high, !low),
            ] {
                prop_assert_eq!(AddressPolicy::default().check(wrapped.into()).is_err(), refused, "{}", wrapped);
            }
        }

        #[test]
        fn what_is_picked_passes(addrs in proptest::collection::vec(v4().prop_map(IpAddr::from), 0..6)) {
            let policy = AddressPolicy::default();
            if let Ok(picked) = policy.pick(&addrs) {
                prop_assert!(picked.iter().all(|a| policy.check(*a).is_ok()));
            }
        }
    }
}
