//! Types and constants, named as in `ucp/api/ucp.h` and `ucs/type/status.h`.
#![expect(non_camel_case_types, reason = "the names of UCX, to be found in its documentation")]
#![expect(missing_docs, reason = "documented by UCX under the same names")]

use std::ffi::{c_char, c_int, c_uint, c_void};

/// Spare words at the end of structures that grow.
pub const SPARE_WORDS: usize = 16;

pub type ucs_status_t = i8;
/// `NULL` (done), a request, or a negative status cast to a pointer.
pub type ucs_status_ptr_t = *mut c_void;

pub type ucp_config_t = *mut c_void;
pub type ucp_context_h = *mut c_void;
pub type ucp_worker_h = *mut c_void;
pub type ucp_ep_h = *mut c_void;
pub type ucp_mem_h = *mut c_void;
pub type ucp_rkey_h = *mut c_void;

pub const UCS_OK: ucs_status_t = 0;
pub const UCS_INPROGRESS: ucs_status_t = 1;
pub const UCS_ERR_NO_MESSAGE: ucs_status_t = -1;
pub const UCS_ERR_NO_RESOURCE: ucs_status_t = -2;
pub const UCS_ERR_NO_MEMORY: ucs_status_t = -4;
pub const UCS_ERR_NO_ELEM: ucs_status_t = -12;
pub const UCS_ERR_BUSY: ucs_status_t = -15;
pub const UCS_ERR_CANCELED: ucs_status_t = -16;
pub const UCS_ERR_LAST: ucs_status_t = -100;

pub const UCS_THREAD_MODE_SERIALIZED: c_int = 1;
pub const UCS_MEMORY_TYPE_HOST: c_int = 0;
pub const UCS_MEMORY_TYPE_CUDA: c_int = 1;

pub const UCP_PARAM_FIELD_FEATURES: u64 = 1 << 0;
pub const UCP_PARAM_FIELD_MT_WORKERS_SHARED: u64 = 1 << 5;
pub const UCP_FEATURE_RMA: u64 = 1 << 1;
pub const UCP_FEATURE_WAKEUP: u64 = 1 << 4;
pub const UCP_FEATURE_AM: u64 = 1 << 6;

pub const UCP_ATTR_FIELD_MEMORY_TYPES: u64 = 1 << 2;

pub const UCP_WORKER_PARAM_FIELD_THREAD_MODE: u64 = 1 << 0;
pub const UCP_WORKER_PARAM_FIELD_FLAGS: u64 = 1 << 5;
pub const UCP_WORKER_FLAG_IGNORE_REQUEST_LEAK: u64 = 1 << 0;

pub const UCP_EP_PARAM_FIELD_REMOTE_ADDRESS: u64 = 1 << 0;
pub const UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE: u64 = 1 << 1;
pub const UCP_EP_PARAM_FIELD_ERR_HANDLER: u64 = 1 << 2;
pub const UCP_ERR_HANDLING_MODE_PEER: c_int = 1;
pub const UCP_EP_CLOSE_FLAG_FORCE: u32 = 1 << 0;

pub const UCP_MEM_MAP_PARAM_FIELD_ADDRESS: u64 = 1 << 0;
pub const UCP_MEM_MAP_PARAM_FIELD_LENGTH: u64 = 1 << 1;
pub const UCP_MEM_MAP_PARAM_FIELD_PROT: u64 = 1 << 3;
pub const UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE: u64 = 1 << 4;
pub const UCP_MEM_MAP_PROT_LOCAL_READ: c_uint = 1 << 0;
pub const UCP_MEM_MAP_PROT_LOCAL_WRITE: c_uint = 1 << 1;
pub const UCP_MEM_MAP_PROT_REMOTE_READ: c_uint = 1 << 8;
pub const UCP_MEM_MAP_PROT_REMOTE_WRITE: c_uint = 1 << 9;

pub const UCP_OP_ATTR_FIELD_CALLBACK: u32 = 1 << 1;
pub const UCP_OP_ATTR_FIELD_USER_DATA: u32 = 1 << 2;
pub const UCP_OP_ATTR_FIELD_DATATYPE: u32 = 1 << 3;
pub const UCP_OP_ATTR_FIELD_FLAGS: u32 = 1 << 4;
pub const UCP_OP_ATTR_FIELD_MEMORY_TYPE: u32 = 1 << 6;
pub const UCP_OP_ATTR_FIELD_MEMH: u32 = 1 << 8;

pub const UCP_AM_HANDLER_PARAM_FIELD_ID: u64 = 1 << 0;
pub const UCP_AM_HANDLER_PARAM_FIELD_FLAGS: u64 = 1 << 1;
pub const UCP_AM_HANDLER_PARAM_FIELD_CB: u64 = 1 << 2;
pub const UCP_AM_HANDLER_PARAM_FIELD_ARG: u64 = 1 << 3;
pub const UCP_AM_FLAG_WHOLE_MSG: u32 = 1 << 0;
pub const UCP_AM_SEND_FLAG_REPLY: u32 = 1 << 0;
pub const UCP_AM_SEND_FLAG_EAGER: u32 = 1 << 1;
pub const UCP_AM_SEND_FLAG_RNDV: u32 = 1 << 2;
pub const UCP_AM_RECV_ATTR_FIELD_REPLY_EP: u64 = 1 << 0;
pub const UCP_AM_RECV_ATTR_FLAG_RNDV: u64 = 1 << 17;

