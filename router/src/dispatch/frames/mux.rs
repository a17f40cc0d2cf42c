//! The generations of one connection: who waits for what, what is to be sent. No I/O, no clock.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use baton_config::frames::{self, FrameError, News, StreamId};
use baton_config::protocol::{GenerateEvent, GenerateRequest};
use tokio::sync::Notify;

use super::super::attempt::Lost;
use super::Link;

/// Tokens that a worker may be ahead of a client.
const WINDOW: u32 = 1024;
/// The same where each of them is a kilobyte.
const RICH_WINDOW: u32 = 64;
/// Events that take no credit: the report, the end, and some to spare.
const ASIDES_MAX: usize = 8;
/// Tokens that a stream waits to be woken for, at most.
const BACKLOG: usize = 64;
/// The same where nobody reads before the end.
const WHOLE_BACKLOG: usize = 256;
/// Bytes that the worker has not taken, then it gets no more requests over this connection.
const UNSENT_MAX_BYTES: usize = 64 << 20;

/// Something that came for a generation.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Item {
    /// A token that carries nothing else.
    Token(u32),
    /// Anything else.
    Event(Box<GenerateEvent>),
}

/// What a worker must not do.
#[derive(Debug, thiserror::Error)]
pub(super) enum Breach {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("more than stream {} was allowed", .0.0)]
    Credit(StreamId),
}

