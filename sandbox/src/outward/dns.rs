//! The answers of a resolver that asks nobody: a public name gets an address of ours, any other does not exist. It must
//! not know what an address leads to. Whatever is asked stays in the sandbox.

use std::net::Ipv4Addr;

use choir_core::HostName;
use simple_dns::rdata::{OPT, RData};
use simple_dns::{CLASS, Name, OPCODE, Packet, PacketFlag, QCLASS, QTYPE, RCODE, ResourceRecord, TYPE, header_buffer};

use super::names::TTL;

/// The longest message that is read, and what we say we read (RFC 9715); a question has far less.
pub const MAX_MESSAGE: usize = 1232;

/// Top-level names that mean something nearby, or nothing: RFC 6761, 6762, 7686, 8375, 9476, and ICANN's `internal`.
const NOT_PUBLIC: [&str; 8] = [
    "alt",
    "arpa",
    "internal",
    "invalid",
    "local",
    "localhost",
    "onion",
    "test",
];

/// The reply to a message, or none to what is no question. `resolve` gives the address of a public name, or nothing
/// where there is none to spare.
pub fn answer(message: &[u8], resolve: impl FnMut(&str) -> Option<Ipv4Addr>) -> Option<Vec<u8>> {
    let id = header_buffer::id(message).ok()?;
    // A reply that were replied to would come back for ever.
    if header_buffer::has_flags(message, PacketFlag::RESPONSE).ok()? {
        return None;
    }
    let reply = match parsed(message) {
        Some(query) => reply(query, resolve),
        None => {
            let mut reply = Packet::new_reply(id);
            *reply.rcode_mut() = RCODE::FormatError;
            reply
        }
    };
    reply.build_bytes_vec_compressed().ok()
}

/// A question and no more. The counts come first: memory is set aside by what they say.
fn parsed(message: &[u8]) -> Option<Packet<'_>> {
    let count = |of: fn(&[u8]) -> simple_dns::Result<u16>| of(message).ok();
    let plain = count(header_buffer::questions)? == 1
        && count(header_buffer::answers)? == 0
        && count(header_buffer::name_servers)? == 0
        && count(header_buffer::additional_records)? <= 2;
    if !plain || message.len() > MAX_MESSAGE {
        return None;
    }
    Packet::parse(message).ok().filter(|packet| packet.questions.len() == 1)
}

fn reply<'a>(query: Packet<'a>, mut resolve: impl FnMut(&str) -> Option<Ipv4Addr>) -> Packet<'a> {
    let wants_recursion = query.has_flags(PacketFlag::RECURSION_DESIRED);
    let extended = query.opt().is_some();
    let mut reply = query.into_reply();
    reply.additional_records.clear();
    reply.set_flags(PacketFlag::RECURSION_AVAILABLE);
    if wants_recursion {
        reply.set_flags(PacketFlag::RECURSION_DESIRED);
    }
    if extended {
        *reply.opt_mut() = Some(OPT {
            opt_codes: Vec::new(),
            udp_packet_size: MAX_MESSAGE as u16,
            version: 0,
        });
    }
    let question = &reply.questions[0];
    let code = if reply.opcode() != OPCODE::StandardQuery {
        RCODE::NotImplemented
    } else if question.qclass != QCLASS::CLASS(CLASS::IN) {
        RCODE::Refused
    } else if let Some(name) = public(&question.qname) {
        // Other types have no answer rather than an error, so that programs go on to ask for this one.
        if question.qtype != QTYPE::TYPE(TYPE::A) {
            RCODE::NoError
        } else if let Some(address) = resolve(name.as_str()) {
            let data = RData::A(address.into());
            let record = ResourceRecord::new(question.qname.clone(), CLASS::IN, TTL, data);
            reply.answers.push(record);
            RCODE::NoError
        } else {
            RCODE::ServerFailure
        }
    } else {
        RCODE::NameError
    };
    *reply.rcode_mut() = code;
    reply
}

