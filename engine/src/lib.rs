//! Engines of Baton that run inside the worker process: a paged KV cache and continuous batching around an
//! exchangeable executor (a real transformer, or a simulation of one).
//!
//! ```text
//!  submit, imported, cancel, ...        Admitted, Prefilled, Token, Finished
//!          |                                        ^
//!          v                                        |
//!     [ engine ] -- who computes what next -- [ block_pool ]  states, prefix cache, eviction
//!          |  batch                                 |
//!          v                                        v
//!     [ executor ]: sim, reference  -- rows --> [ arena ] --> [ memory ]
//!          |  logits
//!          v
//!     [ sampler ]
//! ```
//!
//! Invariants:
//! - The tokens and logits digests of a sequence depend on its tokens, sampling and model alone: never on the other
//!   sequences of a batch, chunking, block size, layout, cache hits, preemption, or where its prompt was computed.
//! - Every block has exactly one state and, unless it is free or cached, exactly one owner.
//! - A block in the prefix cache is never written.
//! - Nothing here spawns a thread, reads a clock or waits: the owner of an [`Engine`] drives it.
//!
//! Called by the worker agent, which owns the engine's thread and the memory below the arena.

#![deny(unsafe_code)]

pub mod arena;
pub mod block_pool;
pub mod engine;
pub mod executor;
pub mod logits_digest;
pub mod memory;
mod mix;
pub mod reference;
pub mod sampler;
pub mod sim;

pub use arena::{Arena, BlockId};
pub use engine::{Engine, EngineEvent, EngineLimits, SeqId, SequenceSpec};
pub use executor::{BatchItem, ExecuteError, Executor, Forward, ModelInfo};
pub use memory::{HeapMemory, KvMemory};
pub use reference::Reference;
