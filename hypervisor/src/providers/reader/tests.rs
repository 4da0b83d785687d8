//! Recorded answers of each API, parted at every byte, and streams that nobody recorded.

use proptest::prelude::*;

use super::*;

/// What passes, and what was learned, when an answer comes in pieces parted at these places.
fn read(mut reader: Reader, text: &[u8], borders: &[usize]) -> (Vec<u8>, Usage) {
    let mut passed = Vec::new();
    let mut from = 0;
    for border in borders.iter().copied().chain([text.len()]) {
        passed.extend(reader.take(&text[from..border]));
        from = border;
    }
    passed.extend(reader.finish());
    (passed, reader.usage())
}

fn tokens(input: u64, cached: u64, output: u64) -> Tokens {
    Tokens { input, cached, output }
}

const CHAT: &str = "data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}],\"usage\":null}\n\n\
                    data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"\\\"usage\\\":{}\"}}],\"usage\":null}\n\n\
                    data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}],\"usage\":null}\n\n";
const CHAT_USAGE: &str = "data: {\"id\":\"c\",\"choices\":[],\"usage\":{\"prompt_tokens\":19,\"completion_tokens\":10,\"total_tokens\":29,\
                          \"prompt_tokens_details\":{\"cached_tokens\":8,\"audio_tokens\":0}}}\n\n";
const DONE: &str = "data: [DONE]\n\n";

const RESPONSES: &str = "event: response.created\n\
                         data: {\"type\":\"response.created\",\"response\":{\"id\":\"r\",\"instructions\":\"{\\\"usage\\\":1}\",\"usage\":null}}\n\n\
                         event: response.output_text.delta\n\
                         data: {\"type\":\"response.output_text.delta\",\"delta\":\"Hi\"}\n\n\
                         event: response.completed\n\
                         data: {\"type\":\"response.completed\",\"response\":{\"id\":\"r\",\"output\":[{\"usage\":{\"input_tokens\":999}}],\
                         \"usage\":{\"input_tokens\":37,\"input_tokens_details\":{\"cached_tokens\":5},\"output_tokens\":11,\"total_tokens\":48}}}\n\n";

const MESSAGES: &str = "event: message_start\n\
                        data: {\"type\":\"message_start\",\"message\":{\"id\":\"m\",\"content\":[],\"usage\":{\"input_tokens\":25,\
                        \"cache_creation_input_tokens\":3,\"cache_read_input_tokens\":100,\"output_tokens\":1}}}\n\n\
                        event: ping\ndata: {\"type\": \"ping\"}\n\n\
                        event: content_block_delta\n\
                        data: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"Hello\"}}\n\n\
                        event: message_delta\n\
                        data: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":15}}\n\n\
                        event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";

#[test]
fn each_stream_is_counted_rightly_and_passes_unchanged_wherever_it_is_parted() {
    let chat = [CHAT, CHAT_USAGE, DONE].concat();
    for (stream, counted) in [
        (chat.as_str(), tokens(19, 8, 10)),
        (RESPONSES, tokens(37, 5, 11)),
        (MESSAGES, tokens(128, 100, 15)),
    ] {
        for end in ["\n", "\r\n", "\r"] {
            let stream = stream.replace('\n', end);
            for border in 0..=stream.len() {
                let (passed, usage) = read(Reader::events(false), stream.as_bytes(), &[border]);
                assert_eq!(String::from_utf8(passed).unwrap(), stream, "parted at {border}");
                assert_eq!(usage.tokens(), counted, "parted at {border} with {end:?}: {stream}");
            }
        }
    }
}

#[test]
fn the_event_that_nobody_asked_for_is_left_out_and_counted_wherever_it_is_parted() {
    for end in ["\n", "\r\n", "\r"] {
        let [stream, rest] = [[CHAT, CHAT_USAGE, DONE].concat(), [CHAT, DONE].concat()].map(|it| it.replace('\n', end));
        for border in 0..=stream.len() {
            let (passed, usage) = read(Reader::events(true), stream.as_bytes(), &[border]);
            assert_eq!(String::from_utf8(passed).unwrap(), rest, "parted at {border}");
            assert_eq!(usage.tokens(), tokens(19, 8, 10));
            // The control: who asked for it has it.
            let (passed, _) = read(Reader::events(false), stream.as_bytes(), &[border]);
            assert_eq!(passed, stream.as_bytes());
        }
    }
}

#[test]
fn every_event_passes_when_its_last_byte_has_come() {
    for uninvited in [false, true] {
        let mut reader = Reader::events(uninvited);
        for event in CHAT.split_inclusive("\n\n") {
            let (all_but_last, last) = event.as_bytes().split_at(event.len() - 1);
            let mut passed = reader.take(all_but_last);
            assert!(!uninvited || passed.is_empty());
            passed.extend(reader.take(last));
            assert_eq!(String::from_utf8(passed).unwrap(), event);
        }
    }
}

