//! What of CUDA works on this machine, for `baton doctor`.

use std::ffi::c_int;

use cudarc::driver::sys::CUdevice_attribute;

use super::owners::Gpu;
use super::raw::{self, Cuda};
use super::{chain, describe, nvrtc};
use crate::device::Unavailable;
use crate::probe::Probe;

/// `CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED`: newer than the declarations used.
pub(super) const DMA_BUF_SUPPORTED: c_int = 124;

/// Looks for the driver, the GPUs, how network cards reach them, and the compiler. Makes nothing and allocates nothing.
pub fn probe() -> Vec<Probe> {
    let mut found = match raw::driver() {
        Ok(cuda) => gpus(cuda),
        Err(Unavailable { what, remedy }) => vec![Probe::fails("cuda driver", what, remedy)],
    };
    found.push(compiler());
    found
}

fn compiler() -> Probe {
    let found = nvrtc::version().and_then(|version| Ok((version, nvrtc::architectures()?)));
    match found {
        Ok(((major, minor), known)) => {
            let range = known.iter().min().zip(known.iter().max());
            let range = range.map_or_else(String::new, |(min, max)| format!(", for sm_{min} to sm_{max}"));
            Probe::works("cuda compiler", format!("NVRTC {major}.{minor}{range}"))
        }
        Err(error) => {
            let remedy = match &error {
                nvrtc::CompileError::Unavailable(unavailable) => unavailable.remedy.clone(),
                _ => "install another version of NVRTC".to_owned(),
            };
            let why =
                format!("{}; digests are computed by the processor, blocks are host-buffered", chain(&error));
            Probe::fails("cuda compiler", why, remedy)
        }
    }
}

fn gpus(cuda: &'static Cuda) -> Vec<Probe> {
    let mut version = 0;
    // SAFETY: the pointer is valid for the call.
    let asked = unsafe { cuda.cuDriverGetVersion(&raw mut version) };
    let mut found = vec![match asked {
        Ok(()) => Probe::works("cuda driver", format!("CUDA {}.{}", version / 1000, version % 1000 / 10)),
        Err(error) => Probe::fails("cuda driver", error.to_string(), "see nvidia-smi"),
    }];
    let gpus = Gpu::count(cuda).and_then(|count| (0..count).map(|ordinal| Gpu::get(cuda, ordinal)).collect());
    let gpus: Vec<Gpu> = match gpus {
        Ok(gpus) => gpus,
        Err(error) => {
            found.push(Probe::fails("cuda GPUs", error.to_string(), "see nvidia-smi"));
            return found;
        }
    };
    if gpus.is_empty() {
        found.push(Probe::fails("cuda GPUs", "the driver shows none", "check CUDA_VISIBLE_DEVICES"));
    }
    for gpu in &gpus {
        let name = format!("cuda GPU {}", gpu.ordinal);
        found.push(match describe(gpu) {
            Ok(detail) => Probe::works(name, detail),
            Err(error) => Probe::fails(name, error.to_string(), "see nvidia-smi"),
        });
        found.push(network(gpu));
        found.extend(peers(gpu, &gpus));
    }
    found
}

/// How network cards reach a GPU.
fn network(gpu: &Gpu) -> Probe {
    let name = format!("cuda GPU {} to network cards", gpu.ordinal);
    let dmabuf = gpu.attribute_number(DMA_BUF_SUPPORTED).unwrap_or(0) != 0;
    let rdma = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED;
    let rdma = gpu.attribute(rdma).unwrap_or(0) != 0;
    match (dmabuf, raw::dmabuf(), rdma) {
        (true, Ok(_), _) => Probe::works(name, "dma-buf"),
        (_, _, true) => Probe::works(name, "by address, with the module nvidia-peermem; no dma-buf"),
        (true, Err(why), false) => Probe::fails(name, why, "install a driver for CUDA 11.7 or later"),
        (false, _, false) => Probe::fails(
            name,
            "the driver neither exports its memory as a dma-buf nor supports GPUDirect RDMA",
            "use a data-centre GPU with the open kernel modules (Ubuntu: nvidia-driver-NNN-server-open)",
        ),
    }
}

/// Which other GPUs of this machine one reaches.
fn peers(gpu: &Gpu, all: &[Gpu]) -> Option<Probe> {
    let others: Vec<&Gpu> = all.iter().filter(|other| other.ordinal != gpu.ordinal).collect();
    let reached = others.iter().filter(|other| gpu.reaches(other).unwrap_or(false));
    let reached: Vec<String> = reached.map(|other| other.ordinal.to_string()).collect();
    let name = format!("cuda GPU {} to other GPUs", gpu.ordinal);
    match (others.len(), reached.as_slice()) {
        (0, _) => None,
        (_, []) => {
            Some(Probe::fails(name, "reaches none directly", "NVLink, or PCIe without access control (ACS)"))
        }
        (_, reached) => Some(Probe::works(name, format!("reaches {}", reached.join(", ")))),
    }
}
