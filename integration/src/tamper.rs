//! Damage on the way: a writer into another process' memory, and a TCP proxy that damages blocks.

use std::fs::OpenOptions;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use baton_transfer::wire::{HEADER_BYTES, Header, Kind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// How bytes are damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// One bit flipped.
    Flip,
    /// Two runs exchanged.
    Swap,
    /// A run zeroed.
    Zero,
}

/// The writable mappings of one name in another process.
///
/// It writes through `/proc/PID/mem`: shared memory is sealed against any other writer.
pub struct MemoryTamper {
    memory: std::fs::File,
    ranges: Vec<Range<u64>>,
}

impl MemoryTamper {
    /// Opens the mappings of `pid` whose name contains `mapping`.
    ///
    /// # Panics
    /// When there is no such mapping or the memory cannot be opened.
    pub fn open(pid: u32, mapping: &str) -> Self {
        let ranges = writable_mappings(pid, mapping);
        assert!(!ranges.is_empty(), "process {pid} maps no {mapping}");
        let path = format!("/proc/{pid}/mem");
        let memory = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .expect("the memory of the other process opens");
        Self { memory, ranges }
    }

    /// A copy of the bytes.
    ///
    /// # Panics
    /// When they cannot be read.
    pub fn snapshot(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for range in &self.ranges {
            let mut bytes = vec![0; usize::try_from(range.end - range.start).expect("an address range")];
            self.memory
                .read_exact_at(&mut bytes, range.start)
                .expect("the memory of the other process is read");
            all.append(&mut bytes);
        }
        all
    }

    /// Damages every run of `run_bytes` that is not all zero and says how many there were.
    pub fn damage(&self, damage: Damage, run_bytes: usize) -> u64 {
        self.ranges.iter().map(|range| damage_once(&self.memory, range, damage, run_bytes)).sum()
    }
}

/// Address ranges of the writable mappings of `pid` whose line in `/proc/PID/maps` contains `name`.
fn writable_mappings(pid: u32, name: &str) -> Vec<Range<u64>> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let range = |line: &str| {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
    };
    maps.lines().filter(|line| line.contains(name) && line.contains(" rw")).filter_map(range).collect()
}

/// One pass: every run that is not all zero is damaged, so that unused memory costs nothing.
fn damage_once(memory: &std::fs::File, range: &Range<u64>, damage: Damage, run_bytes: usize) -> u64 {
    let (mut run, mut other) = (vec![0u8; run_bytes], vec![0u8; run_bytes]);
    let runs = (range.end - range.start) / run_bytes as u64;
    let address = |index: u64| range.start + index * run_bytes as u64;
    let mut damaged = 0;
    for index in 0..runs {
        let at = address(index);
        if memory.read_exact_at(&mut run, at).is_err() || run.iter().all(|byte| *byte == 0) {
            continue;
        }
        let wrote = match damage {
            Damage::Flip => {
                let position = run.iter().position(|byte| *byte != 0).unwrap_or(0);
                memory.write_all_at(&[run[position] ^ 0x40], at + position as u64)
            }
            Damage::Zero => memory.write_all_at(&vec![0; run_bytes], at),
            Damage::Swap => {
                let partner = index + 1;
                if index % 2 == 1
                    || partner >= runs
                    || memory.read_exact_at(&mut other, address(partner)).is_err()
                    || other == run
                {
                    continue;
                }
                memory.write_all_at(&other, at).and_then(|()| memory.write_all_at(&run, address(partner)))
            }
        };
        damaged += u64::from(wrote.is_ok());
    }
    damaged
}

/// What a [`WireTamper`] does to the blocks of a `Data` frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WireDamage {
    /// One bit of one block flipped.
    Flip,
    /// Two blocks exchanged.
    Swap,
    /// One block zeroed.
    Zero,
    /// One block sent in place of another, too.
    Duplicate,
    /// The frame held back for [`HELD_BACK`].
    Delay,
}

/// How long [`WireDamage::Delay`] holds a frame back.
pub const HELD_BACK: Duration = Duration::from_millis(400);

/// A proxy before a transfer agent that understands its frames and damages blocks, leaving headers whole.
pub struct WireTamper {
    /// Where it listens.
    pub address: SocketAddr,
    damaged: Arc<AtomicU64>,
    tasks: tokio::task::JoinSet<()>,
}

impl WireTamper {
    /// Binds the proxy; `upstream` need not be there yet.
    ///
    /// # Panics
    /// When no port can be bound.
    pub async fn start(upstream: SocketAddr, damage: WireDamage, block_bytes: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let damaged = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&damaged);
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let count = Arc::clone(&count);
                connections.spawn(async move {
                    if let Ok(server) = TcpStream::connect(upstream).await {
                        let _ = relay(client, server, damage, block_bytes, &count).await;
                    }
                });
            }
        });
        Self { address, damaged, tasks }
    }

    /// Frames damaged so far.
    pub fn damaged(&self) -> u64 {
        self.damaged.load(Ordering::Relaxed)
    }

    /// Closes the proxy and its connections.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

async fn relay(
    client: TcpStream,
    server: TcpStream,
    damage: WireDamage,
    block_bytes: usize,
    damaged: &AtomicU64,
) -> std::io::Result<()> {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let requests = async move {
        tokio::io::copy(&mut from_client, &mut to_server).await?;
        to_server.shutdown().await
    };
    let answers = async move {
        loop {
            let mut head = [0; HEADER_BYTES];
            from_server.read_exact(&mut head).await?;
            let header = Header::decode(&head).map_err(std::io::Error::other)?;
            let mut payload = vec![0; header.len as usize];
            from_server.read_exact(&mut payload).await?;
            if header.kind == Kind::Data && !payload.is_empty() {
                if damage == WireDamage::Delay {
                    tokio::time::sleep(HELD_BACK).await;
                }
                let changed = damage == WireDamage::Delay || damage_blocks(&mut payload, damage, block_bytes);
                damaged.fetch_add(u64::from(changed), Ordering::Relaxed);
            }
            to_client.write_all(&head).await?;
            to_client.write_all(&payload).await?;
        }
    };
    tokio::select! {
        ended = requests => ended,
        ended = answers => ended,
    }
}

/// Whether any byte changed.
fn damage_blocks(payload: &mut [u8], damage: WireDamage, block_bytes: usize) -> bool {
    let before = payload.to_vec();
    let block = block_bytes.min(payload.len());
    match damage {
        WireDamage::Delay => {}
        WireDamage::Flip => payload[block / 2] ^= 0x40,
        WireDamage::Zero => payload[..block].fill(0),
        WireDamage::Swap | WireDamage::Duplicate if payload.len() >= 2 * block => {
            payload[..block].copy_from_slice(&before[block..2 * block]);
            if damage == WireDamage::Swap {
                payload[block..2 * block].copy_from_slice(&before[..block]);
            }
        }
        // A lone block: its halves (K and V of different layers) take the part of two blocks.
        WireDamage::Swap | WireDamage::Duplicate => {
            let half = payload.len() / 2;
            payload[..half].copy_from_slice(&before[half..2 * half]);
            if damage == WireDamage::Swap {
                payload[half..2 * half].copy_from_slice(&before[..half]);
            }
        }
    }
    payload != before
}
