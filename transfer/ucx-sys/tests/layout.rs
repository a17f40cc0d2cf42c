//! The hand-kept structures and constants against the headers of the installed UCX.
#![cfg(test)]

use std::collections::BTreeMap;
use std::mem::{offset_of, size_of};
use std::path::Path;
use std::process::Command;

use baton_ucx_sys::*;

macro_rules! offsets {
    ($into:ident, $($structure:ident.$field:ident $(as $named:literal)?,)*) => {
        $($into.push((
            [concat!(stringify!($structure), ".", stringify!($field)) $(, $named)?].last().unwrap().to_string(),
            offset_of!($structure, $field) as i64,
        ));)*
    };
}

macro_rules! values {
    ($into:ident, $($name:ident,)*) => {
        $($into.push((stringify!($name).to_owned(), $name as i64));)*
    };
}

fn ours() -> Vec<(String, i64)> {
    let mut all = Vec::new();
    offsets!(all,
        ucp_params_t.field_mask, ucp_params_t.features, ucp_params_t.mt_workers_shared,
        ucp_context_attr_t.field_mask, ucp_context_attr_t.memory_types,
        ucp_worker_params_t.field_mask, ucp_worker_params_t.thread_mode, ucp_worker_params_t.flags,
        ucp_ep_params_t.field_mask, ucp_ep_params_t.address, ucp_ep_params_t.err_mode,
        ucp_ep_params_t.err_handler_cb as "ucp_ep_params_t.err_handler.cb",
        ucp_ep_params_t.err_handler_arg as "ucp_ep_params_t.err_handler.arg",
        ucp_mem_map_params_t.field_mask, ucp_mem_map_params_t.address, ucp_mem_map_params_t.length,
        ucp_mem_map_params_t.prot, ucp_mem_map_params_t.memory_type,
        ucp_request_param_t.op_attr_mask, ucp_request_param_t.flags, ucp_request_param_t.cb,
        ucp_request_param_t.datatype, ucp_request_param_t.user_data, ucp_request_param_t.memory_type, ucp_request_param_t.memh,
        ucp_dt_iov_t.buffer, ucp_dt_iov_t.length,
        ucp_am_handler_param_t.field_mask, ucp_am_handler_param_t.id, ucp_am_handler_param_t.flags,
        ucp_am_handler_param_t.cb, ucp_am_handler_param_t.arg,
        ucp_am_recv_param_t.recv_attr, ucp_am_recv_param_t.reply_ep,
        ucm_global_config_t.enable_events, ucm_global_config_t.mmap_hook_mode,
    );
    all.push(("UCM_MMAP_HOOK_NONE".to_owned(), 0));
    all.push(("ucs_status_t".to_owned(), size_of::<ucs_status_t>() as i64));
    values!(
        all,
        UCS_OK,
        UCS_INPROGRESS,
        UCS_ERR_NO_MESSAGE,
        UCS_ERR_NO_RESOURCE,
        UCS_ERR_NO_MEMORY,
        UCS_ERR_NO_ELEM,
        UCS_ERR_BUSY,
        UCS_ERR_CANCELED,
        UCS_ERR_LAST,
        UCS_THREAD_MODE_SERIALIZED,
        UCS_MEMORY_TYPE_HOST,
        UCS_MEMORY_TYPE_CUDA,
        UCS_LOG_FUNC_RC_STOP,
        UCP_PARAM_FIELD_FEATURES,
        UCP_PARAM_FIELD_MT_WORKERS_SHARED,
        UCP_FEATURE_RMA,
        UCP_FEATURE_WAKEUP,
        UCP_FEATURE_AM,
        UCP_ATTR_FIELD_MEMORY_TYPES,
        UCP_WORKER_PARAM_FIELD_THREAD_MODE,
        UCP_WORKER_PARAM_FIELD_FLAGS,
        UCP_WORKER_FLAG_IGNORE_REQUEST_LEAK,
        UCP_EP_PARAM_FIELD_REMOTE_ADDRESS,
        UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE,
        UCP_EP_PARAM_FIELD_ERR_HANDLER,
        UCP_ERR_HANDLING_MODE_PEER,
        UCP_EP_CLOSE_FLAG_FORCE,
        UCP_MEM_MAP_PARAM_FIELD_ADDRESS,
        UCP_MEM_MAP_PARAM_FIELD_LENGTH,
        UCP_MEM_MAP_PARAM_FIELD_PROT,
        UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE,
        UCP_MEM_MAP_PROT_LOCAL_READ,
        UCP_MEM_MAP_PROT_LOCAL_WRITE,
        UCP_MEM_MAP_PROT_REMOTE_READ,
        UCP_MEM_MAP_PROT_REMOTE_WRITE,
        UCP_OP_ATTR_FIELD_CALLBACK,
        UCP_OP_ATTR_FIELD_USER_DATA,
        UCP_OP_ATTR_FIELD_DATATYPE,
        UCP_DATATYPE_IOV,
        UCP_OP_ATTR_FIELD_FLAGS,
        UCP_OP_ATTR_FIELD_MEMORY_TYPE,
        UCP_OP_ATTR_FIELD_MEMH,
        UCP_AM_HANDLER_PARAM_FIELD_ID,
        UCP_AM_HANDLER_PARAM_FIELD_FLAGS,
        UCP_AM_HANDLER_PARAM_FIELD_CB,
        UCP_AM_HANDLER_PARAM_FIELD_ARG,
        UCP_AM_FLAG_WHOLE_MSG,
        UCP_AM_SEND_FLAG_REPLY,
        UCP_AM_SEND_FLAG_EAGER,
        UCP_AM_SEND_FLAG_RNDV,
        UCP_AM_RECV_ATTR_FIELD_REPLY_EP,
        UCP_AM_RECV_ATTR_FLAG_RNDV,
    );
    all
}

