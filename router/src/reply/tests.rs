use expect_test::expect_file;

use super::*;

fn overloaded(reason: Reason) -> Refusal {
    Refusal::Overloaded(Refused { reason, after: std::time::Duration::from_millis(1500) })
}

fn every_refusal() -> Vec<Refusal> {
    vec![
        Refusal::invalid("temperature", "'temperature' must be at most 2, not 3."),
        Refusal::coded("n", "integer_above_max_value", "'n' must be at most 128, not 1000."),
        Refusal::malformed("The request body is empty; a JSON object is expected."),
        Refusal::ContextLength { message: "Too long.".to_owned(), param: "messages" },
        Refusal::UnknownModel { model: "gpt-9\"\n".to_owned() },
        Refusal::UnknownPath { method: "GET".to_owned(), path: "/x".repeat(200) },
        Refusal::NotStored { id: "resp_1".to_owned() },
        Refusal::Method { method: "PUT".to_owned(), path: "/livez".to_owned(), allow: "GET, HEAD" },
        Refusal::SlowBody,
        Refusal::TooLarge { limit: 4096 },
        Refusal::HeadTooLarge,
        Refusal::MediaType { message: "Content-Type must be application/json.".to_owned() },
        Refusal::Unauthorized { message: "Incorrect API key provided.", code: "invalid_api_key" },
        Refusal::Forbidden { message: "The token names no tenant of this service.", code: "unknown_tenant" },
        overloaded(Reason::QueueFull),
        overloaded(Reason::Deadline),
        overloaded(Reason::WorkersQueued),
        overloaded(Reason::QueueTimeout),
        overloaded(Reason::Requests),
        overloaded(Reason::Tokens),
        overloaded(Reason::Concurrency),
        Refusal::WorkersBusy,
        Refusal::NoWorker,
        Refusal::WorkerLost,
        Refusal::Barred,
        Refusal::TimedOut,
        Refusal::Internal,
    ]
}

#[test]
fn bodies_and_headers_are_golden() {
    let mut lines = String::new();
    for refusal in every_refusal() {
        let response = refusal.response(Dialect::OpenAi);
        let mut headers: Vec<String> = response
            .headers()
            .iter()
            .filter(|(name, _)| **name != CONTENT_TYPE)
            .map(|(name, value)| format!(" {name}: {}", value.to_str().unwrap()))
            .collect();
        headers.sort();
        let body = refusal.body(Dialect::OpenAi);
        let anthropic = refusal.body(Dialect::Anthropic);
        lines.push_str(&format!(
            "{} {:?}{}\n  {}\n  {}\n",
            response.status().as_u16(),
            refusal.outcome(),
            headers.concat(),
            std::str::from_utf8(&body).unwrap(),
            std::str::from_utf8(&anthropic).unwrap()
        ));
    }
    expect_file!["golden.txt"].assert_eq(&lines);
}

#[test]
fn no_refusal_is_a_422_and_every_one_parses() {
    for refusal in every_refusal() {
        assert_ne!(refusal.status().as_u16(), 422);
        let body: serde_json::Value = serde_json::from_slice(&refusal.body(Dialect::OpenAi)).unwrap();
        assert!(body["error"]["message"].as_str().unwrap().len() < 400);
        assert!(body["error"]["type"].is_string());
    }
}

#[test]
fn only_empty_refusals_of_hyper_are_replaced() {
    let own =
        b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    let (status, answer) = unparsed(own).unwrap();
    let answer = std::str::from_utf8(&answer).unwrap();
    assert_eq!(status, 431);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 431 Request Header Fields Too Large\r\n"));
    assert!(head.ends_with(&format!("content-length: {}", body.len())));
    for other in [
        &b"HTTP/1.1 404 Not Found\r\ncontent-length: 10\r\n\r\n"[..],
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\nHTTP/1.1",
        b"HTTP/1.1 4",
        b"data: {}\n\n",
        b"",
    ] {
        assert_eq!(unparsed(other), None);
    }
}