/// Ids are counted up, so they need no mixing but for the bits that a table looks at.
#[derive(Debug, Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }

    fn write_u32(&mut self, number: u32) {
        self.0 = (self.0 ^ u64::from(number)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
}

/// What has come for one generation and was not taken.
#[derive(Debug, Default)]
struct Slot(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    queue: VecDeque<Item>,
    waker: Option<Waker>,
    /// Whether it is among those to be woken later.
    due: bool,
    /// Whether nobody reads before the end.
    whole: bool,
    /// Whether anything came: what comes first is not held up.
    begun: bool,
    /// Whether anything came since the last tick,
    heard: bool,
    /// and whether it is for this stream to see that there was one.
    ticked: bool,
    /// Tokens that may still come.
    credit: u32,
    lost: Option<Lost>,
}

impl Slot {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct Table {
    slots: HashMap<StreamId, Arc<Slot>, BuildHasherDefault<IdHasher>>,
    next: u32,
    /// Set when nothing comes any more.
    lost: Option<Lost>,
}

/// The generations of one connection.
#[derive(Debug)]
pub(super) struct Mux {
    table: Mutex<Table>,
    unsent: Mutex<Vec<u8>>,
    news: Notify,
    abandoned: AtomicBool,
    over: AtomicBool,
}

/// Who is to be told of what came.
#[derive(Debug, Default)]
pub(super) struct Due {
    now: Vec<Waker>,
    later: Vec<Arc<Slot>>,
}

impl Due {
    /// Wakes those who wait for more than another token.
    pub(super) fn wake_now(&mut self) {
        self.now.drain(..).for_each(Waker::wake);
    }

    /// Whether there are others.
    pub(super) fn is_later(&self) -> bool {
        !self.later.is_empty()
    }

    /// Wakes the others.
    pub(super) fn wake_later(&mut self) {
        for slot in self.later.drain(..) {
            let waker = {
                let mut waiting = slot.waiting();
                waiting.due = false;
                waiting.waker.take()
            };
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

impl Mux {
    pub(super) fn new() -> Self {
        Self {
            table: Mutex::default(),
            unsent: Mutex::default(),
            news: Notify::new(),
            abandoned: AtomicBool::new(false),
            over: AtomicBool::new(false),
        }
    }

    /// Whether nothing can be begun over this connection any more.
    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Nobody wants it any more.
    pub(super) fn abandon(&self) {
        self.abandoned.store(true, Ordering::Release);
        self.news.notify_one();
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    /// Done when there is something to send, or nobody left.
    pub(super) async fn news(&self) {
        self.news.notified().await;
    }

    /// Takes what is to be sent, into `into`, which should be empty.
    pub(super) fn take_unsent(&self, into: &mut Vec<u8>) {
        std::mem::swap(&mut *self.unsent(), into);
    }

    /// Takes in a frame of the worker.
    pub(super) fn receive(&self, kind: u8, payload: &[u8], due: &mut Due) -> Result<(), Breach> {
        match News::decode(kind, payload)? {
            News::Tokens(tokens) => {
                let table = self.table();
                for (id, token) in tokens {
                    // One that is not known was given up.
                    let Some(slot) = table.slots.get(&id) else { continue };
                    put(slot, Item::Token(token), due).map_err(|()| Breach::Credit(id))?;
                }
            }
            News::Event(id, event) => {
                let mut table = self.table();
                let last = matches!(event, GenerateEvent::Finished { .. } | GenerateEvent::Failed { .. });
                let slot = if last { table.slots.remove(&id) } else { table.slots.get(&id).cloned() };
                drop(table);
                if let Some(slot) = slot {
                    put(&slot, Item::Event(Box::new(event)), due).map_err(|()| Breach::Credit(id))?;
                }
            }
        }
        Ok(())
    }

    /// Time has passed: tells every generation, which may find that its worker has been silent for too long. Those to whom
    /// something came are awake enough. `false` when there are none.
    pub(super) fn tick(&self) -> bool {
        let mut quiet: Vec<Waker> = Vec::new();
        let table = self.table();
        for slot in table.slots.values() {
            let mut waiting = slot.waiting();
            waiting.ticked = true;
            if !std::mem::take(&mut waiting.heard) {
                quiet.extend(waiting.waker.take());
            }
        }
        let any = !table.slots.is_empty();
        drop(table);
        quiet.into_iter().for_each(Waker::wake);
        any
    }

    /// Nothing comes any more: every generation that is open is lost.
    pub(super) fn end(&self, why: &Lost) {
        self.over.store(true, Ordering::Release);
        let slots = {
            let mut table = self.table();
            table.lost = Some(why.clone());
            std::mem::take(&mut table.slots)
        };
        for slot in slots.into_values() {
            let waker = {
                let mut waiting = slot.waiting();
                waiting.lost = Some(why.clone());
                waiting.waker.take()
            };
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }

    /// Writes a command; `false` when too many wait already.
    fn say(&self, write: impl FnOnce(&mut Vec<u8>)) -> bool {
        let mut unsent = self.unsent();
        if unsent.len() > UNSENT_MAX_BYTES {
            return false;
        }
        let first = unsent.is_empty();
        write(&mut unsent);
        let news = first && !unsent.is_empty();
        drop(unsent);
        if news {
            self.news.notify_one();
        }
        true
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unsent(&self) -> MutexGuard<'_, Vec<u8>> {
        self.unsent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Puts an item where its generation finds it.
fn put(slot: &Arc<Slot>, item: Item, due: &mut Due) -> Result<(), ()> {
    let mut waiting = slot.waiting();
    let plain = matches!(item, Item::Token(_));
    match &item {
        Item::Event(event) if !matches!(**event, GenerateEvent::Token { .. }) => {
            if waiting.queue.len() >= WINDOW as usize + ASIDES_MAX {
                return Err(());
            }
        }
        Item::Token(_) | Item::Event(_) => waiting.credit = waiting.credit.checked_sub(1).ok_or(())?,
    }
    let backlog = if waiting.whole { WHOLE_BACKLOG } else { BACKLOG };
    let patient = plain && waiting.begun && waiting.queue.len() < backlog;
    // What comes before the first token is told with it.
    waiting.begun |= plain;
    waiting.heard = true;
    waiting.queue.push_back(item);
    if !patient {
        due.now.extend(waiting.waker.take());
    } else if waiting.waker.is_some() && !waiting.whole && !waiting.due {
        waiting.due = true;
        due.later.push(Arc::clone(slot));
    }
    Ok(())
}

/// One generation, as its attempt has it. Dropping it gives it up.
#[derive(Debug)]
pub(crate) struct Stream {
    link: Arc<Link>,
    id: StreamId,
    slot: Arc<Slot>,
    /// Taken from the slot and not passed on yet.
    taken: VecDeque<Item>,
    window: u32,
    /// Tokens passed on for which no credit was given.
    spent: u32,
    /// Whether there was a tick.
    ticked: bool,
}

impl Stream {
    /// Begins a generation.
    pub(crate) fn open(link: &Arc<Link>, request: &GenerateRequest) -> Result<Self, Lost> {
        let mux = &link.0;
        let rich = request.sampling.logprobs.is_some() || request.logits_digest;
        let window = if rich { RICH_WINDOW } else { WINDOW };
        let waiting = Waiting { credit: window, whole: request.whole, ..Waiting::default() };
        let slot = Arc::new(Slot(Mutex::new(waiting)));
        let id = {
            let mut table = mux.table();
            if let Some(lost) = &table.lost {
                return Err(lost.clone());
            }
            let id = StreamId(table.next);
            match table.next.checked_add(1) {
                Some(next) => table.next = next,
                // Four billion generations: the next one gets another connection.
                None => {
                    mux.over.store(true, Ordering::Release);
                    return Err(Lost::Overloaded);
                }
            }
            table.slots.insert(id, Arc::clone(&slot));
            id
        };
        // From here on dropping it takes it out of the table.
        let stream = Self {
            link: Arc::clone(link),
            id,
            slot,
            taken: VecDeque::new(),
            window,
            spent: 0,
            ticked: false,
        };
        let mut unwritable = None;
        let said = mux.say(|unsent| unwritable = frames::open(unsent, id, window, request).err());
        if let Some(error) = unwritable {
            return Err(Lost::Refused(format!("a request that cannot be written: {error}")));
        }
        if said { Ok(stream) } else { Err(Lost::Overloaded) }
    }

    /// The connection it runs over.
    pub(crate) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// What is there already.
    pub(crate) fn ready(&mut self) -> Option<Item> {
        let item = self.taken.pop_front()?;
        self.spend(&item);
        Some(item)
    }

    /// What comes next.
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Item, Lost>> {
        if self.taken.is_empty() {
            let mut waiting = self.slot.waiting();
            self.ticked |= std::mem::take(&mut waiting.ticked);
            if waiting.queue.is_empty() {
                if let Some(lost) = &waiting.lost {
                    return Poll::Ready(Err(lost.clone()));
                }
                match &mut waiting.waker {
                    Some(waker) => waker.clone_from(cx.waker()),
                    none => *none = Some(cx.waker().clone()),
                }
                return Poll::Pending;
            }
            std::mem::swap(&mut waiting.queue, &mut self.taken);
        }
        match self.ready() {
            Some(item) => Poll::Ready(Ok(item)),
            None => Poll::Pending,
        }
    }

    /// Whether time has passed since this was last asked: about a tick of [`Mux::tick`].
    pub(crate) fn take_tick(&mut self) -> bool {
        std::mem::take(&mut self.ticked)
    }

    /// Gives credit for tokens that were passed on, half a window at a time.
    fn spend(&mut self, item: &Item) {
        let costs = match item {
            Item::Token(_) => true,
            Item::Event(event) => matches!(**event, GenerateEvent::Token { .. }),
        };
        self.spent += u32::from(costs);
        if self.spent < self.window / 2 {
            return;
        }
        let spent = std::mem::take(&mut self.spent);
        self.slot.waiting().credit += spent;
        self.link.0.say(|unsent| frames::credit(unsent, self.id, spent));
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let open = self.link.0.table().slots.remove(&self.id).is_some();
        if open {
            // A connection that takes no more bytes is given up with all its generations.
            self.link.0.say(|unsent| frames::cancel(unsent, self.id));
        }
    }
}

#[cfg(test)]
mod tests;
