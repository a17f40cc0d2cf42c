//! Drivers within one process that are slow, lossy, full or dead as a test wants: seeded, without a library. And a host
//! that does not answer, for those of libraries.

use std::collections::{HashMap, VecDeque};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::driver::{
    Access, Done, Driver, DriverError, DriverInfo, LocalId, LocalRange, Opened, PeerId, PostError,
    REQUEST_MAX_BYTES, RemoteId,
};
use crate::memory::{HostMemory, MemorySpan};

/// A small generator of numbers that look random (splitmix64).
#[derive(Debug, Clone)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// Below `end`, which is not 0.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn per_mille(&mut self, chance: u32) -> bool {
        self.below(1000) < u64::from(chance)
    }
}

/// What goes wrong, in chances per mille where it is a chance.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Faults {
    /// Longest time an operation takes: each takes a random part of it, so that they end out of order.
    pub(crate) delay: Duration,
    /// Posts that find the queues full.
    pub(crate) again: u32,
    /// Operations that happen, or not, and are never reported.
    pub(crate) lost: u32,
    /// Operations that fail.
    pub(crate) failed: u32,
    /// Operations of which a byte changes on the way.
    pub(crate) flipped: u32,
    /// Whether a write that is under way lands although its key has ended meanwhile.
    pub(crate) late_writes: bool,
    /// Most operations the driver takes at once.
    pub(crate) depth: usize,
    /// Longest message; 0: there are none.
    pub(crate) message_max: usize,
    /// Whether there are requests.
    pub(crate) requests: bool,
    /// Whether there is a descriptor to wait for; without, the thread naps.
    pub(crate) descriptor: bool,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            delay: Duration::ZERO,
            again: 0,
            lost: 0,
            failed: 0,
            flipped: 0,
            late_writes: false,
            depth: usize::MAX,
            message_max: 1 << 20,
            requests: true,
            descriptor: false,
        }
    }
}

/// All drivers that can reach each other.
#[derive(Clone, Default)]
pub(crate) struct World(Arc<Mutex<Vec<Endpoint>>>);

#[derive(Default)]
struct Endpoint {
    alive: bool,
    /// Neither answers nor breaks.
    frozen: bool,
    /// Closes no connection.
    clings: bool,
    /// How long it takes to connect.
    connects_in: Duration,
    /// How long it takes to close; until then what was posted may land.
    closes_in: Duration,
    shown: HashMap<u32, (MemorySpan, Access)>,
    awaited: HashMap<u64, (u64, HostMemory, LocalRange)>,
    done: Vec<Done>,
    requests: VecDeque<Vec<u8>>,
    asked: usize,
    last_asked: Vec<u8>,
    bell: Option<Arc<OwnedFd>>,
    registered: usize,
    /// Registrations made in all.
    registrations: usize,
    imported: usize,
    polls: usize,
    /// Most operations and bytes posted to one peer at once.
    peak: (usize, usize),
    /// Operations posted in all.
    posted: usize,
}

