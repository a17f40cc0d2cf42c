//! Takes what tasks want, and what peers ask for.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use super::Progress;
use super::job::{Job, PeerState};
use crate::backend::fabric::batch::{Batch, Posting};
use crate::backend::fabric::driver::{Driver, DriverError};
use crate::backend::fabric::registry::Registration;
use crate::backend::fabric::thread::queue::{Command, Exchange, Imported, Then};
use crate::backend::fabric::thread::{Peer, PeerInner};
use crate::backend::fabric::window::{Window, Work as _};

/// Requests of peers answered before something else has its turn.
const TURN_REQUESTS: usize = 16;

impl<D: Driver + ?Sized> Progress<D> {
    /// Takes the commands that wait, but those that this turn must leave alone: no other depends on one of them, since
    /// who gave it waits for its reply, or is gone.
    pub(super) fn take_commands(&mut self) {
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

    pub(super) fn obey(&mut self, command: Command) {
        match command {
            Command::Register { span, access, reply } => {
                if !reply.is_closed() {
                    let made = self.driver().register(&span, access);
                    let made = made.map(|made| Registration::new(made, span, Arc::clone(&self.queue)));
                    // An unclaimed one ends by its drop, also when it was sent already.
                    let _ = reply.send(made);
                }
            }
            Command::Deregister { id, keep } => {
                self.driver().deregister(id);
                drop(keep);
            }
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
                    Some((id, None)) => {
                        self.driver().import(id, &key).map(|remote| Imported::new(peer, remote))
                    }
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
            key: OnceLock::new(),
            queue: Arc::clone(&self.queue),
            failed: OnceLock::new(),
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
    pub(super) fn submit(&mut self, batch: Arc<Batch>) -> Option<u64> {
        let peer = batch.peer.key();
        if batch.is_settled() {
            return None;
        }
        // One of a fabric that was closed and opened again may have the number of another here.
        let is_own = batch.peer.is_of(&self.queue);
        let Some(state) = self.peers.get_mut(peer).filter(|_| is_own) else {
            batch.refuse(&"the peer is disconnected".into());
            return None;
        };
        if let Some(why) = &state.failed {
            batch.refuse(why);
            return None;
        }
        let posting = Posting { job: 0, batch: Arc::clone(&batch) };

        let missing: Vec<usize> = (0..posting.transfers()).map(|transfer| posting.bytes(transfer)).collect();
        let open = missing.len();
        let receives = batch.receives();
        let job = Job {
            batch,
            ask: None,
            then: VecDeque::new(),
            peer,
            missing,
            open,
            first_open: 0,
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
    pub(super) fn exchange(&mut self, Exchange { receive, ask }: Exchange) {
        let job = self.submit(receive);
        if let Some(job) = job.and_then(|job| self.jobs.get_mut(job)) {
            job.ask = Some(ask);
        }
    }

    /// Takes a batch, and what follows it.
    fn submit_then(&mut self, batch: Arc<Batch>, then: VecDeque<Then>) {
        let job = self.submit(batch);
        match job.and_then(|job| self.jobs.get_mut(job)) {
            Some(job) => job.then = then,
            None => {
                let why = "the operations before it have failed".into();
                then.iter().for_each(|then| then.exchange.receive.refuse(&why));
            }
        }
    }

    /// Answers requests of peers; whether there were any.
    pub(super) fn answer(&mut self) -> bool {
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
}
