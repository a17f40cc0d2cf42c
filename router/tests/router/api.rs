//! The API as a client sees it.

use baton_config::Role;
use serde_json::{Value, json};

use crate::fake_worker::{Act, FakeWorker, oracle};
use crate::harness::{Answer, Harness, one_worker};
use crate::model_dir::{BOS, CONTEXT};

/// The text of printable byte tokens.
pub(crate) fn text(tokens: &[u32]) -> String {
    tokens.iter().map(|token| char::from(u8::try_from(*token).expect("a byte"))).collect()
}

fn hello() -> Value {
    json!({ "model": "tiny", "messages": [{ "role": "user", "content": "hello world" }], "max_tokens": 12, "seed": 7 })
}

fn with(mut body: Value, key: &str, value: Value) -> Value {
    body[key] = value;
    body
}

#[tokio::test]
async fn a_streamed_chat_has_the_role_first_and_the_usage_last() {
    let (decode, harness) = one_worker().await;
    let body = with(with(hello(), "stream", json!(true)), "stream_options", json!({ "include_usage": true }));
    let answer = harness.chat(&body).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    let events = answer.events();
    let first = &events[0];
    assert_eq!(first["object"], "chat.completion.chunk");
    assert_eq!(first["model"], "tiny");
    assert_eq!(first["choices"][0]["delta"], json!({ "role": "assistant", "content": "" }));
    assert!(events.iter().all(|event| event["id"] == first["id"]), "one id");
    let request = &decode.generated()[0];
    assert_eq!(request.tokens[0], BOS, "the template begins with the bos token");
    assert_eq!(answer.content(0), text(&oracle(&request.tokens, 7, 12)));
    let last = events.last().expect("events");
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 12);
    assert_eq!(last["usage"]["prompt_tokens"], request.tokens.len());
    assert_eq!(last["usage"]["total_tokens"], request.tokens.len() + 12);
    assert_eq!(last["usage"]["prompt_tokens_details"]["cached_tokens"], 3);
    let end = &events[events.len() - 2]["choices"][0];
    assert_eq!((&end["finish_reason"], &end["delta"]), (&json!("length"), &json!({})));
    harness.finish().await;
}

#[tokio::test]
async fn whole_and_streamed_answers_are_equal() {
    let (_decode, harness) = one_worker().await;
    let whole = harness.chat(&hello()).await;
    let streamed = harness.chat(&with(hello(), "stream", json!(true))).await;
    assert_eq!(whole.content(0), streamed.content(0));
    assert_eq!(whole.json()["choices"][0]["message"]["role"], "assistant");
    assert_eq!(whole.json()["choices"][0]["finish_reason"], "length");
    assert_eq!(whole.headers["x-request-id"], whole.json()["id"].as_str().expect("an id"));
    assert!(whole.json()["choices"][0].get("baton").is_none(), "the extension is for those who ask");
    harness.finish().await;
}

#[tokio::test]
async fn choices_of_one_request_differ_by_seed_and_repeat_exactly() {
    let (decode, harness) = one_worker().await;
    let body = with(hello(), "n", json!(3));
    let first = harness.chat(&body).await;
    let again = harness.chat(&with(body, "stream", json!(true))).await;
    let prompt = &decode.generated()[0].tokens;
    for index in 0..3 {
        assert_eq!(first.content(index), text(&oracle(prompt, 7 + index, 12)));
        assert_eq!(first.content(index), again.content(index));
    }
    assert_eq!(first.json()["usage"]["completion_tokens"], 36);
    assert_eq!(first.json()["usage"]["prompt_tokens"], prompt.len(), "the prompt counts once");
    assert_eq!(
        first.json()["usage"]["prompt_tokens_details"]["cached_tokens"],
        3,
        "and what was cached of it"
    );
    harness.finish().await;
}