impl World {
    fn endpoints(&self) -> MutexGuard<'_, Vec<Endpoint>> {
        self.0.lock().unwrap()
    }

    /// Opens a driver of this world.
    pub(crate) fn driver(&self, seed: u64, faults: Faults) -> MemoryDriver {
        let bell = faults
            .descriptor
            .then(|| Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()));
        let mut endpoints = self.endpoints();
        endpoints.push(Endpoint { alive: true, bell: bell.clone(), ..Endpoint::default() });
        MemoryDriver {
            world: self.clone(),
            me: endpoints.len() - 1,
            info: DriverInfo {
                detail: "memory".into(),
                wire: "memory".into(),
                same_host: false,
                read: true,
                write: true,
                emulated: false,
                message_max: faults.message_max,
                requests: faults.requests,
                op_max: 1 << 30,
                rails: 1,
                device_memory: Vec::new(),
            },
            faults,
            rng: Rng::new(seed),
            bell,
            local: HashMap::new(),
            peers: HashMap::new(),
            remotes: HashMap::new(),
            lingering: Vec::new(),
            posted: Vec::new(),
            requests: VecDeque::new(),
            next: 0,
        }
    }

    /// Opens a driver, of every second seed one that any thread may call.
    pub(crate) fn open(&self, seed: u64, faults: Faults) -> Opened {
        let driver = Box::new(self.driver(seed, faults));
        if seed.is_multiple_of(2) { Opened::Movable(driver) } else { Opened::Bound(driver) }
    }

    /// The process of an endpoint dies: what is posted to it fails.
    pub(crate) fn kill(&self, endpoint: usize) {
        self.endpoints()[endpoint].alive = false;
    }

    /// An endpoint answers no more, or again.
    pub(crate) fn freeze(&self, endpoint: usize, frozen: bool) {
        self.endpoints()[endpoint].frozen = frozen;
    }

    /// The library of an endpoint closes no connection, or does again.
    pub(crate) fn cling(&self, endpoint: usize, clings: bool) {
        self.endpoints()[endpoint].clings = clings;
    }

    /// The library of an endpoint blocks for so long whenever it is to connect.
    pub(crate) fn connect_slowly(&self, endpoint: usize, takes: Duration) {
        self.endpoints()[endpoint].connects_in = takes;
    }

    /// The library of an endpoint takes so long to close, and does what was posted before it has.
    pub(crate) fn close_slowly(&self, endpoint: usize, takes: Duration) {
        self.endpoints()[endpoint].closes_in = takes;
    }

    /// Most operations and bytes an endpoint had posted to one peer at once.
    pub(crate) fn peak(&self, endpoint: usize) -> (usize, usize) {
        self.endpoints()[endpoint].peak
    }

    /// Operations an endpoint has posted.
    pub(crate) fn posted(&self, endpoint: usize) -> usize {
        self.endpoints()[endpoint].posted
    }

    /// How often an endpoint was polled.
    pub(crate) fn polls(&self, endpoint: usize) -> usize {
        self.endpoints()[endpoint].polls
    }

    /// Whether the driver of an endpoint is open and not killed.
    pub(crate) fn is_alive(&self, endpoint: usize) -> bool {
        self.endpoints()[endpoint].alive
    }

    /// Requests that came to an endpoint from its peers.
    pub(crate) fn asked(&self, endpoint: usize) -> usize {
        self.endpoints()[endpoint].asked
    }

    /// The last of them.
    pub(crate) fn last_asked(&self, endpoint: usize) -> Vec<u8> {
        self.endpoints()[endpoint].last_asked.clone()
    }

    /// Sends a request to an endpoint, as anybody can who reaches it.
    pub(crate) fn inject(&self, endpoint: usize, request: &[u8]) {
        let endpoint = &mut self.endpoints()[endpoint];
        endpoint.requests.push_back(request.to_vec());
        endpoint.ring();
    }

    /// Keys of peers that the driver of an endpoint has now.
    pub(crate) fn imported(&self, endpoint: usize) -> usize {
        self.endpoints()[endpoint].imported
    }

    /// Registrations of an endpoint now.
    pub(crate) fn registered(&self, endpoint: usize) -> usize {
        self.endpoints()[endpoint].registered
    }

    /// Registrations that an endpoint has made in all.
    pub(crate) fn registrations(&self, endpoint: usize) -> usize {
        self.endpoints()[endpoint].registrations
    }
}

pub(crate) struct MemoryDriver {
    world: World,
    me: usize,
    info: DriverInfo,
    faults: Faults,
    rng: Rng,
    bell: Option<Arc<OwnedFd>>,
    local: HashMap<u32, MemorySpan>,
    peers: HashMap<u32, usize>,
    remotes: HashMap<u32, (PeerId, u32)>,
    /// Disconnected, but not closed.
    lingering: Vec<PeerId>,
    posted: Vec<Posted>,
    /// Requests to be taken: without the lock of the world, which a thread that looks again and again would hold too often.
    requests: VecDeque<Vec<u8>>,
    next: u32,
}

struct Posted {
    op: u64,
    peer: PeerId,
    due: Instant,
    what: What,
    local: LocalRange,
    memory: HostMemory,
    /// Where a write goes, found when it was posted.
    target: Option<(HostMemory, usize)>,
    lost: bool,
}

#[derive(Clone, Copy)]
enum What {
    Read { region: u32, offset: u64 },
    Write { region: u32, offset: u64 },
    Send { tag: u64 },
    Ask,
}

