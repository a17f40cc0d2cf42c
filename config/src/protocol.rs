//! Messages between the router and worker agents, and between two worker agents.
//!
//! All are JSON over HTTP/1.1; a generation is streamed as newline-delimited JSON, one [`GenerateEvent`] a line. Between a
//! router and a worker the same messages travel in [`crate::frames`], all generations over one connection.
//! Token ids only: text, templates and tokenizers stay in the router. Receivers check every field against their
//! own limits; nothing here is trusted because it parsed.

mod kv_event;

use serde::{Deserialize, Serialize};

use crate::geometry::KvGeometry;
use crate::names::{Epoch, HandoffId, PoolName, Role, WorkerId};
use crate::prefix::{BlockHash, HashScheme};

/// A worker as the sender's view had it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerRef {
    /// Its name.
    pub worker: WorkerId,
    /// The life it was in.
    pub epoch: Epoch,
    /// `host:port` of its HTTP API.
    pub address: String,
}

/// The handoff a request takes part in, seen from one side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandoffRef {
    /// Minted by the router, the same on both sides.
    pub id: HandoffId,
    /// The epoch of the worker this message is for: a worker in another life refuses it.
    pub own_epoch: Epoch,
    /// The other side.
    pub peer: PeerRef,
}

/// How the next token is chosen. Sampling is keyed by (`seed`, position), so a replay continues identically.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// 0 is greedy; otherwise logits are divided by it.
    pub temperature: f32,
    /// Nucleus: smallest set of tokens with at least this probability mass; 1 keeps all.
    pub top_p: f32,
    /// Keep only so many of the likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep tokens at least this likely relative to the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Subtracted once from the logit of every token generated before (OpenAI).
    pub presence_penalty: f32,
    /// Subtracted per occurrence from the logit of every token generated before (OpenAI).
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens of prompt and output; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the (seed, position) key.
    pub seed: u64,
    /// Report the log-probability of the chosen token and of so many likeliest ones.
    pub logprobs: Option<u32>,
    /// End at any of these tokens (besides the model's own end tokens).
    pub stop_tokens: Vec<u32>,
    /// Do not end at the model's own end tokens.
    pub ignore_eos: bool,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
            stop_tokens: Vec::new(),
            ignore_eos: false,
        }
    }
}

/// `POST /v1/generate`: generate on this worker, alone or as the decode side of a handoff.
///
/// The answer streams [`GenerateEvent`]s; dropping the connection cancels everything the request holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerateRequest {
    /// For logs and traces.
    pub request_id: String,
    /// Prompt token ids, then the tokens generated before a migration.
    pub tokens: Vec<u32>,
    /// How many of the last `tokens` were generated (0 unless this continues a stream).
    #[serde(default)]
    pub generated: u32,
    /// Tokens to generate at most.
    pub max_tokens: u32,
    /// How tokens are chosen.
    #[serde(default)]
    pub sampling: Sampling,
    /// Separates prefix caches of tenants; 0 for none.
    #[serde(default)]
    pub cache_salt: u64,
    /// Whether each token event carries the running digest of the logits bits.
    #[serde(default)]
    pub logits_digest: bool,
    /// Nobody reads the answer before its end: tokens after the first may come together, a moment later.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub whole: bool,
    /// Present when another worker prefills.
    #[serde(default)]
    pub handoff: Option<HandoffRef>,
}

/// `POST /v1/prefill`: compute the KV cache of `tokens` and hand it to the peer.
///
/// The answer, a [`PrefillReply`], comes when the handoff has ended, at once if that was before this request came;
/// dropping the connection cancels it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrefillRequest {
    /// For logs and traces.
    pub request_id: String,
    /// As in [`GenerateRequest::tokens`].
    pub tokens: Vec<u32>,
    /// As in [`GenerateRequest::generated`].
    #[serde(default)]
    pub generated: u32,
    /// How the first token is chosen.
    #[serde(default)]
    pub sampling: Sampling,
    /// As in [`GenerateRequest::cache_salt`].
    #[serde(default)]
    pub cache_salt: u64,
    /// As in [`GenerateRequest::logits_digest`].
    #[serde(default)]
    pub logits_digest: bool,
    /// The decode side.
    pub handoff: HandoffRef,
}

