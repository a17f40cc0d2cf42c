//! What of this machine's network libraries and devices works, and why the rest does not: for `baton doctor`.

use crate::backend::libfabric::{self, LibfabricOptions};
use crate::backend::plugin::{self, PluginOptions};
use crate::backend::ucx::{self, UcxOptions};
use crate::device;

/// One thing that was tried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// What it is: a library, a provider, a transport, a device.
    pub name: String,
    /// Whether it can be used.
    pub works: bool,
    /// What was found, or why it cannot be used.
    pub detail: String,
    /// What would help, such as the package to install.
    pub remedy: Option<String>,
}

impl Probe {
    /// Something that works.
    pub fn works(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { name: name.into(), works: true, detail: detail.into(), remedy: None }
    }

    /// Something that does not, and what would help.
    pub fn fails(name: impl Into<String>, why: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name: name.into(), works: false, detail: why.into(), remedy: Some(remedy.into()) }
    }
}

/// Providers of libfabric and the device memory they take.
pub fn libfabric(options: &LibfabricOptions) -> Vec<Probe> {
    libfabric::probe(options)
}

/// UCX, and what of it is there.
pub fn ucx(options: &UcxOptions) -> Vec<Probe> {
    ucx::probe(options)
}

/// A plugin: loaded, opened and closed again.
pub fn plugin(options: &PluginOptions) -> Vec<Probe> {
    plugin::probe(options)
}

/// Memory of other processes, copied by the kernel.
pub fn cma() -> Probe {
    crate::backend::shm::probe_cma()
}

/// NVIDIA GPUs.
pub fn cuda() -> Vec<Probe> {
    device::cuda::probe()
}

/// AWS Neuron devices.
pub fn neuron() -> Vec<Probe> {
    device::neuron::probe()
}
