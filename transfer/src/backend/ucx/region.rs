//! Registered memory.

use std::ffi::c_void;
use std::time::Instant;

use baton_ucx_sys::{
    UCP_MEM_MAP_PARAM_FIELD_ADDRESS, UCP_MEM_MAP_PARAM_FIELD_LENGTH, UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE,
    UCP_MEM_MAP_PARAM_FIELD_PROT, UCP_MEM_MAP_PROT_LOCAL_READ, UCP_MEM_MAP_PROT_LOCAL_WRITE,
    UCP_MEM_MAP_PROT_REMOTE_READ, UCP_MEM_MAP_PROT_REMOTE_WRITE, UCS_MEMORY_TYPE_CUDA, UCS_MEMORY_TYPE_HOST,
    UCS_OK, Zeroed, ucp_mem_h, ucp_mem_map_params_t,
};

use super::config::Context;
use super::{Access, DriverError, MemorySpan};
use crate::memory::Place;

/// A registration. It keeps its memory, and is unmapped by [`Region::unmap`] once nothing uses it.
pub(super) struct Region {
    pub(super) span: MemorySpan,
    pub(super) access: Access,
    pub(super) memory: ucp_mem_h,
    /// What a peer must know to have this served as messages.
    pub(super) secret: u128,
    /// Operations under way on it.
    pub(super) in_use: usize,
    /// Since when it is deregistered, and kept only for what is under way.
    pub(super) gone: Option<Instant>,
}

impl Region {
    pub(super) fn map(context: &Context, span: &MemorySpan, access: Access) -> Result<Self, DriverError> {
        let kind = memory_type(span.place()).map_err(|why| DriverError {
            what: why,
            remedy: "move such memory through host memory".to_owned(),
        })?;
        if kind == UCS_MEMORY_TYPE_CUDA {
            context.cuda()?;
        }
        let mut params = ucp_mem_map_params_t::zeroed();
        params.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS
            | UCP_MEM_MAP_PARAM_FIELD_LENGTH
            | UCP_MEM_MAP_PARAM_FIELD_PROT
            | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
        params.address = std::ptr::with_exposed_provenance_mut::<c_void>(span.address());
        params.length = span.len();
        params.memory_type = kind;
        params.prot = UCP_MEM_MAP_PROT_LOCAL_READ
            | UCP_MEM_MAP_PROT_LOCAL_WRITE
            | match access {
                Access::Local => 0,
                Access::RemoteRead => UCP_MEM_MAP_PROT_REMOTE_READ,
                Access::RemoteWrite => UCP_MEM_MAP_PROT_REMOTE_WRITE,
            };
        let mut memory = std::ptr::null_mut();
        // SAFETY: the span is memory of its kind for as long as the clone of it that goes into the region, which
        // outlives the mapping.
        let status = unsafe { (context.api.ucp_mem_map)(context.handle, &raw const params, &raw mut memory) };
        if status != UCS_OK {
            return Err(context.error("register memory", status));
        }
        Ok(Self { span: span.clone(), access, memory, secret: 0, in_use: 0, gone: None })
    }

    /// Where `[offset, offset + len)` is.
    pub(super) fn at(&self, offset: u64, len: usize) -> Option<usize> {
        let offset = usize::try_from(offset).ok()?;
        let end = offset.checked_add(len)?;
        (end <= self.span.len()).then(|| self.span.address() + offset)
    }

    pub(super) fn is_host(&self) -> bool {
        self.span.place() == Place::Host
    }

    pub(super) fn memory_type(&self) -> i32 {
        memory_type(self.span.place()).unwrap_or(UCS_MEMORY_TYPE_HOST)
    }

    /// Ends the registration; its memory may go after this.
    pub(super) fn unmap(self, context: &Context) {
        // SAFETY: mapped in `map`, unmapped once, and no operation uses it (`in_use`).
        unsafe { (context.api.ucp_mem_unmap)(context.handle, self.memory) };
    }
}

fn memory_type(place: Place) -> Result<i32, String> {
    match place {
        Place::Host => Ok(UCS_MEMORY_TYPE_HOST),
        Place::Cuda(_) => Ok(UCS_MEMORY_TYPE_CUDA),
        Place::Neuron(_) => Err("UCX knows no memory of Neuron devices".to_owned()),
    }
}
