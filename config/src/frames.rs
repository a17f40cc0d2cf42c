//! Frames: all generations of one router on one worker over one connection.
//!
//! `GET /v1/stream?epoch=N` with `Upgrade: baton-frames/1` turns an HTTP/1.1 connection into frames in both directions. A
//! step of an engine yields a token for each of its sequences at once; here they travel, and are read, together. What a
//! generation is does not change: it begins with a [`GenerateRequest`], its [`GenerateEvent`]s come in the order of
//! `POST /v1/generate`, and the end of the connection is the end of all its generations.
//!
//! A frame is its length without these five bytes (`u32`), its kind (`u8`), and its payload; numbers are little-endian.
//!
//! | kind | from | payload |
//! |---|---|---|
//! | 1 open | router | id `u32`, credit `u32`, length of the JSON `u32`, a [`GenerateRequest`] without tokens as JSON, tokens `u32`... |
//! | 2 cancel | router | id `u32` |
//! | 3 credit | router | id `u32`, tokens that may be sent besides `u32` |
//! | 16 tokens | worker | (id `u32`, token `u32`)... |
//! | 17 event | worker | id `u32`, a [`GenerateEvent`] as JSON: what is not a plain token |
//!
//! Ids are chosen by the router and not used twice on a connection. Every token takes one credit, other events take none;
//! an id is forgotten by the worker after its last event or its cancel, so frames for an id that is not known mean nothing.
//! Nothing here is trusted because it parsed, and nothing is allocated because a length says so.

mod reader;
mod write;

use crate::protocol::{GenerateEvent, GenerateRequest};

pub use reader::Reader;
pub use write::{TokenFrame, cancel, credit, event, open};

/// What the `Upgrade` header says.
pub const PROTOCOL: &str = "baton-frames/1";
/// Where the connection is asked for.
pub const PATH: &str = "/v1/stream";
/// Longest payload of every frame but `open`.
pub const PAYLOAD_MAX_BYTES: usize = 1 << 20;
/// Most tokens that a router may allow a generation to be ahead of it.
pub const CREDIT_MAX: u32 = 1 << 20;

/// Bytes before the payload.
const HEADER_BYTES: usize = 5;

const OPEN: u8 = 1;
const CANCEL: u8 = 2;
const CREDIT: u8 = 3;
const TOKENS: u8 = 16;
const EVENT: u8 = 17;

/// One generation on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u32);

/// Why bytes are no frames, or not those that may come now. The connection cannot be used any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Longer than any frame of its kind.
    #[error("a frame of {bytes} bytes, {max} at most")]
    TooLong {
        /// What its head says.
        bytes: usize,
        /// What is taken.
        max: usize,
    },
    /// Not a kind that the other side sends.
    #[error("a frame of kind {0}")]
    Kind(u8),
    /// A payload that is not of its kind.
    #[error("a {what} frame of {bytes} bytes that is none")]
    Malformed {
        /// The kind.
        what: &'static str,
        /// Length of the payload.
        bytes: usize,
    },
    /// JSON that is not what it should be.
    #[error("a {what} frame with other JSON: {why}")]
    Json {
        /// The kind.
        what: &'static str,
        /// What the parser says.
        why: String,
    },
}

/// What a router says.
#[derive(Debug, Clone, PartialEq)]
pub enum Command<'a> {
    /// Begin a generation.
    Open(Open<'a>),
    /// Give a generation up.
    Cancel(StreamId),
    /// So many more tokens may come.
    Credit(StreamId, u32),
}

/// A generation to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open<'a> {
    /// Its id.
    pub id: StreamId,
    /// Tokens that may be sent before more credit comes.
    pub credit: u32,
    json: &'a [u8],
    tokens: &'a [u8],
}

/// What a worker says.
#[derive(Debug, Clone, PartialEq)]
pub enum News<'a> {
    /// Tokens that carry nothing else, in order.
    Tokens(Tokens<'a>),
    /// Anything else that happened to a generation.
    Event(StreamId, GenerateEvent),
}

/// The tokens of a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens<'a>(&'a [u8]);

impl<'a> Open<'a> {
    /// The request with its tokens.
    ///
    /// # Errors
    /// [`FrameError::Json`].
    pub fn request(&self) -> Result<GenerateRequest, FrameError> {
        let mut request: GenerateRequest = parse("open", self.json)?;
        request.tokens = self.tokens.chunks_exact(4).map(|bytes| number(bytes, 0)).collect();
        Ok(request)
    }

    fn decode(payload: &'a [u8]) -> Option<Self> {
        let (head, rest) = payload.split_at_checked(12)?;
        let (json, tokens) = rest.split_at_checked(number(head, 8) as usize)?;
        tokens.len().is_multiple_of(4).then_some(Self {
            id: StreamId(number(head, 0)),
            credit: number(head, 4),
            json,
            tokens,
        })
    }
}

impl<'a> Command<'a> {
    /// Reads a frame of a router.
    ///
    /// # Errors
    /// When a router sends no such frame.
    pub fn decode(kind: u8, payload: &'a [u8]) -> Result<Self, FrameError> {
        let malformed = |what| FrameError::Malformed { what, bytes: payload.len() };
        match (kind, payload.len()) {
            (OPEN, _) => Open::decode(payload).map(Self::Open).ok_or_else(|| malformed("open")),
            (CANCEL, 4) => Ok(Self::Cancel(StreamId(number(payload, 0)))),
            (CANCEL, _) => Err(malformed("cancel")),
            (CREDIT, 8) => Ok(Self::Credit(StreamId(number(payload, 0)), number(payload, 4))),
            (CREDIT, _) => Err(malformed("credit")),
            (kind, _) => Err(FrameError::Kind(kind)),
        }
    }
}

impl<'a> News<'a> {
    /// Reads a frame of a worker.
    ///
    /// # Errors
    /// When a worker sends no such frame.
    pub fn decode(kind: u8, payload: &'a [u8]) -> Result<Self, FrameError> {
        let malformed = |what| FrameError::Malformed { what, bytes: payload.len() };
        match kind {
            TOKENS if payload.len().is_multiple_of(8) => Ok(Self::Tokens(Tokens(payload))),
            TOKENS => Err(malformed("tokens")),
            EVENT => {
                let (id, json) = payload.split_at_checked(4).ok_or_else(|| malformed("event"))?;
                Ok(Self::Event(StreamId(number(id, 0)), parse("event", json)?))
            }
            kind => Err(FrameError::Kind(kind)),
        }
    }
}

impl Iterator for Tokens<'_> {
    type Item = (StreamId, u32);

    fn next(&mut self) -> Option<Self::Item> {
        let (first, rest) = self.0.split_at_checked(8)?;
        self.0 = rest;
        Some((StreamId(number(first, 0)), number(first, 4)))
    }
}

fn parse<T: serde::de::DeserializeOwned>(what: &'static str, json: &[u8]) -> Result<T, FrameError> {
    serde_json::from_slice(json).map_err(|error| FrameError::Json { what, why: error.to_string() })
}

/// The number at `at`, whose bytes the caller has counted.
fn number(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

#[cfg(test)]
mod tests;
