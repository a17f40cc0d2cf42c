//! A TCP proxy between a reader and an owner that holds back, flips and cuts what they send.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

/// What happens to bytes on their way from the owner to the reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// They pass.
    Relay,
    /// After so many bytes of a connection they are held back until the mode changes.
    Hold(usize),
    /// One bit of the byte at this place of a connection is flipped; later connections are spared.
    FlipOnce(usize),
    /// The connection is cut after so many bytes.
    Cut(usize),
    /// As `FlipOnce`, of what the reader sends.
    FlipUpstreamOnce(usize),
    /// As `Hold`, of what the reader sends.
    HoldUpstream(usize),
}

pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    mode: watch::Sender<Mode>,
    target: watch::Sender<Option<SocketAddr>>,
    /// Connections that reader and proxy have open.
    open: watch::Receiver<usize>,
    flips: Arc<AtomicUsize>,
}

impl Proxy {
    /// Listens; what it leads to is said later, because the owner must know the proxy's address first.
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (mode, modes) = watch::channel(Mode::Relay);
        let (target, targets) = watch::channel(None);
        let (opened, open) = watch::channel(0);
        let opened = Arc::new(opened);
        let flips = Arc::new(AtomicUsize::new(0));
        let tasks = TaskTracker::new();
        let counted = Arc::clone(&flips);
        tasks.clone().spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Some(target) = *targets.borrow() else { continue };
                let far = TcpStream::connect(target).await.unwrap();
                opened.send_modify(|open| *open += 1);
                let (modes, opened, flips) = (modes.clone(), Arc::clone(&opened), Arc::clone(&counted));
                tasks.spawn(async move {
                    relay(near, far, modes, &flips).await;
                    opened.send_modify(|open| *open -= 1);
                });
            }
        });
        Self { address, mode, target, open, flips }
    }

    pub(crate) fn lead_to(&self, target: SocketAddr) {
        self.target.send_replace(Some(target));
    }

    pub(crate) fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    pub(crate) fn flips(&self) -> usize {
        self.flips.load(Ordering::SeqCst)
    }

    /// Waits until as many connections are open as said.
    pub(crate) async fn until_open(&self, wanted: impl FnMut(&usize) -> bool) {
        self.open.clone().wait_for(wanted).await.unwrap();
    }
}

async fn relay(near: TcpStream, far: TcpStream, modes: watch::Receiver<Mode>, flips: &AtomicUsize) {
    let (near_read, near_write) = near.into_split();
    let (far_read, far_write) = far.into_split();
    // Either end closing closes both.
    tokio::select! {
        () = one_way(near_read, far_write, modes.clone(), flips, true) => {}
        () = one_way(far_read, near_write, modes, flips, false) => {}
    }
}

/// What a mode means for one direction.
fn turned(mode: Mode, upstream: bool) -> Mode {
    match (mode, upstream) {
        (Mode::FlipUpstreamOnce(at), true) => Mode::FlipOnce(at),
        (Mode::HoldUpstream(after), true) => Mode::Hold(after),
        (Mode::FlipUpstreamOnce(_) | Mode::HoldUpstream(_), false) | (_, true) => Mode::Relay,
        (mode, false) => mode,
    }
}

async fn one_way(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut modes: watch::Receiver<Mode>,
    flips: &AtomicUsize,
    upstream: bool,
) {
    let mut buffer = vec![0; 64 << 10];
    let mut passed = 0;
    loop {
        let count = from.read(&mut buffer).await.unwrap_or(0);
        if count == 0 {
            return;
        }
        let bytes = &mut buffer[..count];
        let mode = turned(*modes.borrow_and_update(), upstream);
        let mut first = count;
        match mode {
            Mode::FlipOnce(at) => {
                if (passed..passed + count).contains(&at)
                    && flips.compare_exchange(0, 1, Ordering::SeqCst, Ordering::SeqCst).is_ok()
                {
                    bytes[at - passed] ^= 0x10;
                }
            }
            Mode::Hold(after) | Mode::Cut(after) => first = count.min(after.saturating_sub(passed)),
            Mode::Relay | Mode::FlipUpstreamOnce(_) | Mode::HoldUpstream(_) => {}
        }
        if to.write_all(&bytes[..first]).await.is_err() {
            return;
        }
        if first < count {
            if matches!(mode, Mode::Cut(_)) {
                return;
            }
            let holds = |mode: &Mode| matches!(turned(*mode, upstream), Mode::Hold(_));
            if modes.wait_for(|mode| !holds(mode)).await.is_err()
                || to.write_all(&bytes[first..]).await.is_err()
            {
                return;
            }
        }
        passed += count;
    }
}
