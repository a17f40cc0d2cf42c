//! The router of Baton: one OpenAI-compatible endpoint in front of a fleet of prefill and decode workers.
//!
//! ```text
//! client --HTTP--> server -> gateway -> request (parse, validate) -> model (template, tokenize)
//!                                |
//!                                v
//!        fleet (who is there) -> schedule (choose P and D) -> dispatch (both calls, replay)
//!                                                                 |
//! client <--SSE/JSON-- answer (detokenize, stop strings, encode) <+
//! ```
//!
//! Where servers of other projects generate, [`forward`] passes requests on to them instead of all that comes after the
//! gateway.
//!
//! Invariants: requests begun = ok + client errors + refused + failed + in flight (`account`); the tokens of a stream
//! are at every moment a prefix of what one undisturbed engine would have produced (`dispatch`); text shown is always
//! a prefix of the text of all tokens (`model::decode`, `stop`). What is absent: this crate never sees KV bytes,
//! tickets or transfer metadata, and no file but `reply` knows a status code.
#![forbid(unsafe_code)]

mod account;
mod admit;
mod alarm;
mod answer;
mod body;
mod clock;
mod dispatch;
mod entropy;
mod fleet;
mod forward;
mod gateway;
pub mod index;
pub mod measure;
mod metrics;
mod model;
mod options;
mod reply;
mod request;
mod room;
mod routes;
mod schedule;
mod search;
mod server;
mod stop;
mod tenant;

pub use fleet::{Member, Roster, RosterFeed};
pub use forward::{ForwardOptions, ForwardPool, ServersError};
pub use model::{ModelError, inspect};
pub use options::{Limits, ModelOptions, RouterOptions, Timeouts};
pub use server::{ServeError, Stop, serve, serve_with};
pub use tenant::{AuthError, JwksError, MintError, MintedKey, mint};
