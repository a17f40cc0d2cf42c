use serde_json::{Value, json};

use super::*;
use crate::routes::Route;

const BOUNDS: Bounds = Bounds { vocab: 0, choices: 128, messages: 2048 };

fn parse(passing: Passing, body: &str) -> Result<Passed, Refusal> {
    parse_passed(passing, &Bytes::copy_from_slice(body.as_bytes()), &BOUNDS, &["mine".to_owned()])
}

fn text(bytes: &Bytes) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn a_body_stays_as_it_is_but_for_the_name_of_the_model() {
    let body = "{ \"prompt\" : \"a\\u0062\", \"mine\":[1], \"model\":\"x\" , \"stop\":null}";
    let passed = parse(Passing::Completions, body).unwrap();
    assert_eq!((passed.model(), passed.stream), (Some("x"), false));
    assert_eq!(text(&passed.body_for(None)), body);
    assert_eq!(text(&passed.body_for(Some("x"))), body);
    assert_eq!(text(&passed.body_for(Some("a\"b"))), body.replace("\"x\"", "\"a\\\"b\""));
}

#[test]
fn what_never_passes_is_left_out_wherever_it_stands() {
    let body = "{\"rid\":1,\"model\":\"x\",\"kv_transfer_params\":{\"a\":{}},\"prompt\":\"a\",\"na\\u0074\":null,\"cache_salt\":\"s\"}";
    let passed = parse(Passing::Completions, body).unwrap();
    let kept: Value = serde_json::from_slice(&passed.body_for(Some("other"))).unwrap();
    assert_eq!(kept, json!({ "model": "other", "prompt": "a", "nat": null }));
    let escaped = "{\"model\":\"x\",\"prompt\":\"a\",\"r\\u0069d\":1}";
    assert_eq!(
        text(&parse(Passing::Completions, escaped).unwrap().body_for(None)),
        "{\"model\":\"x\",\"prompt\":\"a\"}"
    );
}

#[test]
fn the_words_of_a_growing_chat_begin_alike() {
    let chat = |messages: &str| {
        let body = format!("{{\"temperature\":1,\"model\":\"x\",\"messages\":{messages}}}");
        parse(Passing::Chat, &body).unwrap().words
    };
    let first = chat("[{\"role\":\"user\",\"content\":\"hello\"}]");
    let second =
        chat("[{\"role\":\"user\",\"content\":\"hello\"},{\"role\":\"assistant\",\"content\":\"hi\"}]");
    assert_eq!(first[..8], second[..8]);
    assert!(
        chat(&format!("[{{\"role\":\"user\",\"content\":\"{}\"}}]", "a".repeat(1 << 20))).len() <= 64 << 10
    );
}

#[test]
fn every_path_has_its_own_fields() {
    let all: Vec<Passing> = Route::all().filter_map(Route::passing).collect();
    assert_eq!(all.len(), 9);
    for passing in all {
        assert_eq!(Route::of_path(passing.path()).passing(), Some(passing));
        let unknown = parse(
            passing,
            "{\"model\":\"x\",\"prompt\":\"a\",\"input\":\"a\",\"tokens\":[],\"logits_processors\":[],\"messages\":[{\"role\":\"user\"}]}",
        );
        assert!(unknown.is_err(), "{passing:?}");
    }
    assert!(
        parse(Passing::Chat, "{\"model\":\"x\",\"messages\":[{\"role\":\"user\"}],\"guided_json\":{}}")
            .is_ok()
    );
    assert!(parse(Passing::Embeddings, "{\"model\":\"x\",\"input\":\"a\",\"guided_json\":{}}").is_err());
    assert_eq!(Route::of_path("/v1/chat/completions/").passing(), None);
}
