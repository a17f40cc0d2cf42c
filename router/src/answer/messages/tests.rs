use expect_test::expect;
use proptest::prelude::*;
use serde_json::Value;

use super::super::encode::tests::{delta, end, head};
use super::super::encode::{Api, Meter};
use super::super::writer::EventWriter;
use super::*;
use crate::reply::Refusal;

fn written(head: Head, deltas: &[Delta]) -> (String, Usage) {
    let mut writer = EventWriter::new(head, 1);
    let mut meter = Meter::new(5, 1);
    let mut out = Vec::new();
    writer.begin(meter.usage(), &mut out);
    for delta in deltas {
        meter.add(delta);
        writer.delta(delta, &mut out);
    }
    writer.done(meter.usage(), &mut out);
    (String::from_utf8(out).unwrap(), meter.usage())
}

fn last(reason: FinishReason, stop: Option<&str>) -> Delta {
    let stop = stop.map(str::to_owned);
    Delta { end: Some(End { reason, stop, ..end() }), ..Delta::default() }
}

/// The data of events, each checked against its name.
fn events(stream: &str) -> Vec<Value> {
    let data = |block: &str| {
        let (name, data) = block.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
        assert!(!data.contains(['\n', '\r']), "{data}");
        let event: Value = serde_json::from_str(data).unwrap();
        assert_eq!(event["type"].as_str(), Some(name));
        event
    };
    stream.split_terminator("\n\n").map(data).collect()
}

#[test]
fn a_stream_is_golden() {
    let deltas = [delta("hi", &[104, 105]), last(FinishReason::Stop, None)];
    expect![[r#"
        event: message_start
        data: {"message":{"content":[],"id":"msg_1","model":"m\"}","role":"assistant","stop_reason":null,"stop_sequence":null,"type":"message","usage":{"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"input_tokens":5,"output_tokens":0}},"type":"message_start"}

        event: content_block_start
        data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}

        event: ping
        data: {"type":"ping"}

        event: content_block_delta
        data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"hi"}}

        event: content_block_stop
        data: {"type":"content_block_stop","index":0}

        event: message_delta
        data: {"delta":{"stop_reason":"end_turn","stop_sequence":null},"type":"message_delta","usage":{"cache_creation_input_tokens":0,"cache_read_input_tokens":1,"input_tokens":4,"output_tokens":2}}

        event: message_stop
        data: {"type":"message_stop"}

    "#]].assert_eq(&written(head(Api::Messages), &deltas).0);
}

#[test]
fn reasons_to_stop_have_their_own_names() {
    for (reason, stop, name) in [
        (FinishReason::Stop, None, "end_turn"),
        (FinishReason::Stop, Some("END"), "stop_sequence"),
        (FinishReason::Length, None, "max_tokens"),
    ] {
        let (stream, usage) = written(head(Api::Messages), &[last(reason, stop)]);
        let events = events(&stream);
        let told = events.iter().find(|event| event["type"] == "message_delta").unwrap();
        assert_eq!(told["delta"], serde_json::json!({ "stop_reason": name, "stop_sequence": stop }));
        let whole = MessageWriter::new(head(Api::Messages)).whole(last(reason, stop), usage);
        let whole: Value = serde_json::from_slice(&whole).unwrap();
        assert_eq!((&whole["stop_reason"], &whole["stop_sequence"]), (&json!(name), &json!(stop)));
    }
}

#[test]
fn a_message_without_text_has_no_block() {
    let (stream, usage) = written(head(Api::Messages), &[last(FinishReason::Stop, None)]);
    assert!(!stream.contains("content_block"), "{stream}");
    let whole = MessageWriter::new(head(Api::Messages)).whole(last(FinishReason::Stop, None), usage);
    assert_eq!(serde_json::from_slice::<Value>(&whole).unwrap()["content"], json!([]));
}

#[test]
fn a_stream_that_broke_ends_with_an_error() {
    let mut writer = EventWriter::new(head(Api::Messages), 1);
    let mut out = Vec::new();
    writer.begin(Usage::default(), &mut out);
    writer.broken(&Refusal::WorkerLost, Usage::default(), &mut out);
    let events = events(std::str::from_utf8(&out).unwrap());
    assert_eq!(events.last().unwrap()["error"]["type"], "api_error");
}

#[test]
fn what_is_asked_for_comes_along() {
    let debug = Debug { report: true, token_ids: true, logits_digest: true };
    let head = Head { debug, ..head(Api::Messages) };
    let mut first = delta("", &[104]);
    first.logits_digest = Some(0xAB);
    let (stream, _) = written(head, &[first, last(FinishReason::Stop, None)]);
    let events = events(&stream);
    let of = |kind: &str| events.iter().find(|event| event["type"] == kind).unwrap();
    assert_eq!(of("content_block_delta")["baton"]["token_ids"], json!([104]));
    assert_eq!(of("content_block_delta")["baton"]["logits_digest"], "00000000000000ab");
    assert_eq!(of("message_delta")["baton"]["decode_worker"], "d");
}

proptest! {
    #[test]
    fn a_stream_says_in_pieces_what_the_whole_says_at_once(
        texts in prop::collection::vec(any::<String>(), 1..6),
    ) {
        let mut deltas: Vec<Delta> = texts.iter().map(|text| delta(text, &[104])).collect();
        deltas.push(last(FinishReason::Length, None));
        let (stream, usage) = written(head(Api::Messages), &deltas);
        let shown: String = events(&stream).iter()
            .filter_map(|event| event.pointer("/delta/text")?.as_str().map(str::to_owned)).collect();
        let mut whole = last(FinishReason::Length, None);
        whole.text = texts.concat();
        let whole = MessageWriter::new(head(Api::Messages)).whole(whole, usage);
        let whole: Value = serde_json::from_slice(&whole).unwrap();
        let text = whole.pointer("/content/0/text").and_then(Value::as_str).unwrap_or_default();
        prop_assert_eq!(&shown, text);
        prop_assert_eq!(&shown, &texts.concat());
    }
}
