use baton_config::KvGeometry;

use super::*;

fn model() -> ModelInfo {
    ModelInfo {
        name: "m".into(),
        vocab: 100,
        max_context: 64,
        eos: vec![0],
        layers: 1,
        kv_heads: 1,
        head_dim: 8,
    }
}

fn parse(patch: &str) -> GenerateRequest {
    let mut value: serde_json::Value =
        serde_json::from_str(r#"{"request_id":"r","tokens":[1,2,3],"max_tokens":4}"#).unwrap();
    let patch: serde_json::Map<String, serde_json::Value> = serde_json::from_str(patch).unwrap();
    value.as_object_mut().unwrap().extend(patch);
    serde_json::from_value(value).unwrap()
}

const HANDOFF: &str = r#"{"id":"0123456789abcdef0123456789abcdef","own_epoch":1,
    "peer":{"worker":"p","epoch":2,"address":"ADDRESS"}}"#;

#[test]
fn a_good_request_passes() {
    generate(&parse("{}"), &model()).unwrap();
    for address in ["127.0.0.1:80", "[::1]:7500", "node-3.fleet.local:7500"] {
        let patch = format!(r#"{{"handoff":{}}}"#, HANDOFF.replace("ADDRESS", address));
        generate(&parse(&patch), &model()).unwrap();
    }
}

#[test]
fn every_impossible_value_is_named() {
    let long: Vec<u32> = vec![1; 64];
    let cases = [
        (r#"{"tokens":[]}"#.to_owned(), "tokens must not be empty"),
        (format!(r#"{{"tokens":{long:?}}}"#), "64 tokens do not fit"),
        (r#"{"tokens":[1,100]}"#.to_owned(), "tokens holds token 100"),
        (r#"{"tokens":[1,4294967295]}"#.to_owned(), "tokens holds token 4294967295"),
        (r#"{"generated":3}"#.to_owned(), "generated is 3"),
        (r#"{"max_tokens":0}"#.to_owned(), "max_tokens must not be empty"),
        (format!(r#"{{"request_id":"{}"}}"#, "x".repeat(257)), "request_id has 257"),
        (r#"{"sampling":{"temperature":-1}}"#.to_owned(), "temperature is -1"),
        (r#"{"sampling":{"temperature":1e300}}"#.to_owned(), "temperature is inf"),
        (r#"{"sampling":{"top_p":0}}"#.to_owned(), "top_p is 0"),
        (r#"{"sampling":{"top_p":1.5}}"#.to_owned(), "top_p is 1.5"),
        (r#"{"sampling":{"min_p":-0.5}}"#.to_owned(), "min_p is -0.5"),
        (r#"{"sampling":{"presence_penalty":1e5}}"#.to_owned(), "presence_penalty is"),
        (r#"{"sampling":{"frequency_penalty":-1e5}}"#.to_owned(), "frequency_penalty is"),
        (r#"{"sampling":{"repetition_penalty":0}}"#.to_owned(), "repetition_penalty is 0"),
        (r#"{"sampling":{"logprobs":21}}"#.to_owned(), "logprobs is 21"),
        (r#"{"sampling":{"logit_bias":[[100,1]]}}"#.to_owned(), "logit_bias holds token 100"),
        (r#"{"sampling":{"logit_bias":[[1,1e9]]}}"#.to_owned(), "logit_bias is"),
        (r#"{"sampling":{"stop_tokens":[100]}}"#.to_owned(), "stop_tokens holds token 100"),
        (
            format!(
                r#"{{"handoff":{}}}"#,
                HANDOFF
                    .replace("0123456789abcdef0123456789abcdef", &"0".repeat(32))
                    .replace("ADDRESS", "a:1")
            ),
            "a handoff id of zero",
        ),
    ];
    for (patch, message) in cases {
        let error = generate(&parse(&patch), &model()).unwrap_err().to_string();
        assert!(error.contains(message), "{patch}: {error}");
    }
}

#[test]
fn no_number_at_all_is_refused_too() {
    for field in 0..6 {
        let mut s = Sampling::default();
        let target = match field {
            0 => &mut s.temperature,
            1 => &mut s.top_p,
            2 => &mut s.min_p,
            3 => &mut s.presence_penalty,
            4 => &mut s.frequency_penalty,
            _ => &mut s.repetition_penalty,
        };
        *target = f32::NAN;
        assert!(matches!(sampling(&s, &model()), Err(Invalid::Range { .. })), "field {field}");
    }
}

#[test]
fn an_address_can_not_smuggle_anything_into_a_url() {
    for address in [
        "",
        "host",
        "host:",
        "host:0",
        "host:65536",
        ":80",
        "host:+80",
        "user@host:80",
        "host/path:80",
        "a b:80",
        "host:80/x",
        "http://host:80",
        "[::1:80",
        "[zz]:80",
        "host?x:80",
        "host#x:80",
    ] {
        let patch = format!(r#"{{"handoff":{}}}"#, HANDOFF.replace("ADDRESS", address));
        let result = generate(&parse(&patch), &model());
        assert!(matches!(result, Err(Invalid::Address { .. })), "{address:?}: {result:?}");
    }
}

/// A ticket with these fields instead of good ones.
fn ticket_with(patch: &str) -> Ticket {
    let geometry = KvGeometry { layers: 1, kv_heads: 1, head_dim: 8, block_tokens: 16, ..KvGeometry::PLAIN };
    let mut value = serde_json::json!({
        "worker": "p", "epoch": 1, "to_epoch": 2, "seq": 0, "geometry": geometry, "tokens": 64, "blocks": [],
        "first": { "token": 99, "logprob": null, "logits_digest": null },
    });
    for (path, new) in serde_json::from_str::<serde_json::Map<_, _>>(patch).unwrap() {
        *value.pointer_mut(&path).unwrap() = new;
    }
    serde_json::from_value(value).unwrap()
}

#[test]
fn a_ticket_that_cannot_be_is_refused_before_anybody_reckons_with_it() {
    ticket(&ticket_with("{}"), &model()).unwrap();
    ticket(&ticket_with(r#"{"/first":null}"#), &model()).unwrap();
    let blocks = |count| {
        serde_json::json!(vec![serde_json::json!({"index":0,"region":0,"offset":0,"digest":0}); count])
    };
    let top = |count| serde_json::json!({ "logprob": -1.0, "top": vec![(1, -1.0); count] });
    ticket(&ticket_with(&format!(r#"{{"/blocks":{}}}"#, blocks(TICKET_BLOCKS_MAX))), &model()).unwrap();
    ticket(&ticket_with(&format!(r#"{{"/first/logprob":{}}}"#, top(FIRST_TOP_MAX))), &model()).unwrap();
    for (patch, message) in [
        (format!(r#"{{"/blocks":{}}}"#, blocks(TICKET_BLOCKS_MAX + 1)), "blocks has 4097"),
        (r#"{"/geometry/head_dim":0}"#.to_owned(), "every count must be at least 1"),
        (r#"{"/geometry/layers":0}"#.to_owned(), "every count must be at least 1"),
        (r#"{"/geometry/layers":16385}"#.to_owned(), "larger than any memory"),
        (
            r#"{"/geometry/layers":16384,"/geometry/head_dim":16384,"/geometry/kv_heads":16384}"#.to_owned(),
            "every count",
        ),
        (r#"{"/tokens":65}"#.to_owned(), "65 tokens do not fit"),
        (r#"{"/first/token":100}"#.to_owned(), "first holds token 100"),
        (format!(r#"{{"/first/logprob":{}}}"#, top(FIRST_TOP_MAX + 1)), "first.logprob.top has 21"),
    ] {
        let error = ticket(&ticket_with(&patch), &model()).unwrap_err().to_string();
        assert!(error.contains(message), "{patch}: {error}");
    }
}

#[test]
fn whatever_is_listed_has_an_end() {
    let ids = |count: usize| vec![1; count];
    let biases = |count: usize| vec![(1, 0.5); count];
    for (patch, max) in [
        (format!(r#"{{"sampling":{{"stop_tokens":{:?}}}}}"#, ids(STOP_TOKENS_MAX)), None),
        (
            format!(r#"{{"sampling":{{"stop_tokens":{:?}}}}}"#, ids(STOP_TOKENS_MAX + 1)),
            Some(STOP_TOKENS_MAX),
        ),
        (format!(r#"{{"sampling":{{"logit_bias":{}}}}}"#, serde_json::json!(biases(100))), None),
        (format!(r#"{{"sampling":{{"logit_bias":{}}}}}"#, serde_json::json!(biases(101))), Some(100)),
    ] {
        match (generate(&parse(&patch), &model()), max) {
            (Ok(()), None) => {}
            (Err(Invalid::TooMany { max, .. }), Some(expected)) => assert_eq!(max, expected),
            (result, _) => panic!("{result:?}"),
        }
    }
    for (length, good) in [(ADDRESS_MAX_BYTES, true), (ADDRESS_MAX_BYTES + 1, false)] {
        let address = format!("{}:1", "a".repeat(length - 2));
        let handoff = HANDOFF.replace("ADDRESS", &address);
        let result = generate(&parse(&format!(r#"{{"handoff":{handoff}}}"#)), &model());
        assert_eq!(result.is_ok(), good, "{length} bytes");
        let body = format!(r#"{{"request_id":"r","tokens":[1],"handoff":{handoff}}}"#);
        assert_eq!(prefill(&serde_json::from_str(&body).unwrap(), &model()).is_ok(), good, "{length} bytes");
    }
}
