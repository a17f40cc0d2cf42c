//! Puts the name by which a client knows the model in the place of the server's.

use bytes::{Bytes, BytesMut};

const KEY: &[u8] = b"\"model\":";

/// Two names of a model, as JSON strings. Neither can occur within another string of an answer: its quotes would be
/// escaped there.
#[derive(Debug, Clone)]
pub(super) struct Rename {
    from: String,
    to: String,
}

impl Rename {
    /// What is to be done to answers of a server that calls the model `server`, for a client that calls it `client`.
    pub(super) fn between(server: Option<&str>, client: Option<&str>) -> Option<Self> {
        let (server, client) = (server?, client?);
        let json = |name: &str| serde_json::Value::from(name).to_string();
        (server != client).then(|| Self { from: json(server), to: json(client) })
    }

    /// The bytes with every `"model": NAME` changed; the same bytes where there is none.
    pub(super) fn apply(&self, bytes: Bytes) -> Bytes {
        let mut out = BytesMut::new();
        let mut rest: &[u8] = &bytes;
        while let Some(at) = find(rest, KEY) {
            let value_at = at + KEY.len() + usize::from(rest.get(at + KEY.len()) == Some(&b' '));
            let (before, value) = rest.split_at(value_at);
            rest = value;
            match value.strip_prefix(self.from.as_bytes()) {
                Some(after) => {
                    out.extend_from_slice(before);
                    out.extend_from_slice(self.to.as_bytes());
                    rest = after;
                }
                None => out.extend_from_slice(before),
            }
        }
        if out.is_empty() {
            return bytes;
        }
        out.extend_from_slice(rest);
        out.freeze()
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_name_of_the_model_is_changed() {
        let rename = Rename::between(Some("meta/\"L\""), Some("llama")).unwrap();
        let apply =
            |text: &str| String::from_utf8(rename.apply(Bytes::from(text.to_owned())).to_vec()).unwrap();
        assert_eq!(apply("{\"model\":\"meta/\\\"L\\\"\",\"x\":1}"), "{\"model\":\"llama\",\"x\":1}");
        assert_eq!(
            apply("{\"model\": \"meta/\\\"L\\\"\"}{\"model\":\"meta/\\\"L\\\"\"}"),
            "{\"model\": \"llama\"}{\"model\":\"llama\"}"
        );
        let said = "{\"model\":\"other\",\"content\":\"\\\"model\\\":\\\"meta/L\\\"\"}";
        assert_eq!(apply(said), said);
        assert_eq!(apply("{\"model\":"), "{\"model\":");
        assert!(
            Rename::between(Some("a"), Some("a")).is_none() && Rename::between(None, Some("a")).is_none()
        );
    }
}
