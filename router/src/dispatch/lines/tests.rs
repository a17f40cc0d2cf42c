use baton_config::protocol::{FinishReason, TokenLogprob};
use proptest::prelude::*;

use super::*;

fn event() -> impl Strategy<Value = GenerateEvent> {
    let logprob = prop::option::of((-9.0f32..0.0, prop::collection::vec((any::<u32>(), -9.0f32..0.0), 0..3)));
    let token =
        (any::<u32>(), logprob, prop::option::of(any::<u64>())).prop_map(|(token, logprob, digest)| {
            let logprob = logprob.map(|(logprob, top)| TokenLogprob { logprob, top });
            GenerateEvent::Token { token, logprob, logits_digest: digest }
        });
    let plain =
        any::<u32>().prop_map(|token| GenerateEvent::Token { token, logprob: None, logits_digest: None });
    let finished = Just(GenerateEvent::Finished { reason: FinishReason::Stop });
    prop_oneof![token, plain, finished]
}

fn read_all(chunks: &[&[u8]]) -> Result<Vec<GenerateEvent>, LineError> {
    let mut lines = Lines::default();
    let mut events = Vec::new();
    for chunk in chunks {
        lines.push(chunk)?;
        while let Some(event) = lines.next_event()? {
            events.push(event);
        }
    }
    Ok(events)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn any_cutting_gives_the_same_events(
        events in prop::collection::vec(event(), 0..12),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let mut bytes = Vec::new();
        for event in &events {
            serde_json::to_writer(&mut bytes, event).unwrap();
            bytes.extend_from_slice(b"\r\n\n");
        }
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let chunks: Vec<&[u8]> = cuts.windows(2).map(|cut| &bytes[cut[0]..cut[1]]).collect();
        prop_assert_eq!(read_all(&chunks).unwrap(), events);
    }

    #[test]
    fn any_bytes_are_events_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = read_all(&[&bytes]);
    }

    #[test]
    fn the_short_way_reads_what_serde_reads(token in any::<u32>()) {
        let line = format!("{{\"event\":\"token\",\"token\":{token}}}");
        let read = plain_token(line.as_bytes());
        prop_assert!(read == Some(token) || token > 999_999_999);
        prop_assert_eq!(parse(line.as_bytes()).unwrap(), serde_json::from_str(&line).unwrap());
    }
}

#[test]
fn numbers_that_json_does_not_know_take_the_long_way_to_an_error() {
    for number in ["", "01", "-1", "+1", "1.0", "1e3", "99999999999", " 1"] {
        let line = format!("{{\"event\":\"token\",\"token\":{number}}}");
        assert_eq!(plain_token(line.as_bytes()), None, "{number:?}");
    }
    assert!(read_all(&[b"{\"event\":\"token\",\"token\":01}\n"]).is_err());
}

#[test]
fn a_line_without_end_is_refused() {
    let mut lines = Lines::default();
    let piece = vec![b'x'; 300_000];
    let refused = (0..5).find_map(|_| {
        let pushed = lines.push(&piece);
        lines.next_event().unwrap();
        pushed.err()
    });
    assert!(matches!(refused, Some(LineError::TooLong)));
}

#[test]
fn a_line_that_was_cut_off_is_noticed() {
    let mut lines = Lines::default();
    lines.push(b"{\"event\":\"token\",\"token\":1}\n{\"ev").unwrap();
    assert!(lines.next_event().unwrap().is_some());
    assert!(lines.next_event().unwrap().is_none());
    assert!(lines.is_mid_line());
}