/// The name in lower case, where it can be one of a host on the internet. No way of writing an address is.
fn public(name: &Name) -> Option<HostName> {
    let mut text = String::new();
    for label in name.get_labels() {
        let label = std::str::from_utf8(label.as_ref()).ok()?;
        // In a message a dot may be part of a label.
        if label.contains('.') {
            return None;
        }
        if !text.is_empty() {
            text.push('.');
        }
        text.push_str(label);
    }
    text.make_ascii_lowercase();
    let last = text.rsplit('.').next()?;
    if NOT_PUBLIC.contains(&last) {
        return None;
    }
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use simple_dns::Question;

    use super::*;

    const GIVEN: Ipv4Addr = Ipv4Addr::new(127, 77, 1, 2);

    fn packet(name: &str, kind: QTYPE) -> Packet<'_> {
        let mut packet = Packet::new_query(7);
        packet.set_flags(PacketFlag::RECURSION_DESIRED);
        let class = CLASS::IN.into();
        packet
            .questions
            .push(Question::new(Name::new_unchecked(name), kind, class, false));
        packet
    }

    fn query(name: &str, kind: QTYPE) -> Vec<u8> {
        packet(name, kind).build_bytes_vec().unwrap()
    }

    /// The code, the addresses, and what the table was asked for.
    fn asked(message: &[u8]) -> (RCODE, Vec<Ipv4Addr>, Vec<String>) {
        let mut names = Vec::new();
        let reply = answer(message, |name| {
            names.push(name.to_owned());
            Some(GIVEN)
        });
        let reply = reply.expect("there is a reply");
        let reply = Packet::parse(&reply).unwrap();
        assert!(reply.has_flags(PacketFlag::RESPONSE) && reply.id() == 7);
        let addresses = reply.answers.iter().map(|record| match &record.rdata {
            RData::A(a) => Ipv4Addr::from(a.address),
            other => panic!("{other:?}"),
        });
        (reply.rcode(), addresses.collect(), names)
    }

    fn a(name: &str) -> (RCODE, Vec<Ipv4Addr>, Vec<String>) {
        asked(&query(name, TYPE::A.into()))
    }

    #[test]
    fn a_public_name_gets_its_address_in_any_case_of_letters() {
        for name in [
            "db.example.com",
            "DB.example.COM",
            "a_b.xn--bcher-kva.example",
            "3.pool.ntp.org",
        ] {
            let (code, addresses, names) = a(name);
            assert_eq!((code, addresses), (RCODE::NoError, vec![GIVEN]), "{name}");
            assert_eq!(names, [name.to_ascii_lowercase()]);
        }
    }

    #[test]
    fn what_is_no_public_name_does_not_exist_and_is_not_looked_up() {
        for name in [
            "box",
            "localhost",
            "a.localhost",
            "printer.local",
            "metadata.google.internal",
            "nas.home.arpa",
            "a.invalid",
            "a.test",
            "a.onion",
            "1.0.77.127.in-addr.arpa",
            "127.0.0.1",
            "0x7f.1",
            "a.0x7f",
            "a b.com",
            "a:1.com",
            "a/b.com",
            "a@b.com",
            "a\r\nb.com",
            "bücher.example",
            ".",
        ] {
            let (code, addresses, names) = a(name);
            assert_eq!(
                (code, addresses.len(), names.len()),
                (RCODE::NameError, 0, 0),
                "{name:?}"
            );
        }
    }

    #[test]
    fn other_types_of_a_public_name_have_no_answer_and_no_error() {
        for kind in [TYPE::AAAA, TYPE::TXT, TYPE::MX, TYPE::SRV, TYPE::HTTPS] {
            let (code, addresses, names) = asked(&query("db.example.com", kind.into()));
            assert_eq!((code, addresses.len(), names.len()), (RCODE::NoError, 0, 0));
        }
        let (code, ..) = asked(&query("localhost", TYPE::AAAA.into()));
        assert_eq!(code, RCODE::NameError);
    }

    #[test]
    fn without_an_address_to_spare_the_failure_is_temporary() {
        let reply = answer(&query("db.example.com", TYPE::A.into()), |_| None).unwrap();
        assert_eq!(Packet::parse(&reply).unwrap().rcode(), RCODE::ServerFailure);
    }

    #[test]
    fn the_reply_carries_the_question_and_what_was_wanted() {
        let mut packet = packet("Db.Example.com", TYPE::A.into());
        *packet.opt_mut() = Some(OPT {
            opt_codes: Vec::new(),
            udp_packet_size: 4096,
            version: 0,
        });
        let reply = answer(&packet.build_bytes_vec().unwrap(), |_| Some(GIVEN)).unwrap();
        let reply = Packet::parse(&reply).unwrap();
        assert_eq!(reply.questions[0].qname.to_string(), "Db.Example.com");
        assert!(reply.has_flags(PacketFlag::RECURSION_DESIRED | PacketFlag::RECURSION_AVAILABLE));
        assert_eq!(reply.opt().unwrap().udp_packet_size, 1232);
        assert_eq!(reply.answers[0].ttl, TTL);
    }

    #[test]
    fn what_is_no_plain_question_is_refused_or_ignored() {
        let question = query("db.example.com", TYPE::A.into());
        let changed = |at: usize, byte: u8| {
            let mut message = question.clone();
            message[at] = byte;
            message
        };
        assert_eq!(answer(&changed(2, 0x80), |_| Some(GIVEN)), None, "a reply");
        assert_eq!(answer(&question[..5], |_| Some(GIVEN)), None);
        for (what, message) in [
            ("cut", question[..20].to_vec()),
            ("two questions", changed(5, 2)),
            ("none", changed(5, 0)),
            ("an answer", changed(7, 1)),
            ("65,000 records", changed(10, 0xff)),
        ] {
            assert_eq!(asked(&message).0, RCODE::FormatError, "{what}");
        }
        assert_eq!(asked(&changed(2, 0x10)).0, RCODE::NotImplemented, "a status request");
        assert_eq!(asked(&changed(question.len() - 1, 3)).0, RCODE::Refused, "class CHAOS");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn no_bytes_panic_it_or_make_a_name_that_is_none(bytes in proptest::collection::vec(any::<u8>(), 0..1400)) {
            check(&bytes)?;
        }

        /// A question with some bytes changed gets further than noise does.
        #[test]
        fn nor_does_a_question_that_was_tampered_with(
            name in "[a-z.]{1,40}",
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..6),
        ) {
            let mut bytes = query(&name, TYPE::A.into());
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            check(&bytes)?;
        }
    }

    fn check(bytes: &[u8]) -> Result<(), TestCaseError> {
        let mut asked = Vec::new();
        let reply = answer(bytes, |name| {
            asked.push(name.to_owned());
            Some(GIVEN)
        });
        prop_assert!(asked.len() <= 1);
        for name in asked {
            prop_assert!(name.parse::<HostName>().is_ok(), "{}", name);
        }
        if let Some(reply) = reply {
            prop_assert!(Packet::parse(&reply).is_ok() && reply.len() <= MAX_MESSAGE);
        }
        Ok(())
    }
}