impl MemoryDriver {
    fn number(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    fn post(&mut self, peer: PeerId, what: What, local: LocalRange, op: u64) -> Result<(), PostError> {
        if !self.peers.contains_key(&peer.0) {
            return Err(PostError::Failed("not connected".into()));
        }
        let memory = self.local_range(local)?;
        if self.posted.len() >= self.faults.depth || self.rng.per_mille(self.faults.again) {
            return Err(PostError::Again);
        }
        let delay = self.faults.delay.mul_f64(self.rng.below(1001) as f64 / 1000.0);
        let lost = self.rng.per_mille(self.faults.lost);
        let target = match what {
            What::Write { region, .. } if self.faults.late_writes => {
                let endpoints = self.world.endpoints();
                let shown = endpoints[self.peers[&peer.0]].shown.get(&region);
                shown.and_then(|(span, _)| span.host())
            }
            _ => None,
        };
        let due = Instant::now() + delay;
        self.posted.push(Posted { op, peer, due, what, local, memory, target, lost });
        let of_peer = self.posted.iter().filter(|posted| posted.peer == peer);
        let now = of_peer.fold((0, 0), |(ops, bytes), posted| (ops + 1, bytes + posted.local.len));
        let own = &mut self.world.endpoints()[self.me];
        own.peak = (own.peak.0.max(now.0), own.peak.1.max(now.1));
        own.posted += 1;
        Ok(())
    }

    fn local_range(&self, range: LocalRange) -> Result<HostMemory, PostError> {
        let span = self.local.get(&range.id.0).ok_or(PostError::Range)?;
        let fits = range.offset.checked_add(range.len).is_some_and(|end| end <= span.len());
        // Local ends are whole memories here.
        span.host().filter(|(_, base)| fits && *base == 0).map(|(memory, _)| memory).ok_or(PostError::Range)
    }

    fn region(&self, peer: PeerId, remote: RemoteId) -> Result<u32, PostError> {
        let found = self.remotes.get(&remote.0).filter(|(owner, _)| *owner == peer);
        found.map(|(_, region)| *region).ok_or(PostError::Range)
    }

    /// Does what an operation is for.
    fn perform(&mut self, posted: &Posted) -> Result<usize, String> {
        let peer = self.peers[&posted.peer.0];
        let Posted { local, memory, .. } = posted;
        let flip = self.rng.per_mille(self.faults.flipped).then(|| self.rng.below(local.len as u64) as usize);
        if self.rng.per_mille(self.faults.failed) {
            return Err("it failed".into());
        }
        let mut endpoints = self.world.endpoints();
        let peer = &mut endpoints[peer];
        if !peer.alive {
            return Err("the peer is dead".into());
        }
        let mut bytes = vec![0; local.len];
        let shown = |region: u32, access: Access| {
            let found = peer.shown.get(&region).filter(|(_, shown)| *shown == access);
            found.and_then(|(span, _)| span.host()).ok_or("no such key")
        };
        match posted.what {
            What::Read { region, offset } => {
                let (from, base) = shown(region, Access::RemoteRead)?;
                from.read(base + offset as usize, &mut bytes);
                flip.iter().for_each(|at| bytes[*at] ^= 4);
                memory.write(local.offset, &bytes);
            }
            What::Write { region, offset } => {
                memory.read(local.offset, &mut bytes);
                flip.iter().for_each(|at| bytes[*at] ^= 4);
                let (to, base) = match &posted.target {
                    Some(target) => target.clone(),
                    None => shown(region, Access::RemoteWrite)?,
                };
                to.write(base + offset as usize, &bytes);
            }
            What::Send { tag } => {
                memory.read(local.offset, &mut bytes);
                flip.iter().for_each(|at| bytes[*at] ^= 4);
                // What nobody awaits is gone.
                if let Some((op, memory, to)) = peer.awaited.remove(&tag) {
                    peer.deliver(op, &memory, to, &bytes);
                }
            }
            What::Ask => {
                memory.read(local.offset, &mut bytes);
                flip.iter().for_each(|at| bytes[*at] ^= 4);
                peer.last_asked.clone_from(&bytes);
                peer.requests.push_back(bytes);
                peer.asked += 1;
                peer.ring();
            }
        }
        Ok(local.len)
    }
}

impl Endpoint {
    fn deliver(&mut self, op: u64, memory: &HostMemory, to: LocalRange, bytes: &[u8]) {
        let result = if bytes.len() > to.len {
            Err("a message longer than its buffer".into())
        } else {
            memory.write(to.offset, bytes);
            Ok(bytes.len())
        };
        self.done.push(Done { op, result });
        self.ring();
    }

    fn ring(&self) {
        if let Some(bell) = &self.bell {
            rustix::io::write(bell, &1u64.to_ne_bytes()).unwrap();
        }
    }
}

impl Driver for MemoryDriver {
    fn info(&self) -> &DriverInfo {
        &self.info
    }

