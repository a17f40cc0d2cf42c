//! The paths from this worker to one life of a peer: which are open, which is the quickest, which are broken.
//!
//! ```text
//! unopened ──► opening ──► open ──► broken (not used for a while, as long as there is another) ──► opening ...
//! ```
//!
//! A path is opened when a session is asked for, when a read has no other, or by a survey in the background, which also
//! measures. Nothing here runs without a read: an idle pair costs nothing.

mod opener;
mod survey;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use baton_config::Epoch;
use tokio::sync::Notify;
use tokio::time::Instant;

pub(crate) use self::opener::Opener;

use super::probe::Measured;
use super::server::Denial;
use super::{BackendKind, ConnectError};
use crate::backend::control::{self, Control};
use crate::backend::handshake::Route;
use crate::backend::shm::link::ShmLink;
use crate::backend::{Fault, Link, Pair};
use crate::error::{LinkError, Refusal};
use crate::session::PathInfo;
use crate::wire::Metadata;

/// A later path of the list is preferred when its time for a typical read is at most this share of an earlier one's.
const CLEARLY_BETTER: f64 = 0.75;
/// How long a session waits, once there is a path, for paths listed before it to open.
const GRACE: Duration = Duration::from_millis(3);

/// The paths of one pair.
pub(crate) struct Paths {
    pub(crate) pair: Pair,
    pub(crate) route: Route,
    opener: Arc<Opener>,
    /// In the order listed.
    candidates: Box<[Candidate]>,
    ruled_out: Vec<(BackendKind, String)>,
    order: Order,
    /// When a broken path may be tried again, in nanoseconds since `started`; `u64::MAX`: none is broken.
    retry_at: AtomicU64,
    started: Instant,
    surveying: AtomicBool,
    /// Fires when a candidate changes.
    changed: Notify,
    /// For what is said beside blocks; opened when it is needed.
    control: tokio::sync::Mutex<Option<Control>>,
}

struct Candidate {
    backend: BackendKind,
    /// Held while the path is being opened.
    opening: tokio::sync::Mutex<()>,
    state: Mutex<State>,
    /// The first link to mapped memory, kept for as long as the paths: [`Paths::mapped`] lends it while it is open. Should
    /// it break and another be opened, that is found in `state` only.
    mapped: OnceLock<Arc<Link>>,
    mapped_is_open: AtomicBool,
}

#[derive(Default)]
struct State {
    stage: Stage,
    measured: Option<Measured>,
}

impl State {
    /// Whether this very connection is the open one.
    fn is_open_as(&self, path: &Path) -> bool {
        matches!(&self.stage, Stage::Open(link) if Arc::ptr_eq(link, &path.link))
    }
}

#[derive(Clone, Default)]
enum Stage {
    #[default]
    Unopened,
    Opening,
    Open(Arc<Link>),
    Broken {
        until: Instant,
        why: String,
        verdict: Option<Verdict>,
    },
}

/// What a peer said about sessions altogether, whatever the path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Stale(Option<Epoch>),
    Refused(Refusal),
}

/// Of the candidates in `order` the one that carries blocks, or else the one that would be opened for them.
fn chosen<'a>(order: &[usize], stage: impl Fn(usize) -> &'a Stage) -> Option<usize> {
    let rank = |index: &usize| match stage(*index) {
        Stage::Open(_) => 0,
        Stage::Unopened | Stage::Opening => 1,
        Stage::Broken { .. } => 2,
    };
    order.iter().copied().min_by_key(rank)
}

/// Positions of candidates, best first, four bits each: looked at with every read, so without a lock.
struct Order(AtomicU64);

impl Order {
    /// Most candidates.
    const MOST: usize = 16;

    fn new(positions: impl IntoIterator<Item = usize>) -> Self {
        let order = Self(AtomicU64::new(0));
        order.set(positions);
        order
    }

    fn set(&self, positions: impl IntoIterator<Item = usize>) {
        let bits = positions.into_iter().enumerate().map(|(at, position)| (position as u64) << (4 * at));
        self.0.store(bits.sum(), Ordering::Relaxed);
    }

    fn positions(&self, count: usize) -> impl Iterator<Item = usize> + use<> {
        let bits = self.0.load(Ordering::Relaxed);
        (0..count).map(move |at| (bits >> (4 * at)) as usize % Self::MOST)
    }
}

/// A path to read over.
pub(crate) struct Path {
    index: usize,
    pub(crate) backend: BackendKind,
    pub(crate) link: Arc<Link>,
}

/// Paths that a read has tried already.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tried(u32);

impl Tried {
    pub(crate) fn add(&mut self, path: &Path) {
        self.0 |= 1 << path.index;
    }

