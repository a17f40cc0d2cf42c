//! Refusals of servers of other projects, brought into the one shape of errors.

use http::StatusCode;
use serde_json::Value;

use super::Refusal;

/// Longest message passed on, in characters.
const MESSAGE_MAX_CHARS: usize = 4096;
/// Longest other text passed on, in characters.
const WORD_MAX_CHARS: usize = 256;

/// What a client is told of a refusal: vLLM, SGLang, llama.cpp, TGI and FastAPI each have a shape of their own for it.
pub(crate) fn refused_by_server(status: StatusCode, body: &[u8]) -> Refusal {
    let value: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
    let error = value.get("error").filter(|error| error.is_object()).unwrap_or(&value);
    let word = |key: &str| error.get(key).and_then(Value::as_str).map(|text| cut(text, WORD_MAX_CHARS));
    let said = [error.get("message"), value.get("detail"), value.get("error"), value.get("message")];
    let text = said.into_iter().flatten().find_map(|said| match said {
        Value::String(text) if !text.is_empty() => Some(text.clone()),
        // FastAPI lists what is wrong with which field.
        Value::Array(_) => Some(said.to_string()),
        _ => None,
    });
    let plain = || String::from_utf8_lossy(body).trim().to_owned();
    let message = match text {
        Some(text) => text,
        None if value.is_null() && !body.is_empty() => plain(),
        None => "The server refused the request without saying why.".to_owned(),
    };
    // FastAPI's status for a wrong type, which no OpenAI client knows.
    let status = if status == StatusCode::UNPROCESSABLE_ENTITY { StatusCode::BAD_REQUEST } else { status };
    Refusal::RefusedByServer {
        status,
        message: cut(&message, MESSAGE_MAX_CHARS),
        kind: kind(word("type"), status),
        param: word("param"),
        code: word("code"),
    }
}

/// Python's names of exceptions are no types of OpenAI's.
fn kind(said: Option<String>, status: StatusCode) -> String {
    let known = |kind: &String| kind.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    let own = if status.is_client_error() { "invalid_request_error" } else { "server_error" };
    said.filter(known).unwrap_or_else(|| own.to_owned())
}

fn cut(text: &str, max_chars: usize) -> String {
    text.chars().take(max_chars).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routes::Dialect;

    #[test]
    fn every_shape_becomes_the_one() {
        let body = |status: u16, body: &str| {
            let refusal = refused_by_server(StatusCode::from_u16(status).unwrap(), body.as_bytes());
            let error: Value = serde_json::from_slice(&refusal.body(Dialect::OpenAi)).unwrap();
            let error = error["error"].as_object().unwrap();
            assert_eq!(error.keys().collect::<Vec<_>>(), ["code", "message", "param", "type"]);
            (refusal.status().as_u16(), error.values().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        };
        for (status, given, expected_status, expected) in [
            (
                400,
                "{\"error\":{\"message\":\"too long\",\"type\":\"invalid_request_error\",\"param\":\"prompt\",\"code\":\"context_length_exceeded\"}}",
                400,
                "\"context_length_exceeded\" \"too long\" \"prompt\" \"invalid_request_error\"",
            ),
            (
                400,
                "{\"object\":\"error\",\"message\":\"too long\",\"type\":\"BadRequestError\",\"param\":null,\"code\":400}",
                400,
                "null \"too long\" null \"invalid_request_error\"",
            ),
            (
                422,
                "{\"detail\":[{\"loc\":[\"body\"]}]}",
                400,
                "null \"[{\\\"loc\\\":[\\\"body\\\"]}]\" null \"invalid_request_error\"",
            ),
            (404, "{\"detail\":\"Not Found\"}", 404, "null \"Not Found\" null \"invalid_request_error\""),
            (
                413,
                "{\"error\":\"too large\",\"error_type\":\"validation\"}",
                413,
                "null \"too large\" null \"invalid_request_error\"",
            ),
            (400, "plain words", 400, "null \"plain words\" null \"invalid_request_error\""),
            (
                501,
                "",
                501,
                "null \"The server refused the request without saying why.\" null \"server_error\"",
            ),
        ] {
            assert_eq!(body(status, given), (expected_status, expected.to_owned()), "{given}");
        }
    }
}
