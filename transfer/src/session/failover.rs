//! A read over the best path of a pair and, when that breaks or stands still, the rest of it over the next one.

use std::task::Poll;
use std::time::Duration;

use futures_util::poll;
use tokio::time::{Instant, sleep_until};

use super::timers::Timer;
use super::{BlockRead, BlockSink, Destination, Inner};
use crate::agent::BackendKind;
use crate::agent::paths::Tried;
use crate::backend::{Fault, Progress, ReadJob};
use crate::error::{LinkError, Refusal};

/// Why a read ended early.
pub(super) enum Stop {
    Fault(Fault),
    Deadline,
}

/// What became of a read over one path.
enum Attempt {
    /// It is done, but for these blocks, which failed their digest.
    Done(Vec<usize>),
    /// The path does not do; another may.
    Left(Fault),
}

/// A path may stand still for one part in so many of the time that is left.
const STALL_SHARE: u32 = 3;
/// How often a path is looked at in the time it may stand still.
const LOOKS: u32 = 2;

/// Reads; positions of the blocks that failed their digest. All others are in place.
pub(super) async fn read(inner: &Inner, job: &ReadJob<'_>, deadline: Instant) -> Result<Vec<usize>, Stop> {
    if job.blocks.is_empty() {
        return Ok(Vec::new());
    }
    let mut tried = Tried::default();
    // The usual way: no list is copied, and nothing to be mapped back.
    let mut left = match attempt(inner, job, &mut tried, None, deadline).await? {
        Attempt::Done(corrupt) => return Ok(corrupt),
        Attempt::Left(fault) => fault,
    };
    loop {
        let rest = Rest::of(job);
        if rest.blocks.is_empty() {
            return Ok(Vec::new());
        }
        let sink = rest.sink(job.into);
        let into = sink.as_ref().map_or(job.into, |sink| Destination::Sink(sink));
        let progress = Progress::new(rest.blocks.len());
        let again = ReadJob { blocks: &rest.blocks, into, progress: &progress, ..*job };
        let outcome = attempt(inner, &again, &mut tried, Some(left), deadline).await;
        rest.account(job.progress, &progress);
        match outcome? {
            Attempt::Done(corrupt) => {
                return Ok(corrupt.into_iter().map(|index| rest.places[index]).collect());
            }
            Attempt::Left(fault) => left = fault,
        }
    }
}

/// Reads over the next path. `left` is why the one before was left, and the end of the read if there is no other.
async fn attempt(
    inner: &Inner,
    job: &ReadJob<'_>,
    tried: &mut Tried,
    left: Option<Fault>,
    deadline: Instant,
) -> Result<Attempt, Stop> {
    let (paths, avoid) = (&inner.paths, inner.avoid);
    let next = match paths.ready(avoid, *tried) {
        Some(path) => Some(path),
        // Boxed, as it opens connections: most reads need none, and would move its kilobytes all the same.
        None => tokio::select! {
            biased;
            next = Box::pin(paths.next(avoid, *tried)) => next.map_err(Stop::Fault)?,
            () = sleep_until(deadline) => return Err(Stop::Deadline),
        },
    };
    let Some(path) = next else {
        return Err(Stop::Fault(left.unwrap_or(Fault::Link(LinkError::Closed))));
    };
    tried.add(&path);
    if let Some(Fault::Link(why)) = &left {
        inner.counters.path_failover();
        tracing::info!(peer = %paths.pair.to, over = %path.backend, %why, "a read goes on over another path");
    }
    let mut over = path.link.read(job);
    let outcome = match poll!(over.as_mut()) {
        Poll::Ready(outcome) => Ok(outcome),
        Poll::Pending => {
            let stall = paths.has_other(avoid, *tried).then_some(inner.stall);
            let mut timer = inner.timers.take();
            tokio::select! {
                biased;
                outcome = over => Ok(outcome),
                stopped = watch(job.progress, &mut timer, deadline, stall, || paths.is_open(&path)) => Err(stopped),
            }
        }
    };
    // The read has ended or was dropped: either way it is fenced.
    inner.counters.read(path.backend, job.progress.moved());
    let fault = match outcome {
        Ok(Ok(corrupt)) => return Ok(Attempt::Done(corrupt)),
        Ok(Err(fault)) => fault,
        Err(Stopped::Deadline) => return Err(Stop::Deadline),
        Err(Stopped::Stalled(stood)) => LinkError::Stalled(stood).into(),
    };
    if let Fault::Link(LinkError::Protocol(error)) = &fault {
        inner.counters.broken(*error);
    }
    if let Fault::Link(error) = &fault
        && !matches!(error, LinkError::Device(_))
    {
        paths.broke(&path, error);
    }
    match is_of_path(&fault, path.backend) && paths.has_other(avoid, *tried) {
        true => Ok(Attempt::Left(fault)),
        false => Err(Stop::Fault(fault)),
    }
}

