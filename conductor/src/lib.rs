//! The conductor: who is in the fleet, and how the rest of the fleet gets to know.
//!
//! ```text
//!  worker ── Membership ──POST /v1/workers, keepalive──►┐
//!                                                       │ registry ──► Store (embedded, or etcd)
//!  router ◄── Client ◄──GET /v1/watch (NDJSON)──────────┘    ▲            │ watch
//!                                                            └── mirror ◄─┘
//! ```
//!
//! Invariants: one revision order; at most one live epoch per worker name; epochs only grow, also over restarts;
//! a client's view is never emptied because the conductor is away; nothing here is on the path of a request.
//!
//! Called by `worker-agent` ([`Membership`]), `router` and the command line ([`Client`]), and the `conductor`
//! subcommand ([`server::serve`]).
#![forbid(unsafe_code)]

pub mod api;
mod autoscale;
pub mod client;
mod dice;
#[cfg(test)]
#[expect(unreachable_pub, dead_code, reason = "shared with the end-to-end tests, which use all of it")]
#[path = "../../integration/src/etcd.rs"]
mod etcd_servers;
pub mod http;
mod leader;
pub mod membership;
mod mirror;
#[cfg(test)]
#[expect(unreachable_pub, reason = "shared as `etcd_servers` is, which takes its ports from it")]
#[path = "../../integration/src/ports.rs"]
mod ports;
mod reconcile;
pub mod record;
mod registry;
pub mod server;
pub mod store;
#[cfg(test)]
mod test_authority;
mod tls;

pub use client::{Client, ClientOptions, View};
pub use membership::{JoinError, Membership, MembershipOptions, Registration};
pub use record::{Load, WorkerRecord, WorkerState};
pub use server::{ConductorOptions, PoolOptions, ServeError, StoreOptions, serve};
pub use tls::{ServerCertificates, TlsError};