/// How a handoff ended at the prefill side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrefillReply {
    /// Whether the decode side confirmed every block it wanted.
    pub outcome: HandoffOutcome,
    /// Prompt tokens found in the prefill worker's prefix cache.
    pub cached_tokens: u32,
    /// Tokens computed.
    pub computed_tokens: u32,
    /// Milliseconds queued before the first chunk.
    pub queue_ms: f64,
    /// Milliseconds from the first chunk to the first token.
    pub prefill_ms: f64,
}

/// The end of a handoff.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HandoffOutcome {
    /// The decode side verified what it wanted and has the first token.
    Done,
    /// The decode side, the router or the client gave it up.
    Cancelled,
    /// The decode side was not reached within the deadline.
    Expired,
}

/// The log-probability of a token and of the likeliest alternatives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenLogprob {
    /// Natural log of the probability of the chosen token.
    pub logprob: f32,
    /// The likeliest tokens with their log-probabilities, best first.
    pub top: Vec<(u32, f32)>,
}

/// The first token of a request, chosen where its prompt was computed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FirstToken {
    /// Its id.
    pub token: u32,
    /// Present when asked for.
    pub logprob: Option<TokenLogprob>,
    /// Running digest of the logits bits after this token, present when asked for.
    pub logits_digest: Option<u64>,
}

/// Where a prompt was prefilled and what it cost, for the parts of the time to first token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrefillReport {
    /// Prompt tokens found in this worker's prefix cache.
    pub cached_tokens: u32,
    /// Prompt tokens whose KV came from the peer.
    pub imported_tokens: u32,
    /// Bytes of KV read from the peer.
    pub imported_bytes: u64,
    /// Milliseconds this worker made the request wait before admitting it.
    pub queue_ms: f64,
    /// Milliseconds from admission to the first token.
    pub prefill_ms: f64,
    /// Milliseconds between the peer's last block being ready and the last one being verified here.
    pub transfer_tail_ms: f64,
    /// What went wrong with the handoff, if the prompt was prefilled here because of it. Nothing did when this worker
    /// chose to prefill a short prompt by itself: then nothing was imported and there is no reason here.
    pub fallback: Option<String>,
}

/// One line of the answer to [`GenerateRequest`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case", deny_unknown_fields)]
pub enum GenerateEvent {
    /// A token; the first is preceded by nothing, the last is followed by `Finished`.
    Token {
        /// Its id.
        token: u32,
        /// Present when asked for.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        logprob: Option<TokenLogprob>,
        /// Running digest of the logits bits, present when asked for.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        logits_digest: Option<u64>,
    },
    /// The prompt is in place; sent once, before or after the first token.
    Prefilled(PrefillReport),
    /// The last line of a good stream. A token that ended the stream by being a stop token was sent before it.
    Finished {
        /// Why it ended.
        reason: FinishReason,
    },
    /// The last line of a stream that broke on this worker.
    Failed {
        /// Machine-readable cause.
        code: FailureCode,
        /// For the log; never sent to clients.
        message: String,
    },
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end token or a stop token.
    Stop,
    /// `max_tokens` or the model's context length.
    Length,
}

/// Why a worker could not go on with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// The request can never be served by this worker (bad ids, bad numbers): do not retry.
    Refused,
    /// The sequence is longer than this worker's KV cache holds: one with more memory may take it.
    TooLong,
    /// No room now: retry elsewhere or later.
    Overloaded,
    /// The worker is draining or lost its lease: retry elsewhere.
    Unavailable,
    /// The engine broke: replay elsewhere.
    Engine,
}

/// The body of every error answer of a worker agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerError {
    /// Machine-readable cause.
    pub code: FailureCode,
    /// What is wrong and what would help.
    pub message: String,
}

