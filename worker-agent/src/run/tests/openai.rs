//! The OpenAI surface of a worker with a simulated engine, over HTTP.

use serde_json::{Value, json};

use super::fleet::{Fleet, Running, Setup, until};

fn setup() -> Setup {
    Setup { prefix_cache: true, ..Setup::sim() }
}

/// The data of the events of a stream, the last of which must be `[DONE]`.
fn events(body: &str) -> Vec<Value> {
    let mut data: Vec<&str> = body.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
    assert_eq!(data.pop(), Some("[DONE]"), "{body}");
    data.into_iter().map(|text| serde_json::from_str(text).unwrap()).collect()
}

async fn model_of(worker: &Running) -> String {
    let models: Value = worker.get("/v1/models").await.json().await.unwrap();
    assert_eq!(models["object"], "list");
    models["data"][0]["id"].as_str().unwrap().to_owned()
}

#[test]
fn chats_and_completions_are_answered_whole_and_as_streams() {
    let fleet = Fleet::start(setup());
    let worker = fleet.alone("sim-0");
    fleet.block_on(async {
        let model = model_of(&worker).await;
        assert_eq!(worker.get("/health").await.status().as_u16(), 200);
        let content = "four".repeat(40);
        let chat =
            json!({ "model": model, "max_tokens": 5, "messages": [{ "role": "user", "content": content }] });
        let whole: Value =
            fleet.post(&worker, "/v1/chat/completions", &chat).await.unwrap().json().await.unwrap();
        let text = whole["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
        assert_eq!(text.len(), 5 * 4, "{whole}");
        // The role, the content, and the role of who answers: 1 + 40 + 3 tokens.
        assert_eq!(whole["usage"]["prompt_tokens"], 44);
        assert_eq!(whole["usage"]["completion_tokens"], 5);
        assert_eq!(whole["choices"][0]["finish_reason"], "length");

        let mut streamed = chat.clone();
        streamed["stream"] = true.into();
        streamed["stream_options"] = json!({ "include_usage": true });
        let answer = fleet.post(&worker, "/v1/chat/completions", &streamed).await.unwrap();
        assert_eq!(answer.headers()["content-type"], "text/event-stream");
        let events = events(&answer.text().await.unwrap());
        assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
        let said: String =
            events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(said, text, "the same prompt, the same words");
        assert_eq!(events.len(), 1 + 5 + 1 + 1);
        assert_eq!(events[6]["choices"][0]["finish_reason"], "length");
        assert_eq!(events[7]["usage"]["prompt_tokens_details"]["cached_tokens"], 32, "two blocks of sixteen");

        let completion = json!({ "model": model, "prompt": [1, 2, 3], "max_tokens": 2 });
        let whole: Value =
            fleet.post(&worker, "/v1/completions", &completion).await.unwrap().json().await.unwrap();
        assert_eq!(whole["usage"]["prompt_tokens"], 3);
        assert_eq!(whole["choices"][0]["text"].as_str().unwrap().len(), 8);
        let tokens: Value = fleet.post(&worker, "/tokenize", &chat).await.unwrap().json().await.unwrap();
        assert_eq!((&tokens["count"], tokens["tokens"].as_array().unwrap().len()), (&json!(44), 44));
        let metrics = worker.text("/metrics").await;
        assert!(metrics.contains("baton_agent_requests_total{end=\"ok\",kind=\"openai\"} 3"), "{metrics}");
        assert!(metrics.contains("baton_agent_tokens_total{kind=\"cached\"} 32"), "{metrics}");
    });
}

#[test]
fn a_client_that_leaves_ends_its_sequence() {
    // Nothing of it would end by itself in time.
    let fleet = Fleet::start(Setup { decode_us: 20_000.0, ..setup() });
    let worker = fleet.alone("sim-0");
    fleet.block_on(async {
        for stream in [true, false] {
            let body = json!({ "prompt": "x", "max_tokens": 1900, "stream": stream });
            let request = fleet.post(&worker, "/v1/completions", &body);
            let left = tokio::time::timeout(std::time::Duration::from_millis(50), async {
                // Of a stream the head comes at once, of a whole answer nothing.
                let answer = request.await.unwrap();
                let text = answer.text().await;
                panic!("1900 tokens cannot be there yet: {text:?}");
            });
            assert!(left.await.is_err());
        }
        until("both are gone", || worker.in_use() == 0).await;
        let cancelled = "baton_agent_requests_total{end=\"cancelled\",kind=\"openai\"} 2";
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !worker.text("/metrics").await.contains(cancelled) {
            assert!(std::time::Instant::now() < deadline, "never counted");
        }
    });
}

#[test]
fn what_cannot_be_answered_is_refused_in_openais_shape() {
    let fleet = Fleet::start(setup());
    let worker = fleet.alone("sim-0");
    fleet.block_on(async {
        for (path, body, status, code) in [
            ("/v1/chat/completions", "{\"prompt\":\"x\"}", 400, Value::Null),
            ("/v1/completions", "{\"messages\":[]}", 400, Value::Null),
            ("/v1/completions", "{\"prompt\":\"x\"", 400, Value::Null),
            ("/v1/completions", "{\"prompt\":7}", 400, Value::Null),
            ("/v1/completions", "{\"prompt\":[]}", 400, Value::Null),
            ("/v1/completions", "{\"prompt\":[4294967295]}", 400, Value::Null),
            ("/v1/completions", "{\"prompt\":\"x\",\"max_tokens\":0}", 400, Value::Null),
            ("/v1/completions", "{\"prompt\":\"x\",\"model\":\"other\"}", 404, json!("model_not_found")),
            ("/tokenize", "{}", 400, Value::Null),
        ] {
            let answer = fleet.post_text(&worker, path, body).await;
            assert_eq!(answer.status().as_u16(), status, "{body}");
            let error: Value = answer.json().await.unwrap();
            assert_eq!(error["error"]["code"], code, "{body}");
            assert!(!error["error"]["message"].as_str().unwrap().is_empty(), "{body}");
            assert_eq!(error["error"]["type"], "invalid_request_error");
        }
    });
}

#[test]
fn a_real_engine_has_no_such_paths() {
    let fleet = Fleet::start(Setup::reference());
    let worker = fleet.alone("r-0");
    fleet.block_on(async {
        assert_eq!(worker.get("/v1/models").await.status().as_u16(), 404);
        assert_eq!(fleet.post_text(&worker, "/v1/completions", "{}").await.status().as_u16(), 404);
    });
}
