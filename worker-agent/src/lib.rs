//! The worker agent: what runs next to one engine and makes it part of a fleet.
#![forbid(unsafe_code)]

pub mod driver;
pub mod engine_thread;
pub mod handoff;
pub mod kv_log;
pub mod meter;
pub mod metrics;
pub mod path;
pub mod peer;
pub mod validate;