/// One block of the prefill side that is ready to be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TicketBlock {
    /// Index of the block in the sequence, in blocks of the prefill side.
    pub index: u32,
    /// Region of the prefill side's transfer agent.
    pub region: u32,
    /// Byte offset of the block in that region.
    pub offset: u64,
    /// Digest of the block's bytes, bound to handoff, epoch and index.
    pub digest: u64,
}

/// `POST /v1/handoffs/{id}/ticket`, prefill to decode: these blocks are ready.
///
/// Idempotent by `seq`: a repeated ticket gets the answer of the first. The answer, a [`TicketAck`], comes when the
/// decode side no longer needs the blocks' current place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ticket {
    /// The sender.
    pub worker: WorkerId,
    /// The sender's life; blocks of any other are void.
    pub epoch: Epoch,
    /// The receiver's life as the sender knows it.
    pub to_epoch: Epoch,
    /// 0, 1, 2...
    pub seq: u32,
    /// Geometry of the blocks.
    pub geometry: KvGeometry,
    /// Prompt tokens whose KV is complete with this ticket.
    pub tokens: u32,
    /// Blocks finished since the last ticket.
    pub blocks: Vec<TicketBlock>,
    /// With the last ticket: the first token.
    pub first: Option<FirstToken>,
}

/// Answer to a [`Ticket`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TicketAck {
    /// The blocks were read and verified (or were not needed): their place may be reused.
    Taken,
    /// The decode side gave the handoff up: free everything.
    Abandoned,
}

/// `POST /v1/handoffs/{id}/want`, decode to prefill: from which token on blocks are needed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Want {
    /// The sender.
    pub worker: WorkerId,
    /// The sender's life.
    pub epoch: Epoch,
    /// The receiver's life as the sender knows it.
    pub to_epoch: Epoch,
    /// KV of earlier tokens is cached at the sender and need not be offered.
    pub from_token: u32,
}

/// `GET /v1/handoffs/{id}`: the state of a handoff at the worker asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandoffStatus {
    /// The worker asked.
    pub worker: WorkerId,
    /// Its life.
    pub epoch: Epoch,
    /// Its side and phase, for people: `prefill/computing`, `decode/importing`...
    pub phase: String,
    /// At the prefill side: tickets not yet acknowledged, so that a lost one can be taken from here.
    pub pending: Vec<Ticket>,
}

/// Counts of KV blocks by state; their sum is the size of the pool, always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct BlockCounts {
    /// Unused.
    pub free: u32,
    /// Owned by a request, nothing in them yet.
    pub reserved: u32,
    /// Being written by prefill, decode or an import.
    pub filling: u32,
    /// Complete, owned by one request, not in the prefix cache.
    pub valid: u32,
    /// In the prefix cache, referenced or evictable.
    pub shared: u32,
    /// Not reusable until a possible writer is known to be gone.
    pub quarantined: u32,
}

impl BlockCounts {
    /// Blocks held for something other than the prefix cache.
    pub fn held(&self) -> u32 {
        self.reserved + self.filling + self.valid + self.quarantined
    }

    /// All blocks.
    pub fn total(&self) -> u32 {
        self.free + self.reserved + self.filling + self.valid + self.shared + self.quarantined
    }
}

/// The transfer path between this worker and a peer. May gain fields: readers ignore those they don't know.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PathStatus {
    /// The prefill side.
    pub prefill: WorkerId,
    /// The decode side.
    pub decode: WorkerId,
    /// Chosen backend.
    pub backend: String,
    /// Why this one, and why not a better one.
    pub reason: String,
    /// Bandwidth: of the reads that were long enough to tell, until then as measured when the path was chosen.
    pub gb_per_s: Option<f64>,
    /// Latency: time to the first byte of reads, until there are any as measured when the path was chosen.
    pub latency_us: Option<f64>,
    /// The paths preferred to this one that do not work now, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fell_back: Option<String>,
}

