//! Carries out what the handoffs of this worker decide: one task owns the [`Desk`], others hold [`Handoffs`].
//!
//! Every call to a peer, export and read runs as a task of its own and comes back as a command; the owner itself waits
//! for nothing but the engine's command channel, which the engine's thread always empties.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use baton_conductor::{Client, View};
use baton_config::protocol::{HandoffOutcome, PeerRef};
use baton_config::{Epoch, HandoffId, KvGeometry, WorkerId};
use baton_engine::arena::BlockId;
use baton_engine::{ModelInfo, SeqId};
use baton_transfer::Agent;
use baton_transfer::export::Exporter;
use baton_transfer::import::Importer;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::engine_thread::{EngineHandle, EngineView};
use crate::handoff::decode::{DecodeEnd, ImportReport};
use crate::handoff::{Action, Answer, DecodeEvent, Desk, Limits, OpenError, Opening, PrefillEvent, Waiter};
use crate::metadata_cache::MetadataCache;
use crate::metrics::{Metrics, TokenKind};
use crate::path::Paths;
use crate::peer::PeerClient;

mod decode_io;
mod handle;
mod prefill_io;

use handle::{Command, NewsSink};
pub use handle::{DecodeNews, Handoffs, Open, OpenFailure};

/// Commands waiting for the owner at most; senders wait beyond that.
const COMMANDS_MAX: usize = 4096;
/// How often the engine is looked at in the time that it may be blocked.
const LOOKS: u32 = 4;

/// What handoffs need of the rest of the worker.
pub struct Io {
    /// This worker.
    pub worker: WorkerId,
    /// Geometry of its blocks.
    pub geometry: KvGeometry,
    /// The model that it serves.
    pub model: ModelInfo,
    /// Its engine.
    pub engine: EngineHandle,
    /// Its transfer agent.
    pub agent: Agent,
    /// Makes blocks readable.
    pub exporter: Exporter,
    /// Reads blocks.
    pub importer: Importer,
    /// The fleet.
    pub fleet: Client,
    /// What peers published for connecting to them.
    pub metadata: MetadataCache,
    /// Calls to peers.
    pub peers: PeerClient,
    /// Sessions and what they measured.
    pub paths: Paths,
    /// Counters.
    pub metrics: Metrics,
    /// Owner of every task.
    pub tasks: TaskTracker,
    /// Whether short prompts are prefilled here by what was measured.
    pub local_prefill: bool,
    /// For a transfer session with a peer to come about.
    pub connect_timeout: Duration,
}

impl Handoffs {
    /// Starts the owner; it ends when `stop` is cancelled.
    pub fn start(io: Arc<Io>, limits: Limits, stop: CancellationToken) -> Self {
        let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
        let (publish, open) = watch::channel(Open::default());
        let owner = Owner {
            desk: Desk::new(io.worker.clone(), limits),
            back: commands.clone(),
            prefills: HashMap::new(),
            decodes: HashMap::new(),
            waiters: HashMap::new(),
            next_waiter: 0,
            seen: io.fleet.view(),
            blocked: Blocked::default(),
            open: publish,
            io: Arc::clone(&io),
        };
        io.tasks.spawn(owner.run(receiver, stop));
        Self { commands, open }
    }
}

/// The I/O of a prefill side.
struct PrefillLeg {
    seq: SeqId,
    peer: PeerRef,
    epoch: Epoch,
    blocks: Vec<BlockId>,
    /// Posts under way, by ticket.
    posts: HashMap<u32, CancellationToken>,
    /// Ends everything under way for this handoff.
    withdrawn: CancellationToken,
    outcome: oneshot::Sender<HandoffOutcome>,
}

/// The I/O of a decode side.
struct DecodeLeg {
    seq: SeqId,
    peer: PeerRef,
    epoch: Epoch,
    blocks: Vec<u32>,
    /// Aborts the read under way.
    pull: CancellationToken,
    news: NewsSink,
    /// The request is over; only a fence may be outstanding.
    closed: bool,
}

