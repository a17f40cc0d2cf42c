//! Rounds of raw probes and transfers, and what comes out of them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::bare;
use super::peer::{Peer, own_cpu};
use super::raw::Raw;
use super::{
    BenchError, BenchOptions, HANDOFF, Op, PEER_EPOCH, PEER_NAME, Row, Shape, agent_options, fill,
    integrity_name,
};
use crate::agent::{Agent, BackendKind, Integrity, RegionId};
use crate::digest::{DigestSeed, block_digest};
use crate::memory::{HostMemory, MemoryError};
use crate::session::{BlockRead, BlockWrite, Descriptor, Expected, Prepared, Session, Target};

/// One turn of a probe within a round.
const TURN: Duration = Duration::from_millis(10);
/// A transfer that takes longer than this is stuck.
const DEADLINE: Duration = Duration::from_secs(10);

/// Memory of this side, the same for all backends.
#[derive(Clone)]
pub(super) struct Memory {
    /// Read into.
    into: HostMemory,
    /// Holds the same bytes as the peer's region.
    twin: HostMemory,
}

impl Memory {
    pub(super) fn new(bytes: usize) -> Result<Self, MemoryError> {
        let (into, twin) =
            (HostMemory::allocate(bytes, "bench destination")?, HostMemory::allocate(bytes, "bench twin")?);
        into.prefault()?;
        fill(&twin);
        Ok(Self { into, twin })
    }
}

/// Sessions with the peer over one backend.
pub(super) struct Bench(Arc<Inner>);

struct Inner {
    backend: BackendKind,
    agents: Vec<Agent>,
    off: Session,
    digest: Session,
    memory: Memory,
    region: RegionId,
    scratch: RegionId,
    raw: Mutex<Raw>,
    bare: Bare,
}

/// The library by itself, of backends that are made of one, or why it is not measured.
type Bare = Option<Result<Mutex<bare::Reader>, String>>;

/// One kind of row: every turn of it does the same.
#[derive(Clone)]
struct Work {
    op: Op,
    integrity: Integrity,
    bytes: u64,
    /// Checked once, posted many times.
    prepared: Prepared,
}

/// Times of one probe.
#[derive(Default)]
struct Times {
    each: Vec<Duration>,
    /// Of both processes, for everything moved, also what is not counted in `each`.
    cpu: Duration,
    moved: u64,
}

impl Bench {
    pub(super) async fn start(
        peer: &mut Peer,
        backend: BackendKind,
        memory: &Memory,
        options: &BenchOptions,
    ) -> Result<Self, BenchError> {
        let off = connect(peer, backend, Integrity::Off, options).await?;
        let digest = connect(peer, backend, Integrity::Digest, options).await?;
        let raw = Raw::new(backend, &peer.ready, &memory.twin).map_err(BenchError::io("the raw probe"))?;
        let bare = match options.ops.contains(&Op::Read) {
            true => open_bare(peer, backend, memory).await?,
            false => None,
        };
        Ok(Self(Arc::new(Inner {
            backend,
            agents: vec![off.0, digest.0],
            off: off.1,
            digest: digest.1,
            memory: memory.clone(),
            region: RegionId(peer.ready.region),
            scratch: RegionId(peer.ready.scratch),
            raw: Mutex::new(raw),
            bare,
        })))
    }

    /// Why the library is not measured by itself, where it was to be.
    pub(super) fn no_bare_probe(&self) -> Option<&str> {
        self.0.bare.as_ref()?.as_ref().err().map(String::as_str)
    }

    /// Adds the rows of all shapes to `rows`, until one fails.
    pub(super) async fn measure_all(
        &self,
        peer: &mut Peer,
        options: &BenchOptions,
        op: Op,
        rows: &mut Vec<Row>,
    ) -> Result<(), BenchError> {
        for shape in options.shapes.iter().copied() {
            rows.extend(self.measure(peer, shape, op, options.time_per_shape).await?);
        }
        Ok(())
    }

    /// The rows of one shape, measured in turns for about `time`.
    async fn measure(
        &self,
        peer: &mut Peer,
        shape: Shape,
        op: Op,
        time: Duration,
    ) -> Result<[Row; 2], BenchError> {
        let work = |integrity, session| {
            let prepared = self.prepare(shape, op, session)?;
            Ok::<_, BenchError>(Work { op, integrity, bytes: shape.bytes() as u64, prepared })
        };
        let plain = work(Integrity::Off, &self.0.off)?;
        let verified = work(Integrity::Digest, &self.0.digest)?;
        self.raw_turn(peer, shape, op, &mut Times::default()).await?;
        self.bare_turn(peer, shape, op, &mut Times::default()).await?;
        self.turn(peer, &plain, &mut Times::default()).await?;
        self.turn(peer, &verified, &mut Times::default()).await?;
        let (mut limits, mut off, mut digest) = (Limits::default(), Times::default(), Times::default());
        let start = Instant::now();
        // Who comes after a turn that strains the core less may run at a higher clock for a while: that is the limit's and
        // the transfer's in turns.
        loop {
            self.raw_turn(peer, shape, op, &mut limits.raw).await?;
            self.bare_turn(peer, shape, op, &mut limits.bare).await?;
            self.turn(peer, &plain, &mut off).await?;
            self.turn(peer, &verified, &mut digest).await?;

            self.turn(peer, &plain, &mut off).await?;
            self.bare_turn(peer, shape, op, &mut limits.bare).await?;
            self.raw_turn(peer, shape, op, &mut limits.raw).await?;
            self.turn(peer, &verified, &mut digest).await?;
            if start.elapsed() >= time {
                break;
            }
        }
        Ok([
            self.row(shape, &plain, &mut off, &mut limits),
            self.row(shape, &verified, &mut digest, &mut limits),
        ])
    }

