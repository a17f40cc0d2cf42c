//! How two agents meet over TCP: who, in which lives, and, where they share a token, with proof of it on both sides.
//!
//! ```text
//! Hello(names, epochs, process)           ─►  ◄─ Welcome                             no token
//! Hello(names, epochs, process, nonce)    ─►  ◄─ Challenge(nonce)
//! Proof(client)                           ─►  ◄─ Welcome(proof of the server)        from here on every frame is signed
//! ```
//!
//! A side that holds a token takes nothing less: there is nothing to be talked down to. Before its proof a peer
//! learns nothing of this agent, and changes nothing in it.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::frames::{FrameReader, FrameWriter};
use super::{CONNECT_TIMEOUT, Fault, Pair, tcp};
use crate::agent::server::{Denial, Life, Server};
use crate::auth::{Token, Transcript, nonce};
use crate::error::{LinkError, Refusal};
use crate::stats::Counters;
use crate::wire::{self, Header, Hello, Kind, NONCE_BYTES, PROOF_BYTES, WireError};

/// How a peer is reached, and what belongs to connections with it.
#[derive(Clone)]
pub(crate) struct Route {
    pub(crate) address: SocketAddr,
    pub(crate) auth: Option<Token>,
    pub(crate) counters: Arc<Counters>,
    /// Runs what listens on connections.
    pub(crate) tasks: TaskTracker,
    /// Closes them.
    pub(crate) ended: CancellationToken,
}

/// A connection past its handshake, as its client sees it.
pub(crate) struct Opened {
    pub(crate) socket: TcpStream,
    pub(crate) reader: FrameReader,
    pub(crate) writer: FrameWriter,
}

/// Connects to a peer and shakes hands.
pub(crate) async fn open(pair: &Pair, route: &Route) -> Result<Opened, Fault> {
    let connect = async {
        let socket = TcpStream::connect(route.address).await.map_err(LinkError::io("connecting"))?;
        tcp::tune(&socket);
        let mut opened = Opened { socket, reader: FrameReader::new(), writer: FrameWriter::default() };
        opened.greet(pair, route.auth.as_ref()).await?;
        Ok(opened)
    };
    let timed_out = || LinkError::io("connecting")(std::io::ErrorKind::TimedOut.into());
    let outcome = timeout(CONNECT_TIMEOUT, connect).await.unwrap_or_else(|_| Err(timed_out().into()));
    if let Err(Fault::Refused(Refusal::Unauthenticated)) = outcome {
        route.counters.auth_refused();
    }
    outcome
}

impl Opened {
    async fn greet(&mut self, pair: &Pair, token: Option<&Token>) -> Result<(), Fault> {
        let nonce = token.map(|_| nonce()).transpose().map_err(LinkError::io("asking for random bytes"))?;
        let hello = pair.hello(nonce);
        self.send(Kind::Hello, pair, &hello.encode()).await?;
        let (header, payload) = self.answer().await?;
        let Some(token) = token else {
            return match header.kind {
                Kind::Welcome if header.epoch == pair.epoch && payload.is_empty() => Ok(()),
                _ => Err(Fault::protocol(WireError::Kind)),
            };
        };
        let challenge: &[u8; NONCE_BYTES] = match header.kind {
            Kind::Challenge => payload.as_ref().try_into().map_err(|_| Fault::protocol(WireError::Short))?,
            // It has no token: nothing it says can be believed.
            Kind::Welcome => return Err(Fault::Refused(Refusal::Unauthenticated)),
            _ => return Err(Fault::protocol(WireError::Kind)),
        };
        let transcript = Transcript::new(token, pair.epoch, &hello, challenge);
        self.send(Kind::Proof, pair, &transcript.client_proof()).await?;
        let (header, proof) = self.answer().await?;
        if header.kind != Kind::Welcome || header.epoch != pair.epoch {
            return Err(Fault::protocol(WireError::Kind));
        }
        if !transcript.is_server_proof(&proof) {
            return Err(Fault::Refused(Refusal::Unauthenticated));
        }
        self.reader.expect_signed(transcript.to_client());
        self.writer.sign(transcript.to_server());
        Ok(())
    }

