//! `pools[].engine:` of the fleet document.

use std::path::PathBuf;
use std::time::Duration;

use super::listen::{URL_EXPECTED, url};
use super::{OpenaiSpec, defaults};
use crate::choice::choice;
use crate::reader::Section;

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
    Openai(OpenaiSpec),
}

impl EngineSpec {
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
    /// Stands for the weights: the tokens and KV bytes it makes up follow from it; the same in every sim pool of a fleet.
    pub seed: u64,
    /// Whether the KV bytes are written and checked. Without it a token costs the worker next to nothing: for measuring
    /// what stands in front of it.
    pub check_kv: bool,
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

choice! {
    /// The kinds of [`EngineSpec`].
    EngineKind {
        /// [`EngineSpec::Reference`].
        Reference => "reference",
        /// [`EngineSpec::Sim`].
        Sim => "sim",
        /// [`EngineSpec::Vllm`].
        Vllm => "vllm",
        /// [`EngineSpec::Sglang`].
        Sglang => "sglang",
        /// [`EngineSpec::Openai`].
        Openai => "openai",
    }
}

impl EngineSpec {
    /// Its kind.
    pub fn kind(&self) -> EngineKind {
        match self {
            Self::Reference(_) => EngineKind::Reference,
            Self::Sim(_) => EngineKind::Sim,
            Self::Vllm(_) => EngineKind::Vllm,
            Self::Sglang(_) => EngineKind::Sglang,
            Self::Openai(_) => EngineKind::Openai,
        }
    }

    /// Replicas of a pool that does not say how many: one for each server it names.
    pub(super) fn replicas(&self) -> u32 {
        match self {
            Self::Openai(spec) if spec.urls.len() > 1 => u32::try_from(spec.urls.len()).unwrap_or(u32::MAX),
            _ => defaults::REPLICAS,
        }
    }

    pub(super) fn read(mut section: Section<'_, '_>) -> Self {
        match section.choice("kind", defaults::ENGINE) {
            EngineKind::Reference => {
                let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u64;
                let threads = section.integer("threads", 1..=1024, cores);
                let threads = usize::try_from(threads).unwrap_or(1);
                Self::Reference(ReferenceSpec { threads, limits: EngineLimits::read(&mut section) })
            }
            EngineKind::Sim => Self::Sim(SimSpec::read(&mut section)),
            EngineKind::Vllm => Self::Vllm(RemoteSpec::read(&mut section)),
            EngineKind::Sglang => Self::Sglang(RemoteSpec::read(&mut section)),
            EngineKind::Openai => Self::Openai(OpenaiSpec::read(&mut section)),
        }
    }
}

impl EngineLimits {
    fn read(section: &mut Section<'_, '_>) -> Self {
        Self {
            prefill_chunk: section.count("prefill_chunk", 1..=1_000_000, defaults::PREFILL_CHUNK),
            max_batch: section.count("max_batch", 1..=65_536, defaults::MAX_BATCH),
            max_waiting: section.count("max_waiting", 1..=1_000_000, defaults::MAX_WAITING),
            prefix_cache: section.flag("prefix_cache", defaults::PREFIX_CACHE),
        }
    }
}

impl SimSpec {
    fn read(section: &mut Section<'_, '_>) -> Self {
        const MOST: u64 = 3_600_000_000;
        let mut cost = |key, default| section.duration(key, 0..=MOST, default);
        let prefill_base = cost("prefill_us_base", defaults::SIM_PREFILL_BASE);
        let prefill_per_token = cost("prefill_us_per_token", defaults::SIM_PREFILL_PER_TOKEN);
        let prefill_per_token2 = cost("prefill_ns_per_token2", defaults::SIM_PREFILL_PER_TOKEN2);
        let decode_base = cost("decode_us_base", defaults::SIM_DECODE_BASE);
        let decode_per_seq = cost("decode_us_per_seq", defaults::SIM_DECODE_PER_SEQ);
        let decode_per_context_token =
            cost("decode_ns_per_context_token", defaults::SIM_DECODE_PER_CONTEXT_TOKEN);
        Self {
            prefill_base,
            prefill_per_token,
            prefill_per_token2,
            decode_base,
            decode_per_seq,
            decode_per_context_token,
            seed: section.integer("seed", 0..=u64::MAX, defaults::SIM_SEED),
            check_kv: section.flag("check_kv", defaults::SIM_CHECK_KV),
            limits: EngineLimits::read(section),
        }
    }
}

impl RemoteSpec {
    fn read(section: &mut Section<'_, '_>) -> Self {
        let url = section.required("url", URL_EXPECTED, url).unwrap_or_default();
        Self { url, api_key_file: section.file("api_key_file") }
    }
}
