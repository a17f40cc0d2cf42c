//! [`Driver`] over the calls of a plugin: keeps what belongs to what, and believes nothing unchecked.

mod info;
mod numbered;

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use self::info::Checked;
use self::numbered::Numbered;
use super::abi::{self, RawDone, RawLocal, RawRemote};
use super::calls::{CallError, Calls};
use crate::backend::fabric::driver::{
    ADDRESS_MAX_BYTES, Access, Done, Driver, DriverError, DriverInfo, KEY_MAX_BYTES, LocalId, LocalRange,
    PeerId, PostError, RemoteId,
};
use crate::memory::{MemorySpan, Place};

/// Ends taken from the plugin with one call.
const ENDS_PER_CALL: usize = 64;

/// A driver of a plugin.
pub(super) struct PluginDriver {
    state: State,
    info: DriverInfo,
    address: Vec<u8>,
    nap: Duration,
    wait: Option<OwnedFd>,
    locals: Numbered<LocalId, Local>,
    peers: Numbered<PeerId, u64>,
    remotes: Numbered<RemoteId, Remote>,
    /// By the number the plugin got.
    posted: HashMap<u64, Posted>,
    /// Numbers of receives, by the operation of the caller.
    receives: HashMap<u64, u64>,
    last_number: u64,
    /// Ended without the plugin: to be reported by the next poll.
    ended: Vec<Done>,
    ends: Box<[RawDone]>,
}

enum State {
    Open(Calls),
    /// It broke a rule: which one.
    Condemned(String),
}

struct Local {
    handle: u64,
    span: MemorySpan,
    posted: u32,
    /// To be deregistered once nothing is posted.
    ending: bool,
}

struct Remote {
    handle: u64,
    peer: PeerId,
    posted: u32,
    /// To be forgotten once nothing is posted.
    ending: bool,
}

struct Posted {
    op: u64,
    local: LocalId,
    len: usize,
    to: To,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum To {
    /// A read or a write.
    Remote(PeerId, RemoteId),
    /// A send.
    Peer(PeerId),
    /// A receive.
    Here,
}

impl To {
    fn peer(self) -> Option<PeerId> {
        match self {
            Self::Remote(peer, _) | Self::Peer(peer) => Some(peer),
            Self::Here => None,
        }
    }
}

impl PluginDriver {
    /// Asks an opened driver what it is.
    pub(super) fn start(mut calls: Calls) -> Result<Self, CallError> {
        let Checked { info, nap } = info::check(&calls.info()?).map_err(CallError::Breach)?;
        let address = calls.address(ADDRESS_MAX_BYTES)?;
        if address.is_empty() {
            return Err(CallError::Breach("its address is empty".to_owned()));
        }
        let wait = calls.wait_fd()?;
        Ok(Self {
            state: State::Open(calls),
            info,
            address,
            nap,
            wait,
            locals: Numbered::new(LocalId),
            peers: Numbered::new(PeerId),
            remotes: Numbered::new(RemoteId),
            posted: HashMap::new(),
            receives: HashMap::new(),
            last_number: 0,
            ended: Vec::new(),
            ends: vec![RawDone::ZEROED; ENDS_PER_CALL].into(),
        })
    }

    /// Makes a call that gives something; a breach of the rules ends the driver.
    fn ask<T>(&mut self, call: impl FnOnce(&mut Calls) -> Result<T, CallError>) -> Result<T, DriverError> {
        let error = match &mut self.state {
            State::Open(calls) => match call(calls) {
                Ok(value) => return Ok(value),
                Err(error) => error,
            },
            State::Condemned(why) => return Err(plain(why.clone())),
        };
        if let CallError::Breach(why) = &error {
            self.condemn(why.clone());
        }
        Err(explain("the plugin", error))
    }

    /// Makes a call that cannot fail.
    fn tell(&mut self, call: impl FnOnce(&mut Calls)) {
        if let State::Open(calls) = &mut self.state {
            call(calls);
        }
    }

    /// The local end of an operation of at most `max` bytes.
    fn local(&self, range: LocalRange, max: usize) -> Result<RawLocal, PostError> {
        let local = self.locals.get(range.id).filter(|local| !local.ending).ok_or(PostError::Range)?;
        let end = range.offset.checked_add(range.len).ok_or(PostError::Range)?;
        if range.len == 0 || range.len > max || end > local.span.len() {
            return Err(PostError::Range);
        }
        Ok(RawLocal { registration: local.handle, offset: range.offset as u64, len: range.len as u64 })
    }