impl DecodeLeg {
    /// The request's task takes one piece of news, or has ended.
    fn tell(&self, news: DecodeNews) {
        self.news.tell(news);
    }
}

/// An engine that was found blocked.
#[derive(Default)]
struct Blocked {
    seen: Option<EngineView>,
    /// How often it was found as it had been found before.
    times: u32,
}

impl Blocked {
    /// Takes a look; whether nothing has changed for so many of them.
    fn is_for_long(&mut self, view: EngineView) -> bool {
        let same = view.blocked && self.seen.as_ref() == Some(&view);
        self.times = if same { self.times + 1 } else { 0 };
        self.seen = view.blocked.then_some(view);
        let long = self.times == LOOKS;
        if long {
            self.times = 0;
        }
        long
    }
}

struct Owner {
    desk: Desk,
    io: Arc<Io>,
    back: mpsc::Sender<Command>,
    prefills: HashMap<HandoffId, PrefillLeg>,
    decodes: HashMap<HandoffId, DecodeLeg>,
    waiters: HashMap<Waiter, oneshot::Sender<Answer>>,
    next_waiter: u64,
    /// The view as of the last look.
    seen: Arc<View>,
    blocked: Blocked,
    open: watch::Sender<Open>,
}

impl Owner {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>, stop: CancellationToken) {
        let mut views = self.io.fleet.changed();
        let mut looks = tokio::time::interval(self.desk.limits().blocked / LOOKS);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let deadline = self.desk.deadline().map(Instant::from_std);
            let timer = async {
                match deadline {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let mut actions = Vec::new();
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                // Its sender lives as long as this task.
                Some(command) = commands.recv() => self.take(command, &mut actions),
                Ok(()) = views.changed() => {
                    let view = views.borrow_and_update().clone();
                    self.view_changed(view, &mut actions);
                }
                () = timer => self.desk.tick(now(), &mut actions),
                _ = looks.tick(), if self.desk.prefills() + self.desk.decodes() > 0 => {
                    if self.blocked.is_for_long(self.io.engine.view()) {
                        self.desk.blocked(now(), &mut actions);
                    }
                }
            }
            self.carry_out(actions).await;
            self.publish();
        }
        self.close().await;
    }

    fn take(&mut self, command: Command, out: &mut Vec<Action>) {
        match command {
            Command::OpenPrefill(opening, seq, answer) => self.open_prefill(opening, seq, answer, out),
            Command::OpenDecode(opening, seq, news, answer) => {
                let id = opening.id;
                let opened = self.open_decode(opening, seq, news, out);
                let is_open = opened.is_ok();
                if answer.send(opened).is_err() && is_open {
                    self.take(Command::CloseDecode(id), out);
                }
            }
            Command::PrefillBlocks(id, blocks) => {
                if let Some(leg) = self.prefills.get_mut(&id) {
                    leg.blocks = blocks;
                }
            }
            Command::Prefill(id, event) => self.desk.prefill(now(), id, event, out),
            Command::DecodeAdmitted { id, cached, blocks } => {
                let Some(leg) = self.decodes.get_mut(&id) else { return };
                leg.blocks = blocks.into_iter().map(|block| block.0).collect();
                let local_below = self.io.local_below(&leg.peer.worker);
                self.desk.decode(now(), id, DecodeEvent::Admitted { cached, local_below }, out);
            }
            Command::Decode(id, event) => self.desk.decode(now(), id, event, out),
            Command::CloseDecode(id) => {
                if let Some(leg) = self.decodes.get_mut(&id) {
                    leg.closed = true;
                    self.desk.close_decode(now(), id, out);
                }
            }
            Command::Ticket(id, ticket, answer) => {
                let waiter = self.waiter(answer);
                self.desk.ticket(now(), id, *ticket, waiter, out);
            }
            Command::Want(id, want, answer) => {
                let waiter = self.waiter(answer);
                self.desk.want(now(), id, want, waiter, out);
            }
            Command::Status(id, answer) => drop(answer.send(self.desk.status(now(), id, out))),
            Command::Delete(id, answer) => {
                self.desk.delete(now(), id, out);
                let _ = answer.send(());
            }
            Command::Epoch(epoch, answer) => {
                self.desk.set_epoch(now(), epoch, out);
                let _ = answer.send(());
            }
        }
    }

    fn waiter(&mut self, answer: oneshot::Sender<Answer>) -> Waiter {
        let waiter = Waiter(self.next_waiter);
        self.next_waiter += 1;
        self.waiters.insert(waiter, answer);
        waiter
    }

    fn open_prefill(
        &mut self,
        opening: Opening,
        seq: SeqId,
        answer: oneshot::Sender<Result<oneshot::Receiver<HandoffOutcome>, OpenError>>,
        out: &mut Vec<Action>,
    ) {
        let (id, own_epoch, peer) = (opening.id, opening.own_epoch, opening.peer.clone());
        let (outcome, receiver) = oneshot::channel();
        let result = self.desk.open_prefill(now(), opening, self.io.geometry, out);
        let is_open = result.is_ok();
        if is_open {
            let leg = PrefillLeg {
                seq,
                peer,
                epoch: own_epoch,
                blocks: Vec::new(),
                posts: HashMap::new(),
                withdrawn: CancellationToken::new(),
                outcome,
            };
            self.prefills.insert(id, leg);
        }
        if answer.send(result.map(|()| receiver)).is_err() && is_open {
            self.desk.prefill(now(), id, PrefillEvent::Cancel, out);
        }
    }

    fn open_decode(
        &mut self,
        opening: Opening,
        seq: SeqId,
        news: NewsSink,
        out: &mut Vec<Action>,
    ) -> Result<(), OpenError> {
        let (id, epoch, peer) = (opening.id, opening.own_epoch, opening.peer.clone());
        self.desk.open_decode(now(), opening, out)?;
        let leg = DecodeLeg {
            seq,
            peer,
            epoch,
            blocks: Vec::new(),
            pull: CancellationToken::new(),
            news,
            closed: false,
        };
        self.decodes.insert(id, leg);
        Ok(())
    }

    /// Peers that were in the last view and are not in this one are gone, and so are those with a newer life. One that
    /// was in neither is unknown: the router's view may be ahead of this one.
    fn view_changed(&mut self, view: Arc<View>, out: &mut Vec<Action>) {
        let before = std::mem::replace(&mut self.seen, Arc::clone(&view));
        self.io.forget_departed(&view);
        let live = |worker: &WorkerId, epoch: Epoch| match view.worker(worker) {
            Some(record) => record.epoch <= epoch,
            None => before.worker(worker).is_none_or(|record| record.epoch != epoch),
        };
        self.desk.view_changed(now(), live, out);
    }

    async fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Prefill(id, action) => self.prefill_action(id, action).await,
                Action::Decode(id, action) => self.decode_action(id, action).await,
                Action::Answer { waiter, answer } => self.answer(waiter, answer),
                Action::PrefillEnded(id, outcome) => {
                    if let Some(leg) = self.prefills.remove(&id) {
                        let _ = leg.outcome.send(outcome);
                    }
                }
                Action::DecodeEnded(id, end) => self.decode_ended(id, end),
            }
        }
    }

    fn decode_ended(&mut self, id: HandoffId, end: DecodeEnd) {
        if let DecodeEnd::Local(why) = end {
            self.io.metrics.fallback(why);
        }
        if self.decodes.get(&id).is_some_and(|leg| leg.closed) {
            self.decodes.remove(&id);
        }
    }

    fn answer(&mut self, waiter: Waiter, answer: Answer) {
        if matches!(answer, Answer::Stale { .. }) {
            self.io.metrics.stale_epoch.inc();
        }
        if let Some(sender) = self.waiters.remove(&waiter) {
            // Whoever posted it may have left and posts again.
            let _ = sender.send(answer);
        }
    }

    /// Runs `work` until it is done or `until` is cancelled, and hands its result to the owner.
    fn spawn<F>(&self, until: CancellationToken, work: F)
    where
        F: Future<Output = Option<Command>> + Send + 'static,
    {
        let back = self.back.clone();
        self.io.tasks.spawn(async move {
            if let Some(Some(command)) = until.run_until_cancelled(work).await {
                // The owner is gone only when the worker stops.
                let _ = back.send(command).await;
            }
        });
    }

    fn publish(&self) {
        let (prefills, decodes) = (self.desk.prefills(), self.desk.decodes());
        self.io.metrics.leases.set(i64::try_from(prefills).unwrap_or(i64::MAX));
        self.io.metrics.imports.set(i64::try_from(decodes).unwrap_or(i64::MAX));
        self.io.metrics.parked.set(i64::try_from(self.desk.parked()).unwrap_or(i64::MAX));
        self.open.send_if_modified(|open| {
            let new = Open { prefills, decodes, requests: self.prefills.len() + self.decodes.len() };
            std::mem::replace(open, new) != new
        });
    }

    /// Ends every handoff, so that peers need not find out by themselves.
    async fn close(&mut self) {
        let mut actions = Vec::new();
        for id in self.prefills.keys().copied().collect::<Vec<_>>() {
            self.desk.prefill(now(), id, PrefillEvent::Cancel, &mut actions);
        }
        for id in self.decodes.keys().copied().collect::<Vec<_>>() {
            self.desk.close_decode(now(), id, &mut actions);
        }
        self.carry_out(actions).await;
    }
}