    fn address(&self) -> Vec<u8> {
        (self.me as u64).to_le_bytes().to_vec()
    }

    fn register(&mut self, span: &MemorySpan, access: Access) -> Result<(LocalId, Vec<u8>), DriverError> {
        let refused = || DriverError { what: "not host memory".into(), remedy: String::new() };
        span.host().ok_or_else(refused)?;
        let id = self.number();
        self.local.insert(id, span.clone());
        let mut endpoints = self.world.endpoints();
        endpoints[self.me].registered += 1;
        endpoints[self.me].registrations += 1;
        if access == Access::Local {
            return Ok((LocalId(id), Vec::new()));
        }
        endpoints[self.me].shown.insert(id, (span.clone(), access));
        Ok((LocalId(id), [(self.me as u64).to_le_bytes(), u64::from(id).to_le_bytes()].concat()))
    }

    fn deregister(&mut self, id: LocalId) {
        assert!(self.local.remove(&id.0).is_some(), "registered once, deregistered once");
        let mut endpoints = self.world.endpoints();
        endpoints[self.me].registered -= 1;
        endpoints[self.me].shown.remove(&id.0);
    }

    fn connect(&mut self, address: &[u8]) -> Result<PeerId, DriverError> {
        let refused = || DriverError { what: "no such endpoint".into(), remedy: String::new() };
        let takes = self.world.endpoints()[self.me].connects_in;
        #[expect(clippy::disallowed_methods, reason = "a library that blocks its thread")]
        std::thread::sleep(takes);
        let endpoint = u64::from_le_bytes(address.try_into().map_err(|_| refused())?) as usize;
        if !self.world.endpoints().get(endpoint).is_some_and(|endpoint| endpoint.alive) {
            return Err(refused());
        }
        let id = self.number();
        self.peers.insert(id, endpoint);
        Ok(PeerId(id))
    }

    fn disconnect(&mut self, peer: PeerId) {
        if self.world.endpoints()[self.me].clings {
            return self.lingering.push(peer);
        }
        assert!(self.peers.remove(&peer.0).is_some(), "connected once, disconnected once");
        let gone = self.posted.extract_if(.., |posted| posted.peer == peer);
        let failed = gone.map(|posted| Done { op: posted.op, result: Err("disconnected".into()) });
        self.world.endpoints()[self.me].done.extend(failed);
        self.remotes.retain(|_, (owner, _)| *owner != peer);
        self.world.endpoints()[self.me].imported = self.remotes.len();
    }

    fn lingers(&self, peer: PeerId) -> bool {
        self.lingering.contains(&peer)
    }

    fn import(&mut self, peer: PeerId, key: &[u8]) -> Result<RemoteId, DriverError> {
        let refused = || DriverError { what: "not a key".into(), remedy: String::new() };
        let (owner, region) = key.split_first_chunk::<8>().ok_or_else(refused)?;
        let region = u64::from_le_bytes(region.try_into().map_err(|_| refused())?);
        if self.peers.get(&peer.0) != Some(&(u64::from_le_bytes(*owner) as usize)) {
            return Err(refused());
        }
        let id = self.number();
        self.remotes.insert(id, (peer, region as u32));
        self.world.endpoints()[self.me].imported = self.remotes.len();
        Ok(RemoteId(id))
    }

    fn forget(&mut self, _peer: PeerId, remote: RemoteId) {
        self.remotes.remove(&remote.0);
        self.world.endpoints()[self.me].imported = self.remotes.len();
    }

    fn read(
        &mut self,
        peer: PeerId,
        remote: RemoteId,
        offset: u64,
        to: LocalRange,
        op: u64,
    ) -> Result<(), PostError> {
        let region = self.region(peer, remote)?;
        self.post(peer, What::Read { region, offset }, to, op)
    }

    fn write(
        &mut self,
        peer: PeerId,
        remote: RemoteId,
        offset: u64,
        from: LocalRange,
        op: u64,
    ) -> Result<(), PostError> {
        let region = self.region(peer, remote)?;
        self.post(peer, What::Write { region, offset }, from, op)
    }

    fn send(&mut self, peer: PeerId, tag: u64, from: LocalRange, op: u64) -> Result<(), PostError> {
        assert!(from.len <= self.info.message_max, "a message of {} bytes", from.len);
        self.post(peer, What::Send { tag }, from, op)
    }

