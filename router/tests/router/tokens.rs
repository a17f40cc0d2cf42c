//! What the router answers by itself: tokens of texts, texts of tokens, how many there are, and that there are no embeddings.

use baton_config::Role;
use serde_json::{Value, json};

use crate::fake_worker::FakeWorker;
use crate::harness::Harness;
use crate::model_dir::{BOS, CONTEXT};

async fn start() -> (FakeWorker, Harness) {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&worker], |_| {}).await;
    (worker, harness)
}

#[tokio::test]
async fn text_becomes_tokens_and_text_again() {
    let (_worker, harness) = start().await;
    for path in ["/tokenize", "/v1/tokenize"] {
        let told = harness.post(path, &json!({ "model": "tiny", "prompt": "hello world" })).await;
        let body = told.json();
        assert_eq!((&body["count"], &body["max_model_len"]), (&json!(2), &json!(CONTEXT)), "{}", told.text);
        assert_eq!(body["tokens"].as_array().map(Vec::len), Some(2));
        assert_eq!(body["token_strs"], Value::Null);
    }
    for (text, count) in [("", 0), ("é😀 hello\u{0}", 6), ("<|bos|>hello<|eos|>", 3)] {
        let asked = json!({ "prompt": text, "return_token_strs": true });
        let told = harness.post("/tokenize", &asked).await.json();
        assert_eq!(told["count"], count, "{told}");
        assert_eq!(told["token_strs"].as_array().map(Vec::len), Some(count));
        for path in ["/detokenize", "/v1/detokenize"] {
            let back = harness.post(path, &json!({ "model": "gpt-4o-mini", "tokens": told["tokens"] })).await;
            assert_eq!(back.json(), json!({ "prompt": text }));
        }
    }
    let names =
        harness.post("/tokenize", &json!({ "prompt": "hello world", "return_token_strs": true })).await;
    assert_eq!(names.json()["token_strs"], json!(["hello", "Ġworld"]));
    harness.finish().await;
}

#[tokio::test]
async fn a_conversation_has_the_tokens_that_are_generated_from() {
    let (worker, harness) = start().await;
    let messages =
        json!([{ "role": "system", "content": "be brief" }, { "role": "user", "content": "hello" }]);
    let told = harness.post("/tokenize", &json!({ "model": "tiny", "messages": messages })).await.json();
    let chat = json!({ "model": "tiny", "messages": messages, "max_tokens": 1 });
    assert_eq!(harness.chat(&chat).await.status, 200);
    assert_eq!(told["tokens"], json!(worker.generated()[0].tokens));
    assert_eq!(told["tokens"][0], BOS);
    let asked = json!({ "messages": messages, "add_generation_prompt": false, "add_special_tokens": false });
    let without = harness.post("/tokenize", &asked).await.json();
    let (tokens, shorter) =
        (told["tokens"].as_array().expect("tokens"), without["tokens"].as_array().expect("tokens"));
    assert!(shorter.len() < tokens.len() && tokens.starts_with(shorter), "{told} {without}");
    let input = json!({ "model": "tiny", "instructions": "be brief", "input": "hello" });
    let counted = harness.post("/v1/responses/input_tokens", &input).await;
    let expected = json!({ "object": "response.input_tokens", "input_tokens": tokens.len() });
    assert_eq!(counted.json(), expected, "{}", counted.text);
    harness.finish().await;
}

#[tokio::test]
async fn large_texts_are_no_matter_of_the_context() {
    let (_worker, harness) = start().await;
    let text = "hello world ".repeat(20_000);
    let told = harness.post("/tokenize", &json!({ "prompt": text })).await.json();
    assert!(told["count"].as_u64().is_some_and(|count| count >= 40_000), "{}", told["count"]);
    let back = harness.post("/detokenize", &json!({ "tokens": told["tokens"] })).await.json();
    assert!(back["prompt"] == text.as_str());
    harness.finish().await;
}

#[tokio::test]
async fn there_are_no_embeddings() {
    let (worker, harness) = start().await;
    for input in [json!("hello"), json!(["a", "b"]), json!([1, 2]), json!([[1], [2]])] {
        let body = json!({ "model": "tiny", "input": input, "encoding_format": "float", "dimensions": 8 });
        let answer = harness.post("/v1/embeddings", &body).await;
        let error = &answer.json()["error"];
        assert_eq!(
            (answer.status, &error["param"], &error["code"]),
            (400, &json!("model"), &json!("unsupported_model"))
        );
    }
    let unknown = harness.post("/v1/embeddings", &json!({ "model": "ada", "input": "a" })).await;
    assert_eq!((unknown.status, &unknown.json()["error"]["code"]), (404, &json!("model_not_found")));
    assert!(worker.generated().is_empty());
    harness.finish().await;
}