/// Whether what ended a read is a matter of the path, so that another may do.
fn is_of_path(fault: &Fault, backend: BackendKind) -> bool {
    match fault {
        Fault::Link(_) => true,
        // Mapped memory cannot show every region and every grant; what is asked over the network can.
        Fault::Refused(Refusal::NotGranted | Refusal::OutsideRegion | Refusal::Unavailable) => {
            matches!(backend, BackendKind::Shm | BackendKind::Cma)
        }
        Fault::Refused(Refusal::Mismatch) => true,
        Fault::Refused(_) | Fault::Stale(_) => false,
    }
}

enum Stopped {
    Deadline,
    Stalled(Duration),
}

/// Waits until the deadline, or until a read has stood still for `stall`, or waits for its turn on a path that is not open
/// any more: another has found out.
async fn watch(
    progress: &Progress,
    timer: &mut Timer<'_>,
    deadline: Instant,
    stall: Option<Duration>,
    is_open: impl Fn() -> bool,
) -> Stopped {
    let Some(stall) = stall else {
        timer.until(deadline).await;
        return Stopped::Deadline;
    };
    let mut seen = progress.moved();
    let begun = Instant::now();
    let mut since = begun;
    let patience = stall.min(deadline.saturating_duration_since(begun) / STALL_SHARE);
    loop {
        let look = Instant::now() + patience / LOOKS;
        timer.until(look.min(deadline)).await;
        let now = Instant::now();
        if now >= deadline {
            return Stopped::Deadline;
        }
        let moved = progress.moved();
        if progress.is_queued() && !is_open() {
            return Stopped::Stalled(now - begun);
        } else if moved != seen || progress.is_queued() {
            (seen, since) = (moved, now);
        } else if now - since >= patience {
            return Stopped::Stalled(now - since);
        }
    }
}

/// The blocks of a read that are not in place.
struct Rest {
    blocks: Vec<BlockRead>,
    /// Their positions in the read.
    places: Vec<usize>,
}

impl Rest {
    fn of(job: &ReadJob<'_>) -> Self {
        let places: Vec<usize> = (0..job.blocks.len()).filter(|at| !job.progress.is_finished(*at)).collect();
        Self { blocks: places.iter().map(|at| job.blocks[*at]).collect(), places }
    }

    /// A sink that passes blocks on under their positions in the read.
    fn sink<'a>(&'a self, into: Destination<'a>) -> Option<impl BlockSink + 'a> {
        match into {
            Destination::Sink(sink) => {
                Some(move |index: usize, bytes: &[u8]| sink.block(self.places[index], bytes))
            }
            Destination::Memory(_) | Destination::Device(_) => None,
        }
    }

