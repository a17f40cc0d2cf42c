//! Where everything that happens to the generations of one connection comes together, in the order in which it happens.
//!
//! The engine's thread and the owner of the handoffs put in, never waiting; one task takes out, always at once. It holds at
//! most what the engine can emit between two wake-ups of that task. One wake-up takes all that a step of the engine yields.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_config::frames::StreamId;
use baton_engine::EngineEvent;
use tokio::sync::Notify;

use crate::driver::DecodeNews;

/// What an item belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) stream: StreamId,
    /// Which of the sequences that were made for it, one after the other.
    pub(crate) turn: u32,
}

/// What happened, besides what `S` says of a start.
#[derive(Debug)]
pub(crate) enum Item<S> {
    /// The engine emitted something.
    Engine(EngineEvent),
    /// A handoff came to an end.
    Handoff(DecodeNews),
    /// The generation was taken, or refused.
    Started(S),
}

/// The items of one connection.
#[derive(Debug)]
pub(crate) struct Inbox<S> {
    items: Mutex<Items<S>>,
    arrived: Notify,
}

#[derive(Debug)]
struct Items<S> {
    queue: Vec<(Key, Item<S>)>,
    closed: bool,
}

impl<S> Inbox<S> {
    /// An empty one.
    pub(crate) fn new() -> Self {
        Self { items: Mutex::new(Items { queue: Vec::new(), closed: false }), arrived: Notify::new() }
    }

    /// Takes everything out, into `into`, which should be empty.
    pub(crate) fn take(&self, into: &mut Vec<(Key, Item<S>)>) {
        std::mem::swap(&mut self.items().queue, into);
    }

    /// Takes everything out for the last time: what is put from now on comes back.
    pub(crate) fn close(&self) -> Vec<(Key, Item<S>)> {
        let mut items = self.items();
        items.closed = true;
        std::mem::take(&mut items.queue)
    }

    /// Done when something was put in since the last time.
    pub(crate) async fn arrived(&self) {
        self.arrived.notified().await;
    }

    /// Puts something in without telling anybody; whether somebody should be told, or the item if nobody takes it.
    fn put(&self, key: Key, item: Item<S>) -> Result<bool, Item<S>> {
        let mut items = self.items();
        if items.closed {
            return Err(item);
        }
        let first = items.queue.is_empty();
        items.queue.push((key, item));
        Ok(first)
    }

    /// Puts something in.
    pub(crate) fn send(&self, key: Key, item: Item<S>) -> Result<(), Item<S>> {
        if self.put(key, item)? {
            self.arrived.notify_one();
        }
        Ok(())
    }

    fn items(&self) -> MutexGuard<'_, Items<S>> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An inbox as the engine's thread and the owner of the handoffs see it.
trait Takes: Send + Sync {
    fn put_event(&self, key: Key, event: EngineEvent) -> bool;
    fn send_news(&self, key: Key, news: DecodeNews);
    fn wake(&self);
}

impl<S: Send> Takes for Inbox<S> {
    fn put_event(&self, key: Key, event: EngineEvent) -> bool {
        // A closed one: its task cancels the sequence.
        self.put(key, Item::Engine(event)).unwrap_or(false)
    }

    fn send_news(&self, key: Key, news: DecodeNews) {
        let _ = self.send(key, Item::Handoff(news));
    }

    fn wake(&self) {
        self.arrived.notify_one();
    }
}

/// The way of one sequence into an inbox.
#[derive(Clone)]
pub struct Port {
    inbox: Arc<dyn Takes>,
    key: Key,
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Port").field(&self.key).finish()
    }
}

impl Port {
    /// A port for what belongs to `key`.
    pub(crate) fn new<S: Send + 'static>(inbox: &Arc<Inbox<S>>, key: Key) -> Self {
        Self { inbox: Arc::clone(inbox) as Arc<dyn Takes>, key }
    }

    /// Puts an event in; whoever does so wakes the reader with [`Self::wake`] after the last one, if told to.
    pub(crate) fn put(&self, event: EngineEvent) -> bool {
        self.inbox.put_event(self.key, event)
    }

    /// Puts news in and wakes the reader.
    pub(crate) fn tell(&self, news: DecodeNews) {
        self.inbox.send_news(self.key, news);
    }

    /// Wakes the reader.
    pub(crate) fn wake(&self) {
        self.inbox.wake();
    }
}
