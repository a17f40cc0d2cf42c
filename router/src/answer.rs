//! From generated tokens to the bytes of an answer.

mod choice;
mod encode;
mod events;
mod messages;
mod responses;
mod whole;
mod writer;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use hyper::body::{Body, Frame, SizeHint};

use crate::dispatch::{DispatchError, Dispatcher};
use crate::forward::Relay;
use crate::model::Model;
pub(crate) use choice::{ChoiceSpec, Delta};
pub(crate) use encode::{Api, Head, Meter};
pub(crate) use events::{EventStream, Quiet};
pub(crate) use whole::collect;
pub(crate) use writer::{EventWriter, KEEP_ALIVE};

/// Choices of one request that are generated at the same time; further ones follow as these end.
const CHOICES_AT_ONCE: usize = 16;

/// Deltas of all choices of a request, as they come.
pub(crate) type Deltas = BoxStream<'static, Result<Delta, DispatchError>>;

/// Begins all choices of a request.
pub(crate) fn deltas(dispatcher: &Arc<Dispatcher>, model: &Arc<Model>, mut specs: Vec<ChoiceSpec>) -> Deltas {
    if specs.len() == 1
        && let Some(spec) = specs.pop()
    {
        return choice::run(Arc::clone(dispatcher), Arc::clone(model), spec);
    }
    let (dispatcher, model) = (Arc::clone(dispatcher), Arc::clone(model));
    let runs =
        stream::iter(specs).map(move |spec| choice::run(Arc::clone(&dispatcher), Arc::clone(&model), spec));
    runs.flatten_unordered(CHOICES_AT_ONCE).boxed()
}

/// An answer whose status and length promised more than came.
#[derive(Debug, thiserror::Error)]
#[error("the answer broke off")]
pub(crate) struct BrokenOff;

/// The body of any answer.
#[derive(Debug)]
pub(crate) enum AnswerBody {
    /// All at once.
    Full(Option<Bytes>),
    /// As it is generated.
    Events(Pin<Box<EventStream>>),
    /// As it comes from another server.
    Relayed(Box<Relay>),
}

impl AnswerBody {
    /// A body that is complete.
    pub(crate) fn full(bytes: Bytes) -> Self {
        Self::Full(Some(bytes))
    }

    /// A body that comes from another server.
    pub(crate) fn relayed(relay: Relay) -> Self {
        Self::Relayed(Box::new(relay))
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = BrokenOff;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        match self.get_mut() {
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Events(events) => {
                events.as_mut().poll_bytes(cx).map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
            }
            Self::Relayed(relay) => {
                relay.poll_bytes(cx).map(|bytes| bytes.map(|bytes| bytes.map(Frame::data)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Full(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Events(_) | Self::Relayed(_) => SizeHint::default(),
        }
    }
}