    fn row(&self, shape: Shape, work: &Work, times: &mut Times, limits: &mut Limits) -> Row {
        let Limits { raw, bare } = limits;
        let (p50_us, raw_p50_us) = (times.percentile_us(0.5), raw.percentile_us(0.5));
        let probe = self.bare().filter(|_| !bare.each.is_empty());
        Row {
            backend: self.0.backend.as_str().to_owned(),
            op: work.op.as_str().to_owned(),
            integrity: integrity_name(work.integrity).to_owned(),
            block_bytes: shape.block_bytes,
            blocks: shape.blocks,
            p50_us,
            p99_us: times.percentile_us(0.99),
            gb_per_s: shape.bytes() as f64 / p50_us / 1e3,
            cpu_s: times.cpu.as_secs_f64(),
            cpu_s_per_gb: times.cpu_s_per_gb(),
            raw_probe: self.0.raw.lock().unwrap_or_else(PoisonError::into_inner).name().to_owned(),
            raw_p50_us,
            raw_cpu_s_per_gb: raw.cpu_s_per_gb(),
            ratio: p50_us / raw_p50_us,
            bare_probe: probe.map(|bare| name(bare).to_owned()),
            bare_p50_us: probe.map(|_| bare.percentile_us(0.5)),
            bare_p99_us: probe.map(|_| bare.percentile_us(0.99)),
            bare_cpu_s_per_gb: probe.map(|_| bare.cpu_s_per_gb()),
        }
    }

    pub(super) async fn close(self) {
        for agent in self.0.agents.clone() {
            agent.close().await;
        }
    }

    fn prepare(&self, shape: Shape, op: Op, session: &Session) -> Result<Prepared, BenchError> {
        let Memory { into, twin } = &self.0.memory;
        let prepared = match op {
            Op::Read => session.prepare_read(HANDOFF, self.blocks(shape), Target::Memory(into.clone()))?,
            Op::Write => {
                let block = |index| {
                    let from = shape.offset(index);
                    let to =
                        Descriptor { region: self.0.scratch, offset: from as u64, len: shape.block_bytes };
                    BlockWrite { from, to }
                };
                session.prepare_write(HANDOFF, (0..shape.blocks).map(block).collect(), twin.clone())?
            }
        };
        Ok(prepared)
    }

    fn blocks(&self, shape: Shape) -> Vec<BlockRead> {
        let mut bytes = vec![0; shape.block_bytes as usize];
        let block = |index| {
            let offset = shape.offset(index);
            self.0.memory.twin.read(offset, &mut bytes);
            let seed = DigestSeed { handoff: HANDOFF, epoch: PEER_EPOCH, index };
            let source = Descriptor { region: self.0.region, offset: offset as u64, len: shape.block_bytes };
            let expected = Expected { seed, digest: block_digest(seed, &bytes) };
            BlockRead { source, to: offset, expected: Some(expected) }
        };
        (0..shape.blocks).map(block).collect()
    }

    /// One turn of the raw probe, on a thread that may block.
    async fn raw_turn(
        &self,
        peer: &mut Peer,
        shape: Shape,
        op: Op,
        times: &mut Times,
    ) -> Result<(), BenchError> {
        let before = own_cpu() + peer.cpu().await?;
        let inner = Arc::clone(&self.0);
        let turn = tokio::task::spawn_blocking(move || {
            let mut raw = inner.raw.lock().unwrap_or_else(PoisonError::into_inner);
            let own = match op {
                Op::Write if raw.sends() => &inner.memory.twin,
                Op::Read | Op::Write => &inner.memory.into,
            };
            let start = Instant::now();
            // The first of a turn finds everything cold: it is not counted.
            raw.once(op, own, shape)?;
            let mut each = Vec::new();
            while start.elapsed() < TURN || each.is_empty() {
                each.push(raw.once(op, own, shape)?);
            }
            Ok(each)
        });
        let each = turn.await.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        let each = each.map_err(BenchError::io("the raw probe"))?;
        times.add(each, shape.bytes() as u64, (own_cpu() + peer.cpu().await?).saturating_sub(before));
        Ok(())
    }

