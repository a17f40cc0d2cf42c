//! The worker agent: what runs next to one engine and makes it part of a fleet.
//!
//! ```text
//!  router ──generate, prefill──► http ──sequences──► engine_thread ──► Engine (one thread, one owner)
//!                                 │                       ▲
//!                                 └──► driver ──imported──┘
//!  peers ◄─tickets, wants, status──► (one task owns handoff::Desk; I/O runs beside it)
//!                                 └──► transfer: Exporter, Importer ◄── blocks ──► peers
//!  conductor ◄── Membership, Client ── run (build, join, serve, drain, leave)
//! ```
//!
//! Where a server of another project computes, [`sidecar`] stands beside it instead of all this.
//!
//! Invariants:
//! 1. The state of every handoff lives in one place, [`handoff::Desk`], which does no I/O and reads no clock.
//! 2. The engine's thread waits for nobody but its own channel; no slow client, peer or transfer holds it up.
//! 3. Whatever is reserved has an owner with a deadline: a request's task, a handoff's lease, an export's lease. An
//!    audit looks for what has none every five seconds.
//! 4. Blocks that a read may still write are neither computed into nor reused until the read is confirmed gone.
//! 5. Every message names the lives of both workers; one of another life changes nothing and is counted.
//!
//! What is absent: no text and no tokenizer (routers deal in them), no trust in anything a message says, no file and no
//! environment variable is read but the model directory.
#![forbid(unsafe_code)]

pub mod arena;
pub mod driver;
pub mod engine_thread;
pub mod handoff;
mod http;
mod in_flight;
pub mod inbox;
pub mod kv_log;
mod listen;
mod member;
pub mod metadata_cache;
pub mod meter;
pub mod metrics;
pub mod options;
pub mod path;
pub mod peer;
pub mod run;
pub mod sidecar;
pub mod validate;

pub use options::{OptionsError, WorkerOptions};
pub use run::{RunError, Stop, run};
pub use sidecar::{SidecarError, SidecarOptions, SidecarOptionsError};
