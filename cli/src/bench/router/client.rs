//! A client that costs little itself: HTTP/1.1 on one kept connection, answers looked at as bytes.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

/// No answer may be silent for longer.
const SILENCE_MAX: Duration = Duration::from_secs(60);
const READ_BYTES: usize = 64 << 10;
const HEAD_MAX_BYTES: usize = 64 << 10;
/// The end of an answer, in which the usage stands.
const TAIL_BYTES: usize = 2 << 10;

/// Why there is no good answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("the connection failed")]
    Io(#[from] std::io::Error),
    #[error("the connection ended in the middle of an answer")]
    Cut,
    #[error("no byte came for {SILENCE_MAX:?}")]
    Silent,
    #[error("not an answer of HTTP/1.1: {0}")]
    Http(&'static str),
    #[error("status {status}: {body}")]
    Status { status: u16, body: String },
    #[error("the answer does not end as it should: {0}")]
    Unfinished(String),
}

/// A good answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    /// From the first byte sent to the first token; to the end, where nothing is streamed.
    pub(super) first: Duration,
    /// To the end.
    pub(super) whole: Duration,
    /// Tokens, by the usage that the answer ends with.
    pub(super) tokens: u64,
}

/// A connection, made when it is first needed, and again when it was closed.
#[derive(Debug)]
pub(super) struct Connection {
    target: SocketAddr,
    stream: Option<TcpStream>,
    buffer: Vec<u8>,
}

/// How the length of a body is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Length {
    Bytes(usize),
    Chunked,
    Close,
}

struct Head {
    status: u16,
    length: Length,
    keep: bool,
    /// Where the body begins.
    end: usize,
}

impl Connection {
    pub(super) fn new(target: SocketAddr) -> Self {
        Self { target, stream: None, buffer: Vec::with_capacity(READ_BYTES) }
    }

    pub(super) fn target(&self) -> SocketAddr {
        self.target
    }

    /// Connects, if it is not connected.
    pub(super) async fn open(&mut self) -> Result<(), Broken> {
        if self.stream.is_none() {
            let stream = TcpStream::connect(self.target).await?;
            stream.set_nodelay(true)?;
            self.stream = Some(stream);
        }
        Ok(())
    }

    /// Sends a request and reads its answer to the end.
    pub(super) async fn exchange(&mut self, request: &[u8], streamed: bool) -> Result<Seen, Broken> {
        self.open().await?;
        let Some(mut stream) = self.stream.take() else { return Err(Broken::Cut) };
        let start = Instant::now();
        let (seen, keep) = answer(&mut stream, &mut self.buffer, request, streamed, start).await?;
        if keep {
            self.stream = Some(stream);
        }
        Ok(seen)
    }
}

async fn answer(
    stream: &mut TcpStream,
    buffer: &mut Vec<u8>,
    request: &[u8],
    streamed: bool,
    start: Instant,
) -> Result<(Seen, bool), Broken> {
    stream.write_all(request).await?;
    buffer.clear();
    let head = loop {
        if !read(stream, buffer).await? {
            return Err(Broken::Cut);
        }
        if let Some(head) = parse_head(buffer)? {
            break head;
        }
    };
    let mut body = Body::new(head.length);
    let mut watch = Watch::default();
    let mut at = head.end;
    loop {
        body.take(&buffer[at..], &mut watch)?;
        if watch.first.is_none() && watch.token {
            watch.first = Some(start.elapsed());
        }
        if body.ended() {
            break;
        }
        buffer.clear();
        at = 0;
        if !read(stream, buffer).await? {
            if head.length == Length::Close {
                break;
            }
            return Err(Broken::Cut);
        }
    }
    let whole = start.elapsed();
    let tail = || String::from_utf8_lossy(&watch.tail).into_owned();
    if head.status != 200 {
        return Err(Broken::Status { status: head.status, body: tail() });
    }
    if streamed && find(&watch.tail, b"[DONE]").is_none() {
        return Err(Broken::Unfinished(tail()));
    }
    let Some(tokens) = completion_tokens(&watch.tail) else { return Err(Broken::Unfinished(tail())) };
    let first = if streamed { watch.first.unwrap_or(whole) } else { whole };
    Ok((Seen { first, whole, tokens }, head.keep))
}