#[test]
fn an_event_with_choices_or_without_usage_is_never_left_out() {
    let kept = "data: {\"choices\":[],\"prompt_filter_results\":[]}\n\n: still here\n\n\
                data: {\"choices\":[{\"index\":0}],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":1}}\n\n\
                data: {\"choices\":[],\"usage\":null}\n\ndata: {\"error\":{\"message\":\"over\"}}\n\ndata: {\"choices\":[],\"usage\":{\"p";
    let (passed, _) = read(Reader::events(true), kept.as_bytes(), &[70]);
    assert_eq!(String::from_utf8(passed).unwrap(), kept);
}

#[test]
fn an_event_of_any_length_passes_and_little_of_it_is_kept() {
    let mut reader = Reader::events(true);
    let mut passed = reader.take(b"data: {\"choices\":[{\"delta\":{\"content\":\"");
    for _ in 0..1000 {
        passed.extend(reader.take(&[b'a'; 1000]));
        let Reader::Events(events) = &reader else {
            unreachable!()
        };
        assert!(events.kept.len() <= KEPT_BACK + 1000);
    }
    passed.extend(reader.take(b"\"}}]}\n\n"));
    assert_eq!(passed.len(), 39 + 1_000_000 + 7);
    assert_eq!(reader.take(CHAT_USAGE.as_bytes()), b"");
}

#[test]
fn plain_answers_are_counted_and_pass_unchanged_wherever_they_are_parted() {
    for (text, counted) in [
        (
            "{\"choices\":[{\"message\":{\"content\":\"hi\",\"usage\":{\"prompt_tokens\":900}}}],\"usage\":{\"prompt_tokens\":9,\
             \"completion_tokens\":12,\"total_tokens\":21,\"prompt_tokens_details\":{\"cached_tokens\":0}}}",
            tokens(9, 0, 12),
        ),
        (
            "{\"object\":\"list\",\"data\":[{\"embedding\":[0.1,-2e-3]}],\"usage\":{\"prompt_tokens\":5,\"total_tokens\":5}}\n",
            tokens(5, 0, 0),
        ),
        (
            "{\"type\":\"message\",\"content\":[],\"usage\":{\"input_tokens\":10,\"cache_read_input_tokens\":7,\"output_tokens\":4,\
             \"cache_creation_input_tokens\":null}}",
            tokens(17, 7, 4),
        ),
        ("{\"error\":{\"message\":\"no\"}}", tokens(0, 0, 0)),
        ("{\"usage\":{\"prompt_tokens\":-1}}", tokens(0, 0, 0)),
        ("not JSON", tokens(0, 0, 0)),
    ] {
        for border in 0..=text.len() {
            let (passed, usage) = read(Reader::text(), text.as_bytes(), &[border]);
            assert_eq!(
                (passed.as_slice(), usage.tokens()),
                (text.as_bytes(), counted),
                "parted at {border}"
            );
        }
    }
}

#[test]
fn a_stream_that_breaks_off_is_counted_as_far_as_it_came() {
    let cut = MESSAGES.find("event: message_delta").unwrap();
    let (_, usage) = read(Reader::events(false), &MESSAGES.as_bytes()[..cut], &[]);
    assert_eq!((usage.tokens(), usage.input()), (tokens(128, 100, 1), Some(128)));
    let (_, usage) = read(Reader::events(true), CHAT.as_bytes(), &[]);
    assert_eq!((usage.input(), usage.pieces), (None, 3));
}

proptest! {
    #[test]
    fn whatever_comes_in_whatever_pieces_passes_but_for_the_one_event(
        parts in proptest::collection::vec(0usize..8, 0..12), end in prop::sample::select(vec!["\n", "\r\n", "\r"]),
        borders in proptest::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let texts = [
            CHAT, DONE, ": ping\n\n", "\n", "data:\ndata: {\"a\":\n\n", "event: x\nid: 3\n\n", "retry: 1\ndata: {\"choices\":[ ]}\n\n", CHAT_USAGE,
        ];
        let text = |usage: bool| -> String {
            let kept = parts.iter().filter(|which| usage || **which != 7);
            kept.map(|which| texts[*which].replace('\n', end)).collect()
        };
        let (stream, rest) = (text(true), text(false));
        let mut borders: Vec<usize> = borders.iter().map(|at| at.index(stream.len() + 1)).collect();
        borders.sort_unstable();
        let (passed, usage) = read(Reader::events(false), stream.as_bytes(), &borders);
        prop_assert_eq!(passed, stream.as_bytes());
        let asked = parts.contains(&7);
        prop_assert_eq!(usage.input(), asked.then_some(19));
        let (passed, usage) = read(Reader::events(true), stream.as_bytes(), &borders);
        prop_assert_eq!(String::from_utf8(passed).unwrap(), rest);
        prop_assert_eq!(usage.input(), asked.then_some(19));
    }

    #[test]
    fn no_bytes_are_lost_or_added_where_nothing_is_left_out(
        bytes in proptest::collection::vec(any::<u8>(), 0..300), border in any::<prop::sample::Index>(), uninvited in any::<bool>(),
    ) {
        let border = border.index(bytes.len() + 1);
        let (passed, _) = read(Reader::events(uninvited), &bytes, &[border]);
        prop_assert_eq!(passed, bytes);
    }
}
