//! The raw limits: `memcpy` of scattered blocks, and blocking `writev` and `readv` of them over one TCP connection.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::Shape;
use crate::backend::tcp::tune_local;
use crate::memory::{HostMemory, Span, read_scattered, write_gathered};

/// Most blocks of one system call (`IOV_MAX`).
const MAX_SPANS: usize = 1024;

/// Serves raw reads of `memory` from a thread of its own, for as long as the process lives.
pub(super) fn serve(memory: HostMemory) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let memory = memory.clone();
            std::thread::spawn(move || answer(stream, &memory));
        }
    });
    Ok(address)
}

/// Answers requests of 8 bytes, blocks and bytes of a block, until the other side closes.
fn answer(mut stream: TcpStream, memory: &HostMemory) -> io::Result<()> {
    stream.set_nodelay(true)?;
    tune_local(&stream, stream.local_addr(), stream.peer_addr());
    let mut request = [0; 8];
    loop {
        stream.read_exact(&mut request)?;
        let [a, b, c, d, e, f, g, h] = request;
        let shape =
            Shape { blocks: u32::from_le_bytes([a, b, c, d]), block_bytes: u32::from_le_bytes([e, f, g, h]) };
        move_all(memory, shape, |spans| write_gathered(stream.as_fd(), &[], spans))?;
    }
}

/// The reading side of the raw TCP probe.
pub(super) struct RawTcp(TcpStream);

impl RawTcp {
    pub(super) fn connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        tune_local(&stream, stream.local_addr(), stream.peer_addr());
        Ok(Self(stream))
    }

    /// Reads the blocks of `shape` once; how long it took.
    pub(super) fn read(&mut self, into: &HostMemory, shape: Shape) -> io::Result<Duration> {
        let start = Instant::now();
        let mut request = [0; 8];
        request[..4].copy_from_slice(&shape.blocks.to_le_bytes());
        request[4..].copy_from_slice(&shape.block_bytes.to_le_bytes());
        self.0.write_all(&request)?;
        move_all(into, shape, |spans| read_scattered(self.0.as_fd(), &mut [], spans))?;
        Ok(start.elapsed())
    }
}

/// Moves all blocks of `shape` by as few calls as the system takes them in.
fn move_all<'a>(
    memory: &'a HostMemory,
    shape: Shape,
    mut move_some: impl FnMut(std::iter::Take<Spans<'a>>) -> io::Result<usize>,
) -> io::Result<()> {
    let mut moved = 0;
    while moved < shape.bytes() {
        match move_some(Spans { memory, shape, moved }.take(MAX_SPANS))? {
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

/// Copies the blocks of `shape` once; how long it took.
pub(super) fn copy(from: &HostMemory, to: &HostMemory, shape: Shape) -> Duration {
    let start = Instant::now();
    for index in 0..shape.blocks {
        let offset = shape.offset(index);
        from.copy_to(offset, to, offset, shape.block_bytes as usize);
    }
    start.elapsed()
}
