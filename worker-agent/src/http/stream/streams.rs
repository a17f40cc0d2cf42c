//! The generations of one connection and what is still to be sent of them. No I/O, no clock.
//!
//! Each generation has credit of its own: without it its tokens wait here, and those of others go on. One of which enough
//! waits is to be paused until most of that is gone. Where nobody reads an answer before its end, its tokens wait for each
//! other.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use baton_config::frames::{self, CREDIT_MAX, StreamId, TokenFrame};
use baton_config::protocol::GenerateEvent;

/// Tokens of one generation that are written before it is the turn of the next one.
const TURN_TOKENS: usize = 256;
/// What of one generation waits here before it is paused: as much as the credit that it has in the router.
const FULL: usize = 1024;
/// What is left when a paused one goes on: it has to be brought back into the engine before it can yield more.
const DRAINED: usize = FULL / 4;
/// Tokens of one generation that wait for each other at most.
const HELD_TOKENS: usize = 64;

/// Whether somebody reads tokens as they come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading {
    /// Somebody does.
    Each,
    /// What follows the first token may wait for more, until [`Streams::release`].
    Together,
}

/// Something of a generation that is to be sent.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Out {
    /// A token that carries nothing else.
    Token(u32),
    /// A token that does.
    Rich(Box<GenerateEvent>),
    /// What takes no credit.
    Aside(Box<GenerateEvent>),
    /// The last event.
    Last(Box<GenerateEvent>),
}

impl Out {
    /// What it counts towards [`FULL`]: a token that carries log-probabilities takes as much memory as many that do not.
    fn weight(&self) -> usize {
        match self {
            Self::Token(_) => 1,
            Self::Rich(_) => FULL / 64,
            Self::Aside(_) | Self::Last(_) => 0,
        }
    }
}

/// What the engine is to do about a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pace {
    /// Stop: its reader does not keep up.
    Pause(StreamId),
    /// Go on.
    Resume(StreamId),
}

/// What a router must not do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Breach {
    /// An id twice.
    #[error("stream {} is open already", .0.0)]
    Twice(StreamId),
    /// More than anybody needs.
    #[error("stream {} is given credit for more than {CREDIT_MAX} tokens", .0.0)]
    Credit(StreamId),
}

/// One generation.
#[derive(Debug)]
struct Stream<T> {
    /// What the owner keeps of it.
    state: T,
    credit: u32,
    queue: VecDeque<Out>,
    /// The weight of the queue.
    weight: usize,
    /// Whether the engine was told to stop.
    paused: bool,
    reading: Reading,
    /// Whether it had a token: the first does not wait.
    begun: bool,
    /// Whether it is among those whose tokens wait for more.
    held: bool,
    /// Whether it is in the row of those with something to write.
    in_row: bool,
    /// Since when it has a token and no credit.
    blocked: Option<Instant>,
}

/// All generations of a connection.
#[derive(Debug)]
pub(super) struct Streams<T> {
    table: HashMap<StreamId, Stream<T>>,
    row: VecDeque<StreamId>,
    paces: Vec<Pace>,
    /// Those with tokens that wait for more; some may have ended or gone on since.
    held: Vec<StreamId>,
}

impl<T> Streams<T> {
    /// None.
    pub(super) fn new() -> Self {
        Self { table: HashMap::new(), row: VecDeque::new(), paces: Vec::new(), held: Vec::new() }
    }

    /// Begins one.
    pub(super) fn open(
        &mut self,
        id: StreamId,
        credit: u32,
        reading: Reading,
        state: T,
    ) -> Result<(), Breach> {
        if credit > CREDIT_MAX {
            return Err(Breach::Credit(id));
        }
        if self.table.contains_key(&id) {
            return Err(Breach::Twice(id));
        }
        let stream = Stream {
            state,
            credit,
            queue: VecDeque::new(),
            weight: 0,
            paused: false,
            reading,
            begun: false,
            held: false,
            in_row: false,
            blocked: None,
        };
        self.table.insert(id, stream);
        Ok(())
    }

    /// Forgets one, if it is there.
    pub(super) fn remove(&mut self, id: StreamId) -> Option<T> {
        self.table.remove(&id).map(|stream| stream.state)
    }