    async fn send(&mut self, kind: Kind, pair: &Pair, payload: &[u8]) -> Result<(), Fault> {
        let frame = self.writer.frame(kind, pair.epoch, 0, payload);
        Ok(self.socket.write_all(&frame).await.map_err(LinkError::io("shaking hands"))?)
    }

    async fn answer(&mut self) -> Result<(Header, Bytes), Fault> {
        let answer = self.reader.next(&mut self.socket).await.map_err(|error| match error {
            LinkError::Protocol(error) => Fault::protocol(error),
            other => Fault::Link(other),
        })?;
        let (header, payload) = answer.ok_or(LinkError::Closed)?;
        match header.kind {
            Kind::Refused => Err(Fault::refused(&header)),
            _ => Ok((header, payload)),
        }
    }
}

/// Who was let in.
pub(crate) struct Admitted {
    pub(crate) hello: Hello,
    pub(crate) life: Life,
    pub(crate) writer: FrameWriter,
}

/// The serving side of the handshake; `None` when the connection was refused, which the peer has been told.
pub(crate) async fn admit(
    server: &Server,
    stream: &mut TcpStream,
    frames: &mut FrameReader,
) -> Result<Option<Admitted>, LinkError> {
    let Some((header, payload)) = frames.next(stream).await? else { return Ok(None) };
    if header.kind != Kind::Hello {
        return Err(LinkError::Protocol(WireError::Kind));
    }
    let hello = Hello::decode(&payload).map_err(LinkError::Protocol)?;
    let challenge = nonce().map_err(LinkError::io("asking for random bytes"))?;
    let transcript = match (&server.auth, hello.nonce) {
        (None, None) => None,
        (Some(token), Some(_)) => Some(Transcript::new(token, header.epoch, &hello, &challenge)),
        _ => return refuse(server, stream, Denial::Refused(Refusal::Unauthenticated)).await,
    };
    let mut proof: &[u8] = &[];
    let ours: [u8; PROOF_BYTES];
    if let Some(transcript) = &transcript {
        send(stream, Kind::Challenge, &header, &challenge).await?;
        let Some((answer, theirs)) = frames.next(stream).await? else { return Ok(None) };
        if answer.kind != Kind::Proof {
            return Err(LinkError::Protocol(WireError::Kind));
        }
        if !transcript.is_client_proof(&theirs) {
            return refuse(server, stream, Denial::Refused(Refusal::Unauthenticated)).await;
        }
        ours = transcript.server_proof();
        proof = &ours;
    }
    let life = match server.admit(header.epoch, &hello) {
        Ok(life) => life,
        Err(denial) => return refuse(server, stream, denial).await,
    };
    send(stream, Kind::Welcome, &header, proof).await?;
    let mut writer = FrameWriter::default();
    if let Some(transcript) = &transcript {
        frames.expect_signed(transcript.to_server());
        writer.sign(transcript.to_client());
    }
    Ok(Some(Admitted { hello, life, writer }))
}

async fn send(stream: &mut TcpStream, kind: Kind, asked: &Header, payload: &[u8]) -> Result<(), LinkError> {
    let frame = wire::encode_frame(kind, asked.epoch, 0, payload);
    stream.write_all(&frame).await.map_err(LinkError::io("shaking hands"))
}

async fn refuse(
    server: &Server,
    stream: &mut TcpStream,
    denial: Denial,
) -> Result<Option<Admitted>, LinkError> {
    server.counters.denied(denial);
    // Who has not proved anything is not told the epoch.
    let current = server.epoch().filter(|_| denial == Denial::Stale);
    let bytes = denial.header(current, 0).encode(&[]);
    stream.write_all(&bytes).await.map_err(LinkError::io("sending a refusal"))?;
    Ok(None)
}
