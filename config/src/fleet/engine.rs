//! `pools[].engine:` of the fleet document.

use std::path::PathBuf;
use std::time::Duration;

/// What computes tokens in a pool.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum EngineSpec {
    /// The embedded transformer.
    Reference(ReferenceSpec),
    /// The timing model without arithmetic.
    Sim(SimSpec),
    /// A vLLM server.
    Vllm(RemoteSpec),
    /// An SGLang server.
    Sglang(RemoteSpec),
    /// Any OpenAI-compatible server; no KV handoff.
    Openai(RemoteSpec),
}

impl EngineSpec {
    /// Its word in the document.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Reference(_) => "reference",
            Self::Sim(_) => "sim",
            Self::Vllm(_) => "vllm",
            Self::Sglang(_) => "sglang",
            Self::Openai(_) => "openai",
        }
    }

    /// The batching limits of an in-process engine; `None` for servers, which have their own.
    pub fn limits(&self) -> Option<&EngineLimits> {
        match self {
            Self::Reference(spec) => Some(&spec.limits),
            Self::Sim(spec) => Some(&spec.limits),
            Self::Vllm(_) | Self::Sglang(_) | Self::Openai(_) => None,
        }
    }
}

/// Batching of an in-process engine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineLimits {
    /// Prompt tokens computed in one step at most.
    pub prefill_chunk: u32,
    /// Sequences in one step at most.
    pub max_batch: u32,
    /// Sequences waiting for room at most.
    pub max_waiting: u32,
    /// Whether finished blocks are kept for prompts with the same beginning.
    pub prefix_cache: bool,
}

/// The embedded transformer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReferenceSpec {
    /// Threads of one worker.
    pub threads: usize,
    /// Batching.
    pub limits: EngineLimits,
}

/// The timing model: a step takes `prefill_base + n * prefill_per_token + n * context * prefill_per_token2` for
/// `n` prompt tokens, and `decode_base + sequences * decode_per_seq + context * decode_per_context_token`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SimSpec {
    /// Cost of a step with prompt tokens in it.
    pub prefill_base: Duration,
    /// Cost of a prompt token.
    pub prefill_per_token: Duration,
    /// Cost of a prompt token per token before it (attention).
    pub prefill_per_token2: Duration,
    /// Cost of a step with decoding sequences in it.
    pub decode_base: Duration,
    /// Cost of a decoding sequence.
    pub decode_per_seq: Duration,
    /// Cost of a token of context of a decoding sequence.
    pub decode_per_context_token: Duration,
    /// Seeds the tokens and KV bytes it makes up; pools that hand over to each other must agree on it.
    pub seed: u64,
    /// Batching.
    pub limits: EngineLimits,
}

/// A server of another project.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RemoteSpec {
    /// `http://HOST:PORT` of it.
    pub url: String,
    /// File that holds its API key.
    pub api_key_file: Option<PathBuf>,
}
