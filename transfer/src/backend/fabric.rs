//! Backends that move bytes with one-sided operations of a network library: libfabric, UCX, plugins.
//!
//! ```text
//! reader: Session ── FabricLink ── progress thread ── Driver ══ fabric ══ Driver ── progress thread ── Served :owner
//!                        └───────────── control connection (keys, packs, fences) ─────────────┘
//! ```
//!
//! A [`driver::Driver`] is all that a library needs to provide, and all that is unsafe. Everything above it is shared.

#[expect(dead_code, reason = "the drivers come with the commits that follow")]
pub(crate) mod driver;
pub(crate) mod serve;