#[tokio::test]
async fn many_choices_are_all_answered() {
    let (_decode, harness) = one_worker().await;
    let answer = harness.chat(&with(hello(), "n", json!(40))).await;
    let choices = answer.json()["choices"].as_array().expect("choices").len();
    assert_eq!(choices, 40);
    assert!((0..40).all(|index| answer.content(index).len() == 12));
    harness.finish().await;
}

#[tokio::test]
async fn completions_take_prompts_of_all_four_shapes() {
    let (decode, harness) = one_worker().await;
    let ask = async |prompt: Value| -> Answer {
        harness
            .complete(&json!({ "model": "gpt-4o-mini", "prompt": prompt, "max_tokens": 4, "seed": 0 }))
            .await
    };
    let one = ask(json!("hello world")).await;
    let two = ask(json!(["hello world", "the user"])).await;
    let ids = ask(json!([104, 105])).await;
    let lists = ask(json!([[104, 105], [106]])).await;
    assert_eq!(one.json()["object"], "text_completion");
    assert_eq!(one.json()["model"], "gpt-4o-mini", "the name the client used");
    assert_eq!(one.content(0), two.content(0));
    assert_eq!(ids.content(0), text(&oracle(&[104, 105], 0, 4)));
    assert_eq!(lists.content(0), ids.content(0));
    assert_eq!(lists.content(1), text(&oracle(&[106], 0, 4)));
    assert_eq!(lists.json()["usage"]["prompt_tokens"], 3);
    // "hello" and " world" are one token each.
    assert_eq!(decode.generated()[0].tokens.len(), 2);
    let empty = ask(json!("")).await;
    assert_eq!(empty.status, 200, "an empty text begins with the bos token");
    assert_eq!(decode.generated().last().expect("a call").tokens, [BOS]);
    harness.finish().await;
}

#[tokio::test]
async fn echo_begins_the_text_with_the_prompt() {
    let (_decode, harness) = one_worker().await;
    let body = json!({ "model": "tiny", "prompt": "hello", "max_tokens": 2, "seed": 0, "echo": true });
    let whole = harness.complete(&body).await.content(0);
    assert!(whole.starts_with("hello") && whole.len() == 7, "{whole}");
    assert_eq!(harness.complete(&with(body, "stream", json!(true))).await.content(0), whole);
    let ids = json!({ "model": "tiny", "prompt": [104, 105], "max_tokens": 1, "seed": 0, "echo": true });
    assert!(harness.complete(&ids).await.content(0).starts_with("hi"));
    harness.finish().await;
}

#[tokio::test]
async fn stop_strings_end_the_text_and_the_work() {
    let (decode, harness) = one_worker().await;
    let word = |word: &str| word.bytes().map(u32::from).collect::<Vec<_>>();
    decode.always(Act::Say([word("one two ST"), vec![32], word("three STOP four")].concat()));
    for stream in [false, true] {
        let body = with(with(hello(), "stop", json!(["STOP", "never"])), "stream", json!(stream));
        let body = with(body, "max_tokens", json!(100));
        let answer = harness.chat(&body).await;
        assert_eq!(answer.content(0), "one two ST three ");
        assert!(answer.text.contains("\"finish_reason\":\"stop\""));
    }
    // What could have become one of them, or a character, is shown when nothing more comes.
    for (said, shown) in
        [(word("one ST"), "one ST"), ([word("one ST"), vec![0xC3]].concat(), "one ST\u{FFFD}")]
    {
        decode.always(Act::Say(said));
        for stream in [false, true] {
            let body = with(with(hello(), "stop", json!(["STOP", "never"])), "stream", json!(stream));
            assert_eq!(harness.chat(&body).await.content(0), shown);
        }
    }
    // Also what only becomes one of them at the end.
    let body = with(hello(), "stop", json!("\u{FFFD}"));
    let answer = harness.chat(&body).await;
    assert_eq!(
        (answer.content(0).as_str(), &answer.json()["choices"][0]["finish_reason"]),
        ("one ST", &json!("stop"))
    );
    // A worker tells nothing before the end only where nothing before it can matter.
    assert!(decode.generated().iter().all(|request| !request.whole));
    harness.chat(&with(hello(), "stream", json!(true))).await;
    harness.chat(&hello()).await;
    let whole: Vec<bool> = decode.generated().iter().rev().take(2).map(|request| request.whole).collect();
    assert_eq!(whole, [true, false]);
    harness.finish().await;
}

