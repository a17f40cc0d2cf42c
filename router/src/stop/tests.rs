use proptest::prelude::*;

use super::*;

/// Reads character by character and ends as soon as the text ends in a stop string, which is cut off.
fn plainly(text: &str, stops: &[String]) -> (String, bool) {
    let mut read = String::new();
    for c in text.chars() {
        read.push(c);
        let longest = stops.iter().filter(|stop| read.ends_with(stop.as_str())).map(String::len).max();
        if let Some(len) = longest {
            read.truncate(read.len() - len);
            return (read, true);
        }
    }
    (read, false)
}

fn streamed(pieces: &[String], stops: &[String]) -> (Vec<String>, bool) {
    let mut matcher = StopMatcher::new(stops.to_vec());
    let mut shown = Vec::new();
    for piece in pieces {
        let mut out = String::new();
        let ended = matcher.push(piece, &mut out);
        shown.push(out);
        if ended {
            return (shown, true);
        }
    }
    let mut out = String::new();
    matcher.finish(&mut out);
    shown.push(out);
    (shown, false)
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

#[test]
fn a_stop_string_over_token_borders_is_held_back() {
    let (shown, ended) = streamed(&strings(&["one ST", "O", "P two"]), &strings(&["STOP"]));
    assert_eq!((shown, ended), (strings(&["one ", "", ""]), true));
    let (shown, ended) = streamed(&strings(&["one ST", "O", "RE"]), &strings(&["STOP"]));
    assert_eq!((shown, ended), (strings(&["one ", "", "STORE", ""]), false));
}

#[test]
fn what_was_held_back_is_shown_at_the_end() {
    let (shown, ended) = streamed(&strings(&["a S", "TO"]), &strings(&["STOP"]));
    assert_eq!((shown.concat(), ended), ("a STO".to_owned(), false));
}

#[test]
fn the_match_that_ends_first_wins() {
    let (shown, _) = streamed(&strings(&["xabcdy"]), &strings(&["abcd", "bc"]));
    assert_eq!(shown.concat(), "xa");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_cutting_gives_what_reading_by_character_gives(
        pieces in prop::collection::vec("[abé\n]{0,4}", 0..12),
        stops in prop::collection::vec("[abé\n]{1,4}", 0..4),
    ) {
        let (shown, ended) = streamed(&pieces, &stops);
        prop_assert_eq!((shown.concat(), ended), plainly(&pieces.concat(), &stops));
    }

    #[test]
    fn nothing_is_held_back_without_need(
        pieces in prop::collection::vec("[abc]{0,4}", 1..12),
        stops in prop::collection::vec("[ab]{1,4}", 1..4),
    ) {
        let mut matcher = StopMatcher::new(stops.clone());
        for piece in &pieces {
            if matcher.push(piece, &mut String::new()) {
                break;
            }
            let beginning = |stop: &String| stop.len() > matcher.held.len() && stop.starts_with(&matcher.held);
            prop_assert!(matcher.held.is_empty() || stops.iter().any(beginning), "{:?}", matcher.held);
        }
    }
}
