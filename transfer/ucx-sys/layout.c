/* Prints what src/abi.rs must agree with, from the installed headers: `name value` per line. */
#include <stddef.h>
#include <stdio.h>
#include <ucm/api/ucm.h>
#include <ucp/api/ucp.h>
#include <ucs/debug/log_def.h>

#define OFFSET(type, field) printf(#type "." #field " %zu\n", offsetof(type, field))
#define SIZE(type) printf(#type " %zu\n", sizeof(type))
#define VALUE(name) printf(#name " %lld\n", (long long)(name))

int main(void)
{
    SIZE(ucs_status_t);
    SIZE(ucp_params_t);
    OFFSET(ucp_params_t, field_mask);
    OFFSET(ucp_params_t, features);
    OFFSET(ucp_params_t, mt_workers_shared);
    SIZE(ucp_context_attr_t);
    OFFSET(ucp_context_attr_t, field_mask);
    OFFSET(ucp_context_attr_t, memory_types);
    SIZE(ucp_worker_params_t);
    OFFSET(ucp_worker_params_t, field_mask);
    OFFSET(ucp_worker_params_t, thread_mode);
    OFFSET(ucp_worker_params_t, flags);
    SIZE(ucp_ep_params_t);
    OFFSET(ucp_ep_params_t, field_mask);
    OFFSET(ucp_ep_params_t, address);
    OFFSET(ucp_ep_params_t, err_mode);
    OFFSET(ucp_ep_params_t, err_handler.cb);
    OFFSET(ucp_ep_params_t, err_handler.arg);
    SIZE(ucp_mem_map_params_t);
    OFFSET(ucp_mem_map_params_t, field_mask);
    OFFSET(ucp_mem_map_params_t, address);
    OFFSET(ucp_mem_map_params_t, length);
    OFFSET(ucp_mem_map_params_t, prot);
    OFFSET(ucp_mem_map_params_t, memory_type);
    SIZE(ucp_request_param_t);
    OFFSET(ucp_request_param_t, op_attr_mask);
    OFFSET(ucp_request_param_t, flags);
    OFFSET(ucp_request_param_t, cb);
    OFFSET(ucp_request_param_t, datatype);
    OFFSET(ucp_request_param_t, user_data);
    OFFSET(ucp_request_param_t, memory_type);
    OFFSET(ucp_request_param_t, memh);
    OFFSET(ucp_dt_iov_t, buffer);
    OFFSET(ucp_dt_iov_t, length);
    SIZE(ucp_dt_iov_t);
    SIZE(ucp_am_handler_param_t);
    OFFSET(ucp_am_handler_param_t, field_mask);
    OFFSET(ucp_am_handler_param_t, id);
    OFFSET(ucp_am_handler_param_t, flags);
    OFFSET(ucp_am_handler_param_t, cb);
    OFFSET(ucp_am_handler_param_t, arg);
    OFFSET(ucp_am_recv_param_t, recv_attr);
    OFFSET(ucp_am_recv_param_t, reply_ep);
    OFFSET(ucm_global_config_t, enable_events);
    OFFSET(ucm_global_config_t, mmap_hook_mode);
    VALUE(UCM_MMAP_HOOK_NONE);
    VALUE(UCS_OK);
    VALUE(UCS_INPROGRESS);
    VALUE(UCS_ERR_NO_MESSAGE);
    VALUE(UCS_ERR_NO_RESOURCE);
    VALUE(UCS_ERR_NO_MEMORY);
    VALUE(UCS_ERR_NO_ELEM);
    VALUE(UCS_ERR_BUSY);
    VALUE(UCS_ERR_CANCELED);
    VALUE(UCS_ERR_LAST);
    VALUE(UCS_THREAD_MODE_SERIALIZED);
    VALUE(UCS_MEMORY_TYPE_HOST);
    VALUE(UCS_MEMORY_TYPE_CUDA);
    VALUE(UCS_LOG_FUNC_RC_STOP);
    VALUE(UCP_PARAM_FIELD_FEATURES);
    VALUE(UCP_PARAM_FIELD_MT_WORKERS_SHARED);
    VALUE(UCP_FEATURE_RMA);
    VALUE(UCP_FEATURE_WAKEUP);
    VALUE(UCP_FEATURE_AM);
    VALUE(UCP_ATTR_FIELD_MEMORY_TYPES);
    VALUE(UCP_WORKER_PARAM_FIELD_THREAD_MODE);
    VALUE(UCP_WORKER_PARAM_FIELD_FLAGS);
    VALUE(UCP_WORKER_FLAG_IGNORE_REQUEST_LEAK);
    VALUE(UCP_EP_PARAM_FIELD_REMOTE_ADDRESS);
    VALUE(UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE);
    VALUE(UCP_EP_PARAM_FIELD_ERR_HANDLER);
    VALUE(UCP_ERR_HANDLING_MODE_PEER);
    VALUE(UCP_EP_CLOSE_FLAG_FORCE);
    VALUE(UCP_MEM_MAP_PARAM_FIELD_ADDRESS);
    VALUE(UCP_MEM_MAP_PARAM_FIELD_LENGTH);
    VALUE(UCP_MEM_MAP_PARAM_FIELD_PROT);
    VALUE(UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE);
    VALUE(UCP_MEM_MAP_PROT_LOCAL_READ);
    VALUE(UCP_MEM_MAP_PROT_LOCAL_WRITE);
    VALUE(UCP_MEM_MAP_PROT_REMOTE_READ);
    VALUE(UCP_MEM_MAP_PROT_REMOTE_WRITE);
    VALUE(UCP_OP_ATTR_FIELD_CALLBACK);
    VALUE(UCP_OP_ATTR_FIELD_USER_DATA);
    VALUE(UCP_OP_ATTR_FIELD_DATATYPE);
    VALUE(UCP_DATATYPE_IOV);
    VALUE(UCP_OP_ATTR_FIELD_FLAGS);
    VALUE(UCP_OP_ATTR_FIELD_MEMORY_TYPE);
    VALUE(UCP_OP_ATTR_FIELD_MEMH);
    VALUE(UCP_AM_HANDLER_PARAM_FIELD_ID);
    VALUE(UCP_AM_HANDLER_PARAM_FIELD_FLAGS);
    VALUE(UCP_AM_HANDLER_PARAM_FIELD_CB);
    VALUE(UCP_AM_HANDLER_PARAM_FIELD_ARG);
    VALUE(UCP_AM_FLAG_WHOLE_MSG);
    VALUE(UCP_AM_SEND_FLAG_REPLY);
    VALUE(UCP_AM_SEND_FLAG_EAGER);
    VALUE(UCP_AM_SEND_FLAG_RNDV);
    VALUE(UCP_AM_RECV_ATTR_FIELD_REPLY_EP);
    VALUE(UCP_AM_RECV_ATTR_FLAG_RNDV);
    return 0;
}
