//! The events of a stream, in the shape of its API.

use super::choice::Delta;
use super::encode::{Api, ChunkWriter, Head, Usage};
use super::messages::MessageWriter;
use super::responses::ResponseWriter;
use crate::reply::Refusal;
use crate::routes::Dialect;

/// What is sent where there is nothing to send: clients ignore it, proxies see that the stream lives.
pub(crate) const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

/// Writes the events of one stream.
#[derive(Debug)]
pub(crate) enum EventWriter {
    /// Chat and completions.
    Chunks(ChunkWriter),
    Response(Box<ResponseWriter>),
    Message(Box<MessageWriter>),
}

impl EventWriter {
    /// A writer for `choices` choices.
    pub(crate) fn new(head: Head, choices: usize) -> Self {
        match head.api {
            Api::Chat | Api::Completions => Self::Chunks(ChunkWriter::new(head, choices)),
            Api::Responses => Self::Response(Box::new(ResponseWriter::new(head))),
            Api::Messages => Self::Message(Box::new(MessageWriter::new(head))),
        }
    }

    /// The API of the stream.
    pub(super) fn api(&self) -> Api {
        match self {
            Self::Chunks(writer) => writer.api(),
            Self::Response(_) => Api::Responses,
            Self::Message(_) => Api::Messages,
        }
    }

    /// Writes what comes before anything was generated.
    pub(super) fn begin(&mut self, usage: Usage, out: &mut Vec<u8>) {
        match self {
            Self::Chunks(_) => {}
            Self::Response(writer) => writer.begin(out),
            Self::Message(writer) => writer.begin(usage, out),
        }
    }

    /// Writes one delta.
    pub(super) fn delta(&mut self, delta: &Delta, out: &mut Vec<u8>) {
        match self {
            Self::Chunks(writer) => writer.delta(delta, out),
            Self::Response(writer) => writer.delta(delta, out),
            Self::Message(writer) => writer.delta(delta, out),
        }
    }

    /// Writes the end of a stream whose last delta was written.
    pub(super) fn done(&mut self, usage: Usage, out: &mut Vec<u8>) {
        match self {
            Self::Chunks(writer) => writer.done(usage, out),
            Self::Response(writer) => writer.done(usage, out),
            Self::Message(writer) => writer.done(usage, out),
        }
    }

    /// Writes why the stream ends early.
    pub(super) fn broken(&mut self, why: &Refusal, usage: Usage, out: &mut Vec<u8>) {
        match self {
            Self::Chunks(_) => {
                out.extend_from_slice(b"data: ");
                out.extend_from_slice(&why.body(Dialect::OpenAi));
                out.extend_from_slice(b"\n\n");
            }
            Self::Response(writer) => writer.failed(why, usage, out),
            Self::Message(_) => {
                out.extend_from_slice(b"event: error\ndata: ");
                out.extend_from_slice(&why.body(Dialect::Anthropic));
                out.extend_from_slice(b"\n\n");
            }
        }
    }

    /// What bridges a silence.
    pub(super) fn keep_alive(&self) -> &'static [u8] {
        match self {
            Self::Chunks(_) | Self::Response(_) => KEEP_ALIVE,
            Self::Message(_) => super::messages::PING,
        }
    }
}