/// What a draining worker still waits for. It leaves when nothing is left, or when its grace is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainStatus {
    /// Milliseconds since it was asked to drain.
    pub since_ms: u64,
    /// Milliseconds until it leaves whatever is left.
    pub grace_left_ms: u64,
    /// Requests that have not ended, in whatever phase.
    pub requests: u32,
    /// Of these, the engine is working on.
    pub requests_running: u32,
    /// And these wait for room.
    pub requests_waiting: u32,
    /// Handoffs that are open, from this worker or to it.
    pub handoffs: u32,
    /// Of these, handed out: their blocks are kept until they are read or the lease runs out.
    pub leases: u32,
    /// KV blocks held for requests and leases.
    pub blocks_held: u32,
}

/// `GET /v1/state` of a worker agent: what routers and operators need to know about it now.
///
/// May gain fields: readers ignore those they don't know, so that workers and routers can be upgraded one by one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// Name.
    pub worker: WorkerId,
    /// Current life; `None` before the first registration.
    pub epoch: Option<Epoch>,
    /// Pool.
    pub pool: PoolName,
    /// Role.
    pub role: Role,
    /// `joining`, `ready`, `draining` or `unhealthy`.
    pub state: String,
    /// Operating-system process id.
    pub pid: u32,
    /// Drawn when the process began: in containers every process has the same `pid`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<u64>,
    /// Requests the engine is working on.
    pub requests_running: u32,
    /// Requests waiting for room.
    pub requests_waiting: u32,
    /// Prompt tokens queued or being computed.
    pub prefill_tokens_pending: u64,
    /// KV blocks by state.
    pub kv_blocks: BlockCounts,
    /// How many of the `shared` ones no request references: they are as good as free.
    #[serde(default)]
    pub kv_evictable: u32,
    /// Prompt tokens computed since the process started.
    #[serde(default)]
    pub prefilled_tokens: u64,
    /// Prompt tokens that a request brings to compute (decaying mean), once known.
    #[serde(default)]
    pub prompt_tokens: Option<f64>,
    /// Measured prefill speed (decaying mean), once known.
    pub prefill_tokens_per_s: Option<f64>,
    /// Measured time between tokens of one stream (decaying mean), once known.
    pub itl_ms: Option<f64>,
    /// Paths to the peers used so far.
    pub paths: Vec<PathStatus>,
    /// The last thing that went wrong, for people.
    pub last_error: Option<String>,
    /// Milliseconds since that went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error_ago_ms: Option<u64>,
    /// Milliseconds since this life began, once it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_ms: Option<u64>,
    /// Of a worker beside a server of another project: milliseconds since nobody was found to listen there, when that last
    /// began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_gone_ms: Option<u64>,
    /// What it waits for, while it drains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainStatus>,
}

/// A change of a worker's prefix cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum KvEvent {
    /// These full blocks are now cached, each following the one before it; the first follows `parent`.
    Stored {
        /// Chain hash before the first of `blocks`.
        parent: BlockHash,
        /// Chain hashes.
        blocks: Vec<BlockHash>,
    },
    /// These blocks were evicted.
    Removed {
        /// Chain hashes.
        blocks: Vec<BlockHash>,
    },
    /// The whole cache was dropped.
    Cleared,
}

/// Where a worker keeps cached blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvTier {
    /// In the memory of its accelerator, ready for use.
    #[default]
    Device,
    /// In the memory of its host.
    Host,
    /// In storage it shares with others.
    Remote,
}

/// One line of `GET /v1/kv/events?since=SEQ`.
///
/// May gain fields: readers ignore those they don't know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvEventBatch {
    /// The worker's life.
    pub epoch: Epoch,
    /// Number of the last event in this line; the next line starts at `seq + 1` unless it is a snapshot.
    pub seq: u64,
    /// Whether `events` replace everything known about this worker (the history did not reach back to `since`).
    pub snapshot: bool,
    /// Tokens per block of the hashes.
    pub block_tokens: u32,
    /// How the blocks are hashed.
    #[serde(default)]
    pub scheme: HashScheme,
    /// Where the blocks were stored or removed. A snapshot of several tiers is one line for each, only the first of
    /// which says `snapshot`.
    #[serde(default)]
    pub tier: KvTier,
    /// The changes, oldest first.
    pub events: Vec<KvEvent>,
}
