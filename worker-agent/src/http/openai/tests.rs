use axum::body::Bytes;

use super::answer::{Kind, Writer};
use super::request::{Prompt, parse};
use super::tokens::{of_messages, of_text, word};

const VOCAB: u32 = 904;

fn messages_of(json: &str) -> Vec<u32> {
    let body = Ok(Bytes::from(format!("{{\"messages\":{json}}}")));
    let request = parse(&body).unwrap();
    of_messages(request.messages.as_deref().unwrap(), VOCAB)
}

#[test]
fn equal_beginnings_of_texts_are_equal_beginnings_of_tokens() {
    let (one, other) =
        (of_text("the same text, then this", VOCAB), of_text("the same text, then that", VOCAB));
    assert_eq!((one.len(), other.len()), (6, 6));
    assert_eq!(one[..5], other[..5]);
    assert_ne!(one[5], other[5]);
    assert_eq!(of_text("abcde", VOCAB).len(), 2);
    assert_ne!(of_text("a", VOCAB), of_text("a\0", VOCAB));
    assert!(of_text("", VOCAB).is_empty());
    let all: std::collections::HashSet<u32> =
        (0..20_000).flat_map(|n| of_text(&format!("{n:04}"), VOCAB)).collect();
    assert!(all.len() > 890 && all.iter().all(|token| *token < VOCAB), "{} of {VOCAB}", all.len());
}

#[test]
fn a_chat_that_grows_begins_with_what_it_was() {
    let before =
        messages_of(r#"[{"role":"system","content":"be kind"},{"role":"user","content":"hello you"}]"#);
    let after = messages_of(
        r#"[{"role":"system","content":"be kind"},{"role":"user","content":"hello you"},
            {"role":"assistant","content":"hello"},{"role":"user","content":[{"type":"text","text":"and"},{"type":"image"},{"text":" you"}]}]"#,
    );
    assert_eq!(after[..before.len()], before);
    assert!(after.len() > before.len());
    assert_eq!(messages_of(r#"[{"role":"user","content":null}]"#), messages_of(r#"[{"role":"user"}]"#));
}

#[test]
fn words_are_four_bytes_that_json_leaves_alone() {
    let mut seen = std::collections::HashSet::new();
    for token in 0..17_576 {
        let mut out = Vec::new();
        word(token, &mut out);
        assert!(out.len() == 4 && out[1..].iter().all(u8::is_ascii_lowercase) && out[0] == b' ');
        seen.insert(out);
    }
    assert_eq!(seen.len(), 17_576, "so many ids have words of their own");
}

#[test]
fn escaped_texts_and_token_ids_are_read() {
    let body =
        Ok(Bytes::from_static(br#"{"prompt":"a\nb","model":"m\u0041","extra":{"x":[1]},"stream":null}"#));
    let request = parse(&body).unwrap();
    assert!(matches!(&request.prompt, Some(Prompt::Text(text)) if text == "a\nb"));
    assert_eq!(
        (request.model.as_deref(), request.stream(), request.usage_wanted()),
        (Some("mA"), false, false)
    );
    let body = Ok(Bytes::from_static(br#"{"prompt":[1,2],"max_tokens":3,"max_completion_tokens":4}"#));
    let request = parse(&body).unwrap();
    assert!(matches!(&request.prompt, Some(Prompt::Tokens(tokens)) if tokens == &[1, 2]));
    assert_eq!(request.max_tokens(), Some(4));
    let body = Ok(Bytes::from_static(br#"{"prompt":-1}"#));
    assert_eq!(parse(&body).unwrap_err().status().as_u16(), 400);
}

#[test]
fn the_name_of_a_model_cannot_break_the_answer() {
    for kind in [Kind::Chat, Kind::Completion] {
        let writer = Writer::new(kind, 7, "a \"model\"\\", true);
        let mut out = Vec::new();
        writer.first(&mut out);
        writer.token(1, &mut out);
        let text = String::from_utf8(out).unwrap();
        let events: Vec<&str> = text.split_terminator("\n\n").collect();
        assert_eq!(events.len(), if kind == Kind::Chat { 2 } else { 1 });
        for event in events {
            let event: serde_json::Value =
                serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap();
            assert_eq!(event["model"], "a \"model\"\\");
        }
    }
}
