//! Agents over real sockets and shared memory: in one process, through a proxy that breaks things, and in two.
#![cfg(test)]

mod auth;
mod devices;
mod faults;
mod foreign;
mod hostile;
mod paths;
mod processes;
mod proxy;
mod sessions;
mod support;
mod writes;
