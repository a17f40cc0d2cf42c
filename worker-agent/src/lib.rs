//! The worker agent: what runs next to one engine and makes it part of a fleet.
#![forbid(unsafe_code)]

pub mod arena;
pub mod driver;
pub mod engine_thread;
pub mod handoff;
mod http;
pub mod kv_log;
pub mod meter;
pub mod metrics;
pub mod options;
pub mod path;
pub mod peer;
pub mod run;
pub mod validate;

pub use options::WorkerOptions;
pub use run::{RunError, Stop, run};
