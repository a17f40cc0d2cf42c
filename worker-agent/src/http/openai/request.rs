//! What is read of a request.

use std::borrow::Cow;
use std::fmt;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};

use super::refusal::Refusal;

/// A request for an answer, or for tokens; which of the fields must be there depends on the path.
#[derive(Debug, Deserialize)]
pub(super) struct Request<'a> {
    #[serde(default, borrow)]
    pub(super) model: Option<Cow<'a, str>>,
    #[serde(default, borrow)]
    pub(super) messages: Option<Vec<Message<'a>>>,
    #[serde(default, borrow)]
    pub(super) prompt: Option<Prompt<'a>>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// What somebody said.
#[derive(Debug, Deserialize)]
pub(super) struct Message<'a> {
    #[serde(borrow)]
    pub(super) role: Cow<'a, str>,
    #[serde(default, borrow)]
    content: Content<'a>,
}

/// A text, or parts of one; nothing where `content` is null.
#[derive(Debug, Default)]
struct Content<'a>(Vec<Cow<'a, str>>);

#[derive(Debug, Deserialize)]
struct Part<'a> {
    #[serde(default, borrow)]
    text: Option<Cow<'a, str>>,
}

/// What a completion begins with.
#[derive(Debug)]
pub(super) enum Prompt<'a> {
    Text(Cow<'a, str>),
    Tokens(Vec<u32>),
}

impl Request<'_> {
    /// Tokens of the answer at most, where the request says.
    pub(super) fn max_tokens(&self) -> Option<u32> {
        self.max_completion_tokens.or(self.max_tokens)
    }

    /// Whether the answer is wanted token by token.
    pub(super) fn stream(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// Whether a stream ends with its usage.
    pub(super) fn usage_wanted(&self) -> bool {
        self.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false)
    }
}

impl Message<'_> {
    /// The texts of its content.
    pub(super) fn texts(&self) -> impl Iterator<Item = &str> {
        self.content.0.iter().map(AsRef::as_ref)
    }

    /// Bytes of all of them.
    pub(super) fn content_bytes(&self) -> usize {
        self.texts().map(str::len).sum()
    }
}

/// The body of a request.
pub(super) fn parse(body: &Result<Bytes, BytesRejection>) -> Result<Request<'_>, Refusal> {
    match body {
        Ok(body) => serde_json::from_slice(body)
            .map_err(|error| Refusal::invalid(format!("the body is not understood: {error}"))),
        Err(rejection) => Err(Refusal::new(rejection.status(), rejection.body_text())),
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Content<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ContentVisitor)
    }
}

struct ContentVisitor;

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = Content<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, a list of parts, or null")
    }

    fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Content(vec![Cow::Borrowed(text)]))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Content(vec![Cow::Owned(text.to_owned())]))
    }

    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(Content::default())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<Self::Value, A::Error> {
        let mut texts = Vec::new();
        while let Some(part) = parts.next_element::<Part<'de>>()? {
            texts.extend(part.text);
        }
        Ok(Content(texts))
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Prompt<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptVisitor)
    }
}

struct PromptVisitor;

impl<'de> Visitor<'de> for PromptVisitor {
    type Value = Prompt<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text or a list of token ids")
    }

    fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Prompt::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Prompt::Text(Cow::Owned(text.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut ids: A) -> Result<Self::Value, A::Error> {
        let mut tokens = Vec::new();
        while let Some(id) = ids.next_element()? {
            tokens.push(id);
        }
        Ok(Prompt::Tokens(tokens))
    }
}
