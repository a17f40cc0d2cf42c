//! `shm`: the peer's memory, mapped read-only, copied from directly.
//!
//! Peers meet at a Unix socket in the abstract namespace, so that nothing is left on disk however a process ends.
//! The owner passes its control memory and, when asked, its regions, all sealed against writing and shrinking by
//! others. A reader needs no word with the owner per read: it looks for the epoch and the grant in the control
//! memory before and after it copies. The open socket is the sign of life.
//!
//! A grant is checked by handoff here, not by range: a process that may map a region can read all of it. That is
//! why only processes of the same user are let in.

pub(crate) mod control;
pub(crate) mod link;
mod pass;
pub(crate) mod serve;

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::SocketAddr;

/// The address of the socket of the process `incarnation`.
fn socket_address(incarnation: u128) -> std::io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(socket_name(incarnation))
}

fn socket_name(incarnation: u128) -> String {
    format!("baton-transfer-{incarnation:032x}")
}