/// Appends what comes; `false` at the end.
async fn read(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Result<bool, Broken> {
    buffer.reserve(READ_BYTES / 4);
    let read = timeout(SILENCE_MAX, stream.read_buf(buffer)).await.map_err(|_| Broken::Silent)??;
    Ok(read > 0)
}

fn parse_head(buffer: &[u8]) -> Result<Option<Head>, Broken> {
    let Some(end) = find(buffer, b"\r\n\r\n") else {
        return if buffer.len() > HEAD_MAX_BYTES {
            Err(Broken::Http("no end of its head"))
        } else {
            Ok(None)
        };
    };
    let text = std::str::from_utf8(&buffer[..end]).map_err(|_| Broken::Http("a head that is no text"))?;
    // The line end after the last chunk of the answer before may have come late.
    let mut lines = text.trim_start().split("\r\n");
    let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok());
    let mut head = Head {
        status: status.ok_or(Broken::Http("no status"))?,
        length: Length::Close,
        keep: true,
        end: end + 4,
    };
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            let length = value.parse().map_err(|_| Broken::Http("a length that is no number"))?;
            head.length = Length::Bytes(length);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            head.length = Length::Chunked;
        } else if name.eq_ignore_ascii_case("connection") && value.eq_ignore_ascii_case("close") {
            head.keep = false;
        }
    }
    head.keep &= head.length != Length::Close;
    Ok(Some(head))
}

/// A body whose bytes come in pieces.
struct Body {
    length: Length,
    /// Bytes left of the body, or of the chunk at hand.
    left: usize,
    /// The line of a chunk's length, as far as it has come.
    line: Vec<u8>,
    in_chunk: bool,
    done: bool,
}

impl Body {
    fn new(length: Length) -> Self {
        let left = if let Length::Bytes(left) = length { left } else { 0 };
        let done = length == Length::Bytes(0);
        Self { length, left, line: Vec::new(), in_chunk: false, done }
    }

    fn ended(&self) -> bool {
        self.done
    }

    fn take(&mut self, mut piece: &[u8], watch: &mut Watch) -> Result<(), Broken> {
        match self.length {
            Length::Close => watch.see(piece),
            Length::Bytes(_) => {
                let count = piece.len().min(self.left);
                watch.see(&piece[..count]);
                self.left -= count;
                self.done = self.left == 0;
            }
            Length::Chunked => {
                while !piece.is_empty() && !self.done {
                    piece = if self.in_chunk { self.chunk(piece, watch) } else { self.length_line(piece)? };
                }
            }
        }
        Ok(())
    }

    /// Takes what belongs to the chunk at hand and the line end after it.
    fn chunk<'a>(&mut self, piece: &'a [u8], watch: &mut Watch) -> &'a [u8] {
        const LINE_END: usize = 2;
        let count = piece.len().min(self.left);
        let content = count.min(self.left.saturating_sub(LINE_END));
        watch.see(&piece[..content]);
        self.left -= count;
        self.in_chunk = self.left > 0;
        &piece[count..]
    }

    fn length_line<'a>(&mut self, piece: &'a [u8]) -> Result<&'a [u8], Broken> {
        let Some(end) = piece.iter().position(|byte| *byte == b'\n') else {
            self.line.extend_from_slice(piece);
            return Ok(&[]);
        };
        self.line.extend_from_slice(&piece[..end]);
        let text = std::str::from_utf8(&self.line).unwrap_or_default();
        let digits = text.split(';').next().unwrap_or_default().trim();
        let length = usize::from_str_radix(digits, 16).map_err(|_| Broken::Http("a chunk without length"));
        self.line.clear();
        // The last chunk is empty; trailers, which nobody here sends, are not read.
        match length? {
            0 => self.done = true,
            length => (self.left, self.in_chunk) = (length + 2, true),
        }
        // The line end after the last chunk belongs to this answer.
        Ok(&piece[end + 1..])
    }
}

/// Looks at the bytes of a body as they come.
#[derive(Default)]
struct Watch {
    token: bool,
    first: Option<Duration>,
    tail: Vec<u8>,
}

impl Watch {
    fn see(&mut self, piece: &[u8]) {
        if self.tail.len() + piece.len() > 2 * TAIL_BYTES {
            let kept = self.tail.len().min(TAIL_BYTES);
            self.tail.drain(..self.tail.len() - kept);
        }
        self.tail.extend_from_slice(&piece[piece.len().saturating_sub(2 * TAIL_BYTES)..]);
        if !self.token {
            self.token = says_something(&self.tail);
        }
    }
}

/// Whether a content that is not empty is among these bytes.
fn says_something(bytes: &[u8]) -> bool {
    const CONTENT: &[u8] = b"\"content\":";
    let mut rest = bytes;
    while let Some(at) = find(rest, CONTENT) {
        rest = &rest[at + CONTENT.len()..];
        let value = rest.trim_ascii_start();
        if value.len() >= 2 && value[0] == b'"' && value[1] != b'"' {
            return true;
        }
    }
    false
}

/// The number after the last `"completion_tokens":`.
fn completion_tokens(tail: &[u8]) -> Option<u64> {
    const NAME: &[u8] = b"\"completion_tokens\":";
    let mut last = None;
    let mut rest = tail;
    while let Some(at) = find(rest, NAME) {
        rest = &rest[at + NAME.len()..];
        let number = rest.trim_ascii_start();
        let digits = number.iter().take_while(|byte| byte.is_ascii_digit()).count();
        last = std::str::from_utf8(&number[..digits]).ok().and_then(|text| text.parse().ok()).or(last);
    }
    last
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

#[cfg(test)]
mod tests;