    fn remote(&self, peer: PeerId, id: RemoteId, offset: u64, len: usize) -> Result<RawRemote, PostError> {
        let remote = self.remotes.get(id).filter(|remote| remote.peer == peer && !remote.ending);
        let (Some(handle), Some(remote)) = (self.peers.get(peer), remote) else {
            return Err(PostError::Failed("the connection to the peer is closed".to_owned()));
        };
        if offset.checked_add(len as u64).is_none() {
            return Err(PostError::Range);
        }
        Ok(RawRemote { peer: *handle, key: remote.handle, offset })
    }

    /// Posts what `call` posts under the number it is given.
    fn post(
        &mut self,
        posted: Posted,
        call: impl FnOnce(&mut Calls, u64) -> Result<(), CallError>,
    ) -> Result<(), PostError> {
        let number = self.last_number + 1;
        let outcome = match &mut self.state {
            State::Open(calls) => call(calls, number),
            State::Condemned(why) => return Err(PostError::Failed(why.clone())),
        };
        match outcome {
            Ok(()) => {}
            Err(CallError::Again) => return Err(PostError::Again),
            Err(CallError::Range) => return Err(PostError::Range),
            Err(CallError::Refused(error)) => return Err(PostError::Failed(error.what)),
            Err(CallError::Breach(why)) => {
                self.condemn(why.clone());
                return Err(PostError::Failed(why));
            }
        }
        self.last_number = number;
        if let Some(local) = self.locals.get_mut(posted.local) {
            local.posted += 1;
        }
        match posted.to {
            To::Remote(_, id) => {
                if let Some(remote) = self.remotes.get_mut(id) {
                    remote.posted += 1;
                }
            }
            To::Here => drop(self.receives.insert(posted.op, number)),
            To::Peer(_) => {}
        }
        self.posted.insert(number, posted);
        Ok(())
    }

    /// Takes the end of an operation from the plugin; the rule it breaks, where it does.
    fn settle(&mut self, end: &RawDone) -> Result<Done, String> {
        let number = end.op;
        let Some(posted) = self.posted.get(&number) else {
            return Err(format!("it reported operation {number}, which is not posted"));
        };
        let (op, len) = (posted.op, posted.len);
        let result = match end.status {
            abi::OK if end.bytes > len as u64 => {
                return Err(format!("it moved {} bytes where {len} were asked for", end.bytes));
            }
            abi::OK if end.bytes < len as u64 && posted.to != To::Here => {
                Err(format!("only {} of {len} bytes were moved", end.bytes))
            }
            abi::OK => Ok(end.bytes as usize),
            _ => Err(Some(abi::text(&end.why))
                .filter(|why| !why.is_empty())
                .unwrap_or("no reason given".into())),
        };
        self.release(number);
        Ok(Done { op, result })
    }

    fn take_ends(&mut self, count: usize, done: &mut Vec<Done>) -> Result<(), String> {
        for at in 0..count {
            let end = self.ends[at];
            // An entry that the next poll counts without writing it is then the end of nothing.
            self.ends[at].op = 0;
            done.push(self.settle(&end)?);
        }
        Ok(())
    }

    fn takes(&self, place: Place) -> Result<(), String> {
        if place == Place::Host {
            return Ok(());
        }
        let known = self.info.device_memory.iter().find(|(kind, _)| *kind == place.kind());
        known.map_or_else(|| Err(format!("{} memory is unknown", place.kind())), |(_, takes)| takes.clone())
    }

    /// Forgets an operation, and ends what waited for its end.
    fn release(&mut self, number: u64) {
        let Some(posted) = self.posted.remove(&number) else { return };
        if self.receives.get(&posted.op) == Some(&number) {
            self.receives.remove(&posted.op);
        }
        if let Some(local) = self.locals.get_mut(posted.local) {
            local.posted -= 1;
            if local.ending && local.posted == 0 {
                self.end_local(posted.local);
            }
        }
        if let To::Remote(_, id) = posted.to
            && let Some(remote) = self.remotes.get_mut(id)
        {
            remote.posted -= 1;
            if remote.ending && remote.posted == 0 {
                self.end_remote(id);
            }
        }
    }

    fn end_local(&mut self, id: LocalId) {
        if let Some(local) = self.locals.remove(id) {
            self.tell(|calls| calls.deregister(local.handle));
        }
    }

