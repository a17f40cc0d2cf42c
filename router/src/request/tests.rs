use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const BOUNDS: Bounds = Bounds { vocab: 300, choices: 128, messages: 2048 };

fn chat(body: &Value) -> Result<Ask, Refusal> {
    parse_chat(body.to_string().as_bytes(), &BOUNDS)
}

fn completion(body: &Value) -> Result<Ask, Refusal> {
    parse_completions(body.to_string().as_bytes(), &BOUNDS)
}

#[test]
fn the_smallest_chat_has_the_documented_defaults() {
    let ask =
        chat(&json!({ "model": "m", "messages": [{ "role": "user", "content": "hi" }], "seed": 1 })).unwrap();
    let expected = Ask {
        user: None,
        model: "m".to_owned(),
        input: Input::Chat(vec![Message { role: "user", content: "hi".to_owned(), name: None }]),
        stream: false,
        include_usage: false,
        n: 1,
        max_tokens: None,
        sampling: Sampling { seed: 1, ..Sampling::default() },
        stop: Vec::new(),
        echo: false,
        debug: Debug::default(),
        repeats: None,
    };
    assert_eq!(ask, expected);
}

#[test]
fn every_field_arrives_where_it_belongs() {
    let ask = completion(&json!({
        "model": "m", "prompt": [[1, 2], [3]], "max_tokens": 5, "n": 2, "best_of": 2, "stream": true,
        "stream_options": { "include_usage": true, "include_obfuscation": false },
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": -2, "frequency_penalty": 2, "logit_bias": { "7": -100, "3": 1.5 }, "seed": -1,
        "logprobs": 3, "stop": ["a", "b"], "stop_token_ids": [9], "ignore_eos": true,
        "baton": { "token_ids": true, "logits_digest": true }
    }))
    .unwrap();
    assert_eq!(ask.input, Input::Prompts(vec![Prompt::Tokens(vec![1, 2]), Prompt::Tokens(vec![3])]));
    assert_eq!((ask.stream, ask.include_usage, ask.n, ask.max_tokens), (true, true, 2, Some(5)));
    assert_eq!(ask.stop, ["a", "b"]);
    assert_eq!(ask.debug, Debug { report: true, token_ids: true, logits_digest: true });
    let expected = Sampling {
        temperature: 0.5,
        top_p: 0.9,
        top_k: 40,
        min_p: 0.1,
        presence_penalty: -2.0,
        frequency_penalty: 2.0,
        repetition_penalty: 1.1,
        logit_bias: vec![(3, 1.5), (7, -100.0)],
        seed: u64::MAX,
        logprobs: Some(3),
        stop_tokens: vec![9],
        ignore_eos: true,
    };
    assert_eq!(ask.sampling, expected);
}

#[test]
fn requests_without_a_seed_get_different_ones() {
    let body = json!({ "model": "m", "prompt": "a" });
    assert_ne!(completion(&body).unwrap().sampling.seed, completion(&body).unwrap().sampling.seed);
}

#[test]
fn max_completion_tokens_comes_before_max_tokens() {
    let body = json!({ "model": "m", "messages": [{ "role": "user", "content": "hi" }],
        "max_tokens": 5, "max_completion_tokens": 7 });
    assert_eq!(chat(&body).unwrap().max_tokens, Some(7));
}

#[test]
fn a_token_of_logit_bias_in_two_spellings_is_refused() {
    let refused = completion(&json!({ "model": "m", "prompt": "a", "logit_bias": { "7": 1, "07": 2 } }));
    assert!(matches!(refused, Err(Refusal::Invalid { param: Some(param), .. }) if param == "logit_bias"));
}

/// Any JSON: strings like `text`, keys like `key`, and fewer than `width` members of each list and object.
pub(in crate::request) fn any_json(
    text: &'static str,
    key: &'static str,
    width: usize,
) -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        text.prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..width).prop_map(Value::from),
            prop::collection::btree_map(key, inner, 0..width)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn any_value() -> impl Strategy<Value = Value> {
    any_json("[a-z\u{0}-\u{20}é😀]{0,8}", "role|content|type|text|name|[a-z0-9]{1,3}", 4)
}

const FIELDS: [&str; 32] = [
    "model",
    "messages",
    "prompt",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "best_of",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "logprobs",
    "top_logprobs",
    "stop",
    "stop_token_ids",
    "stream",
    "stream_options",
    "echo",
    "suffix",
    "tools",
    "tool_choice",
    "response_format",
    "metadata",
    "user",
    "modalities",
    "baton",
    "prediction",
];

type Parse = fn(&[u8]) -> Result<(), Refusal>;