    fn has(self, index: usize) -> bool {
        self.0 & 1 << index != 0
    }
}

impl Paths {
    pub(crate) fn new(pair: Pair, route: Route, opener: Arc<Opener>, peer: &Metadata) -> Self {
        let (mut candidates, mut ruled_out) = (Vec::new(), Vec::new());
        for backend in opener.options.backends.iter().copied().take(Order::MOST) {
            match opener.rule_out(backend, peer) {
                Some(reason) => ruled_out.push((backend, reason)),
                None => candidates.push(Candidate {
                    backend,
                    opening: tokio::sync::Mutex::new(()),
                    state: Mutex::default(),
                    mapped: OnceLock::new(),
                    mapped_is_open: AtomicBool::new(false),
                }),
            }
        }
        Self {
            pair,
            route,
            opener,
            order: Order::new(0..candidates.len()),
            candidates: candidates.into(),
            ruled_out,
            retry_at: AtomicU64::new(u64::MAX),
            started: Instant::now(),
            surveying: AtomicBool::new(false),
            changed: Notify::new(),
            control: tokio::sync::Mutex::default(),
        }
    }

    /// Positions of the candidates that a session may use, best first.
    fn usable(&self, avoid: Option<BackendKind>) -> impl Iterator<Item = usize> {
        let allowed = move |index: &usize| avoid != Some(self.candidates[*index].backend);
        self.order.positions(self.candidates.len()).filter(allowed)
    }

    /// The best path that is open, without waiting.
    pub(crate) fn open_now(&self, avoid: Option<BackendKind>, tried: Tried) -> Option<Path> {
        self.usable(avoid)
            .filter(|index| !tried.has(*index))
            .find_map(|index| self.candidates[index].path(index))
    }

    /// The best path, if it is to mapped memory and open: found without a lock or a count, which a short read would feel.
    pub(crate) fn mapped(self: &Arc<Self>, avoid: Option<BackendKind>) -> Option<(BackendKind, &ShmLink)> {
        self.survey_when_due();
        let best = &self.candidates[self.usable(avoid).next()?];
        match (best.mapped_is_open.load(Ordering::Acquire), best.mapped.get().map(|link| &**link)) {
            (true, Some(Link::Shm(link))) => Some((best.backend, link)),
            _ => None,
        }
    }

    /// The best path that is open and not tried yet, without waiting; broken ones are looked after beside it.
    pub(crate) fn ready(self: &Arc<Self>, avoid: Option<BackendKind>, tried: Tried) -> Option<Path> {
        self.survey_when_due();
        self.open_now(avoid, tried)
    }

    /// The best path not tried yet, opened if it must be; broken ones last. None is left, or the peer said no.
    pub(crate) async fn next(
        self: &Arc<Self>,
        avoid: Option<BackendKind>,
        tried: Tried,
    ) -> Result<Option<Path>, Fault> {
        if let Some(path) = self.ready(avoid, tried) {
            return Ok(Some(path));
        }
        let mut left: Vec<usize> = self.usable(avoid).filter(|index| !tried.has(*index)).collect();
        left.sort_by_key(|index| self.candidates[*index].is_broken());
        for index in left {
            match self.open(index).await {
                Ok(link) => return Ok(Some(Path { index, backend: self.candidates[index].backend, link })),
                Err(Fault::Stale(current)) => return Err(Fault::Stale(current)),
                Err(Fault::Refused(refusal)) if self.candidates[index].backend == BackendKind::Tcp => {
                    return Err(Fault::Refused(refusal));
                }
                Err(_) => {}
            }
        }
        Ok(None)
    }

    /// Whether a read could go on elsewhere if it left the paths tried.
    pub(crate) fn has_other(&self, avoid: Option<BackendKind>, tried: Tried) -> bool {
        self.usable(avoid).any(|index| !tried.has(index))
    }

    /// Whether a path is in use still: nothing has broken it.
    pub(crate) fn is_open(&self, path: &Path) -> bool {
        self.candidates[path.index].state().is_open_as(path)
    }

    /// Takes a path out of use for a while: it broke.
    pub(crate) fn broke(&self, path: &Path, why: &LinkError) {
        let candidate = &self.candidates[path.index];
        let mut state = candidate.state();
        // Another read may have noticed before, and the path may be open again since.
        if state.is_open_as(path) {
            let until = Instant::now() + self.opener.options.retry;
            state.stage = Stage::Broken { until, why: chain(why), verdict: None };
            candidate.mapped_is_open.store(false, Ordering::Release);
            drop(state);
            self.note_retry(until);
            tracing::info!(peer = %self.pair.to, backend = %path.backend, why = chain(why), "a transfer path broke");
        }
    }