    /// Forgets all.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = T> + use<'_, T> {
        self.row.clear();
        self.held.clear();
        self.table.drain().map(|(_, stream)| stream.state)
    }

    /// More tokens of one may be sent; it may have ended.
    pub(super) fn credit(&mut self, id: StreamId, tokens: u32) -> Result<(), Breach> {
        let Some(stream) = self.table.get_mut(&id) else { return Ok(()) };
        let credit = stream.credit.checked_add(tokens).filter(|credit| *credit <= CREDIT_MAX);
        stream.credit = credit.ok_or(Breach::Credit(id))?;
        if tokens > 0 {
            stream.blocked = None;
            if !stream.queue.is_empty() && !stream.in_row {
                stream.in_row = true;
                self.row.push_back(id);
            }
        }
        Ok(())
    }

    /// What the owner keeps of one.
    pub(super) fn get_mut(&mut self, id: StreamId) -> Option<&mut T> {
        self.table.get_mut(&id).map(|stream| &mut stream.state)
    }

    /// Adds to what is to be sent of one; nothing may follow the last event.
    pub(super) fn push(&mut self, id: StreamId, out: Out) {
        let Some(stream) = self.table.get_mut(&id) else { return };
        let token = matches!(out, Out::Token(_));
        let waits = token && stream.begun && stream.reading == Reading::Together;
        stream.begun |= token;
        stream.weight += out.weight();
        stream.queue.push_back(out);
        if stream.weight >= FULL && !stream.paused {
            stream.paused = true;
            self.paces.push(Pace::Pause(id));
        }
        if stream.in_row || stream.blocked.is_some() {
            return;
        }
        if waits && stream.queue.len() < HELD_TOKENS {
            if !std::mem::replace(&mut stream.held, true) {
                self.held.push(id);
            }
            return;
        }
        stream.in_row = true;
        self.row.push_back(id);
    }

    /// Whether tokens wait for more.
    pub(super) fn is_holding(&self) -> bool {
        !self.held.is_empty()
    }

    /// Those that wait have waited long enough.
    pub(super) fn release(&mut self) {
        for id in self.held.drain(..) {
            let Some(stream) = self.table.get_mut(&id) else { continue };
            stream.held = false;
            if !stream.queue.is_empty() && !stream.in_row && stream.blocked.is_none() {
                stream.in_row = true;
                self.row.push_back(id);
            }
        }
    }

    /// What the engine is to do now, in this order; some of them may have ended.
    pub(super) fn take_paces(&mut self) -> Vec<Pace> {
        std::mem::take(&mut self.paces)
    }

    /// The ids of all.
    pub(super) fn ids(&self) -> Vec<StreamId> {
        self.table.keys().copied().collect()
    }

    /// Those that have had a token and no credit for so long.
    pub(super) fn blocked_for(&self, now: Instant, patience: Duration) -> Vec<StreamId> {
        let blocked = |stream: &Stream<T>| {
            stream.blocked.is_some_and(|since| now.saturating_duration_since(since) >= patience)
        };
        self.table.iter().filter(|(_, stream)| blocked(stream)).map(|(id, _)| *id).collect()
    }

    /// Appends frames to `out` until it has `full` bytes or nothing more may be sent; `ended` gets what was kept of
    /// generations whose last event is among them.
    pub(super) fn write(&mut self, now: Instant, out: &mut Vec<u8>, full: usize, ended: &mut Vec<T>) {
        let mut tokens = TokenFrame::default();
        while out.len() < full
            && let Some(id) = self.row.pop_front()
        {
            let Some(stream) = self.table.get_mut(&id) else { continue };
            stream.in_row = false;
            let mut over = false;
            for _ in 0..TURN_TOKENS {
                let Some(next) = stream.queue.front() else { break };
                let costs = matches!(next, Out::Token(_) | Out::Rich(_));
                if costs && stream.credit == 0 {
                    stream.blocked = Some(now);
                    break;
                }
                stream.credit -= u32::from(costs);
                stream.weight -= next.weight();
                over = matches!(next, Out::Last(_));
                match stream.queue.pop_front() {
                    Some(Out::Token(token)) => tokens.push(out, id, token),
                    Some(Out::Rich(event) | Out::Aside(event) | Out::Last(event)) => {
                        tokens.close(out);
                        if let Err(error) = frames::event(out, id, &event) {
                            // Only maps with other keys than strings fail, and there are none.
                            tracing::error!(%error, "an event could not be written");
                        }
                    }
                    None => {}
                }
            }
            if stream.paused && stream.weight <= DRAINED {
                stream.paused = false;
                // What it had room for once it need not keep.
                stream.queue.shrink_to(FULL);
                self.paces.push(Pace::Resume(id));
            }
            if over {
                ended.extend(self.remove(id));
            } else if !stream.queue.is_empty() && stream.blocked.is_none() {
                stream.in_row = true;
                self.row.push_back(id);
            }
        }
        tokens.close(out);
    }
}

#[cfg(test)]
mod tests;
