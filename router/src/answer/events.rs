//! The body of a streamed answer.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::time::Instant;

use super::Deltas;
use super::choice::Delta;
use super::encode::Meter;
use super::writer::EventWriter;
use crate::account::Entry;
use crate::admit::Place;
use crate::alarm::Alarm;
use crate::dispatch::DispatchError;
use crate::gateway::refusal;

/// Bytes after which a frame is handed over although more is ready.
const FRAME_BYTES: usize = 16 << 10;

/// Room for a chunk or two.
const FIRST_BYTES: usize = 512;

/// Server-sent events, made as the client takes them.
///
/// Whatever is ready goes into one frame. Dropping it, because the client left or because it ended, gives everything
/// back: the place, the workers, the entry in the books.
pub(crate) struct EventStream {
    deltas: Deltas,
    writer: EventWriter,
    meter: Meter,
    begun: bool,
    /// The delta that was waited for before the answer began.
    first: Option<Delta>,
    held: Option<(Entry, Place)>,
    quiet: Quiet,
}

/// Notices silence without looking at the clock for every frame.
pub(crate) struct Quiet {
    /// Half of the longest silence: one that is seen at two ends of a period may have begun at the start of it.
    period: Duration,
    ends: Alarm,
    spoken: bool,
}

impl Quiet {
    /// Silence is to be noticed that may become this long.
    pub(crate) fn new(longest: Duration) -> Self {
        let period = longest / 2;
        Self { period, ends: Alarm::after(period), spoken: true }
    }

    /// Something was said.
    pub(crate) fn speak(&mut self) {
        self.spoken = true;
    }

    /// Ready when nothing was said for a whole period; call it while there is nothing to say.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.ends.poll(cx).is_ready() {
            self.ends.reset(Instant::now() + self.period);
            if !std::mem::take(&mut self.spoken) {
                return Poll::Ready(());
            }
        }
        Poll::Pending
    }
}

impl fmt::Debug for EventStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventStream").field("ended", &self.held.is_none()).finish_non_exhaustive()
    }
}

impl EventStream {
    /// A stream that begins with `first`, if that was worth waiting for; never silent for longer than `keep_alive`.
    pub(crate) fn new(
        deltas: Deltas,
        first: Option<Delta>,
        writer: EventWriter,
        meter: Meter,
        held: (Entry, Place),
        keep_alive: Duration,
    ) -> Self {
        let mut quiet = Quiet::new(keep_alive);
        // Without a first delta the client has waited long enough.
        quiet.spoken = first.is_some();
        Self { deltas, writer, meter, begun: false, first, held: Some(held), quiet }
    }

    /// The next bytes; `None` at the end.
    pub(super) fn poll_bytes(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let this = &mut *self;
        if this.held.is_none() {
            return Poll::Ready(None);
        }
        // Room is made when there is something to write: often there is not.
        let mut out = Vec::new();
        if !std::mem::replace(&mut this.begun, true) {
            this.writer.begin(this.meter.usage(), &mut out);
        }
        if let Some(first) = this.first.take() {
            this.write(&first, &mut out);
        }
        while out.len() < FRAME_BYTES {
            match this.deltas.poll_next_unpin(cx) {
                Poll::Pending if out.is_empty() => {
                    std::task::ready!(this.quiet.poll(cx));
                    out.extend_from_slice(this.writer.keep_alive());
                    return Poll::Ready(Some(Bytes::from(out)));
                }
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
        this.quiet.spoken = true;
        Poll::Ready(Some(Bytes::from(out)))
    }

    fn write(&mut self, delta: &Delta, out: &mut Vec<u8>) {
        if out.capacity() == 0 {
            out.reserve(FIRST_BYTES);
        }
        self.meter.add(delta);
        if let Some((entry, place)) = &mut self.held {
            let tokens = delta.tokens.len() as u64;
            place.used(tokens);
            entry.used(tokens);
        }
        self.writer.delta(delta, out);
    }

    fn break_off(&mut self, error: &DispatchError, out: &mut Vec<u8>) {
        let refusal = refusal(error, self.writer.api());
        self.writer.broken(&refusal, self.meter.usage(), out);
        if let Some((entry, _place)) = self.held.take() {
            entry.broke();
        }
        // Other choices of the request end with it.
        self.deltas = futures_util::stream::empty().boxed();
    }
}
