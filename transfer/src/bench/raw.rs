//! The raw limits: `memcpy` of scattered blocks, `process_vm_readv` of them by as few calls as the system takes them
//! in, and blocking `writev` and `readv` of them over one TCP connection.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::peer::Ready;
use super::{Op, Shape};
use crate::agent::BackendKind;
use crate::backend::tcp::tune_local;
use crate::memory::{
    HostMemory, MAX_RANGES, Process, RemoteRange, Span, copy_from_process, read_scattered, write_gathered,
};

/// The limit beside a backend.
pub(super) enum Raw {
    Copy { twin: HostMemory },
    Process { process: Process, address: usize },
    Tcp { stream: TcpStream },
}

impl Raw {
    /// The limit of `backend`; `twin` holds what the peer's region holds.
    pub(super) fn new(backend: BackendKind, peer: &Ready, twin: &HostMemory) -> io::Result<Self> {
        match backend {
            BackendKind::Shm => Ok(Self::Copy { twin: twin.clone() }),
            BackendKind::Cma => {
                let pid = rustix::process::Pid::from_raw(peer.pid).ok_or(io::ErrorKind::NotFound)?;
                Ok(Self::Process { process: Process::of(pid), address: peer.address })
            }
            BackendKind::Libfabric | BackendKind::Ucx | BackendKind::Plugin | BackendKind::Tcp => {
                let stream = TcpStream::connect(peer.raw)?;
                tune(&stream)?;
                Ok(Self::Tcp { stream })
            }
        }
    }

    /// What it is, as rows name it.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Copy { .. } => "memcpy",
            Self::Process { .. } => "process_vm_readv",
            Self::Tcp { .. } => "writev/readv over tcp",
        }
    }

    /// Whether a write takes from our memory: the others always copy into it, and not onto itself.
    pub(super) fn sends(&self) -> bool {
        matches!(self, Self::Tcp { .. })
    }

    /// Moves the blocks of `shape` once, from the peer or what stands for it to `own`, or over `Tcp` from `own` to the
    /// peer; how long it took.
    ///
    /// Which of two memories of one host is written makes no difference to a copy: the others always read.
    pub(super) fn once(&mut self, op: Op, own: &HostMemory, shape: Shape) -> io::Result<Duration> {
        let start = Instant::now();
        match self {
            Self::Copy { twin } => {
                for index in 0..shape.blocks {
                    let offset = shape.offset(index);
                    twin.copy_to(offset, own, offset, shape.block_bytes as usize);
                }
            }
            Self::Process { process, address } => copy_by_address(process, *address, own, shape)?,
            Self::Tcp { stream } => ask(stream, op, own, shape)?,
        }
        Ok(start.elapsed())
    }
}

fn copy_by_address(process: &Process, address: usize, own: &HostMemory, shape: Shape) -> io::Result<()> {
    let mut from = Vec::with_capacity(MAX_RANGES.min(shape.blocks as usize));
    for first in (0..shape.blocks).step_by(MAX_RANGES) {
        let blocks = first..shape.blocks.min(first + MAX_RANGES as u32);
        let len = shape.block_bytes as usize;
        from.clear();
        from.extend(blocks.clone().map(|index| RemoteRange { address: address + shape.offset(index), len }));
        let to = blocks.map(|index| Span { memory: own, offset: shape.offset(index), len });
        copy_from_process(process, &mut from, &mut [], to)?;
    }
    Ok(())
}

/// Bytes of a request: the direction, blocks, bytes of a block.
const REQUEST_BYTES: usize = 12;

fn ask(stream: &mut TcpStream, op: Op, own: &HostMemory, shape: Shape) -> io::Result<()> {
    let mut request = [0; REQUEST_BYTES];
    request[..4].copy_from_slice(&u32::from(op == Op::Write).to_le_bytes());
    request[4..8].copy_from_slice(&shape.blocks.to_le_bytes());
    request[8..].copy_from_slice(&shape.block_bytes.to_le_bytes());
    match op {
        Op::Read => {
            stream.write_all(&request)?;
            move_all(own, shape, |spans| read_scattered(stream.as_fd(), &mut [], spans))
        }
        Op::Write => {
            stream.write_all(&request)?;
            move_all(own, shape, |spans| write_gathered(stream.as_fd(), &[], spans))?;
            stream.read_exact(&mut [0])
        }
    }
}

/// Serves raw reads of `memory` and writes to `scratch` from a thread of its own, for as long as the process lives.
pub(super) fn serve(memory: HostMemory, scratch: HostMemory) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (memory, scratch) = (memory.clone(), scratch.clone());
            std::thread::spawn(move || answer(stream, &memory, &scratch));
        }
    });
    Ok(address)
}

/// Answers requests until the other side closes.
fn answer(mut stream: TcpStream, memory: &HostMemory, scratch: &HostMemory) -> io::Result<()> {
    tune(&stream)?;
    let mut request = [0; REQUEST_BYTES];
    loop {
        stream.read_exact(&mut request)?;
        let ([op, blocks, block_bytes], []) = request.as_chunks::<4>() else { return Ok(()) };
        let shape =
            Shape { blocks: u32::from_le_bytes(*blocks), block_bytes: u32::from_le_bytes(*block_bytes) };
        if *op == [0; 4] {
            move_all(memory, shape, |spans| write_gathered(stream.as_fd(), &[], spans))?;
        } else {
            move_all(scratch, shape, |spans| read_scattered(stream.as_fd(), &mut [], spans))?;
            stream.write_all(&[1])?;
        }
    }
}

fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    tune_local(stream, stream.local_addr(), stream.peer_addr());
    Ok(())
}

/// Moves all blocks of `shape` by as few calls as the system takes them in.
fn move_all<'a>(
    memory: &'a HostMemory,
    shape: Shape,
    mut move_some: impl FnMut(std::iter::Take<Spans<'a>>) -> io::Result<usize>,
) -> io::Result<()> {
    let mut moved = 0;
    while moved < shape.bytes() {
        match move_some(Spans { memory, shape, moved }.take(MAX_RANGES))? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            bytes => moved += bytes,
        }
    }
    Ok(())
}

/// What is left to move, block by block.
struct Spans<'a> {
    memory: &'a HostMemory,
    shape: Shape,
    moved: usize,
}

impl<'a> Iterator for Spans<'a> {
    type Item = Span<'a>;

    fn next(&mut self) -> Option<Span<'a>> {
        let block_bytes = self.shape.block_bytes as usize;
        let (index, within) = (self.moved / block_bytes, self.moved % block_bytes);
        let len = block_bytes - within;
        self.moved += len;
        let offset = self.shape.offset(index as u32) + within;
        (index < self.shape.blocks as usize).then_some(Span { memory: self.memory, offset, len })
    }
}
