use baton_config::protocol::TokenLogprob;
use expect_test::expect_file;
use proptest::prelude::*;

use super::super::encode::tests::{delta, end, head};
use super::super::encode::{Api, Meter};
use super::super::writer::EventWriter;
use super::*;
use crate::request::{Bounds, parse_responses};

const BOUNDS: Bounds = Bounds { vocab: 300, choices: 128, messages: 2048 };

/// What the events of `deltas` are, and the usage at their end.
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

/// The data of events, each checked against its name and its number.
fn events(stream: &str) -> Vec<Value> {
    let blocks = stream.split_terminator("\n\n").enumerate();
    blocks
        .map(|(number, block)| {
            let (name, data) = block.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
            assert!(!data.contains(['\n', '\r']), "{data}");
            let event: Value = serde_json::from_str(data).unwrap();
            assert_eq!(
                (event["type"].as_str(), event["sequence_number"].as_u64()),
                (Some(name), Some(number as u64))
            );
            event
        })
        .collect()
}

fn last(reason: FinishReason) -> Delta {
    Delta { end: Some(super::super::choice::End { reason, ..end() }), ..Delta::default() }
}

#[test]
fn a_stream_is_golden() {
    let body = json!({ "model": "m", "input": "hi", "instructions": "be \"brief\"", "max_output_tokens": 9,
        "temperature": 0.5, "metadata": { "k": "v" }, "reasoning": { "effort": "low" }, "user": "u" });
    let ask = parse_responses(body.to_string().as_bytes(), &BOUNDS).unwrap();
    let head = Head { repeats: ask.repeats, ..head(Api::Responses) };
    let (stream, _) =
        written(head, &[delta("hi", &[104, 105]), delta(" \"you\"", &[32]), last(FinishReason::Stop)]);
    expect_file!["golden.txt"].assert_eq(&stream);
}

#[test]
fn a_stream_that_reached_its_bound_is_incomplete() {
    let (stream, _) = written(head(Api::Responses), &[delta("hi", &[104, 105]), last(FinishReason::Length)]);
    let events = events(&stream);
    let end = events.last().unwrap();
    assert_eq!(end["type"], "response.incomplete");
    assert_eq!(end["response"]["status"], "incomplete");
    assert_eq!(end["response"]["incomplete_details"], json!({ "reason": "max_output_tokens" }));
    assert_eq!(end["response"]["output"][0]["status"], "incomplete");
}

#[test]
fn a_stream_that_broke_tells_what_there_was() {
    let mut writer = EventWriter::new(head(Api::Responses), 1);
    let mut out = Vec::new();
    writer.begin(Usage::default(), &mut out);
    writer.delta(&delta("hi", &[104, 105]), &mut out);
    writer.broken(&Refusal::WorkerLost, Usage::default(), &mut out);
    let events = events(std::str::from_utf8(&out).unwrap());
    let end = events.last().unwrap();
    assert_eq!(end["type"], "response.failed");
    assert_eq!(end["response"]["status"], "failed");
    assert_eq!(end["response"]["error"]["code"], "server_error");
    assert_eq!(end["response"]["output"][0]["content"][0]["text"], "hi");
    assert_eq!(end["response"]["output"][0]["status"], "incomplete");
}

#[test]
fn nothing_generated_is_still_a_message() {
    let (stream, usage) = written(head(Api::Responses), &[last(FinishReason::Stop)]);
    let events = events(&stream);
    let whole = ResponseWriter::new(head(Api::Responses)).whole(last(FinishReason::Stop), usage);
    let whole: Value = serde_json::from_slice(&whole).unwrap();
    assert_eq!(events.last().unwrap()["response"], whole);
    assert_eq!(whole["output"][0]["content"][0]["text"], "");
}

#[test]
fn what_is_asked_for_comes_with_each_delta() {
    let debug = Debug { report: true, token_ids: true, logits_digest: false };
    let head = Head { debug, logprobs: true, ..head(Api::Responses) };
    let mut first = delta("h", &[104]);
    first.logprobs = vec![(104, TokenLogprob { logprob: -0.5, top: vec![(104, -0.5)] })];
    // A token whose text is held back.
    let mut second = delta("", &[0xC3]);
    second.logprobs = vec![(0xC3, TokenLogprob { logprob: f32::NEG_INFINITY, top: vec![] })];
    let (stream, _) = written(head, &[first, second, last(FinishReason::Stop)]);
    let events = events(&stream);
    let deltas: Vec<&Value> =
        events.iter().filter(|event| event["type"] == "response.output_text.delta").collect();
    assert_eq!(deltas.len(), 2);
    assert_eq!(deltas[0]["logprobs"][0]["token"], "h");
    assert_eq!(deltas[1]["logprobs"][0]["logprob"], -9999.0);
    assert_eq!(deltas[1]["baton"]["token_ids"], json!([0xC3]));
    let done = events.iter().find(|event| event["type"] == "response.output_text.done").unwrap();
    assert_eq!(done["logprobs"].as_array().map(Vec::len), Some(2));
    assert_eq!(events.last().unwrap()["response"]["baton"]["decision"], "disaggregated");
}

proptest! {
    #[test]
    fn a_stream_says_in_pieces_what_the_whole_says_at_once(
        texts in prop::collection::vec(any::<String>(), 1..6),
    ) {
        let mut deltas: Vec<Delta> = texts.iter().map(|text| delta(text, &[104])).collect();
        deltas.push(last(FinishReason::Stop));
        let (stream, usage) = written(head(Api::Responses), &deltas);
        let events = events(&stream);
        let shown: String =
            events.iter().filter(|event| event["type"] == "response.output_text.delta")
                .map(|event| event["delta"].as_str().unwrap()).collect();
        prop_assert_eq!(&shown, &texts.concat());
        let mut whole = last(FinishReason::Stop);
        whole.text = texts.concat();
        whole.tokens = vec![104; texts.len()];
        let whole = ResponseWriter::new(head(Api::Responses)).whole(whole, usage);
        let whole: Value = serde_json::from_slice(&whole).unwrap();
        prop_assert_eq!(&events.last().unwrap()["response"], &whole);
    }
}