    fn end_remote(&mut self, id: RemoteId) {
        if let Some(remote) = self.remotes.remove(id)
            && let Some(peer) = self.peers.get(remote.peer).copied()
        {
            self.tell(|calls| calls.forget(peer, remote.handle));
        }
    }

    /// Closes a plugin that broke a rule.
    fn condemn(&mut self, breach: String) {
        let why = format!("the plugin broke a rule and was closed: {breach}");
        tracing::error!(plugin = self.info.detail, breach, "a transfer plugin broke a rule and is closed");
        // Closes it, before anything it was told about is given up.
        self.state = State::Condemned(why.clone());
        let failed = self.posted.drain().map(|(_, posted)| Done { op: posted.op, result: Err(why.clone()) });
        self.ended.extend(failed);
        self.receives.clear();
        for local in self.locals.drain() {
            // Nothing vouches for a plugin like that leaving the memory alone: kept for the life of the process.
            std::mem::forget(local.span);
        }
        drop(self.remotes.drain());
        drop(self.peers.drain());
    }
}

impl Driver for PluginDriver {
    fn info(&self) -> &DriverInfo {
        &self.info
    }

    fn address(&self) -> Vec<u8> {
        self.address.clone()
    }

    fn register(&mut self, span: &MemorySpan, access: Access) -> Result<(LocalId, Vec<u8>), DriverError> {
        self.takes(span.place()).map_err(plain)?;
        let id = self.locals.next().ok_or_else(|| plain("too many registrations were made".to_owned()))?;
        let code = match access {
            Access::Local => abi::ACCESS_LOCAL,
            Access::RemoteRead => abi::ACCESS_REMOTE_READ,
            Access::RemoteWrite => abi::ACCESS_REMOTE_WRITE,
        };
        let (handle, mut key) = self.ask(|calls| calls.register(span, code, KEY_MAX_BYTES))?;
        self.locals.insert(id, Local { handle, span: span.clone(), posted: 0, ending: false });
        if access == Access::Local {
            key = Vec::new();
        } else if key.is_empty() {
            self.end_local(id);
            return Err(plain("the plugin gave no key for the memory".to_owned()));
        }
        Ok((id, key))
    }

    fn deregister(&mut self, id: LocalId) {
        match self.locals.get_mut(id) {
            Some(local) if local.posted > 0 => local.ending = true,
            Some(_) => self.end_local(id),
            None => {}
        }
    }

    fn connect(&mut self, address: &[u8]) -> Result<PeerId, DriverError> {
        if address.is_empty() || address.len() > ADDRESS_MAX_BYTES {
            return Err(plain(format!("an address has no {} bytes", address.len())));
        }
        let id = self.peers.next().ok_or_else(|| plain("too many connections were made".to_owned()))?;
        let handle = self.ask(|calls| calls.connect(address))?;
        self.peers.insert(id, handle);
        Ok(id)
    }

    fn disconnect(&mut self, peer: PeerId) {
        let Some(handle) = self.peers.remove(peer) else { return };
        self.tell(|calls| calls.disconnect(handle));
        // Its keys ended with it, so that nothing below asks for them to be forgotten.
        self.remotes.retain(|remote| remote.peer != peer);
        let over: Vec<u64> = self
            .posted
            .iter()
            .filter(|(_, posted)| posted.to.peer() == Some(peer))
            .map(|(number, _)| *number)
            .collect();
        for number in over {
            let op = self.posted.get(&number).map(|posted| posted.op);
            let result = Err("the connection was closed".to_owned());
            self.ended.extend(op.map(|op| Done { op, result }));
            self.release(number);
        }
    }

    fn import(&mut self, peer: PeerId, key: &[u8]) -> Result<RemoteId, DriverError> {
        if key.is_empty() || key.len() > KEY_MAX_BYTES {
            return Err(plain(format!("a key has no {} bytes", key.len())));
        }
        let Some(to) = self.peers.get(peer).copied() else {
            return Err(plain("the connection to the peer is closed".to_owned()));
        };
        let id = self.remotes.next().ok_or_else(|| plain("too many keys were imported".to_owned()))?;
        let handle = self.ask(|calls| calls.import(to, key))?;
        self.remotes.insert(id, Remote { handle, peer, posted: 0, ending: false });
        Ok(id)
    }

