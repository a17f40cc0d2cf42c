//! The UCX driver: RDMA, GPU memory and every other transport UCX knows.

use std::net::IpAddr;

/// How UCX is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UcxOptions {
    /// Address of the interface to use, for transports that have addresses.
    pub bind: IpAddr,
    /// Transports, such as `rc,cuda_ipc,tcp`; those that suit the machine without.
    pub transports: Option<String>,
}

impl Default for UcxOptions {
    fn default() -> Self {
        Self { bind: IpAddr::from([127, 0, 0, 1]), transports: None }
    }
}
