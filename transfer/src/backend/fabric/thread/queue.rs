//! What tasks want of a driver, until somebody takes a turn at it.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::Peer;
use super::sleep::Alarm;
use crate::backend::fabric::batch::Batch;
use crate::backend::fabric::driver::{Access, DriverError, LocalId, RemoteId};
use crate::backend::fabric::registry::Registration;
use crate::memory::MemorySpan;

/// Most commands that wait.
const COMMANDS_MAX: usize = 1024;

/// What tasks want of the thread.
pub(super) enum Command {
    Register {
        span: MemorySpan,
        access: Access,
        reply: oneshot::Sender<Result<Registration, DriverError>>,
    },
    Deregister {
        id: LocalId,
        /// What waits for it.
        keep: Keep,
    },
    Connect {
        address: Vec<u8>,
        reply: oneshot::Sender<Result<Peer, DriverError>>,
    },
    Import {
        peer: Peer,
        key: Vec<u8>,
        reply: oneshot::Sender<Result<Imported, DriverError>>,
    },
    Forget {
        peer: Peer,
        remote: RemoteId,
    },
    Submit(Arc<Batch>),
    Exchange(Exchange),
    /// The exchanges follow as the batch comes along.
    SubmitThen(Arc<Batch>, VecDeque<Then>),
    Abort(Arc<Batch>),
    /// Nothing more to or from this peer.
    Sever {
        peer: u64,
        why: &'static str,
    },
    /// The same, and it is forgotten.
    Disconnect {
        peer: u64,
    },
}

impl Command {
    /// Whether the driver may block for it.
    pub(super) fn may_block(&self) -> bool {
        match self {
            Self::Register { .. }
            | Self::Deregister { .. }
            | Self::Connect { .. }
            | Self::Sever { .. }
            | Self::Disconnect { .. } => true,
            Self::Import { .. }
            | Self::Forget { .. }
            | Self::Submit(_)
            | Self::Exchange(_)
            | Self::SubmitThen(..)
            | Self::Abort(_) => false,
        }
    }
}

/// Dropped when the driver has done what it belongs to, or is closed.
pub(in super::super) type Keep = Option<Box<dyn Any + Send + Sync>>;

/// A key of a peer, on its way to who asked for it: forgotten again where nobody takes it.
pub(super) struct Imported {
    peer: Peer,
    remote: RemoteId,
    taken: bool,
}

impl Imported {
    pub(super) fn new(peer: Peer, remote: RemoteId) -> Self {
        Self { peer, remote, taken: false }
    }

    pub(super) fn take(mut self) -> RemoteId {
        self.taken = true;
        self.remote
    }
}

impl Drop for Imported {
    fn drop(&mut self) {
        if !self.taken {
            let forget = Command::Forget { peer: self.peer.clone(), remote: self.remote };
            let _ = self.peer.0.queue.push(forget, None);
        }
    }
}

/// A message that is awaited, and the request for it, which is posted from then on.
pub(crate) struct Exchange {
    pub(crate) receive: Arc<Batch>,
    pub(crate) ask: Arc<Batch>,
}

/// An exchange that follows a batch, once its first `after` transfers are complete.
pub(crate) struct Then {
    pub(crate) after: usize,
    pub(crate) exchange: Exchange,
}

/// The commands that wait for the thread.
pub(in super::super) struct Queue {
    pub(super) alarm: Alarm,
    pub(super) room: Arc<Semaphore>,
    state: Mutex<Waiting>,
    /// Answers peers' requests.
    pub(super) answering: OnceLock<Answering>,
}

/// Makes the answer to a request, or sees to it that it is made; it must not block.
pub(crate) type Answering = Arc<dyn Fn(&[u8]) -> Option<Arc<Batch>> + Send + Sync>;

#[derive(Default)]
pub(super) struct Waiting {
    pub(super) commands: VecDeque<(Command, Option<OwnedSemaphorePermit>)>,
    /// The thread sleeps, or is about to: ring.
    pub(super) asleep: Option<Asleep>,
    /// No handle is left, or the thread has ended.
    pub(super) closed: bool,
    /// The driver is closed.
    pub(super) over: bool,
}

/// How the thread sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asleep {
    /// It looks again soon, in case something is missed.
    Napping,
    /// Nothing is under way.
    Soundly,
}

/// How much the thread is needed after a turn that a task took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    None,
    /// It is to look after what is under way.
    Soon,
    Now,
}

impl Queue {
    pub(super) fn new(alarm: Alarm) -> Self {
        let room = Arc::new(Semaphore::new(COMMANDS_MAX));
        Self { alarm, room, state: Mutex::default(), answering: OnceLock::new() }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the thread will see it.
    pub(super) fn push(&self, command: Command, room: Option<OwnedSemaphorePermit>) -> Result<(), Command> {
        self.leave(command, room)?;
        self.rouse(Need::Now);
        Ok(())
    }

    /// Leaves a command to whoever takes the next turn; whether somebody will.
    pub(super) fn leave(&self, command: Command, room: Option<OwnedSemaphorePermit>) -> Result<(), Command> {
        let mut state = self.state();
        // What waits for the end of a registration, or of what was posted, waits for that of the driver, too.
        let waits = !state.over && matches!(command, Command::Deregister { .. } | Command::Abort(_));
        if state.closed && !waits {
            return Err(command);
        }
        state.commands.push_back((command, room));
        Ok(())
    }

    /// Wakes the thread if it is needed.
    pub(super) fn rouse(&self, need: Need) {
        if need == Need::None {
            return;
        }
        let mut state = self.state();
        let sleeps = match need {
            Need::None => false,
            Need::Soon => state.asleep == Some(Asleep::Soundly),
            Need::Now => state.asleep.is_some(),
        };
        if sleeps {
            state.asleep = None;
            drop(state);
            self.alarm.ring();
        }
    }

    /// Ends a registration; `keep` is dropped when that is done.
    pub(in super::super) fn deregister(&self, id: LocalId, keep: Keep) {
        let _ = self.push(Command::Deregister { id, keep }, None);
    }

    pub(super) fn close(&self) {
        self.state().closed = true;
        self.alarm.ring();
    }
}