    fn note_retry(&self, at: Instant) {
        let at = at.saturating_duration_since(self.started).as_nanos() as u64;
        self.retry_at.fetch_min(at, Ordering::Relaxed);
    }

    /// Opens a candidate, or takes the link that somebody else has opened meanwhile.
    async fn open(&self, index: usize) -> Result<Arc<Link>, Fault> {
        let candidate = &self.candidates[index];
        let _opening = candidate.opening.lock().await;
        if let Some(path) = candidate.path(index) {
            return Ok(path.link);
        }
        let before = std::mem::replace(&mut candidate.state().stage, Stage::Opening);
        let undo = Undo { paths: self, candidate, before: Some(before) };
        let opened = self.opener.open(candidate.backend, &self.pair, &self.route).await;
        let (stage, outcome) = match opened {
            Ok(link) => {
                let link = Arc::new(link);
                (Stage::Open(Arc::clone(&link)), Ok(link))
            }
            Err(fault) => {
                let until = Instant::now() + self.opener.options.retry;
                self.note_retry(until);
                let (why, verdict) = match &fault {
                    Fault::Stale(current) => ("another epoch".to_owned(), Some(Verdict::Stale(*current))),
                    Fault::Refused(refusal) => (refusal.to_string(), Some(Verdict::Refused(*refusal))),
                    Fault::Link(error) => (chain(error), None),
                };
                (Stage::Broken { until, why, verdict }, Err(fault))
            }
        };
        if let Stage::Open(link) = &stage
            && matches!(**link, Link::Shm(_))
            && candidate.mapped.set(Arc::clone(link)).is_ok()
        {
            // Before anybody can find it broken.
            candidate.mapped_is_open.store(true, Ordering::Release);
        }
        undo.settle(stage);
        self.changed.notify_waiters();
        outcome
    }

    /// The control connection of the pair.
    pub(crate) async fn control(&self) -> Result<Control, Fault> {
        let mut kept = self.control.lock().await;
        if let Some(control) = kept.as_ref().filter(|control| control.is_alive()) {
            return Ok(control.clone());
        }
        let nothing: control::Handler =
            Arc::new(|_, _| Box::pin(async { Err(Denial::Refused(Refusal::Malformed)) }));
        let control = Control::open(self.pair.clone(), &self.route, nothing).await?;
        Ok(kept.insert(control).clone())
    }

    /// Whether a read may work: not when every path is broken and would have to be made anew.
    pub(crate) fn is_usable(&self, avoid: Option<BackendKind>) -> bool {
        let mut usable = self.usable(avoid);
        let backend = |index: usize| self.candidates[index].backend;
        let lone_tcp = || {
            let mut usable = self.usable(avoid);
            usable.next().is_some_and(|index| backend(index) == BackendKind::Tcp) && usable.next().is_none()
        };
        lone_tcp()
            || usable.any(|index| match &self.candidates[index].state().stage {
                Stage::Open(link) => link.is_usable(),
                Stage::Unopened | Stage::Opening => true,
                Stage::Broken { .. } => false,
            })
    }

    /// The path in use and what became of the others.
    pub(crate) fn info(&self, avoid: Option<BackendKind>) -> PathInfo {
        let stages: Vec<(Stage, Option<Measured>)> =
            self.candidates.iter().map(|candidate| candidate.snapshot()).collect();
        let order: Vec<usize> = self.usable(avoid).collect();
        let chosen = chosen(&order, |index| &stages[index].0);
        let mut rejected = Vec::new();
        for backend in self.opener.options.backends.iter().copied() {
            let index = self.candidates.iter().position(|candidate| candidate.backend == backend);
            if index.is_some() && index == chosen {
                continue;
            }
            let reason = match index {
                None => self.ruled_out.iter().find(|(out, _)| *out == backend).map(|(_, why)| why.clone()),
                Some(_) if avoid == Some(backend) => Some("avoided".to_owned()),
                Some(index) => Some(why_not(&stages[index], chosen.is_some_and(|chosen| chosen < index))),
            };
            rejected.extend(reason.map(|reason| (backend, reason)));
        }
        let backend = chosen.map_or(BackendKind::Tcp, |index| self.candidates[index].backend);
        let measured = chosen.and_then(|index| stages[index].1);
        let first = std::iter::once(format!("{backend}: {}", opener::why(backend)));
        // What comes after the chosen one in the list needs no excuse, unless it is known to be broken or slower.
        let others = rejected.iter().filter(|(_, why)| why != LISTED_LATER);
        let reason: Vec<String> =
            first.chain(others.map(|(backend, why)| format!("{backend}: {why}"))).collect();
        PathInfo {
            backend,
            reason: reason.join("; "),
            rejected,
            fallen_from: self.fallen_from(chosen, &order, &stages),
            latency: measured.map(|measured| measured.latency),
            bytes_per_second: measured.map(|measured| measured.bytes_per_second),
        }
    }