    /// Adds what an attempt at the rest has done to the progress of the read.
    fn account(&self, whole: &Progress, rest: &Progress) {
        if rest.moved() > 0 {
            whole.add(rest.moved() as usize);
        }
        for (index, place) in self.places.iter().enumerate() {
            if rest.is_finished(index) {
                whole.finish(*place);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use baton_config::{Epoch, HandoffId};
    use tokio::time::timeout;

    use super::*;
    use crate::agent::{Agent, AgentOptions, RegionId};
    use crate::memory::HostMemory;
    use crate::session::Descriptor;
    use crate::session::timers::Timers;

    /// A block noted under another's place would never be read, and nobody would know.
    #[test]
    fn what_a_further_path_has_done_is_noted_under_the_places_in_the_read() {
        let block = |offset| {
            let source = Descriptor { region: RegionId(1), offset, len: 16 };
            BlockRead { source, to: 0, expected: None }
        };
        let blocks: Vec<BlockRead> = (0..5).map(block).collect();
        let progress = Progress::new(blocks.len());
        [0, 3].into_iter().for_each(|done| progress.finish(done));
        progress.add(32);
        let sink = |_: usize, _: &[u8]| {};
        let into = Destination::Sink(&sink);
        let job = ReadJob { handoff: HandoffId(1), blocks: &blocks, into, verify: true, progress: &progress };
        let rest = Rest::of(&job);
        assert_eq!(rest.places, [1, 2, 4]);
        assert_eq!(rest.blocks, [blocks[1], blocks[2], blocks[4]]);
        let again = Progress::new(rest.blocks.len());
        again.finish(1);
        again.add(16);
        rest.account(&progress, &again);
        assert_eq!((Rest::of(&job).places, progress.moved()), (vec![1, 4], 48));
    }

    /// A copy of mapped memory would still succeed there, while all is said to go another way; and while it is copied
    /// without a word, the others are not forgotten.
    #[tokio::test]
    async fn a_path_that_broke_carries_nothing_until_it_is_opened_anew_and_then_it_is_soon() {
        const BOUND: Duration = Duration::from_secs(20);
        let start = async |name: &str| {
            let options = AgentOptions::new(name.parse().unwrap());
            let agent =
                Agent::start(AgentOptions { retry: Duration::from_secs(1), ..options }).await.unwrap();
            agent.set_epoch(Epoch(1));
            agent
        };
        let (owner, reader) = (start("owner").await, start("reader").await);
        let region = owner.register(HostMemory::allocate(4096, "blocks").unwrap()).unwrap();
        let source = Descriptor { region, offset: 0, len: 4096 };
        owner.grant(HandoffId(1), vec![source]);
        let session = reader.connect(&"owner".parse().unwrap(), Epoch(1), &owner.metadata()).await.unwrap();
        let copy = HostMemory::allocate(4096, "copy").unwrap();
        let read = async || {
            let (blocks, into) = ([BlockRead { source, to: 0, expected: None }], Destination::Memory(&copy));
            session.read(HandoffId(1), &blocks, into, Instant::now() + BOUND).await.unwrap();
            [BackendKind::Shm, BackendKind::Tcp].map(|backend| reader.stats().read_bytes(backend).0 / 4096)
        };
        let paths = &session.0.paths;
        let open = |avoid| paths.open_now(avoid, Tried::default());
        let is_open = async |backend: BackendKind, avoid| {
            while open(avoid).is_none_or(|path| path.backend != backend) {
                tokio::time::sleep(Duration::from_millis(50)).await;
                read().await;
            }
        };
        paths.next(Some(BackendKind::Shm), Tried::default()).await.unwrap();
        paths.broke(&open(Some(BackendKind::Shm)).unwrap(), &LinkError::Closed);
        assert_eq!((read().await, read().await), ([1, 0], [2, 0]));
        timeout(BOUND, is_open(BackendKind::Tcp, Some(BackendKind::Shm))).await.unwrap();
        let [over_shm, over_tcp] = read().await;
        let former = open(None).unwrap();
        paths.broke(&former, &LinkError::Closed);
        assert_eq!(read().await, [over_shm, over_tcp + 1]);
        timeout(BOUND, is_open(BackendKind::Shm, None)).await.unwrap();
        // Who finds out late means the former connection.
        paths.broke(&former, &LinkError::Closed);
        let [over_shm, _] = read().await;
        assert_eq!(read().await[0], over_shm + 1);
    }

    /// A survey that comes along while it is being opened leaves it alone.
    #[tokio::test]
    async fn a_path_whose_opening_was_given_up_is_tried_again() {
        let start = async |name: &str| {
            let options = AgentOptions::new(name.parse().unwrap());
            let agent =
                Agent::start(AgentOptions { retry: Duration::from_millis(300), ..options }).await.unwrap();
            agent.set_epoch(Epoch(1));
            agent
        };
        let (owner, reader) = (start("owner").await, start("reader").await);
        let session = reader.connect(&"owner".parse().unwrap(), Epoch(1), &owner.metadata()).await.unwrap();
        let paths = &session.0.paths;
        let is_open = async |backend: BackendKind, avoid| {
            let open = || paths.ready(avoid, Tried::default());
            while open().is_none_or(|path| path.backend != backend) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let bound = Duration::from_secs(20);
        timeout(bound, is_open(BackendKind::Tcp, Some(BackendKind::Shm))).await.unwrap();
        for backend in [BackendKind::Shm, BackendKind::Tcp] {
            let open = paths.open_now(None, Tried::default()).unwrap();
            assert_eq!(open.backend, backend);
            paths.broke(&open, &LinkError::Closed);
        }
        {
            let mut opening = pin!(paths.next(None, Tried::default()));
            assert!(poll!(opening.as_mut()).is_pending(), "the first of the list");
            timeout(bound, is_open(BackendKind::Tcp, None)).await.unwrap();
        }
        timeout(bound, is_open(BackendKind::Shm, None)).await.expect("it is never tried again");
    }

    /// How long a read over a path is watched that has another beside it, while `work` goes on with it.
    async fn watched(deadline_s: u64, work: impl AsyncFnOnce(&Progress)) -> (Stopped, Duration) {
        let (progress, timers, start) = (Progress::new(1), Timers::default(), Instant::now());
        let (stall, deadline) = (Duration::from_secs(2), start + Duration::from_secs(deadline_s));
        let is_open = || start.elapsed() < Duration::from_secs(20);
        let watch = async {
            let stopped = watch(&progress, &mut timers.take(), deadline, Some(stall), is_open).await;
            (stopped, start.elapsed())
        };
        futures_util::future::join(watch, work(&progress)).await.0
    }

    #[tokio::test(start_paused = true)]
    async fn a_read_stands_still_when_it_could_move_and_does_not() {
        let pause = || tokio::time::sleep(Duration::from_secs(1));
        let queued = watched(100, async |progress| {
            progress.set_queued(true);
            for _ in 0..10 {
                pause().await;
            }
            progress.set_queued(false);
        });
        let (stopped, after) = queued.await;
        assert!(matches!(stopped, Stopped::Stalled(_)) && (11..14).contains(&after.as_secs()), "{after:?}");
        for deadline in [10, 30] {
            let moving = watched(deadline, async |progress| {
                for _ in 0..40 {
                    pause().await;
                    progress.add(1);
                }
            });
            let (stopped, after) = moving.await;
            assert!(matches!(stopped, Stopped::Deadline) && after.as_secs() == deadline, "{after:?}");
        }
        let (stopped, after) = watched(100, async |progress| progress.set_queued(true)).await;
        assert!(matches!(stopped, Stopped::Stalled(_)) && (20..22).contains(&after.as_secs()), "{after:?}");
        let (stopped, after) = watched(3, async |_| ()).await;
        assert!(
            matches!(stopped, Stopped::Stalled(_)) && after.as_secs() < 2,
            "another needs time: {after:?}"
        );
    }

    #[test]
    fn what_another_path_may_answer_otherwise_is_of_the_path() {
        let closed = || Fault::Link(LinkError::Closed);
        for backend in BackendKind::ALL {
            let of_path = |refusal| is_of_path(&Fault::Refused(refusal), backend);
            let maps = matches!(backend, BackendKind::Shm | BackendKind::Cma);
            assert!(is_of_path(&closed(), backend) && of_path(Refusal::Mismatch));
            for refusal in [Refusal::NotGranted, Refusal::OutsideRegion, Refusal::Unavailable] {
                assert_eq!(of_path(refusal), maps, "{refusal} over {backend}");
            }
            assert!(!of_path(Refusal::OutsideGrant) && !is_of_path(&Fault::Stale(None), backend));
        }
    }
}
