//! What is done in a turn: takes commands, posts, polls, tells.

pub(super) mod rest;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::sleep;
use super::{Command, Exchange, Peer, PeerInner, Queue};
use crate::backend::fabric::batch::{Batch, End, Posting, Transfer, Verb};
use crate::backend::fabric::driver::{Done, Driver, DriverError, LocalRange, PeerId, Piece, PostError};
use crate::backend::fabric::table::Table;
use crate::backend::fabric::window::{Bounds, Part, Window};
use crate::spin::Spin;

/// How often jobs that should have ended long ago are looked for.
const SWEEP: Duration = Duration::from_millis(250);
/// How long what was given up may stay posted. Then its peer is disconnected, and its buffers are free.
const GIVEN_UP_MAX: Duration = Duration::from_secs(2);
/// How long a message may take: the peer is there, or it is disconnected.
const SEND_MAX: Duration = Duration::from_secs(15);
/// Operations of one peer posted before the next peer's turn.
const TURN_OPS: usize = 16;
/// Requests of peers answered before something else has its turn.
const TURN_REQUESTS: usize = 16;

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
}

struct PeerState {
    id: PeerId,
    window: Window<Posting>,
    is_ready: bool,
    failed: Option<Arc<str>>,
    handle: Weak<PeerInner>,
}

/// A batch under way.
struct Job {
    batch: Arc<Batch>,
    /// The request that asks for its message.
    ask: Option<Arc<Batch>>,
    /// What follows when all of it is done: a message to be awaited, and its request.
    then: Option<Exchange>,
    peer: u64,
    /// Bytes missing of each transfer.
    missing: Vec<usize>,
    /// Transfers with bytes missing.
    open: usize,
    /// Operations posted and not ended.
    posted: usize,
    done: Vec<u32>,
    failed: Option<Arc<str>>,
    /// When it was submitted or, later, given up.
    since: Instant,
    /// Its peer is disconnected: what is posted touches nothing any more.
    cut: bool,
    /// One of its operations ended in an error.
    lost: bool,
    touched: bool,
}

impl Job {
    /// Whether nothing of it writes local memory, now or later.
    fn end(&self) -> End {
        if self.cut {
            End::Cut
        } else if self.posted == 0 && (self.open == 0 || self.failed.is_some()) {
            // Of an operation that ended in an error, nobody knows whether it still lands at the peer.
            if self.lost { End::Cut } else { End::Settled }
        } else {
            End::Open
        }
    }
}

/// A posted operation.
struct Op {
    job: u64,
    /// Whose window holds it; none for a receive.
    peer: Option<u64>,
    transfer: usize,
    /// Transfers it is of, from `transfer` on; whole ones, if more than one.
    count: usize,
    len: usize,
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

    /// Takes the commands that wait, but those that this turn must leave alone: no other depends on one of them, since
    /// who gave it waits for its reply, or is gone.
    fn take_commands(&mut self) {
        let mut state = self.queue.state();
        for _ in 0..state.commands.len() {
            let Some(next) = state.commands.pop_front() else { break };
            match self.may_block || !next.0.may_block() {
                true => self.commands.push_back(next.0),
                false => state.commands.push_back(next),
            }
        }
        self.held_up = !state.commands.is_empty();
    }