#[tokio::test]
async fn a_request_may_fill_the_context_and_no_more() {
    let (_decode, harness) = one_worker().await;
    let ask = |tokens: u32| json!({ "model": "tiny", "prompt": vec![100; 12], "max_tokens": tokens });
    assert_eq!(harness.complete(&ask(CONTEXT - 12)).await.json()["usage"]["total_tokens"], CONTEXT);
    let refused = harness.complete(&ask(CONTEXT - 11)).await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (400, &json!("context_length_exceeded")));
    harness.finish().await;
}

#[tokio::test]
async fn an_end_token_is_counted_and_not_shown() {
    let (decode, harness) = one_worker().await;
    decode.always(Act::EosAfter(5));
    let answer = harness.chat(&hello()).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"].as_str().expect("text").len(), 5);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["usage"]["completion_tokens"], 6);
    harness.finish().await;
}

#[tokio::test]
async fn a_stop_token_that_is_text_is_not_shown_either() {
    let (decode, harness) = one_worker().await;
    decode.always(Act::Say(vec![104, 105]));
    let answer = harness.chat(&with(hello(), "stop_token_ids", json!([105]))).await;
    assert_eq!(answer.content(0), "h");
    assert_eq!(decode.generated()[0].sampling.stop_tokens, [105]);
    harness.finish().await;
}

#[tokio::test]
async fn characters_are_never_broken_over_chunks() {
    let (decode, harness) = one_worker().await;
    // An emoji in four tokens, an accent in two, a byte that never becomes a character.
    decode.always(Act::Say(vec![0xF0, 0x9F, 0x98, 0x80, 120, 0xC3, 0xA9, 0x80]));
    let answer = harness.chat(&with(hello(), "stream", json!(true))).await;
    assert_eq!(answer.content(0), "😀xé\u{FFFD}");
    let pieces: Vec<Value> =
        answer.events().iter().map(|event| event["choices"][0]["delta"]["content"].clone()).collect();
    assert_eq!(pieces[1], "😀", "{pieces:?}");
    harness.finish().await;
}

#[tokio::test]
async fn logprobs_come_in_the_shape_of_each_api() {
    let (decode, harness) = one_worker().await;
    decode.always(Act::Say(vec![104, 0xC3, 0xA9]));
    let chat = with(with(hello(), "logprobs", json!(true)), "top_logprobs", json!(2));
    let whole = harness.chat(&chat).await.json();
    let content = &whole["choices"][0]["logprobs"]["content"];
    assert_eq!(content.as_array().map(Vec::len), Some(3));
    assert_eq!(content[0]["token"], "h");
    assert_eq!(content[0]["bytes"], json!([104]));
    assert_eq!(content[0]["top_logprobs"].as_array().map(Vec::len), Some(2));
    assert_eq!(content[0]["top_logprobs"][1]["token"], "i");
    assert_eq!(content[1]["bytes"], json!([0xC3]), "half a character has bytes");
    let streamed = harness.chat(&with(chat, "stream", json!(true))).await;
    let entries: usize = streamed
        .events()
        .iter()
        .filter_map(|event| event.pointer("/choices/0/logprobs/content")?.as_array().map(Vec::len))
        .sum();
    assert_eq!(entries, 3, "every token once, held back text or not");
    let body = json!({ "model": "tiny", "prompt": "hello", "max_tokens": 3, "logprobs": 1 });
    let completion = harness.complete(&body).await.json();
    let logprobs = &completion["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"][0], "h");
    assert_eq!(logprobs["token_logprobs"][0], -0.5);
    assert_eq!(logprobs["top_logprobs"][0], json!({ "h": -0.5 }));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2]));
    harness.finish().await;
}