    /// The library by itself, where it is measured.
    fn bare(&self) -> Option<&Mutex<bare::Reader>> {
        self.0.bare.as_ref()?.as_ref().ok()
    }

    /// One turn of the library by itself, which only reads; nothing where there is none.
    async fn bare_turn(
        &self,
        peer: &mut Peer,
        shape: Shape,
        op: Op,
        times: &mut Times,
    ) -> Result<(), BenchError> {
        if self.bare().is_none() || op != Op::Read {
            return Ok(());
        }
        peer.look(Some(self.0.backend)).await?;
        let before = own_cpu() + peer.cpu().await?;
        let bench = Self(Arc::clone(&self.0));
        let turn = tokio::task::spawn_blocking(move || {
            let blocks = bare::blocks(shape);
            let reader = bench.bare().ok_or(std::io::ErrorKind::NotFound)?;
            let mut reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
            let start = Instant::now();
            reader.read(&blocks)?;
            let mut each = Vec::new();
            while start.elapsed() < TURN || each.is_empty() {
                let start = Instant::now();
                reader.read(&blocks)?;
                each.push(start.elapsed());
            }
            Ok(each)
        });
        let each = turn.await.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        let cpu = (own_cpu() + peer.cpu().await?).saturating_sub(before);
        // Also where it failed: what is measured next shares the machine with it.
        peer.look(None).await?;
        times.add(each.map_err(BenchError::io("the probe of a library"))?, shape.bytes() as u64, cpu);
        Ok(())
    }

    /// One turn of transfers, on a task as in a worker.
    async fn turn(&self, peer: &mut Peer, work: &Work, times: &mut Times) -> Result<(), BenchError> {
        let before = own_cpu() + peer.cpu().await?;
        let prepared = work.prepared.clone();
        let turn = TaskTracker::new().spawn(async move {
            let start = Instant::now();
            prepared.run(start + DEADLINE).await?;
            let mut each = Vec::new();
            while start.elapsed() < TURN || each.is_empty() {
                let start = Instant::now();
                prepared.run(start + DEADLINE).await?;
                each.push(start.elapsed());
            }
            Ok::<_, BenchError>(each)
        });
        let each = turn.await;
        let each = each.map_err(|error| BenchError::io("a bench task")(std::io::Error::other(error)))??;
        times.add(each, work.bytes, (own_cpu() + peer.cpu().await?).saturating_sub(before));
        Ok(())
    }
}

/// What stands beside the rows of a shape.
#[derive(Default)]
struct Limits {
    raw: Times,
    bare: Times,
}

fn name(bare: &Mutex<bare::Reader>) -> &'static str {
    bare.lock().unwrap_or_else(PoisonError::into_inner).name()
}

/// The library of a backend by itself, tried out, or why it does not work.
async fn open_bare(peer: &mut Peer, backend: BackendKind, memory: &Memory) -> Result<Bare, BenchError> {
    peer.look(Some(backend)).await?;
    let (shown, Memory { into, twin }) = (peer.ready.bare.clone(), memory.clone());
    let opened = tokio::task::spawn_blocking(move || {
        let opened = bare::Reader::open(backend, &shown, &into)?;
        Some(opened.and_then(|mut reader| {
            reader.try_out(&into, &twin).map_err(|error| error.to_string())?;
            Ok(Mutex::new(reader))
        }))
    });
    let opened = opened.await.unwrap_or_else(|error| Some(Err(error.to_string())));
    peer.look(None).await?;
    Ok(opened)
}

async fn connect(
    peer: &Peer,
    backend: BackendKind,
    integrity: Integrity,
    bench: &BenchOptions,
) -> Result<(Agent, Session), BenchError> {
    let name = |text: &str| text.parse().map_err(|_| BenchError::Peer(text.to_owned()));
    let mut options = agent_options(name("bench")?, vec![backend], bench.plugin.as_ref());
    options.integrity = integrity;
    options.streams = bench.streams;
    let agent = Agent::start(options).await?;
    let session = agent.connect(&name(PEER_NAME)?, PEER_EPOCH, &peer.ready.metadata).await?;
    Ok((agent, session))
}

impl Times {
    /// Takes a turn of `each` and one more that was not counted.
    fn add(&mut self, each: Vec<Duration>, bytes: u64, cpu: Duration) {
        self.moved += (each.len() as u64 + 1) * bytes;
        self.each.extend(each);
        self.cpu += cpu;
    }

    fn cpu_s_per_gb(&self) -> f64 {
        self.cpu.as_secs_f64() / (self.moved as f64 / 1e9)
    }

    fn percentile_us(&mut self, part: f64) -> f64 {
        self.each.sort_unstable();
        let at = (self.each.len() as f64 * part) as usize;
        let time = self.each.get(at.min(self.each.len().saturating_sub(1))).copied().unwrap_or_default();
        time.as_secs_f64() * 1e6
    }
}