    /// What should carry blocks instead of the chosen path, and does not.
    fn fallen_from(
        &self,
        chosen: Option<usize>,
        order: &[usize],
        stages: &[(Stage, Option<Measured>)],
    ) -> Vec<(BackendKind, String)> {
        let broken =
            order.iter().take_while(|index| Some(**index) != chosen).filter_map(|index| {
                match &stages[*index].0 {
                    Stage::Broken { why, .. } => Some((self.candidates[*index].backend, why.clone())),
                    Stage::Unopened | Stage::Opening | Stage::Open(_) => None,
                }
            });
        let listed = |of: BackendKind| self.opener.options.backends.iter().position(|one| *one == of);
        let at = chosen.and_then(|index| listed(self.candidates[index].backend));
        // Shared memory with a peer on another host is no loss; a network library that both sides should have is.
        let missing = self.ruled_out.iter().filter(|(backend, _)| {
            let network = matches!(backend, BackendKind::Libfabric | BackendKind::Ucx | BackendKind::Plugin);
            network && at.is_none_or(|at| listed(*backend).is_some_and(|out| out < at))
        });
        broken.chain(missing.cloned()).collect()
    }

    /// Why there is no session: what the peer said, or all that was tried.
    fn unreachable(&self, avoid: Option<BackendKind>) -> ConnectError {
        let worker = self.pair.to.clone();
        let verdicts = self.usable(avoid).filter_map(|index| match &self.candidates[index].state().stage {
            Stage::Broken { verdict: Some(verdict), .. } => Some((self.candidates[index].backend, *verdict)),
            _ => None,
        });
        let verdicts: Vec<(BackendKind, Verdict)> = verdicts.collect();
        for (_, verdict) in &verdicts {
            if let Verdict::Stale(current) = *verdict {
                return ConnectError::Stale { worker, asked: self.pair.epoch, current };
            }
        }
        // What is said by name at the peer's address holds; over the others it may be the path.
        for (backend, verdict) in &verdicts {
            if let (BackendKind::Tcp, Verdict::Refused(refusal)) = (*backend, *verdict) {
                return ConnectError::Refused { worker, refusal };
            }
        }
        let tried = self.opener.options.backends.iter().map(|backend| {
            let index = self.candidates.iter().position(|candidate| candidate.backend == *backend);
            let why = match index {
                Some(_) if avoid == Some(*backend) => "avoided".to_owned(),
                Some(index) => why_not(&self.candidates[index].snapshot(), false),
                None => self
                    .ruled_out
                    .iter()
                    .find(|(out, _)| out == backend)
                    .map_or_else(String::new, |(_, why)| why.clone()),
            };
            format!("{backend}: {why}")
        });
        ConnectError::Link { worker, tried: tried.collect::<Vec<_>>().join("; ") }
    }
}

const LISTED_LATER: &str = "later in the list";

fn why_not((stage, measured): &(Stage, Option<Measured>), is_later: bool) -> String {
    match stage {
        Stage::Broken { why, .. } => why.clone(),
        Stage::Unopened if is_later => LISTED_LATER.to_owned(),
        Stage::Unopened | Stage::Opening => "not open yet".to_owned(),
        Stage::Open(_) => match measured {
            Some(measured) => format!(
                "measured {:.1} us and {:.2} GB/s, {}",
                measured.latency.as_secs_f64() * 1e6,
                measured.bytes_per_second / 1e9,
                if is_later { "not clearly quicker" } else { "slower" }
            ),
            None => LISTED_LATER.to_owned(),
        },
    }
}

impl Candidate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, index: usize) -> Option<Path> {
        match &self.state().stage {
            Stage::Open(link) => Some(Path { index, backend: self.backend, link: Arc::clone(link) }),
            _ => None,
        }
    }

    fn is_broken(&self) -> bool {
        matches!(self.state().stage, Stage::Broken { .. })
    }

    fn snapshot(&self) -> (Stage, Option<Measured>) {
        let state = self.state();
        (state.stage.clone(), state.measured)
    }
}

/// Puts a candidate back to what it was when its opening is given up.
struct Undo<'a> {
    paths: &'a Paths,
    candidate: &'a Candidate,
    before: Option<Stage>,
}

impl Undo<'_> {
    fn settle(mut self, stage: Stage) {
        self.before = None;
        self.candidate.state().stage = stage;
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if let Some(before) = self.before.take() {
            // A survey meanwhile has passed it over.
            if let Stage::Broken { until, .. } = &before {
                self.paths.note_retry(*until);
            }
            self.candidate.state().stage = before;
        }
    }
}

/// An error and its sources on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