/// What the parsers of the routes beside chat and completions take, and what each of them makes of a body.
fn parsers() -> [(&'static str, Value, Parse); 8] {
    let messages = json!([{ "role": "user", "content": "hi" }]);
    [
        ("responses", json!({ "model": "m", "input": "hi" }), |b| parse_responses(b, &BOUNDS).map(drop)),
        ("messages", json!({ "model": "m", "messages": messages, "max_tokens": 1 }), |b| {
            parse_messages(b, &BOUNDS).map(drop)
        }),
        ("count messages", json!({ "model": "m", "messages": messages }), |b| {
            parse_count_messages(b, &BOUNDS).map(drop)
        }),
        ("count input", json!({ "input": "hi" }), |b| parse_count_input(b, &BOUNDS).map(drop)),
        ("tokenize", json!({ "prompt": "hi" }), |b| parse_tokenize(b, &BOUNDS).map(drop)),
        ("tokenize chat", json!({ "messages": messages }), |b| parse_tokenize(b, &BOUNDS).map(drop)),
        ("detokenize", json!({ "tokens": [1] }), |b| parse_detokenize(b, &BOUNDS).map(drop)),
        ("embeddings", json!({ "model": "m", "input": "hi" }), |b| parse_embeddings(b, &BOUNDS).map(drop)),
    ]
}

#[test]
fn the_smallest_response_has_the_documented_defaults() {
    let ask = parse_responses(br#"{"model":"m","input":"hi","seed":1}"#, &BOUNDS).unwrap();
    let repeats = ask.repeats.clone().unwrap();
    let expected = Ask {
        user: None,
        model: "m".to_owned(),
        input: Input::Chat(vec![Message { role: "user", content: "hi".to_owned(), name: None }]),
        stream: false,
        include_usage: false,
        n: 1,
        max_tokens: None,
        sampling: Sampling { seed: 1, ..Sampling::default() },
        stop: Vec::new(),
        echo: false,
        debug: Debug::default(),
        repeats: ask.repeats.clone(),
    };
    assert_eq!(ask, expected);
    expect_test::expect![[r#"{"instructions":null,"max_output_tokens":null,"max_tool_calls":null,"metadata":{},"temperature":1.0,"top_p":1.0,"top_logprobs":0,"parallel_tool_calls":true,"tool_choice":"auto","tools":[],"text":{"format":{"type":"text"},"verbosity":null},"reasoning":{"effort":null,"summary":null},"truncation":"disabled","service_tier":"default","store":false,"background":false,"previous_response_id":null,"user":null,"safety_identifier":null,"prompt_cache_key":null}"#]].assert_eq(&serde_json::to_string(&repeats).unwrap());
}

#[test]
fn every_field_of_a_response_arrives_where_it_belongs() {
    let body = json!({
        "model": "m", "instructions": "be", "input": [{ "role": "assistant", "content": [{ "type": "output_text", "text": "a",
        "annotations": [], "logprobs": [] }] }], "max_output_tokens": 5, "temperature": 0.5, "top_p": 0.25, "top_k": 40,
        "stream": true, "stream_options": { "include_obfuscation": false }, "stop": "a", "user": "u",
        "include": ["message.output_text.logprobs", "file_search_call.results"], "top_logprobs": 4,
        "baton": { "token_ids": true }
    });
    let ask = parse_responses(body.to_string().as_bytes(), &BOUNDS).unwrap();
    assert_eq!((ask.stream, ask.max_tokens, ask.user.as_deref()), (true, Some(5), Some("u")));
    assert_eq!((ask.sampling.temperature, ask.sampling.top_p, ask.sampling.top_k), (0.5, 0.25, 40));
    assert_eq!((ask.sampling.logprobs, ask.stop), (Some(4), vec!["a".to_owned()]));
    assert_eq!(ask.debug, Debug { report: true, token_ids: true, logits_digest: false });
    let message = |role, content: &str| Message { role, content: content.to_owned(), name: None };
    assert_eq!(ask.input, Input::Chat(vec![message("system", "be"), message("assistant", "a")]));
}

#[test]
fn log_probabilities_are_reported_only_when_included() {
    let ask = parse_responses(br#"{"model":"m","input":"hi","top_logprobs":3}"#, &BOUNDS).unwrap();
    assert_eq!((ask.sampling.logprobs, ask.repeats.unwrap().top_logprobs), (None, 3));
}

#[test]
fn every_field_of_a_message_arrives_where_it_belongs() {
    let body = json!({
        "model": "m", "max_tokens": 5, "system": "be", "temperature": 0, "top_p": 0, "top_k": 3, "stream": true,
        "stop_sequences": ["a", " b"], "metadata": { "user_id": "u" },
        "messages": [{ "role": "user", "content": "a" }, { "role": "user", "content": [{ "type": "text", "text": "b" }] }]
    });
    let ask = parse_messages(body.to_string().as_bytes(), &BOUNDS).unwrap();
    assert_eq!((ask.stream, ask.max_tokens, ask.n), (true, Some(5), 1));
    assert_eq!((ask.stop, ask.user.as_deref()), (vec!["a".to_owned(), " b".to_owned()], Some("u")));
    assert_eq!((ask.sampling.temperature, ask.sampling.top_k), (0.0, 3));
    assert!(ask.sampling.top_p > 0.0);
    let message = |role, content: &str| Message { role, content: content.to_owned(), name: None };
    assert_eq!(ask.input, Input::Chat(vec![message("system", "be"), message("user", "a\nb")]));
    let again = parse_messages(body.to_string().as_bytes(), &BOUNDS).unwrap();
    assert_ne!(again.sampling.seed, ask.sampling.seed, "nobody can give a seed: each request has its own");
}

#[test]
fn texts_get_special_tokens_and_conversations_have_them() {
    let special = |body: Value| parse_tokenize(body.to_string().as_bytes(), &BOUNDS).unwrap().add_special;
    assert!(special(json!({ "prompt": "a" })));
    assert!(!special(json!({ "prompt": "a", "add_special_tokens": false })));
    let messages = json!([{ "role": "user", "content": "hi" }]);
    assert!(!special(json!({ "messages": messages })));
    assert!(special(json!({ "messages": messages, "add_special_tokens": true })));
}

/// Fields of the routes beside chat and completions.
const MORE_FIELDS: [&str; 30] = [
    "model",
    "input",
    "messages",
    "prompt",
    "tokens",
    "system",
    "instructions",
    "max_tokens",
    "max_output_tokens",
    "temperature",
    "top_p",
    "top_k",
    "stop",
    "stop_sequences",
    "stream",
    "stream_options",
    "metadata",
    "include",
    "top_logprobs",
    "text",
    "reasoning",
    "thinking",
    "output_config",
    "tool_choice",
    "tools",
    "truncation",
    "service_tier",
    "add_special_tokens",
    "dimensions",
    "store",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_value_of_any_field_is_taken_or_blamed_on_a_field(
        changes in prop::collection::vec((prop::sample::select(&FIELDS[..]), any_value()), 1..4),
        is_chat in any::<bool>(),
    ) {
        let mut body = if is_chat {
            json!({ "model": "m", "messages": [{ "role": "user", "content": "hi" }] })
        } else {
            json!({ "model": "m", "prompt": "hi" })
        };
        for (field, value) in &changes {
            body[*field] = value.clone();
        }
        match if is_chat { chat(&body) } else { completion(&body) } {
            Ok(ask) => {
                let s = &ask.sampling;
                prop_assert!((0.0..=2.0).contains(&s.temperature) && s.top_p > 0.0 && s.top_p <= 1.0);
                prop_assert!(s.logit_bias.iter().all(|(id, bias)| *id < 300 && bias.abs() <= 100.0));
                prop_assert!(ask.n >= 1 && ask.max_tokens != Some(0) && ask.stop.len() <= STOP_MAX);
            }
            Err(Refusal::Invalid { param, message, .. }) => {
                let param = param.unwrap_or_default();
                let top = param.split(['.', '[']).next().unwrap_or_default();
                let blamed = changes.iter().any(|(field, _)| *field == top)
                    || (top == "best_of" || top == "n" || top == "top_logprobs" || top == "stream_options");
                prop_assert!(blamed, "{param}: {message}");
                prop_assert!(message.len() < 600, "{message}");
            }
            Err(other) => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn any_value_of_any_field_of_any_route_is_taken_or_blamed_on_a_field(
        changes in prop::collection::vec((prop::sample::select(&MORE_FIELDS[..]), any_value()), 1..4),
        which in 0usize..8,
    ) {
        let (name, mut body, parse) = parsers()[which].clone();
        for (field, value) in &changes {
            body[*field] = value.clone();
        }
        match parse(body.to_string().as_bytes()) {
            Ok(()) => {}
            Err(Refusal::Invalid { param, message, .. }) => {
                let param = param.unwrap_or_default();
                let top = param.split(['.', '[']).next().unwrap_or_default();
                // A field that is missing may be one that was set to nothing; of two that exclude each other the
                // message names both.
                let named = |field: &str| top == field || message.contains(&format!("'{field}'"));
                let blamed = changes.iter().any(|(field, _)| named(field)) || top == "prompt";
                prop_assert!(blamed, "{name}: {param}: {message}");
                prop_assert!(message.len() < 600, "{message}");
            }
            Err(other) => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn any_bytes_are_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        for (_, _, parse) in parsers() {
            prop_assert!(parse(&bytes).is_err());
        }
        prop_assert!(parse_chat(&bytes, &BOUNDS).is_err());
        prop_assert!(parse_completions(&bytes, &BOUNDS).is_err());
    }

    #[test]
    fn a_body_that_is_cut_off_is_refused(at in 0usize..84) {
        let body = r#"{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"hi"}]}],"n":1}"#;
        prop_assert!(parse_chat(body.as_bytes(), &BOUNDS).is_ok());
        prop_assert!(parse_chat(&body.as_bytes()[..at], &BOUNDS).is_err());
    }
}