/// Structures that are handed to UCX, which may write all of its own idea of them.
fn sizes() -> Vec<(&'static str, usize)> {
    vec![
        ("ucp_params_t", size_of::<ucp_params_t>()),
        ("ucp_context_attr_t", size_of::<ucp_context_attr_t>()),
        ("ucp_worker_params_t", size_of::<ucp_worker_params_t>()),
        ("ucp_ep_params_t", size_of::<ucp_ep_params_t>()),
        ("ucp_mem_map_params_t", size_of::<ucp_mem_map_params_t>()),
        ("ucp_request_param_t", size_of::<ucp_request_param_t>()),
        ("ucp_dt_iov_t", size_of::<ucp_dt_iov_t>()),
        ("ucp_am_handler_param_t", size_of::<ucp_am_handler_param_t>()),
    ]
}

#[test]
fn structures_and_constants_are_those_of_the_headers() {
    if !Path::new("/usr/include/ucp/api/ucp.h").exists() {
        println!("skipped: the headers of UCX (Debian's libucx-dev) are not installed");
        return;
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("layout.c");
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("ucx-layout-{}", std::process::id()));
    match Command::new("cc").arg(&source).arg("-o").arg(&program).output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            println!("skipped: there is no C compiler `cc`");
            return;
        }
        compiled => {
            let compiled = compiled.unwrap();
            assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
        }
    }
    let printed = Command::new(&program).output().unwrap();
    std::fs::remove_file(&program).unwrap();
    let printed = String::from_utf8(printed.stdout).unwrap();
    let mut theirs: BTreeMap<&str, i64> = BTreeMap::new();
    for line in printed.lines() {
        let (name, value) = line.split_once(' ').unwrap();
        theirs.insert(name, value.parse().unwrap());
    }
    for (name, len) in sizes() {
        let least =
            theirs.remove(name).unwrap_or_else(|| panic!("layout.c does not print the size of {name}"));
        assert!(len >= least as usize, "{name} has {len} bytes, UCX uses {least}");
    }
    for (name, value) in ours() {
        let expected = theirs.remove(name.as_str());
        assert_eq!(expected, Some(value), "{name}");
    }
    assert!(theirs.is_empty(), "printed by layout.c but not compared: {theirs:?}");
}
