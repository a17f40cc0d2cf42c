//! Hand-kept bindings of UCX, opened at run time: only what Baton's transfers use.
//!
//! Nothing links to UCX, so one binary runs with and without it. [`Api::load`] opens `libucp.so.0` and takes the
//! functions of [`Api`] from it and from the libraries it brings along (`libucs`, `libucm`).
//!
//! The structures are those of UCX 1.13 (Debian 12), whose offsets are the same in 1.22. Later versions only add at
//! the end, so every structure ends in spare zeroes, and UCX looks only at fields whose bit is in the mask.
//! `layout.c` prints the offsets of the installed headers, and a test compares them.

mod abi;
mod load;

pub use abi::*;
pub use load::{Api, LoadError};
