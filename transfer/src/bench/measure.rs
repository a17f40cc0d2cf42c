//! Rounds of raw probes and reads, and what comes out of them.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::peer::{Peer, own_cpu};
use super::raw::{self, RawTcp};
use super::{BenchError, HANDOFF, PEER_EPOCH, PEER_NAME, Row, Shape, fill, integrity_name};
use crate::agent::{Agent, AgentOptions, BackendKind, Integrity, RegionId};
use crate::digest::{DigestSeed, block_digest};
use crate::memory::HostMemory;
use crate::session::{BlockRead, Descriptor, Destination, Expected, Session};

/// One turn of a probe within a round.
const TURN: Duration = Duration::from_millis(10);
/// A read that takes longer than this is stuck.
const READ_DEADLINE: Duration = Duration::from_secs(10);

/// Sessions with the peer over one backend, and memory to read into.
pub(super) struct Bench(Arc<Inner>);

struct Inner {
    backend: BackendKind,
    agents: Vec<Agent>,
    off: Session,
    digest: Session,
    into: HostMemory,
    /// Holds the same bytes as the peer's region.
    twin: HostMemory,
    region: RegionId,
    raw: std::net::SocketAddr,
}

/// Times of one probe.
#[derive(Default)]
struct Times {
    each: Vec<Duration>,
    cpu: Duration,
}

impl Bench {
    pub(super) async fn start(
        peer: &Peer,
        backend: BackendKind,
        spread: usize,
        streams: usize,
    ) -> Result<Self, BenchError> {
        let off = connect(peer, backend, Integrity::Off, streams).await?;
        let digest = connect(peer, backend, Integrity::Digest, streams).await?;
        let into = HostMemory::allocate(spread, "bench destination")?;
        into.prefault()?;
        let twin = HostMemory::allocate(spread, "bench twin")?;
        fill(&twin);
        Ok(Self(Arc::new(Inner {
            backend,
            agents: vec![off.0, digest.0],
            off: off.1,
            digest: digest.1,
            into,
            twin,
            region: RegionId(peer.ready.region),
            raw: peer.ready.raw,
        })))
    }

    /// The rows of one shape, measured in turns for about `time`.
    pub(super) async fn measure(
        &self,
        peer: &mut Peer,
        shape: Shape,
        time: Duration,
    ) -> Result<[Row; 2], BenchError> {
        let blocks: Arc<[BlockRead]> = self.blocks(shape).into();
        let rounds = (time.as_secs_f64() / (3.0 * TURN.as_secs_f64())).ceil() as usize;
        let (mut raw, mut off, mut digest) = (Times::default(), Times::default(), Times::default());
        self.raw_turn(shape, &mut Times::default()).await?;
        self.read_turn(peer, Integrity::Off, &blocks, &mut Times::default()).await?;
        self.read_turn(peer, Integrity::Digest, &blocks, &mut Times::default()).await?;
        for _ in 0..rounds {
            self.raw_turn(shape, &mut raw).await?;
            self.read_turn(peer, Integrity::Off, &blocks, &mut off).await?;
            self.read_turn(peer, Integrity::Digest, &blocks, &mut digest).await?;
        }
        let raw_p50_us = raw.percentile_us(0.5);
        let row = |integrity, times: &mut Times| {
            let p50_us = times.percentile_us(0.5);
            Row {
                backend: self.0.backend.as_str().to_owned(),
                op: "read".to_owned(),
                integrity: integrity_name(integrity).to_owned(),
                block_bytes: shape.block_bytes,
                blocks: shape.blocks,
                p50_us,
                p99_us: times.percentile_us(0.99),
                gb_per_s: shape.bytes() as f64 / p50_us / 1e3,
                cpu_s: times.cpu.as_secs_f64(),
                raw_probe: raw_name(self.0.backend).to_owned(),
                raw_p50_us,
                ratio: p50_us / raw_p50_us,
            }
        };
        Ok([row(Integrity::Off, &mut off), row(Integrity::Digest, &mut digest)])
    }

    pub(super) async fn close(self) {
        for agent in self.0.agents.clone() {
            agent.close().await;
        }
    }

