//! The libfabric driver: EFA and every other provider with reliable datagrams and one-sided operations.

use std::net::IpAddr;

/// How libfabric is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibfabricOptions {
    /// The provider, such as `efa` or `tcp;ofi_rxm`; the best one found without.
    pub provider: Option<String>,
    /// Network interfaces used side by side, at most.
    pub rails: usize,
    /// Address of the interface to use, for providers that have addresses.
    pub bind: IpAddr,
}

impl Default for LibfabricOptions {
    fn default() -> Self {
        Self { provider: None, rails: 16, bind: IpAddr::from([127, 0, 0, 1]) }
    }
}