/// The clock of the desk; a paused clock of a test pauses it too.
fn now() -> std::time::Instant {
    Instant::now().into_std()
}

/// Tells a peer that a handoff is over, once more if it may not have heard.
async fn delete_at(io: Arc<Io>, peer: PeerRef, id: HandoffId) {
    for _ in 0..2 {
        match io.peers.delete(&io.address_of(&peer), id).await {
            Err(crate::handoff::PeerFault::Unreachable | crate::handoff::PeerFault::Busy) => {}
            _ => return,
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

impl Io {
    /// Where a peer's API is: as this worker's view has it, else as the router said.
    fn address_of(&self, peer: &PeerRef) -> String {
        let view = self.fleet.view();
        match view.worker(&peer.worker).filter(|record| record.epoch == peer.epoch) {
            Some(record) => record.address.clone(),
            None => peer.address.clone(),
        }
    }

    /// Drops what is known of peers, or of lives of peers, that are not in the view, and closes what leads to them: their
    /// memory is not given back to the system while it is mapped here. Whoever is missing for a moment is dialled again.
    pub(crate) fn forget_departed(&self, view: &View) {
        let life = |peer: &WorkerId| view.worker(peer).map(|record| record.epoch);
        self.metadata.retain(|peer, epoch| life(peer) == Some(epoch));
        self.paths.retain(life);
        self.agent.retain(life);
    }

    /// See [`crate::meter::local_below`].
    fn local_below(&self, peer: &WorkerId) -> u32 {
        if !self.local_prefill {
            return 0;
        }
        let speed = self.engine.view().prefill_tokens_per_s;
        let bytes_per_token = self.geometry.token_bytes().0 as f64;
        speed
            .and_then(|speed| self.paths.costs(peer, speed, bytes_per_token))
            .map_or(0, |c| crate::meter::local_below(&c))
    }

    fn count_import(&self, report: &ImportReport) {
        self.metrics.tokens(TokenKind::Imported, u64::from(report.tokens));
    }
}