    fn blocks(&self, shape: Shape) -> Vec<BlockRead> {
        let mut bytes = vec![0; shape.block_bytes as usize];
        let block = |index| {
            let offset = shape.offset(index);
            self.0.twin.read(offset, &mut bytes);
            let seed = DigestSeed { handoff: HANDOFF, epoch: PEER_EPOCH, index };
            let source = Descriptor { region: self.0.region, offset: offset as u64, len: shape.block_bytes };
            let expected = Expected { seed, digest: block_digest(seed, &bytes) };
            BlockRead { source, to: offset, expected: Some(expected) }
        };
        (0..shape.blocks).map(block).collect()
    }

    /// One turn of the raw probe, on a thread that may block.
    async fn raw_turn(&self, shape: Shape, times: &mut Times) -> Result<(), BenchError> {
        let inner = Arc::clone(&self.0);
        let turn = tokio::task::spawn_blocking(move || {
            let mut tcp = match inner.backend {
                BackendKind::Shm => None,
                _ => Some(RawTcp::connect(inner.raw)?),
            };
            let mut each = Vec::new();
            let start = Instant::now();
            // A connection of its own starts cold: the first probe of a turn is not counted.
            let mut warm = false;
            while start.elapsed() < TURN || each.is_empty() {
                let took = match &mut tcp {
                    Some(tcp) => tcp.read(&inner.into, shape)?,
                    None => raw::copy(&inner.twin, &inner.into, shape),
                };
                if std::mem::replace(&mut warm, true) {
                    each.push(took);
                }
            }
            Ok(each)
        });
        let each = turn.await.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        times.each.extend(each.map_err(BenchError::io("the raw probe"))?);
        Ok(())
    }

    /// One turn of reads, on a task as in a worker.
    async fn read_turn(
        &self,
        peer: &mut Peer,
        integrity: Integrity,
        blocks: &Arc<[BlockRead]>,
        times: &mut Times,
    ) -> Result<(), BenchError> {
        let before = own_cpu() + peer.cpu().await?;
        let (inner, blocks) = (Arc::clone(&self.0), Arc::clone(blocks));
        let turn = TaskTracker::new().spawn(async move {
            let session = match integrity {
                Integrity::Off => &inner.off,
                Integrity::Digest => &inner.digest,
            };
            let mut each = Vec::new();
            let turn = Instant::now();
            let mut warm = false;
            while turn.elapsed() < TURN || each.is_empty() {
                let start = Instant::now();
                let into = Destination::Memory(&inner.into);
                session.read(HANDOFF, &blocks, into, start + READ_DEADLINE).await?;
                if std::mem::replace(&mut warm, true) {
                    each.push(start.elapsed());
                }
            }
            Ok::<_, BenchError>(each)
        });
        let each = turn.await;
        let each = each.map_err(|error| BenchError::io("a bench task")(std::io::Error::other(error)))?;
        times.each.extend(each?);
        times.cpu += (own_cpu() + peer.cpu().await?).saturating_sub(before);
        Ok(())
    }
}

async fn connect(
    peer: &Peer,
    backend: BackendKind,
    integrity: Integrity,
    streams: usize,
) -> Result<(Agent, Session), BenchError> {
    let name = |text: &str| text.parse().map_err(|_| BenchError::Peer(text.to_owned()));
    let mut options = AgentOptions::new(name("bench")?);
    options.backends = vec![backend];
    options.integrity = integrity;
    options.streams = streams;
    let agent = Agent::start(options).await?;
    let session = agent.connect(&name(PEER_NAME)?, PEER_EPOCH, &peer.ready.metadata).await?;
    Ok((agent, session))
}

fn raw_name(backend: BackendKind) -> &'static str {
    match backend {
        BackendKind::Shm => "memcpy",
        _ => "writev/readv over tcp",
    }
}

impl Times {
    fn percentile_us(&mut self, part: f64) -> f64 {
        self.each.sort_unstable();
        let at = (self.each.len() as f64 * part) as usize;
        let time = self.each.get(at.min(self.each.len().saturating_sub(1))).copied().unwrap_or_default();
        time.as_secs_f64() * 1e6
    }
}
