//! What a search must find, wherever it stands and however it comes.

use data_encoding::{BASE64, BASE64URL_NOPAD, HEXUPPER};
use proptest::prelude::*;

use super::*;
use crate::inject;

fn named(name: &str) -> Sought {
    Sought::of_the_box(Kind::Platform, name)
}

fn search(secrets: &[&[u8]]) -> Search {
    let mut builder = Builder::default();
    for (at, secret) in secrets.iter().enumerate() {
        builder.add(named(&at.to_string()), &SecretValue::new(secret.to_vec()));
    }
    builder.build().unwrap()
}

/// What is found when the text comes in chunks of these sizes.
fn found(search: &Search, text: &[u8], sizes: &[usize]) -> Vec<Hit> {
    let mut reader = search.reader();
    feed(&mut reader, text, sizes);
    reader.finish()
}

fn feed(reader: &mut Reader, text: &[u8], sizes: &[usize]) {
    let mut rest = text;
    for size in sizes.iter().copied().chain(std::iter::repeat(7)) {
        if rest.is_empty() {
            return;
        }
        let (chunk, tail) = rest.split_at(size.clamp(1, rest.len()));
        reader.take(chunk);
        rest = tail;
    }
}

const SECRET: &[u8] = "s3cr3t/+\"\\ \u{e4}&=?%end".as_bytes();

fn encodings(secret: &[u8]) -> Vec<(Form, Vec<u8>)> {
    let text = String::from_utf8_lossy(secret).into_owned();
    let mut all = vec![
        (Form::Clear, secret.to_vec()),
        (Form::Hex, HEXUPPER.encode(secret).into_bytes()),
        (Form::Url, inject::encode(secret).into_bytes()),
        (
            Form::Json,
            format!("{text:?}").replace("\\u{e4}", "\u{e4}").into_bytes(),
        ),
    ];
    for before in 0..3 {
        let whole = [&b"xyz"[..before], secret, b"tail"].concat();
        all.push((Form::Base64, BASE64.encode(&whole).into_bytes()));
        all.push((Form::Base64, BASE64URL_NOPAD.encode(&whole).into_bytes()));
    }
    all
}

#[test]
fn every_form_is_found_by_name_form_and_offset_across_every_border() {
    let search = search(&[b"another-secret", SECRET]);
    for (form, bytes) in encodings(SECRET) {
        let around = [b"before ".as_slice(), &bytes, b" after"].concat();
        for border in 1..around.len() {
            let hits = found(&search, &around, &[border, around.len()]);
            let [hit] = hits[..] else {
                panic!("{form:?} at {border}: {hits:?}")
            };
            assert_eq!((hit.sought, hit.form), (1, form), "border at {border}");
            // Up to three characters of base64 also have bits of what is before.
            assert!((7..=10).contains(&hit.offset), "{form:?}: {}", hit.offset);
        }
    }
}

#[test]
fn what_spans_two_blocks_is_found_once_with_its_true_offset() {
    let search = search(&[SECRET]);
    for at in [BLOCK - SECRET.len() - 1, BLOCK - 3, BLOCK, 2 * BLOCK - 1, 3 * BLOCK + 5] {
        let mut text = vec![b'x'; 4 * BLOCK];
        text[at..at + SECRET.len()].copy_from_slice(SECRET);
        for size in [4 * BLOCK, 1000] {
            let hits = found(&search, &text, &vec![size; 4 * BLOCK / size + 1]);
            assert_eq!(hits.len(), 1, "at {at}");
            assert_eq!(hits[0].offset, at as u64);
        }
    }
}

#[test]
fn a_hole_in_a_file_costs_nothing_and_offsets_stay_true() {
    let search = search(&[SECRET]);
    let mut reader = search.reader();
    reader.take(b"start");
    reader.skip(1 << 50);
    reader.take(SECRET);
    assert_eq!(reader.finish()[0].offset, 5 + (1 << 50));
    // Whatever a hostile agent says of holes.
    reader.skip(u64::MAX);
    reader.skip(u64::MAX);
    reader.take(SECRET);
    assert_eq!(reader.finish().len(), 1);
    // A secret is not found in two halves with a hole between them.
    reader.take(&SECRET[..5]);
    reader.skip(1 << 20);
    reader.take(&SECRET[5..]);
    assert_eq!(reader.finish(), []);
}

#[test]
fn two_places_are_not_one() {
    let search = search(&[SECRET]);
    let mut reader = search.reader();
    reader.take(&SECRET[..9]);
    assert_eq!(reader.finish(), []);
    reader.take(&SECRET[9..]);
    assert_eq!(reader.finish(), []);
    reader.take(SECRET);
    assert_eq!(reader.finish().len(), 1);
}