    #[expect(clippy::expect_used, reason = "only the drop takes the driver")]
    fn driver(&mut self) -> &mut D {
        self.driver.as_mut().expect("the driver is there until the drop")
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Register { span, access, reply } => {
                if !reply.is_closed()
                    && let Err(Ok((id, _))) = reply.send(self.driver().register(&span, access))
                {
                    self.driver().deregister(id);
                }
            }
            Command::Deregister(id) => self.driver().deregister(id),
            Command::Connect { address, reply } => {
                if !reply.is_closed() {
                    // An unclaimed handle disconnects by its drop.
                    let _ = reply.send(self.connect(&address));
                }
            }
            Command::Import { peer, key, reply } => {
                let imported = match self
                    .peers
                    .get_mut(peer.key())
                    .map(|state| (state.id, state.failed.clone()))
                {
                    Some((id, None)) => self.driver().import(id, &key),
                    _ => Err(DriverError { what: "the peer is disconnected".into(), remedy: String::new() }),
                };
                let _ = reply.send(imported);
            }
            Command::Forget { peer, remote } => {
                if let Some(id) = self
                    .peers
                    .get_mut(peer.key())
                    .filter(|state| state.failed.is_none())
                    .map(|state| state.id)
                {
                    self.driver().forget(id, remote);
                }
            }
            Command::Submit(batch) => drop(self.submit(batch)),
            Command::Exchange(exchange) => self.exchange(exchange),
            Command::SubmitThen(batch, then) => self.submit_then(batch, then),
            Command::Abort(batch) => self.abort(&batch),
            Command::Sever { peer, why } => self.sever(peer, &why.into()),
            Command::Disconnect { peer } => {
                self.sever(peer, &"disconnected".into());
                self.peers.remove(peer);
            }
        }
    }

    fn connect(&mut self, address: &[u8]) -> Result<Peer, DriverError> {
        let id = self.driver().connect(address)?;
        let inner = Arc::new(PeerInner {
            id,
            key: std::sync::OnceLock::new(),
            queue: Arc::clone(&self.queue),
            failed: std::sync::OnceLock::new(),
        });
        let state = PeerState {
            id,
            window: Window::new(self.bounds),
            is_ready: false,
            failed: None,
            handle: Arc::downgrade(&inner),
        };
        let _ = inner.key.set(self.peers.insert(state));
        Ok(Peer(inner))
    }

    /// Takes a batch; its job, unless it has ended already.
    fn submit(&mut self, batch: Arc<Batch>) -> Option<u64> {
        let peer = batch.peer.key();
        if batch.is_settled() {
            return None;
        }
        let Some(state) = self.peers.get_mut(peer) else {
            batch.refuse(&"the peer is disconnected".into());
            return None;
        };
        if let Some(why) = &state.failed {
            batch.refuse(why);
            return None;
        }
        let posting = Posting { job: 0, batch: Arc::clone(&batch) };
        use crate::backend::fabric::window::Work as _;
        let missing: Vec<usize> = (0..posting.transfers()).map(|transfer| posting.bytes(transfer)).collect();
        let open = missing.len();
        let receives = batch.receives();
        let job = Job {
            batch,
            ask: None,
            then: None,
            peer,
            missing,
            open,
            posted: 0,
            done: Vec::new(),
            failed: None,
            since: Instant::now(),
            cut: false,
            lost: false,
            touched: false,
        };
        let job = self.jobs.insert(job);
        if receives {
            self.receives.extend((0..open).map(|transfer| (job, transfer)));
        } else {
            state.window.submit(Posting { job, ..posting });
            if !std::mem::replace(&mut state.is_ready, true) {
                self.ready.push_back(peer);
            }
        }
        Some(job)
    }

    /// Has a message awaited, and then asked for.
    fn exchange(&mut self, Exchange { receive, ask }: Exchange) {
        let job = self.submit(receive);
        if let Some(job) = job.and_then(|job| self.jobs.get_mut(job)) {
            job.ask = Some(ask);
        }
    }

    /// Takes a batch, and what follows it.
    fn submit_then(&mut self, batch: Arc<Batch>, then: Exchange) {
        let job = self.submit(batch);
        match job.and_then(|job| self.jobs.get_mut(job)) {
            Some(job) => job.then = Some(then),
            None => then.receive.refuse(&"the operations before it have failed".into()),
        }
    }

    /// Answers requests of peers; whether there were any.
    fn answer(&mut self) -> bool {
        for answered in 0..TURN_REQUESTS {
            let Some(request) = self.driver().take_request() else { return answered > 0 };
            let answer = self.queue.answering.get().and_then(|answering| answering(&request));
            if let Some(answer) = answer {
                self.submit(answer);
                // At once: what follows is gathered while the peer takes this.
                self.post();
            }
        }
        true
    }

    fn abort(&mut self, batch: &Arc<Batch>) {
        let found = self.jobs.iter().find(|(_, job)| Arc::ptr_eq(&job.batch, batch)).map(|(key, _)| key);
        match found {
            Some(job) => self.give_up(job, &"given up".into()),
            // It ended already, or was never taken.
            None => batch.refuse(&"given up".into()),
        }
    }

    /// Posts nothing more of a job and stops awaiting its messages.
    fn give_up(&mut self, key: u64, why: &Arc<str>) {
        let Some(job) = self.jobs.get_mut(key) else { return };
        if job.failed.is_none() {
            job.failed = Some(Arc::clone(why));
            job.since = Instant::now();
        }
        let (peer, receives) = (job.peer, job.batch.receives());
        if receives {
            self.receives.retain(|(job, _)| *job != key);
            let posted: Vec<u64> =
                self.ops.iter().filter(|(_, op)| op.job == key).map(|(op, _)| op).collect();
            for op in posted {
                self.driver().cancel_receive(op);
            }
        } else if let Some(peer) = self.peers.get_mut(peer) {
            peer.window.withdraw(|posting| posting.job == key);
        }
        self.touch(key);
    }

    /// Ends everything with a peer: its first failure is its last.
    fn sever(&mut self, key: u64, why: &Arc<str>) {
        let Some(peer) = self.peers.get_mut(key) else { return };
        if peer.failed.is_some() {
            return;
        }
        peer.failed = Some(Arc::clone(why));
        if let Some(handle) = peer.handle.upgrade() {
            let _ = handle.failed.set(Arc::clone(why));
        }
        for job in self.jobs_of(key) {
            self.give_up(job, why);
        }
        match self.may_block {
            true => self.close(key),
            false => self.closing.push(key),
        }
    }

    fn jobs_of(&self, peer: u64) -> Vec<u64> {
        self.jobs.iter().filter(|(_, job)| job.peer == peer).map(|(key, _)| key).collect()
    }

    /// Closes the connection to a peer that has failed.
    fn close(&mut self, key: u64) {
        let Some(id) = self.peers.get_mut(key).map(|peer| peer.id) else { return };
        self.driver().disconnect(id);
        // What lingers is settled by its reports.
        let cut = !self.driver().lingers(id);
        for job in self.jobs_of(key) {
            if let Some(job) = self.jobs.get_mut(job) {
                // A message that is awaited is nobody's until it comes: its buffer is free when it was reported.
                job.cut = cut && job.posted > 0 && !job.batch.receives();
            }
            self.touch(job);
        }
    }

    /// Disconnects the peers of jobs that do not end.
    fn sweep(&mut self) {
        if self.swept.elapsed() < SWEEP {
            return;
        }
        self.swept = Instant::now();
        let is_stuck = |job: &Job| {
            let sends = matches!(job.batch.transfer(0).verb, Verb::Send { .. } | Verb::Ask);
            let age = job.since.elapsed();
            !job.batch.receives() && (age > GIVEN_UP_MAX && job.failed.is_some() || age > SEND_MAX && sends)
        };
        let stuck: Vec<u64> =
            self.jobs.iter().filter(|(_, job)| is_stuck(job)).map(|(_, job)| job.peer).collect();
        for peer in stuck {
            self.sever(peer, &"its operations do not end".into());
        }
    }

    /// Posts what the bounds let through; whether anything was.
    fn post(&mut self) -> bool {
        self.full = false;
        let mut any = self.post_receives();
        for _ in 0..self.ready.len() {
            let Some(key) = self.ready.pop_front() else { break };
            any |= self.post_to(key);
            let Some(peer) = self.peers.get_mut(key) else { continue };
            peer.is_ready = peer.window.next().is_some();
            if peer.is_ready {
                self.ready.push_back(key);
            }
        }
        any
    }

    fn post_receives(&mut self) -> bool {
        let mut any = false;
        while let Some((key, transfer)) = self.receives.front().copied() {
            let Some(job) = self.jobs.get_mut(key) else {
                self.receives.pop_front();
                continue;
            };
            let to = job.batch.transfer(transfer);
            let Verb::Receive { tag } = to.verb else { unreachable!("a batch is of one verb") };
            let op = self.ops.insert(Op { job: key, peer: None, transfer, count: 1, len: to.local.len });
            match self.driver().receive(tag, to.local, op) {
                Ok(()) => {
                    self.receives.pop_front();
                    self.count_posted(key);
                    any = true;
                }
                Err(error) => {
                    self.ops.remove(op);
                    if error == PostError::Again {
                        self.full = true;
                        break;
                    }
                    self.receives.pop_front();
                    self.give_up(key, &error.to_string().into());
                }
            }
        }
        any
    }

    fn post_to(&mut self, key: u64) -> bool {
        for posted in 0..TURN_OPS {
            let Some(peer) = self.peers.get_mut(key) else { return posted > 0 };
            let id = peer.id;
            let Some((posting, part)) = peer.window.next() else { return posted > 0 };
            let (job, batch) = (posting.job, Arc::clone(&posting.batch));
            let Part { transfer, count, len, .. } = part;
            let op = self.ops.insert(Op { job, peer: Some(key), transfer, count, len });
            match self.post_one(id, &batch, part, op) {
                Ok(()) => {
                    if let Some(peer) = self.peers.get_mut(key) {
                        peer.window.posted();
                    }
                    self.count_posted(job);
                }
                Err(error) => {
                    self.ops.remove(op);
                    match error {
                        PostError::Again => self.full = true,
                        PostError::Range => self.give_up(job, &error.to_string().into()),
                        PostError::Failed(why) => self.sever(key, &why.into()),
                    }
                    return posted > 0;
                }
            }
        }
        true
    }

    fn post_one(&mut self, peer: PeerId, batch: &Batch, part: Part, op: u64) -> Result<(), PostError> {
        let first = batch.transfer(part.transfer);
        match first.verb {
            Verb::Send { tag } => return self.driver().send(peer, tag, first.local, op),
            Verb::Ask => return self.driver().ask(peer, first.local, op),
            Verb::Read { .. } | Verb::Write { .. } | Verb::Receive { .. } => {}
        }
        let mut pieces = std::mem::take(&mut self.pieces);
        pieces.clear();
        for at in part.transfer..part.transfer + part.count {
            let Transfer { verb, local } = batch.transfer(at);
            let (Verb::Read { remote, offset } | Verb::Write { remote, offset }) = verb else { break };
            let len = if part.count > 1 { local.len } else { part.len };
            let local = LocalRange { offset: local.offset + part.offset, len, ..local };
            pieces.push(Piece { remote, offset: offset + part.offset as u64, local });
        }
        let posted = match first.verb {
            Verb::Read { .. } => self.driver().read_pieces(peer, &pieces, op),
            Verb::Write { .. } => self.driver().write_pieces(peer, &pieces, op),
            Verb::Send { .. } | Verb::Receive { .. } | Verb::Ask => Err(PostError::Range),
        };
        self.pieces = pieces;
        posted
    }

    fn count_posted(&mut self, job: u64) {
        self.unarmed = true;
        let Some(job) = self.jobs.get_mut(job) else { return };
        job.posted += 1;
        if !job.batch.receives() {
            return;
        }
        match job.ask.take() {
            Some(ask) => drop(self.submit(ask)),
            None => job.batch.note_posted(),
        }
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
        while let Some(key) = self.touched.pop() {
            let Some(job) = self.jobs.get_mut(key) else { continue };
            job.touched = false;
            let end = job.end();
            job.batch.note(&mut job.done, job.failed.as_ref(), end);
            if end != End::Open && job.posted == 0 {
                let Some(Job { failed, then: Some(then), .. }) = self.jobs.remove(key) else { continue };
                match failed {
                    None if end == End::Settled => self.exchange(then),
                    why => then.receive.refuse(&why.unwrap_or_else(|| "an operation was lost".into())),
                }
            }
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
            state.closed = true;
            std::mem::take(&mut state.commands)
        };
        for (_, job) in self.jobs.iter() {
            job.then.iter().for_each(|then| then.receive.refuse(&why));
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
                    then.receive.refuse(&why);
                }
                _ => {}
            }
        }
    }
}
