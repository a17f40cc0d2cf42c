//! The body of a streamed answer.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::StreamExt as _;

use super::Deltas;
use super::choice::Delta;
use super::encode::{ChunkWriter, Meter, error_event};
use crate::account::Entry;
use crate::admit::Place;
use crate::dispatch::DispatchError;
use crate::gateway::refusal;

/// Bytes after which a frame is handed over although more is ready.
const FRAME_BYTES: usize = 16 << 10;

/// Server-sent events, made as the client takes them.
///
/// Whatever is ready goes into one frame. Dropping it, because the client left or because it ended, gives everything
/// back: the place, the workers, the entry in the books.
pub(crate) struct EventStream {
    deltas: Deltas,
    writer: ChunkWriter,
    meter: Meter,
    /// The delta that was waited for before the answer began.
    first: Option<Delta>,
    held: Option<(Entry, Place)>,
}

impl fmt::Debug for EventStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventStream").field("ended", &self.held.is_none()).finish_non_exhaustive()
    }
}

impl EventStream {
    /// A stream that begins with `first`.
    pub(crate) fn new(
        deltas: Deltas,
        first: Delta,
        writer: ChunkWriter,
        meter: Meter,
        held: (Entry, Place),
    ) -> Self {
        Self { deltas, writer, meter, first: Some(first), held: Some(held) }
    }

    /// The next bytes; `None` at the end.
    pub(super) fn poll_bytes(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let this = &mut *self;
        if this.held.is_none() {
            return Poll::Ready(None);
        }
        let mut out = Vec::with_capacity(512);
        if let Some(first) = this.first.take() {
            this.write(&first, &mut out);
        }
        while out.len() < FRAME_BYTES {
            match this.deltas.poll_next_unpin(cx) {
                Poll::Pending if out.is_empty() => return Poll::Pending,
                Poll::Pending => break,
                Poll::Ready(Some(Ok(delta))) => this.write(&delta, &mut out),
                Poll::Ready(Some(Err(error))) => {
                    this.break_off(&error, &mut out);
                    break;
                }
                Poll::Ready(None) => {
                    this.writer.done(this.meter.usage(), &mut out);
                    if let Some((entry, _place)) = this.held.take() {
                        entry.answered(200);
                    }
                    break;
                }
            }
        }
        Poll::Ready(Some(Bytes::from(out)))
    }

    fn write(&mut self, delta: &Delta, out: &mut Vec<u8>) {
        self.meter.add(delta);
        self.writer.delta(delta, out);
    }

    fn break_off(&mut self, error: &DispatchError, out: &mut Vec<u8>) {
        error_event(&refusal(error).body(), out);
        if let Some((entry, _place)) = self.held.take() {
            entry.broke();
        }
        // Other choices of the request end with it.
        self.deltas = futures_util::stream::empty().boxed();
    }
}
