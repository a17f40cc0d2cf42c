//! Backends that move bytes with one-sided operations of a network library: libfabric, UCX, plugins.
//!
//! ```text
//! reader: Session ── FabricLink ── progress thread ── Driver ══ fabric ══ Driver ── progress thread ── Served :owner
//!                        └────────── control connection (attach, keys, windows, fences) ──────────┘
//! ```
//!
//! Requests for blocks go over the fabric, where the library has requests, and are answered by the owner's progress
//! thread: see [`serve::requests`].
//!
//! A [`driver::Driver`] is all that a library needs to provide, and all that is unsafe. Everything above it is shared.

pub(crate) mod batch;
#[expect(unsafe_code, reason = "registers a descriptor with the runtime")]
mod bell;
pub(crate) mod driver;
pub(crate) mod fabrics;
pub(crate) mod link;
pub(crate) mod registry;
pub(crate) mod serve;
mod table;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod thread;
mod window;

use self::driver::{DriverInfo, PiecesMax};
use self::window::Bounds;
use crate::agent::AgentOptions;

/// Bytes of one operation where a peer is reached over several rails: small enough that a block uses all of them.
const STRIPE_BYTES: usize = 256 << 10;
/// Bytes of one operation over a single rail.
const OP_BYTES: usize = 1 << 20;
/// Most blocks of one operation.
pub(crate) const PIECES_MAX: usize = 8;
/// Of all buffers of a kind, how many one peer may have: one part in so many.
const SHARES: usize = 4;

/// Bounds of one fabric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FabricLimits {
    /// Operations posted to one peer at once.
    pub(crate) ops_per_peer: usize,
    /// Bytes posted to one peer at once.
    pub(crate) bytes_per_peer: usize,
    /// Bytes registered with the library.
    pub(crate) registered_bytes: u64,
    /// Registrations.
    pub(crate) regions: usize,
}

impl Default for FabricLimits {
    fn default() -> Self {
        Self { ops_per_peer: 64, bytes_per_peer: 16 << 20, registered_bytes: 1 << 40, regions: 256 }
    }
}

impl FabricLimits {
    fn of(options: &AgentOptions) -> Self {
        let limits = &options.limits;
        Self {
            ops_per_peer: limits.ops_per_peer,
            bytes_per_peer: usize::try_from(limits.bytes_per_peer.0).unwrap_or(usize::MAX),
            registered_bytes: limits.registered_bytes.0,
            regions: limits.regions,
        }
    }

    fn bounds(&self, info: &DriverInfo, pieces_max: PiecesMax) -> Bounds {
        let op_bytes = if info.rails > 1 { STRIPE_BYTES } else { OP_BYTES };
        Bounds {
            ops: self.ops_per_peer.max(1),
            bytes: self.bytes_per_peer.max(1),
            op_bytes: op_bytes.min(info.op_max).max(1),
            read_pieces: pieces_max.read.clamp(1, PIECES_MAX),
            write_pieces: pieces_max.write.clamp(1, PIECES_MAX),
            write_bytes: pieces_max.write_bytes,
        }
    }
}
