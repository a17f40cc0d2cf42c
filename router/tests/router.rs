//! The router over real sockets, with workers that misbehave as told.
#![cfg(test)]

#[path = "support/fake_frames.rs"]
mod fake_frames;
#[path = "support/fake_provider.rs"]
mod fake_provider;
#[path = "support/fake_server.rs"]
mod fake_server;
#[path = "support/fake_worker.rs"]
mod fake_worker;
#[path = "support/harness.rs"]
mod harness;
#[path = "support/model_dir.rs"]
mod model_dir;

#[path = "router/api.rs"]
mod api;
#[path = "router/bad_fields.rs"]
mod bad_fields;
#[path = "router/bad_input.rs"]
mod bad_input;
#[path = "router/faults.rs"]
mod faults;
#[path = "router/forward.rs"]
mod forward;
#[path = "router/frames.rs"]
mod frames;
#[path = "router/handoffs.rs"]
mod handoffs;
#[path = "router/http2.rs"]
mod http2;
#[path = "router/limits.rs"]
mod limits;
#[path = "router/messages.rs"]
mod messages;
#[path = "router/placement.rs"]
mod placement;
#[path = "router/responses.rs"]
mod responses;
#[path = "router/shapes.rs"]
mod shapes;
#[path = "router/smuggling.rs"]
mod smuggling;
#[path = "router/streams.rs"]
mod streams;
#[path = "router/suspects.rs"]
mod suspects;
#[path = "router/tenants.rs"]
mod tenants;
#[path = "router/tokens.rs"]
mod tokens;
#[path = "router/wrong_types.rs"]
mod wrong_types;
