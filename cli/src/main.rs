//! The `baton` binary.
#![forbid(unsafe_code)]
fn main() {}
