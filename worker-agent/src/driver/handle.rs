//! What the rest of the worker asks of the owner of the handoffs.

use baton_config::protocol::{HandoffOutcome, HandoffStatus, Ticket, Want};
use baton_config::{Epoch, HandoffId};
use baton_engine::SeqId;
use baton_engine::arena::BlockId;
use tokio::sync::{mpsc, oneshot, watch};

use crate::handoff::decode::ImportReport;
use crate::handoff::{Answer, DecodeEvent, GiveUp, OpenError, Opening, PrefillEvent};
use crate::inbox::Port;

/// How the handoff of a generate request went.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum DecodeNews {
    /// The whole prompt was imported; tokens follow.
    Imported(ImportReport),
    /// The prompt is prefilled here.
    Local(GiveUp, ImportReport),
    /// The blocks can't be used: the request must be replayed elsewhere.
    Failed,
}

/// Why a handoff was not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenFailure {
    /// The desk refused it.
    #[error(transparent)]
    Refused(#[from] OpenError),
    /// This worker is shutting down.
    #[error("the worker is shutting down")]
    Closed,
}

/// Where the news of a decode side goes.
#[derive(Debug)]
pub(super) enum NewsSink {
    /// To the task of the request.
    Own(mpsc::Sender<DecodeNews>),
    /// To where the events of its sequence go.
    Shared(Port),
}

impl NewsSink {
    /// Passes it on; the request may have ended.
    pub(super) fn tell(&self, news: DecodeNews) {
        match self {
            Self::Own(news_of_one) => drop(news_of_one.try_send(news)),
            Self::Shared(port) => port.tell(news),
        }
    }
}

/// What the owner is asked to do.
pub(super) enum Command {
    OpenPrefill(Opening, SeqId, oneshot::Sender<Result<oneshot::Receiver<HandoffOutcome>, OpenError>>),
    OpenDecode(Opening, SeqId, NewsSink, oneshot::Sender<Result<(), OpenError>>),
    PrefillBlocks(HandoffId, Vec<BlockId>),
    Prefill(HandoffId, PrefillEvent),
    DecodeAdmitted { id: HandoffId, cached: u32, blocks: Vec<BlockId> },
    Decode(HandoffId, DecodeEvent),
    CloseDecode(HandoffId),
    Ticket(HandoffId, Box<Ticket>, oneshot::Sender<Answer>),
    Want(HandoffId, Want, oneshot::Sender<Answer>),
    Status(HandoffId, oneshot::Sender<Result<HandoffStatus, Answer>>),
    Delete(HandoffId, oneshot::Sender<()>),
    Epoch(Epoch, oneshot::Sender<()>),
}

/// The handoffs of this worker; clones share them.
#[derive(Debug, Clone)]
pub struct Handoffs {
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) open: watch::Receiver<Open>,
}

/// Handoffs that are open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Open {
    /// On the prefill side.
    pub prefills: usize,
    /// On the decode side.
    pub decodes: usize,
    /// Requests of either side that were not let go, with those whose handoff has ended.
    pub requests: usize,
}

impl Handoffs {
    /// Opens the prefill side, which `seq` computes; the receiver gets the end of the handoff.
    ///
    /// # Errors
    /// [`OpenFailure`].
    pub async fn open_prefill(
        &self,
        opening: Opening,
        seq: SeqId,
    ) -> Result<oneshot::Receiver<HandoffOutcome>, OpenFailure> {
        let opened = self.ask(|answer| Command::OpenPrefill(opening, seq, answer)).await;
        Ok(opened.ok_or(OpenFailure::Closed)??)
    }

    /// Opens the decode side, which `seq` waits for; the receiver gets one piece of news, unless the request is closed
    /// first.
    ///
    /// # Errors
    /// [`OpenFailure`].
    pub async fn open_decode(
        &self,
        opening: Opening,
        seq: SeqId,
    ) -> Result<mpsc::Receiver<DecodeNews>, OpenFailure> {
        let (news, receiver) = mpsc::channel(1);
        self.begin_decode(opening, seq, NewsSink::Own(news)).await?;
        Ok(receiver)
    }

    /// The same; the news goes where the events of the sequence go.
    ///
    /// # Errors
    /// [`OpenFailure`].
    pub async fn open_decode_into(
        &self,
        opening: Opening,
        seq: SeqId,
        port: Port,
    ) -> Result<(), OpenFailure> {
        self.begin_decode(opening, seq, NewsSink::Shared(port)).await
    }

    async fn begin_decode(&self, opening: Opening, seq: SeqId, news: NewsSink) -> Result<(), OpenFailure> {
        let opened = self.ask(|answer| Command::OpenDecode(opening, seq, news, answer)).await;
        Ok(opened.ok_or(OpenFailure::Closed)??)
    }

    /// The engine gave the prefill side its blocks.
    pub async fn prefill_blocks(&self, id: HandoffId, blocks: Vec<BlockId>) {
        self.tell(Command::PrefillBlocks(id, blocks)).await;
    }

    /// Something happened to the prefill side.
    pub async fn prefill(&self, id: HandoffId, event: PrefillEvent) {
        self.tell(Command::Prefill(id, event)).await;
    }

    /// The engine gave the decode side its blocks.
    pub async fn decode_admitted(&self, id: HandoffId, cached: u32, blocks: Vec<BlockId>) {
        self.tell(Command::DecodeAdmitted { id, cached, blocks }).await;
    }

    /// The request of a decode side has ended, well or not. Must be called once for each that was opened: it takes
    /// the sequence out of the engine, with whatever fencing its blocks need.
    pub async fn close_decode(&self, id: HandoffId) {
        self.tell(Command::CloseDecode(id)).await;
    }

    /// A ticket arrived; waits until it can be answered.
    pub async fn ticket(&self, id: HandoffId, ticket: Ticket) -> Answer {
        self.ask(|answer| Command::Ticket(id, Box::new(ticket), answer)).await.unwrap_or(Answer::Busy)
    }

    /// A want arrived.
    pub async fn want(&self, id: HandoffId, want: Want) -> Answer {
        self.ask(|answer| Command::Want(id, want, answer)).await.unwrap_or(Answer::Busy)
    }

    /// The state of a handoff.
    ///
    /// # Errors
    /// The answer to give instead.
    pub async fn status(&self, id: HandoffId) -> Result<HandoffStatus, Answer> {
        self.ask(|answer| Command::Status(id, answer)).await.unwrap_or(Err(Answer::Busy))
    }

    /// Ends a handoff.
    pub async fn delete(&self, id: HandoffId) {
        self.ask(|answer| Command::Delete(id, answer)).await;
    }

    /// Enters a life; done when messages of the old one are refused.
    pub async fn set_epoch(&self, epoch: Epoch) {
        self.ask(|answer| Command::Epoch(epoch, answer)).await;
    }

    /// Handoffs that are open, with changes.
    pub fn open(&self) -> watch::Receiver<Open> {
        self.open.clone()
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (sender, answer) = oneshot::channel();
        self.commands.send(command(sender)).await.ok()?;
        answer.await.ok()
    }

    /// For commands that mean nothing once the owner is gone.
    async fn tell(&self, command: Command) {
        let _ = self.commands.send(command).await;
    }
}