    fn forget(&mut self, peer: PeerId, remote: RemoteId) {
        match self.remotes.get_mut(remote) {
            Some(known) if known.peer != peer => {}
            Some(known) if known.posted > 0 => known.ending = true,
            Some(_) => self.end_remote(remote),
            None => {}
        }
    }

    fn read(
        &mut self,
        peer: PeerId,
        remote: RemoteId,
        from_offset: u64,
        to: LocalRange,
        op: u64,
    ) -> Result<(), PostError> {
        if !self.info.read {
            return Err(PostError::Failed("the plugin has no one-sided reads".to_owned()));
        }
        let from = self.remote(peer, remote, from_offset, to.len)?;
        let local = self.local(to, self.info.op_max)?;
        let posted = Posted { op, local: to.id, len: to.len, to: To::Remote(peer, remote) };
        self.post(posted, |calls, number| calls.read(&from, &local, number))
    }

    fn write(
        &mut self,
        peer: PeerId,
        remote: RemoteId,
        to_offset: u64,
        from: LocalRange,
        op: u64,
    ) -> Result<(), PostError> {
        if !self.info.write {
            return Err(PostError::Failed("the plugin has no one-sided writes".to_owned()));
        }
        let to = self.remote(peer, remote, to_offset, from.len)?;
        let local = self.local(from, self.info.op_max)?;
        let posted = Posted { op, local: from.id, len: from.len, to: To::Remote(peer, remote) };
        self.post(posted, |calls, number| calls.write(&to, &local, number))
    }

    fn send(&mut self, peer: PeerId, tag: u64, from: LocalRange, op: u64) -> Result<(), PostError> {
        let Some(handle) = self.peers.get(peer).copied() else {
            return Err(PostError::Failed("the connection to the peer is closed".to_owned()));
        };
        let local = self.local(from, self.info.message_max)?;
        let posted = Posted { op, local: from.id, len: from.len, to: To::Peer(peer) };
        self.post(posted, |calls, number| calls.send(handle, tag, &local, number))
    }

    fn receive(&mut self, tag: u64, to: LocalRange, op: u64) -> Result<(), PostError> {
        if self.info.message_max == 0 {
            return Err(PostError::Failed("the plugin has no messages".to_owned()));
        }
        // The range may be longer than any message.
        let local = self.local(to, usize::MAX)?;
        let posted = Posted { op, local: to.id, len: to.len, to: To::Here };
        self.post(posted, |calls, number| calls.receive(tag, &local, number))
    }

    fn cancel_receive(&mut self, op: u64) {
        if let Some(number) = self.receives.get(&op).copied() {
            self.tell(|calls| calls.cancel_receive(number));
        }
    }

    fn poll(&mut self, done: &mut Vec<Done>) -> bool {
        let mut happened = !self.ended.is_empty();
        let State::Open(calls) = &mut self.state else {
            done.append(&mut self.ended);
            return happened;
        };
        let breach = match calls.poll(&mut self.ends) {
            Ok((some, count)) => {
                happened |= some;
                self.take_ends(count, done).err()
            }
            Err(CallError::Breach(why)) => Some(why),
            Err(_) => None,
        };
        if let Some(why) = breach {
            self.condemn(why);
            happened = true;
        }
        done.append(&mut self.ended);
        happened
    }

    fn arm(&mut self) -> bool {
        match &mut self.state {
            _ if !self.ended.is_empty() => false,
            State::Open(calls) => calls.arm(),
            State::Condemned(_) => true,
        }
    }

    fn wait_fd(&self) -> Option<RawFd> {
        match &self.state {
            State::Open(_) => self.wait.as_ref().map(AsRawFd::as_raw_fd),
            State::Condemned(_) => None,
        }
    }

    fn nap(&self) -> Duration {
        self.nap
    }
}

fn plain(what: String) -> DriverError {
    DriverError { what, remedy: String::new() }
}

/// Says what a call of the plugin `name` did instead of what it was asked.
pub(super) fn explain(name: &str, error: CallError) -> DriverError {
    match error {
        CallError::Refused(error) => DriverError { what: format!("{name}: {}", error.what), ..error },
        CallError::Again | CallError::Range => {
            plain(format!("{name} gave a status that only operations may have"))
        }
        CallError::Breach(why) => DriverError {
            what: format!("{name} broke a rule: {why}"),
            remedy: "report it to the plugin's author, or take another backend".to_owned(),
        },
    }
}