#[test]
fn secrets_within_secrets_are_each_found() {
    let search = search(&[b"inner-secret-1", b"outer inner-secret-1 outer", b"inner-secret-1"]);
    let hits = found(&search, b"an outer inner-secret-1 outer", &[]);
    assert_eq!(hits.iter().map(|hit| hit.sought).collect::<Vec<_>>(), [0, 1, 2]);
}

#[test]
fn a_short_secret_is_named_as_one_that_is_not_looked_for() {
    let search = search(&[b"1234567", b"12345678"]);
    assert_eq!(search.sought(), [named("1")]);
    assert_eq!(search.unsought(), [(named("0"), Unsought::TooShort)]);
    assert_eq!(found(&search, b"1234567", &[]), []);
    assert_eq!(found(&search, b"12345678", &[]).len(), 1);
}

#[test]
fn nothing_to_look_for_finds_nothing() {
    assert_eq!(found(&search(&[]), b"anything", &[]), []);
}

fn long() -> Vec<u8> {
    let lines = (0..40).map(|n| format!("{n:02}-line-{:x}\n", u64::MAX / (n + 3)));
    lines.collect::<String>().into_bytes()
}

#[test]
fn a_long_secret_is_found_whole_or_half_and_not_by_what_others_have_in_common_with_it() {
    let secret = long();
    let search = search(&[&secret]);
    for (form, bytes) in encodings(&secret) {
        let hits = found(&search, &[b"before", &bytes[..], b"after"].concat(), &[1000; 9]);
        assert_eq!(hits.iter().map(|hit| hit.form).collect::<Vec<_>>(), [form]);
    }
    assert_eq!(found(&search, &secret[secret.len() / 3..], &[]).len(), 1);
    assert_eq!(found(&search, &secret[..secret.len() / 4], &[]), []);
}

#[test]
fn the_automaton_stays_small_with_as_many_secrets_as_a_user_may_have() {
    let secrets: Vec<Vec<u8>> = (0..1000u32)
        .map(|n| {
            [&n.to_be_bytes()[..], &[n as u8; 60], &n.to_le_bytes()[..]]
                .concat()
                .repeat(8)
        })
        .collect();
    let secrets: Vec<&[u8]> = secrets.iter().map(Vec::as_slice).collect();
    let search = search(&secrets);
    assert!(search.memory() < 256 << 20, "{}", search.memory());
    assert!(found(&search, secrets[500], &[]).iter().any(|hit| hit.sought == 500));
}

/// Prints what a search passes in a second: `cargo nextest run -p choir-broker bytes_a_second --run-ignored all`.
#[test]
#[ignore = "slow"]
fn bytes_a_second() {
    let noise: Vec<u8> = (0..64u32 << 20)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let text = b"fn main() { println!(\"hello, world\"); }\n".repeat((64 << 20) / 40);
    for count in [1, 20, 200, 1000] {
        let secrets: Vec<String> = (0..count)
            .map(|n: u64| format!("{:016x}-{:016x}", n * 7_919, u64::MAX / (n + 1)))
            .collect();
        let secrets: Vec<&[u8]> = secrets.iter().map(|secret| secret.as_bytes()).collect();
        let search = search(&secrets);
        for (what, bytes) in [("noise", &noise), ("text", &text)] {
            let begun = std::time::Instant::now();
            assert_eq!(found(&search, bytes, &[64 << 10; 1100]), []);
            let rate = bytes.len() as f64 / begun.elapsed().as_secs_f64() / 1e6;
            println!(
                "{count} secrets, {what}: {rate:.0} MB/s, automaton {} kB",
                search.memory() / 1000
            );
        }
    }
}

proptest! {
    #[test]
    fn any_secret_is_found_in_each_encoding_wherever_it_stands(
        secret in proptest::collection::vec(any::<u8>(), SHORTEST..700), before in proptest::collection::vec(any::<u8>(), 0..9),
        after in proptest::collection::vec(any::<u8>(), 0..9), sizes in proptest::collection::vec(1usize..300, 0..20),
    ) {
        let search = search(&[&secret]);
        let whole = [before.as_slice(), &secret, &after].concat();
        for text in [
            whole.clone(), BASE64.encode(&whole).into_bytes(), BASE64URL_NOPAD.encode(&whole).into_bytes(),
            HEXUPPER.encode(&whole).into_bytes(), inject::encode(&whole).into_bytes(),
        ] {
            prop_assert!(!found(&search, &text, &sizes).is_empty());
        }
    }

    #[test]
    fn nothing_is_found_where_there_is_nothing(
        secret in proptest::collection::vec(any::<u8>(), 12..400), text in proptest::collection::vec(any::<u8>(), 0..2000),
        sizes in proptest::collection::vec(1usize..300, 0..20),
    ) {
        prop_assert_eq!(found(&search(&[&secret]), &text, &sizes), []);
    }
}
