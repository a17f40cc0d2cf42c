//! Vocabulary and configuration of Baton.
//!
//! Every crate speaks in the types of this one: names, epochs, byte and token counts, the geometry of a KV
//! block, and the messages a router and two worker agents exchange. It is also the only crate that reads files
//! of configuration and the environment.
#![forbid(unsafe_code)]

pub mod choice;
pub mod cidr;
pub mod environment;
pub mod fault;
pub mod fleet;
pub mod frames;
pub mod geometry;
pub mod keys;
pub mod model_shape;
pub mod names;
pub mod prefix;
pub mod protocol;
pub mod reader;
pub mod secret;
mod seldom;
pub mod units;
mod yaml;

pub use cidr::Cidr;
pub use geometry::{
    Attention, BLOCK_MAX_BYTES, BlockAt, Dtype, GeometryError, KvAxis, KvGeometry, KvLayout, KvStrides,
    SCALE_BYTES, Scales, Shard, ShardFault,
};
pub use names::{Accelerator, Epoch, HandoffId, NameError, PoolName, Role, WorkerId};
pub use seldom::Seldom;
pub use units::{ByteRate, Bytes, Tokens};
