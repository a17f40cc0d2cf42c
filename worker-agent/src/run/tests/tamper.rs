//! A TCP path that damages every frame of blocks.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use baton_transfer::wire::{HEADER_BYTES, Header, Kind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// A proxy before a transfer agent; headers stay whole, so that only digests can tell.
pub(super) struct Tamper {
    /// Where it listens.
    pub(super) address: SocketAddr,
    agent: Arc<OnceLock<SocketAddr>>,
    damaged: Arc<AtomicU64>,
    _tasks: JoinSet<()>,
}

impl Tamper {
    pub(super) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (agent, damaged) = (Arc::new(OnceLock::<SocketAddr>::new()), Arc::new(AtomicU64::new(0)));
        let (to, count) = (Arc::clone(&agent), Arc::clone(&damaged));
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let (to, count) = (*to.get().expect("nobody connects before"), Arc::clone(&count));
                connections.spawn(async move {
                    // Either end may close at any time.
                    let _ = relay(client, to, &count).await;
                });
            }
        });
        Self { address, agent, damaged, _tasks: tasks }
    }

    /// Says where the agent is, before anybody connects.
    pub(super) fn lead_to(&self, agent: SocketAddr) {
        self.agent.set(agent).unwrap();
    }

    /// Frames damaged so far.
    pub(super) fn damaged(&self) -> u64 {
        self.damaged.load(Ordering::Relaxed)
    }
}

async fn relay(client: TcpStream, agent: SocketAddr, damaged: &AtomicU64) -> std::io::Result<()> {
    let server = TcpStream::connect(agent).await?;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let answers = async {
        loop {
            let mut head = [0; HEADER_BYTES];
            from_server.read_exact(&mut head).await?;
            let header = Header::decode(&head).map_err(std::io::Error::other)?;
            let mut payload = vec![0; header.len as usize];
            from_server.read_exact(&mut payload).await?;
            if header.kind == Kind::Data && !payload.is_empty() {
                payload[0] ^= 0x40;
                damaged.fetch_add(1, Ordering::Relaxed);
            }
            to_client.write_all(&head).await?;
            to_client.write_all(&payload).await?;
        }
    };
    tokio::select! {
        copied = tokio::io::copy(&mut from_client, &mut to_server) => copied.map(drop),
        ended = answers => ended,
    }
}
