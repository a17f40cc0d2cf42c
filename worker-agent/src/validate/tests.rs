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
    for field in 0..5 {
        let mut s = Sampling::default();
        let target = match field {
            0 => &mut s.temperature,
            1 => &mut s.top_p,
            2 => &mut s.min_p,
            3 => &mut s.presence_penalty,
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
