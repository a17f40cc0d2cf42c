//! Device memory: what has to be loaded for it, and why it cannot be registered.

use std::sync::OnceLock;

use super::object::Info;
use crate::memory::Place;
use baton_libfabric_sys::abi::{FI_HMEM, FI_HMEM_CUDA, FI_HMEM_NEURON, FI_HMEM_SYSTEM};

/// Of the CUDA driver.
const CUDA: &str = "libcuda.so.1";
/// Of the Neuron runtime.
const NEURON: &str = "libnrt.so.1";

/// Loads what libfabric will look for, before it does: at the first call of `fi_getinfo`, and only then.
pub(super) fn load_runtimes() {
    let _ = cuda();
    let _ = neuron();
}

/// Whether there is any device at all that memory could be of.
pub(super) fn any_loadable() -> bool {
    cuda().is_ok() || neuron().is_ok()
}

fn cuda() -> &'static Result<(), String> {
    static LOADED: OnceLock<Result<(), String>> = OnceLock::new();
    LOADED.get_or_init(|| load(CUDA))
}

fn neuron() -> &'static Result<(), String> {
    static LOADED: OnceLock<Result<(), String>> = OnceLock::new();
    LOADED.get_or_init(|| crate::device::neuron::load().map_err(|missing| missing.what))
}

/// Loads a library for everybody in the process, and for good.
fn load(name: &str) -> Result<(), String> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    // SAFETY: the vendor's runtime: its initialisers set up its own state only.
    let library = unsafe { Library::open(Some(name), RTLD_NOW | RTLD_GLOBAL) };
    library.map(std::mem::forget).map_err(|error| baton_libfabric_sys::reason(&error))
}

/// The library's number of a kind of memory, and of the device.
pub(super) fn interface(place: Place) -> (i32, i32) {
    match place {
        Place::Host => (FI_HMEM_SYSTEM, 0),
        Place::Cuda(device) => (FI_HMEM_CUDA, device as i32),
        Place::Neuron(device) => (FI_HMEM_NEURON, device as i32),
    }
}

/// What stands in the way of registering such memory, and what would help.
pub(super) fn obstacle(info: &Info, place: Place) -> Option<(String, &'static str)> {
    let (loaded, runtime, remedy) = match place {
        Place::Host => return None,
        Place::Cuda(_) => (cuda(), CUDA, "install the NVIDIA driver"),
        Place::Neuron(_) => {
            (neuron(), NEURON, "install the Neuron runtime of AWS (package aws-neuronx-runtime-lib)")
        }
    };
    if let Err(reason) = loaded {
        return Some((format!("{} memory needs {runtime}: {reason}", place.kind()), remedy));
    }
    if !info.has_cap(FI_HMEM) {
        let provider = info.provider();
        let what = format!("the provider {provider} of this libfabric takes host memory only");
        return Some((what, "use the EFA installer of AWS, whose libfabric takes device memory"));
    }
    None
}

/// All kinds, and what stands in the way of each.
pub(super) fn obstacles(info: &Info) -> [(&'static str, Option<(String, &'static str)>); 2] {
    [Place::Cuda(0), Place::Neuron(0)].map(|place| (place.kind(), obstacle(info, place)))
}

/// All kinds, for people.
pub(super) fn kinds(info: &Info) -> Vec<(&'static str, Result<(), String>)> {
    let said = |found: Option<(String, &str)>| {
        found.map_or(Ok(()), |(what, remedy)| Err(format!("{what}; {remedy}")))
    };
    obstacles(info).into_iter().map(|(kind, found)| (kind, said(found))).collect()
}