/// Whether a status pointer is a request that is still under way.
pub fn is_request(pointer: ucs_status_ptr_t) -> bool {
    let address = pointer.addr();
    address != 0 && address < (UCS_ERR_LAST as isize as usize)
}

/// The status in a status pointer that is no request.
pub fn status_of(pointer: ucs_status_ptr_t) -> ucs_status_t {
    pointer.addr() as isize as ucs_status_t
}

pub type ucp_send_nbx_callback_t =
    unsafe extern "C" fn(request: *mut c_void, status: ucs_status_t, user_data: *mut c_void);
pub type ucp_am_recv_data_nbx_callback_t =
    unsafe extern "C" fn(request: *mut c_void, status: ucs_status_t, length: usize, user_data: *mut c_void);
pub type ucp_err_handler_cb_t = unsafe extern "C" fn(arg: *mut c_void, ep: ucp_ep_h, status: ucs_status_t);
pub type ucp_am_recv_callback_t = unsafe extern "C" fn(
    arg: *mut c_void,
    header: *const c_void,
    header_length: usize,
    data: *mut c_void,
    length: usize,
    param: *const ucp_am_recv_param_t,
) -> ucs_status_t;
/// The last argument is a `va_list`, which the ABIs of x86-64 and AArch64 pass as a pointer.
pub type ucs_log_func_t = unsafe extern "C" fn(
    file: *const c_char,
    line: c_uint,
    function: *const c_char,
    level: c_int,
    component: *const c_void,
    message: *const c_char,
    arguments: *mut c_void,
) -> c_int;
pub const UCS_LOG_FUNC_RC_STOP: c_int = 0;

/// A zeroed value: no field counts until its bit is in the mask.
pub trait Zeroed: Sized {
    fn zeroed() -> Self {
        // SAFETY: implemented here only, for structures of integers, raw pointers and optional function pointers, all
        // of which may be zero.
        unsafe { std::mem::zeroed() }
    }
}

macro_rules! structure {
    ($name:ident { $($field:ident: $kind:ty,)* }) => {
        #[repr(C)]
        #[derive(Debug, Clone, Copy)]
        pub struct $name {
            $(pub $field: $kind,)*
            spare: [u64; SPARE_WORDS],
        }

        impl Zeroed for $name {}
    };
}

structure!(ucp_params_t {
    field_mask: u64,
    features: u64,
    request_size: usize,
    request_init: *const c_void,
    request_cleanup: *const c_void,
    tag_sender_mask: u64,
    mt_workers_shared: c_int,
});

structure!(ucp_context_attr_t {
    field_mask: u64,
    request_size: usize,
    thread_mode: c_int,
    memory_types: u64,
});

structure!(ucp_worker_params_t {
    field_mask: u64,
    thread_mode: c_int,
    cpu_mask: [u64; 16],
    events: c_uint,
    user_data: *mut c_void,
    event_fd: c_int,
    flags: u64,
});

structure!(ucp_ep_params_t {
    field_mask: u64,
    address: *const c_void,
    err_mode: c_int,
    err_handler_cb: Option<ucp_err_handler_cb_t>,
    err_handler_arg: *mut c_void,
});

structure!(ucp_mem_map_params_t {
    field_mask: u64,
    address: *mut c_void,
    length: usize,
    flags: c_uint,
    prot: c_uint,
    memory_type: c_int,
});

structure!(ucp_request_param_t {
    op_attr_mask: u32,
    flags: u32,
    request: *mut c_void,
    cb: Option<ucp_send_nbx_callback_t>,
    datatype: u64,
    user_data: *mut c_void,
    reply_buffer: *mut c_void,
    memory_type: c_int,
    recv_info: *mut c_void,
    memh: ucp_mem_h,
});

structure!(ucp_am_handler_param_t {
    field_mask: u64,
    id: c_uint,
    flags: u32,
    cb: Option<ucp_am_recv_callback_t>,
    arg: *mut c_void,
});

/// One of several, so without spare room.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ucp_dt_iov_t {
    pub buffer: *mut c_void,
    pub length: usize,
}

pub const UCP_DATATYPE_IOV: u64 = 2;

/// Made by UCX only, so without spare room.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ucp_am_recv_param_t {
    pub recv_attr: u64,
    pub reply_ep: ucp_ep_h,
}

/// The first fields of `ucm_global_config_t`; the rest differs between versions.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ucm_global_config_t {
    pub log_level: c_int,
    pub enable_events: c_int,
    pub mmap_hook_mode: c_int,
}
