use baton_config::protocol::PrefillReport;
use expect_test::expect;
use proptest::prelude::*;

use super::*;
use crate::dispatch::Trace;
use crate::model::tests::model_dir::byte_level_tokenizer;

/// A head of the model `m"}`.
pub(in crate::answer) fn head(api: Api) -> Head {
    let tokenizer = tokenizers::Tokenizer::from_bytes(byte_level_tokenizer().to_string()).unwrap();
    Head {
        api,
        id: format!("{}1", api.id_prefix()),
        created: 7,
        model: "m\"}".to_owned(),
        logprobs: false,
        debug: Debug::default(),
        include_usage: false,
        repeats: None,
        vocabulary: Arc::new(Vocabulary::new(tokenizer)),
    }
}

pub(in crate::answer) fn delta(text: &str, tokens: &[u32]) -> Delta {
    Delta { text: text.to_owned(), tokens: tokens.to_vec(), ..Delta::default() }
}

/// An end that was reported in full.
pub(in crate::answer) fn end() -> End {
    let report = PrefillReport {
        cached_tokens: 1,
        imported_tokens: 2,
        imported_bytes: 3,
        queue_ms: 0.5,
        prefill_ms: 1.5,
        transfer_tail_ms: 0.25,
        fallback: None,
    };
    let trace = Trace {
        prefill: Some("p".parse().unwrap()),
        decode: Some("d".parse().unwrap()),
        report: Some(report),
        migrations: 1,
    };
    End { reason: FinishReason::Stop, stop: None, trace, ttft_ms: Some(12.5) }
}

fn written(head: Head, deltas: &[Delta]) -> String {
    let mut writer = ChunkWriter::new(head, 2);
    let mut meter = Meter::new(5, 1);
    let mut out = Vec::new();
    for delta in deltas {
        meter.add(delta);
        writer.delta(delta, &mut out);
    }
    writer.done(meter.usage(), &mut out);
    String::from_utf8(out).unwrap()
}

#[test]
fn a_chat_stream_is_golden() {
    let debug = Debug { report: true, token_ids: true, logits_digest: true };
    let head = Head { include_usage: true, debug, ..head(Api::Chat) };
    let mut first = delta("hi", &[104, 105]);
    first.logits_digest = Some(0xAB);
    let mut last = delta("", &[]);
    last.end = Some(end());
    expect![[r#"
        data: {"created":7,"id":"chatcmpl-1","model":"m\"}","object":"chat.completion.chunk","system_fingerprint":null,"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}],"usage":null}

        data: {"created":7,"id":"chatcmpl-1","model":"m\"}","object":"chat.completion.chunk","system_fingerprint":null,"choices":[{"index":0,"delta":{"content":"hi"},"baton":{"logits_digest":"00000000000000ab","token_ids":[104,105]},"finish_reason":null}],"usage":null}

        data: {"created":7,"id":"chatcmpl-1","model":"m\"}","object":"chat.completion.chunk","system_fingerprint":null,"choices":[{"index":0,"delta":{},"baton":{"decision":"disaggregated","decode_worker":"d","migrations":1,"prefill":{"cached_tokens":1,"fallback":null,"imported_bytes":3,"imported_tokens":2,"prefill_ms":1.5,"queue_ms":0.5,"transfer_tail_ms":0.25},"prefill_worker":"p","ttft_ms":12.5},"finish_reason":"stop"}],"usage":null}

        data: {"created":7,"id":"chatcmpl-1","model":"m\"}","object":"chat.completion.chunk","system_fingerprint":null,"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2,"total_tokens":7,"prompt_tokens_details":{"cached_tokens":1}}}

        data: [DONE]

    "#]].assert_eq(&written(head, &[first, last]));
}

#[test]
fn a_completion_stream_is_golden() {
    let mut last = delta("", &[]);
    last.end = Some(end());
    expect![[r#"
        data: {"created":7,"id":"cmpl-1","model":"m\"}","object":"text_completion","system_fingerprint":null,"choices":[{"index":0,"text":"hi","finish_reason":null}]}

        data: {"created":7,"id":"cmpl-1","model":"m\"}","object":"text_completion","system_fingerprint":null,"choices":[{"index":0,"text":"","finish_reason":"stop"}]}

        data: [DONE]

    "#]].assert_eq(&written(head(Api::Completions), &[delta("hi", &[104, 105]), last]));
}

#[test]
fn what_is_impossible_has_a_number() {
    let head = head(Api::Chat);
    let entry = TokenLogprob { logprob: f32::NEG_INFINITY, top: vec![(104, f32::NEG_INFINITY)] };
    let value = chat_logprobs(&head.vocabulary, &[(104, entry)]);
    assert_eq!(value["content"][0]["logprob"], -9999.0);
    assert_eq!(value["content"][0]["top_logprobs"][0]["logprob"], -9999.0);
}

proptest! {
    #[test]
    fn every_event_is_one_line_of_json_whatever_the_text(
        texts in prop::collection::vec(any::<String>(), 1..6),
        chat in any::<bool>(),
    ) {
        let api = if chat { Api::Chat } else { Api::Completions };
        let deltas: Vec<Delta> = texts.iter().map(|text| delta(text, &[104])).collect();
        let stream = written(head(api), &deltas);
        let mut blocks: Vec<&str> = stream.split_terminator("\n\n").collect();
        prop_assert_eq!(blocks.pop(), Some("data: [DONE]"));
        let mut shown = String::new();
        for block in blocks {
            prop_assert!(!block.contains(['\n', '\r']));
            let event: Value = serde_json::from_str(block.strip_prefix("data: ").unwrap()).unwrap();
            let place = if chat { "/choices/0/delta/content" } else { "/choices/0/text" };
            shown.push_str(event.pointer(place).unwrap().as_str().unwrap());
        }
        prop_assert_eq!(shown, texts.concat());
    }
}
