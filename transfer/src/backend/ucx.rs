//! The UCX driver: RDMA, GPU memory and every other transport UCX knows.
//!
//! # Two ways to move bytes
//! Where UCX found an RDMA transport, reads and writes are its one-sided `get` and `put` (a write counts once its
//! endpoint was flushed, that is, delivered). Keys are then those of the network cards, which check them.
//!
//! Everywhere else (`tcp`, and `cma` between processes of one host) UCX only *emulates* `get` and `put`: it asks the
//! peer to copy from or to whatever address the message names. Nothing checks a key there, so anybody who reaches the
//! socket reads and writes the whole process, and a request that is late by one `munmap` ends it. Those operations are
//! therefore not even switched on. Reads and writes travel as messages instead ([`messages`]): the owner looks the
//! registration up, checks its secret, its access and the range, and only then sends or stores the bytes. Large
//! answers go by rendezvous, which is one copy between two processes of a host (`cma`).
//!
//! # Fencing
//! [`Driver::deregister`] is a revocation in both modes: a network card forgets the key, an owner that checks each
//! message refuses the next one. Where RDMA switched the one-sided operations on, UCX still emulates them for a peer
//! that it reaches by `tcp` only: there `deregister` revokes nothing, and only the end of the driver does.
//!
//! A peer that takes no bytes cannot keep memory for ever: what is still on its way to it some seconds after the
//! registration ended is cut off, and its connection with it.
//!
//! # Hostile peers
//! UCX takes addresses on trust and aborts the process at odd ones. A peer's address is therefore taken apart here,
//! and UCX gets one made of the parts that are well-formed and of our own transports ([`address`]). Of RDMA transports
//! the insides of an address are left to UCX; there is no RDMA on loopback, and elsewhere who names an address knows
//! the token. `connect` goes to whatever IP address and port a peer names.
//!
//! What remains is UCX itself: its `tcp` transport authenticates nobody and takes what comes on its port on trust. Who
//! reaches that port can end the process. So it belongs on loopback of a host without hostile users, or on a network
//! of trusted hosts.
//!
//! # UCX inside a server
//! See [`baton_ucx_sys::Api::load`]: no signal handlers, no patched `mmap`, errors into the log. Without the patches UCX has no
//! registration cache. All memory is registered here and handed over with every operation, which spares UCX from
//! registering it again; but its one-sided operations of 1.13 do not always take what was handed over, and register
//! the memory of each operation anew over InfiniBand.

mod address;
pub(crate) mod bare;
mod config;
mod core;
mod devices;
mod driver;
mod frame;
mod library;
mod messages;
mod peer;
mod region;
mod slots;

use std::net::{IpAddr, Ipv4Addr};

use self::config::Context;
use self::driver::UcxDriver;
use super::fabric::PIECES_MAX;
use super::fabric::driver::{
    ADDRESS_MAX_BYTES, Access, CALL_MAX, Done, Driver, DriverError, DriverInfo, KEY_MAX_BYTES, LocalId,
    LocalRange, PeerId, Piece, PiecesMax, PostError, REQUEST_MAX_BYTES, RemoteId,
};
use crate::backend::handlers;
use crate::memory::MemorySpan;
use crate::probe::Probe;

/// Longest one-sided operation.
const ONE_SIDED_MAX: usize = 1 << 30;

/// What UCX may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UcxOptions {
    /// The address the worker is bound to: its interface is used, and RDMA devices beside it unless it is loopback.
    pub bind: IpAddr,
    /// UCX's names of transports (`UCX_TLS`); none: all that can tell when a peer fails.
    pub transports: Option<String>,
}

impl Default for UcxOptions {
    fn default() -> Self {
        Self { bind: Ipv4Addr::LOCALHOST.into(), transports: None }
    }
}

/// Opens UCX.
pub(crate) fn open(options: &UcxOptions) -> Result<Box<dyn Driver + Send>, DriverError> {
    let driver = handlers::keep(|| UcxDriver::open(library::get()?, options, None))?;
    Ok(Box::new(driver))
}

/// What of UCX works here.
pub(crate) fn probe(options: &UcxOptions) -> Vec<Probe> {
    let opened = handlers::keep(|| library::get().and_then(|api| UcxDriver::open(api, options, None)));
    let driver = match opened {
        Ok(driver) => driver,
        Err(error) => return vec![Probe::fails("ucx", error.what, error.remedy)],
    };
    let context = &driver.core.context;
    let mut found = vec![Probe::works("ucx", driver.info.detail.clone())];
    found.push(if context.one_sided {
        Probe::works("ucx rdma", "reads and writes are one-sided")
    } else {
        Probe::fails(
            "ucx rdma",
            "no RDMA transport: reads and writes travel as messages",
            "bind to an address that is not loopback on a host with RDMA devices, with a UCX built for them",
        )
    });
    found.push(match context.cuda() {
        Ok(()) => Probe::works("ucx cuda", "memory of GPUs can be registered"),
        Err(error) => Probe::fails("ucx cuda", error.what, error.remedy),
    });
    found
}

fn describe(context: &Context, options: &UcxOptions) -> DriverInfo {
    let networks = context.resources.iter().filter(|name| !name.ends_with("/memory"));
    let rails = networks.filter_map(|name| name.split_once('/')).map(|(_, device)| device);
    let rails = rails.collect::<std::collections::BTreeSet<_>>().len().max(1);
    let (way, longest) =
        if context.one_sided { ("one-sided", ONE_SIDED_MAX) } else { ("messages", messages::BYTES_MAX) };
    let cuda = context.cuda().map_err(|error| format!("{}: {}", error.what, error.remedy));
    DriverInfo {
        detail: format!("UCX {}, {}, {way}", context.version(), context.resources.join(" ")),
        wire: format!(
            "ucx {}.{} {way} {} {}",
            context.version.0,
            context.version.1,
            messages::VERSION,
            config::TCP_PIECE
        ),
        same_host: options.bind.is_loopback(),
        read: true,
        write: true,
        emulated: !context.one_sided,
        message_max: messages::BYTES_MAX,
        requests: true,
        op_max: longest,
        rails,
        device_memory: vec![
            ("cuda", cuda),
            ("neuron", Err("UCX knows no memory of Neuron devices".to_owned())),
        ],
    }
}

#[cfg(test)]
mod tests;
