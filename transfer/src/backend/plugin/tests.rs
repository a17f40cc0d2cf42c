//! Plugins built from C: the example at work, and everything that can be wrong with one.

mod broken;
#[expect(unsafe_code, reason = "borrows the descriptor of a driver")]
mod example;
#[expect(unsafe_code, reason = "a plugin made of Rust functions, which lies")]
mod fuzz;
mod layout;
#[expect(unsafe_code, reason = "borrows the descriptor of a driver")]
mod processes;
mod support;
