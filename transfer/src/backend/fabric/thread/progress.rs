//! What is done in a turn: takes commands, posts, polls, tells.

mod give_up;
mod job;
mod obey;
mod post;
pub(super) mod rest;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use self::job::{Job, Op, PeerState};
use super::Queue;
use super::queue::Command;
use super::sleep;
use crate::backend::fabric::batch::End;
use crate::backend::fabric::driver::{Done, Driver, Piece};
use crate::backend::fabric::table::Table;
use crate::backend::fabric::window::Bounds;
use crate::spin::Spin;

/// What is under way with a driver, and the driver.
pub(super) struct Progress<D: Driver + ?Sized> {
    /// Always there, until the drop closes it before anything else.
    driver: Option<Box<D>>,
    /// Tells what the driver's descriptor tells.
    fd: Option<OwnedFd>,
    queue: Arc<Queue>,
    bounds: Bounds,
    peers: Table<PeerState>,
    jobs: Table<Job>,
    ops: Table<Op>,
    /// Peers whose window may let something through.
    ready: VecDeque<u64>,
    /// Messages to await: job and transfer.
    receives: VecDeque<(u64, usize)>,
    /// Jobs with something to tell.
    touched: Vec<u64>,
    dones: Vec<Done>,
    /// Of the operation that is being posted.
    pieces: Vec<Piece>,
    /// The driver took nothing more the last time.
    full: bool,
    /// The driver's descriptor is broken, or there is none.
    blind: bool,
    /// Whether it looks again and again now, and whether that has paid.
    is_spinning: bool,
    spin: Spin,
    /// When something happened last.
    last: Instant,
    /// When jobs were last swept.
    swept: Instant,
    /// Commands that were taken from the queue.
    commands: VecDeque<Command>,
    /// Whether this turn may make calls that block.
    may_block: bool,
    /// Peers whose connection is to be closed in a turn that may block.
    closing: Vec<u64>,
    /// Whether commands wait for such a turn.
    held_up: bool,
    /// Turns in which something happened.
    events: u64,
    /// Something was posted since the descriptor was last prepared.
    unarmed: bool,
    /// Something happened in the last turn: more may be there that the descriptor has told of already.
    stirred: bool,
    /// In the last turn somebody was woken who waited for a batch.
    told: bool,
}

impl<D: Driver + ?Sized> Progress<D> {
    pub(super) fn new(driver: Box<D>, queue: Arc<Queue>, bounds: Bounds) -> Self {
        Self {
            fd: sleep::wait_fd(&*driver),
            driver: Some(driver),
            queue,
            bounds,
            peers: Table::new(),
            jobs: Table::new(),
            ops: Table::new(),
            ready: VecDeque::new(),
            receives: VecDeque::new(),
            touched: Vec::new(),
            dones: Vec::new(),
            pieces: Vec::new(),
            full: false,
            blind: false,
            is_spinning: false,
            spin: Spin::default(),
            last: Instant::now(),
            swept: Instant::now(),
            commands: VecDeque::new(),
            may_block: true,
            closing: Vec::new(),
            held_up: false,
            events: 0,
            unarmed: false,
            stirred: false,
            told: false,
        }
    }

    /// Works until no handle is left.
    pub(super) fn run(mut self) {
        while !self.queue.state().closed {
            match self.turn(true) {
                true => {
                    if std::mem::take(&mut self.is_spinning) {
                        self.spin.tried(true);
                    }
                }
                false => self.rest(),
            }
        }
    }

    /// Takes commands, posts, polls, tells; whether anything happened. What may block is left alone unless `may_block`.
    pub(super) fn turn(&mut self, may_block: bool) -> bool {
        self.may_block = may_block;
        let mut busy = false;
        while may_block && let Some(peer) = self.closing.pop() {
            busy = true;
            self.close(peer);
        }
        self.take_commands();
        while let Some(command) = self.commands.pop_front() {
            busy = true;
            self.obey(command);
        }
        busy |= self.post();
        busy |= self.poll();
        busy |= self.answer();
        if self.jobs.len() > 0 {
            self.sweep();
        }
        self.tell();
        self.stirred = busy;
        if busy {
            self.events += 1;
            self.last = Instant::now();
        }
        busy
    }