#[tokio::test]
async fn a_disaggregated_request_calls_both_sides_with_one_handoff() {
    let prefill = FakeWorker::start("prefill-0", Role::Prefill).await;
    let decode = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&prefill, &decode], |_| {}).await;
    let asked = json!({ "logits_digest": true, "token_ids": true });
    let whole = harness.chat(&with(hello(), "baton", asked.clone())).await.json();
    let (generate, prefilled) = (&decode.generated()[0], &prefill.prefilled()[0]);
    let handoff = generate.handoff.as_ref().expect("a handoff");
    assert_eq!(handoff.id, prefilled.handoff.id);
    assert_eq!(handoff.peer.worker.as_str(), "prefill-0");
    assert_eq!(prefilled.handoff.peer.worker.as_str(), "decode-0");
    assert_eq!(prefilled.tokens, generate.tokens);
    let report = &whole["choices"][0]["baton"];
    let tokens = oracle(&generate.tokens, 7, 12);
    assert_eq!(report["token_ids"], json!(tokens));
    assert_eq!(report["logits_digest"], "00000000abcd000b");
    assert_eq!(report["decision"], "disaggregated");
    assert_eq!(report["prefill_worker"], "prefill-0");
    assert_eq!(report["decode_worker"], "decode-0");
    assert_eq!(report["prefill"]["cached_tokens"], 3);
    let streamed = harness.chat(&with(with(hello(), "baton", asked), "stream", json!(true))).await;
    let events = streamed.events();
    let ids: Vec<Value> = events
        .iter()
        .filter_map(|event| event.pointer("/choices/0/baton/token_ids")?.as_array().cloned())
        .flatten()
        .collect();
    assert_eq!(json!(ids), json!(tokens));
    let end = &events.last().expect("events")["choices"][0]["baton"];
    assert_eq!(end["decision"], "disaggregated");
    assert_ne!(
        decode.generated()[1].handoff.as_ref().map(|handoff| handoff.id),
        Some(handoff.id),
        "a handoff id is used once"
    );
    harness.finish().await;
}

#[tokio::test]
async fn models_are_listed_under_all_their_names() {
    let (_decode, harness) = one_worker().await;
    let list = harness.get("/v1/models").await.json();
    let names: Vec<&Value> =
        list["data"].as_array().expect("data").iter().map(|model| &model["id"]).collect();
    assert_eq!(names, ["tiny", "gpt-4o-mini", "org/tiny"]);
    assert_eq!(harness.get("/v1/models/gpt-4o-mini").await.json()["root"], "tiny");
    assert_eq!(harness.get("/v1/models/org%2Ftiny").await.json()["id"], "org/tiny");
    assert_eq!(harness.get("/v1/models/other").await.status, 404);
    harness.finish().await;
}

#[tokio::test]
async fn metrics_are_there_from_the_start() {
    let (_decode, harness) = one_worker().await;
    let text = harness.get("/metrics").await.text;
    for name in [
        "baton_router_requests_total{code=\"200\",route=\"/v1/chat/completions\"} 0",
        "baton_router_queue_depth 0",
        "baton_router_rejected_total{reason=\"queue_full\"} 0",
        "baton_router_ttft_seconds_count 0",
        "baton_router_itl_seconds_count 0",
        "baton_router_migrations_total{reason=\"connection\",result=\"moved\"} 0",
        "baton_router_view_age_seconds",
        "baton_router_index_blocks 0",
        "baton_router_index_gaps_total 0",
        "baton_router_disagg_total{decision=\"disaggregated\"} 0",
    ] {
        assert!(text.contains(name), "{name} is missing in\n{text}");
    }
    harness.finish().await;
}
