//! Brings one generation to the engine, and lets it go again.

use std::sync::Arc;

use baton_config::HandoffId;
use baton_config::protocol::{GenerateRequest, HandoffRef};
use baton_engine::SeqId;
use baton_engine::engine::{Purpose, SequenceSpec, Writers};

use super::super::Shared;
use super::super::fault::Fault;
use super::super::prompt_cost::PromptCost;
use crate::driver::OpenFailure;
use crate::handoff::{GiveUp, OpenError, Opening};
use crate::inbox::{self, Item, Key, Port};
use baton_config::frames::StreamId;

/// The inbox of a connection.
pub(super) type Inbox = inbox::Inbox<Result<Started, Fault>>;

/// A generation that the engine has taken. Whoever has it lets it go with [`Held::let_go`].
#[derive(Debug)]
pub(super) struct Started {
    pub(super) held: Held,
    /// Of the sequence that counts: there may have been one before it.
    pub(super) turn: u32,
    pub(super) cost: PromptCost,
}

/// What a generation holds of this worker.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) seq: SeqId,
    pub(super) handoff: Option<HandoffId>,
}

impl Held {
    /// Gives it back.
    pub(super) async fn let_go(self, shared: &Shared) {
        match self.handoff {
            Some(id) => shared.handoffs.close_decode(id).await,
            None => shared.engine.cancel(self.seq, Writers::Gone).await,
        }
    }
}

/// Takes a request to the engine and says in the inbox how that went. The permit goes back to the caller: it counts until
/// the last event was written.
pub(super) async fn run(shared: Arc<Shared>, inbox: Arc<Inbox>, id: StreamId, request: GenerateRequest) {
    let started = start(&shared, &inbox, id, request).await;
    let key = Key { stream: id, turn: 0 };
    // Nobody is there any more.
    if let Err(Item::Started(Ok(Started { held, .. }))) = inbox.send(key, Item::Started(started)) {
        held.let_go(&shared).await;
    }
}

async fn start(
    shared: &Shared,
    inbox: &Arc<Inbox>,
    stream: StreamId,
    request: GenerateRequest,
) -> Result<Started, Fault> {
    let port = |turn| Port::new(inbox, Key { stream, turn });
    let prompt = u32::try_from(request.tokens.len()).unwrap_or(u32::MAX);
    let GenerateRequest {
        tokens, generated, max_tokens, sampling, cache_salt, logits_digest, handoff, ..
    } = request;
    let purpose = if handoff.is_some() { Purpose::Import } else { Purpose::Generate };
    let spec = SequenceSpec { tokens, generated, max_tokens, sampling, cache_salt, logits_digest, purpose };
    let Some(HandoffRef { id, own_epoch, peer }) = handoff else {
        let seq = shared.engine.submit_to(spec, port(0)).await?;
        let cost = PromptCost::new(prompt, None);
        return Ok(Started { held: Held { seq, handoff: None }, turn: 0, cost });
    };
    let alone = SequenceSpec { purpose: Purpose::Generate, ..spec.clone() };
    let seq = shared.engine.submit_to(spec, port(0)).await?;
    let opening = Opening { id, own_epoch, peer, prompt };
    let Err(failure) = shared.handoffs.open_decode_into(opening, seq, port(0)).await else {
        let cost = PromptCost::new(prompt, None);
        return Ok(Started { held: Held { seq, handoff: Some(id) }, turn: 0, cost });
    };
    shared.engine.cancel(seq, Writers::Gone).await;
    if failure != OpenFailure::Refused(OpenError::Ended) {
        return Err(failure.into());
    }
    // The peer gave the handoff up before this request came: nothing to wait for.
    let seq = shared.engine.submit_to(alone, port(1)).await?;
    shared.metrics.fallback(GiveUp::PeerEnded);
    let cost = PromptCost::new(prompt, Some(GiveUp::PeerEnded));
    Ok(Started { held: Held { seq, handoff: None }, turn: 1, cost })
}