    #[expect(clippy::expect_used, reason = "only the drop takes the driver")]
    fn driver(&mut self) -> &mut D {
        self.driver.as_mut().expect("the driver is there until the drop")
    }

    /// Lets the driver work and takes note of what ended; whether anything happened.
    fn poll(&mut self) -> bool {
        let mut dones = std::mem::take(&mut self.dones);
        let happened = self.driver().poll(&mut dones);
        let any = happened || !dones.is_empty();
        for done in dones.drain(..) {
            self.end(done);
        }
        self.dones = dones;
        any
    }

    fn end(&mut self, done: Done) {
        let Some(op) = self.ops.remove(done.op) else {
            tracing::error!(op = done.op, "a driver reported an operation that is not under way");
            return;
        };
        if let Some(key) = op.peer
            && let Some(peer) = self.peers.get_mut(key)
        {
            peer.window.ended(op.len);
            if peer.window.is_waiting() && !std::mem::replace(&mut peer.is_ready, true) {
                self.ready.push_back(key);
            }
        }
        self.touch(op.job);
        let Some(job) = self.jobs.get_mut(op.job) else { return };
        job.posted -= 1;
        let why = match done.result {
            Ok(len) if len == op.len || op.peer.is_none() && len < op.len => {
                if op.peer.is_none() {
                    job.batch.note_arrived(len);
                }
                for transfer in op.transfer..op.transfer + op.count {
                    let missing = &mut job.missing[transfer];
                    *missing -= if op.count > 1 { *missing } else { op.len };
                    if *missing == 0 && job.failed.is_none() {
                        job.open -= 1;
                        job.done.push(transfer as u32);
                    }
                }
                return;
            }
            Ok(len) => format!("{len} bytes arrived instead of {}", op.len),
            Err(why) => why,
        };
        job.lost = true;
        let why = why.into();
        self.give_up(op.job, &why);
        if let Some(peer) = op.peer {
            self.sever(peer, &why);
        }
    }

    fn touch(&mut self, key: u64) {
        if let Some(job) = self.jobs.get_mut(key)
            && !std::mem::replace(&mut job.touched, true)
        {
            self.touched.push(key);
        }
    }

    /// Tells the batches what came of them in this turn.
    fn tell(&mut self) {
        self.told = false;
        while let Some(key) = self.touched.pop() {
            let Some(job) = self.jobs.get_mut(key) else { continue };
            job.touched = false;
            let end = job.end();
            self.told |= job.batch.note(&mut job.done, job.failed.as_ref(), end);
            let mut follows = Vec::new();
            while let Some(then) = job.next_then() {
                follows.push(then.exchange);
            }
            if end != End::Open
                && job.posted == 0
                && let Some(Job { failed, then, .. }) = self.jobs.remove(key)
            {
                let why = failed.unwrap_or_else(|| "an operation was lost".into());
                then.iter().for_each(|then| then.exchange.receive.refuse(&why));
            }
            follows.into_iter().for_each(|exchange| self.exchange(exchange));
        }
    }
}

impl<D: Driver + ?Sized> Drop for Progress<D> {
    fn drop(&mut self) {
        // Closed first: from here on nothing writes memory for it, and what was under way can be settled.
        drop(self.driver.take());
        let why: Arc<str> = "the fabric is closed".into();
        let waiting = {
            let mut state = self.queue.state();
            (state.closed, state.over) = (true, true);
            std::mem::take(&mut state.commands)
        };
        for (_, job) in self.jobs.iter() {
            job.then.iter().for_each(|then| then.exchange.receive.refuse(&why));
            match job.posted {
                0 => job.batch.refuse(&why),
                _ => job.batch.cut(&why),
            }
        }
        for (_, peer) in self.peers.iter() {
            if let Some(handle) = peer.handle.upgrade() {
                let _ = handle.failed.set(Arc::clone(&why));
            }
        }
        for command in self.commands.drain(..).chain(waiting.into_iter().map(|(command, _)| command)) {
            match command {
                Command::Submit(batch) | Command::Abort(batch) => batch.refuse(&why),
                Command::Exchange(exchange) => exchange.receive.refuse(&why),
                Command::SubmitThen(batch, then) => {
                    batch.refuse(&why);
                    then.iter().for_each(|then| then.exchange.receive.refuse(&why));
                }
                _ => {}
            }
        }
    }
}
