//! Harness for tests that drive the real `baton` binary: start a fleet, talk to it, break it, see it gone.
//!
//! Every wait is on a value with a deadline. A fleet that is dropped is asked to stop and must leave no process
//! behind; a test that ends earlier than its fleet is a failed test.
#![forbid(unsafe_code)]

pub mod access;
pub mod binary;
pub mod client;
pub mod etcd;
pub mod fleet;
pub mod load;
pub mod part;
pub mod ports;
pub mod process;
pub mod prompts;
pub mod scenario;
pub mod tamper;

pub use client::{Answer, Client, Prompt};
pub use fleet::{Fleet, FleetOptions};
pub use part::Part;