    fn ask(&mut self, peer: PeerId, from: LocalRange, op: u64) -> Result<(), PostError> {
        assert!(self.info.requests && from.len <= REQUEST_MAX_BYTES, "a request of {} bytes", from.len);
        self.post(peer, What::Ask, from, op)
    }

    fn take_request(&mut self) -> Option<Vec<u8>> {
        self.requests.pop_front()
    }

    fn receive(&mut self, tag: u64, to: LocalRange, op: u64) -> Result<(), PostError> {
        let memory = self.local_range(to)?;
        if self.rng.per_mille(self.faults.again) {
            return Err(PostError::Again);
        }
        let own = &mut self.world.endpoints()[self.me];
        own.awaited.insert(tag, (op, memory, to));
        Ok(())
    }

    fn cancel_receive(&mut self, op: u64) {
        let own = &mut self.world.endpoints()[self.me];
        let before = own.awaited.len();
        own.awaited.retain(|_, (awaited, _, _)| *awaited != op);
        if own.awaited.len() < before {
            own.done.push(Done { op, result: Err("cancelled".into()) });
        }
    }

    fn poll(&mut self, done: &mut Vec<Done>) -> bool {
        if let Some(bell) = &self.bell {
            let _ = rustix::io::read(bell, &mut [0; 8]);
        }
        self.world.endpoints()[self.me].polls += 1;
        let lingering = std::mem::take(&mut self.lingering);
        lingering.into_iter().for_each(|peer| self.disconnect(peer));
        let now = Instant::now();
        let before = done.len();
        let frozen: Vec<usize> =
            self.world.endpoints().iter().enumerate().filter(|(_, e)| e.frozen).map(|(at, _)| at).collect();
        let peers = self.peers.clone();
        let is_due = |posted: &mut Posted| posted.due <= now && !frozen.contains(&peers[&posted.peer.0]);
        let due: Vec<Posted> = self.posted.extract_if(.., |posted| is_due(posted)).collect();
        for mut posted in due {
            let result = self.perform(&posted);
            if posted.lost {
                // Done, perhaps, and silent about it for ever.
                posted.due = now + Duration::from_secs(3600);
                self.posted.push(posted);
                continue;
            }
            done.push(Done { op: posted.op, result });
        }
        let own = &mut self.world.endpoints()[self.me];
        done.append(&mut own.done);
        self.requests.append(&mut own.requests);
        done.len() > before || !self.requests.is_empty()
    }

    fn arm(&mut self) -> bool {
        let now = Instant::now();
        let idle = {
            let own = &self.world.endpoints()[self.me];
            own.done.is_empty() && own.requests.is_empty()
        };
        idle && self.requests.is_empty() && !self.posted.iter().any(|posted| posted.due <= now)
    }

    fn wait_fd(&self) -> Option<RawFd> {
        self.bell.as_ref().map(|bell| bell.as_raw_fd())
    }

    fn nap(&self) -> Duration {
        Duration::from_micros(100)
    }
}

impl Drop for MemoryDriver {
    fn drop(&mut self) {
        let takes = self.world.endpoints()[self.me].closes_in;
        if !takes.is_zero() {
            #[expect(clippy::disallowed_methods, reason = "a library that blocks its thread")]
            std::thread::sleep(takes);
            for posted in std::mem::take(&mut self.posted) {
                let _ = self.perform(&posted);
            }
        }
        let own = &mut self.world.endpoints()[self.me];
        own.alive = false;
        own.shown.clear();
        own.awaited.clear();
    }
}

/// Where connections are neither taken nor refused, for as long as what comes with it is kept.
pub(crate) fn silent_host() -> (SocketAddr, impl Sized) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let address = listener.local_addr().unwrap();
    let brief = Duration::from_millis(100);
    let waiting: Vec<TcpStream> =
        std::iter::from_fn(|| TcpStream::connect_timeout(&address, brief).ok()).take(16).collect();
    assert!(waiting.len() < 16, "connections are still taken");
    (address, (listener, waiting))
}

/// The longest that a driver's calls take while its peer does not answer: of each of `calls`, and of polls.
pub(crate) fn longest_call<D: Driver>(driver: &mut D, calls: [&mut dyn FnMut(&mut D); 3]) -> Duration {
    let (mut longest, mut done) = (Duration::ZERO, Vec::new());
    for call in calls {
        let start = Instant::now();
        call(driver);
        longest = longest.max(start.elapsed());
        for _ in 0..1000 {
            let start = Instant::now();
            driver.poll(&mut done);
            longest = longest.max(start.elapsed());
        }
    }
    longest
}
