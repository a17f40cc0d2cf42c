//! `shm`: the peer's memory, mapped read-only, copied from directly.
//!
//! Peers meet at a Unix socket in the abstract namespace, so that nothing is left on disk however a process ends.
//! The owner passes its control memory and, when asked, its regions, all sealed against writing and shrinking by
//! others. A reader needs no word with the owner per read: it looks for the epoch and the grant in the control
//! memory before and after it copies. The open socket is the sign of life.
//!
//! What cannot be mapped, such as memory that an engine allocated itself, is copied by the kernel instead, by its
//! address in the owner (`process_vm_readv`, [`cma`]): as a backend of its own (`cma`) for every region, or under `shm` for the
//! regions that need it. Everything else is the same.
//!
//! A write goes the same way round: the writer lends its memory, and the owner of the granted ranges copies from it
//! ([`take`]), so that nobody but the owner ever writes there.
//!
//! A grant is checked by handoff here, not by range: a process that may map a region can read all of it. That is
//! why only processes of the same user are let in.

mod cma;
pub(crate) mod control;
pub(crate) mod link;
mod pass;
mod regions;
pub(crate) mod serve;
mod take;

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::SocketAddr;

pub use self::cma::probe as probe_cma;

use crate::agent::RegionId;

/// Stands for the control memory where regions are asked for: no region has this number.
const CONTROL: RegionId = RegionId(u32::MAX);

/// The address of the socket of the process `incarnation`.
fn socket_address(incarnation: u128) -> std::io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(socket_name(incarnation))
}

fn socket_name(incarnation: u128) -> String {
    format!("baton-transfer-{incarnation:032x}")
}
