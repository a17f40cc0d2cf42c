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
    /// So many connections, the first ones, are held altogether; later ones pass.
    HoldFirst(usize),
}

pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    mode: watch::Sender<Mode>,
    target: watch::Sender<Option<SocketAddr>>,
    /// Connections that reader and proxy have open.
    open: watch::Receiver<usize>,
    flips: Arc<AtomicUsize>,
    accepted: Arc<AtomicUsize>,
    /// Connections of lower numbers are ended.
    ended: watch::Sender<usize>,
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
        let accepted = Arc::new(AtomicUsize::new(0));
        let (ended, ends) = watch::channel(0);
        let (counted, numbers) = (Arc::clone(&flips), Arc::clone(&accepted));
        tasks.clone().spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Some(target) = *targets.borrow() else { continue };
                let far = TcpStream::connect(target).await.unwrap();
                let number = numbers.fetch_add(1, Ordering::SeqCst);
                opened.send_modify(|open| *open += 1);
                let (modes, opened, flips) = (modes.clone(), Arc::clone(&opened), Arc::clone(&counted));
                let mut ends = ends.clone();
                tasks.spawn(async move {
                    tokio::select! {
                        () = relay(near, far, modes, &flips, number) => {}
                        _ = ends.wait_for(|end| number < *end) => {}
                    }
                    opened.send_modify(|open| *open -= 1);
                });
            }
        });
        Self { address, mode, target, open, flips, accepted, ended }
    }

    pub(crate) fn lead_to(&self, target: SocketAddr) {
        self.target.send_replace(Some(target));
    }

    pub(crate) fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    /// Holds what is open now; what comes later passes.
    pub(crate) fn hold_open(&self) {
        self.set(Mode::HoldFirst(self.accepted.load(Ordering::SeqCst)));
    }

    /// Ends what is open now.
    pub(crate) async fn end_open(&self) {
        self.ended.send_replace(self.accepted.load(Ordering::SeqCst));
        self.until_open(|open| *open == 0).await;
    }

    pub(crate) fn flips(&self) -> usize {
        self.flips.load(Ordering::SeqCst)
    }

    /// Waits until as many connections are open as said.
    pub(crate) async fn until_open(&self, wanted: impl FnMut(&usize) -> bool) {
        self.open.clone().wait_for(wanted).await.unwrap();
    }
}

async fn relay(
    near: TcpStream,
    far: TcpStream,
    modes: watch::Receiver<Mode>,
    flips: &AtomicUsize,
    number: usize,
) {
    let (near_read, near_write) = near.into_split();
    let (far_read, far_write) = far.into_split();
    let way = |upstream| Way { modes: modes.clone(), flips, upstream, number };
    // Either end closing closes both.
    tokio::select! {
        () = way(true).relay(near_read, far_write) => {}
        () = way(false).relay(far_read, near_write) => {}
    }
}

/// One direction of a connection.
struct Way<'a> {
    modes: watch::Receiver<Mode>,
    flips: &'a AtomicUsize,
    upstream: bool,
    number: usize,
}

impl Way<'_> {
    /// What a mode means here.
    fn here(&self, mode: Mode) -> Mode {
        match (mode, self.upstream) {
            (Mode::HoldFirst(count), _) if self.number < count => Mode::Hold(0),
            (Mode::HoldFirst(_), _) => Mode::Relay,
            (Mode::FlipUpstreamOnce(at), true) => Mode::FlipOnce(at),
            (Mode::HoldUpstream(after), true) => Mode::Hold(after),
            (Mode::FlipUpstreamOnce(_) | Mode::HoldUpstream(_), false) | (_, true) => Mode::Relay,
            (mode, false) => mode,
        }
    }

    async fn relay(mut self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
        let mut buffer = vec![0; 64 << 10];
        let mut passed = 0;
        loop {
            let count = from.read(&mut buffer).await.unwrap_or(0);
            if count == 0 {
                return;
            }
            let bytes = &mut buffer[..count];
            let mode = *self.modes.borrow_and_update();
            let mode = self.here(mode);
            let mut first = count;
            match mode {
                Mode::FlipOnce(at)
                    if (passed..passed + count).contains(&at)
                        && self.flips.compare_exchange(0, 1, Ordering::SeqCst, Ordering::SeqCst).is_ok() =>
                {
                    bytes[at - passed] ^= 0x10;
                }
                Mode::Hold(after) | Mode::Cut(after) => first = count.min(after.saturating_sub(passed)),
                _ => {}
            }
            if to.write_all(&bytes[..first]).await.is_err() {
                return;
            }
            if first < count {
                if matches!(mode, Mode::Cut(_)) {
                    return;
                }
                let mut modes = self.modes.clone();
                let released =
                    modes.wait_for(|mode| !matches!(self.here(*mode), Mode::Hold(_))).await.is_ok();
                if !released || to.write_all(&bytes[first..]).await.is_err() {
                    return;
                }
            }
            passed += count;
        }
    }
}
