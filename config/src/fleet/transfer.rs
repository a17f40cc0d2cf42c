//! `pools[].transfer:` of the fleet document.

use std::net::IpAddr;
use std::time::Duration;

use crate::choice::choice;
use crate::units::{ByteRate, Bytes};

choice! {
    /// Which way KV blocks take between a worker's memory and the wire.
    TransferPath {
        /// The best one the memory allows.
        Auto => "auto",
        /// Through registered host memory, copied in chunks.
        HostBuffered => "host_buffered",
        /// From registered GPU memory.
        GpuDirect => "gpu_direct",
        /// From registered memory, whichever kind it is.
        Direct => "direct",
    }
}

choice! {
    /// What moves bytes between two workers.
    BackendKind {
        /// Shared memory of one host.
        Shm => "shm",
        /// TCP streams.
        Tcp => "tcp",
        /// libfabric (EFA, verbs).
        Libfabric => "libfabric",
        /// UCX.
        Ucx => "ucx",
        /// Files.
        File => "file",
        /// An object store.
        Object => "object",
    }
}

choice! {
    /// Whether the receiver verifies a digest of every block before it is used.
    Integrity {
        /// It does.
        Digest => "digest",
        /// It trusts the wire.
        Off => "off",
    }
}

/// How KV blocks leave and reach the workers of a pool.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TransferSpec {
    /// Which way.
    pub path: TransferPath,
    /// Which backends, best first; never empty, no repeats.
    pub backends: Vec<BackendKind>,
    /// Provider of libfabric, such as `efa`.
    pub provider: Option<String>,
    /// Whether blocks are verified.
    pub integrity: Integrity,
    /// TCP streams per peer.
    pub streams: usize,
    /// Address the transfer agent listens on; the port is chosen free.
    pub bind: IpAddr,
    /// Address peers connect to; `bind` without.
    pub advertise: Option<IpAddr>,
    /// Registered host memory that blocks of a device pass through.
    pub staging: Bytes,
    /// Copy speed of the emulated device; unlimited without.
    pub device_bandwidth: Option<ByteRate>,
    /// Time to reach a peer.
    pub connect_timeout: Duration,
    /// Time a transfer may go without progress.
    pub stall_timeout: Duration,
}
