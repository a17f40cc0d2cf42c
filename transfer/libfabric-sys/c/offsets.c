/*
 * Prints what the installed headers say about every field and constant that src/abi.rs repeats, one a line:
 * `struct.field OFFSET WIDTH`, `sizeof struct BYTES`, `CONSTANT VALUE`. tests/offsets.rs compares.
 */
#include <stddef.h>
#include <stdio.h>

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>
#include <rdma/fi_tagged.h>

#define FIELD(type, field) \
	printf(#type "." #field " %zu %zu\n", offsetof(struct type, field), sizeof(((struct type *) 0)->field))
#define SIZE(type) printf("sizeof " #type " %zu\n", sizeof(struct type))
#define VALUE(name) printf(#name " %llu\n", (unsigned long long) (name))

int main(void)
{
	FIELD(iovec, iov_base);
	FIELD(iovec, iov_len);
	FIELD(fid, fclass);
	FIELD(fid, context);
	FIELD(fid, ops);
	FIELD(fi_ops, size);
	FIELD(fi_ops, close);
	FIELD(fi_ops, bind);
	FIELD(fi_ops, control);
	FIELD(fi_tx_attr, caps);
	FIELD(fi_tx_attr, mode);
	FIELD(fi_tx_attr, op_flags);
	FIELD(fi_tx_attr, msg_order);
	FIELD(fi_tx_attr, comp_order);
	FIELD(fi_tx_attr, inject_size);
	FIELD(fi_tx_attr, size);
	FIELD(fi_tx_attr, iov_limit);
	FIELD(fi_tx_attr, rma_iov_limit);
	FIELD(fi_rx_attr, caps);
	FIELD(fi_rx_attr, mode);
	FIELD(fi_rx_attr, op_flags);
	FIELD(fi_rx_attr, msg_order);
	FIELD(fi_rx_attr, comp_order);
	FIELD(fi_rx_attr, total_buffered_recv);
	FIELD(fi_rx_attr, size);
	FIELD(fi_ep_attr, type);
	FIELD(fi_ep_attr, protocol);
	FIELD(fi_ep_attr, protocol_version);
	FIELD(fi_ep_attr, max_msg_size);
	FIELD(fi_domain_attr, domain);
	FIELD(fi_domain_attr, name);
	FIELD(fi_domain_attr, threading);
	FIELD(fi_domain_attr, control_progress);
	FIELD(fi_domain_attr, data_progress);
	FIELD(fi_domain_attr, resource_mgmt);
	FIELD(fi_domain_attr, av_type);
	FIELD(fi_domain_attr, mr_mode);
	FIELD(fi_domain_attr, mr_key_size);
	FIELD(fi_domain_attr, cq_data_size);
	FIELD(fi_domain_attr, cq_cnt);
	FIELD(fi_domain_attr, ep_cnt);
	FIELD(fi_fabric_attr, fabric);
	FIELD(fi_fabric_attr, name);
	FIELD(fi_fabric_attr, prov_name);
	FIELD(fi_fabric_attr, prov_version);
	FIELD(fi_fabric_attr, api_version);
	FIELD(fi_info, next);
	FIELD(fi_info, caps);
	FIELD(fi_info, mode);
	FIELD(fi_info, addr_format);
	FIELD(fi_info, src_addrlen);
	FIELD(fi_info, dest_addrlen);
	FIELD(fi_info, src_addr);
	FIELD(fi_info, dest_addr);
	FIELD(fi_info, handle);
	FIELD(fi_info, tx_attr);
	FIELD(fi_info, rx_attr);
	FIELD(fi_info, ep_attr);
	FIELD(fi_info, domain_attr);
	FIELD(fi_info, fabric_attr);
	FIELD(fi_info, nic);
	FIELD(fid_fabric, fid);
	FIELD(fid_fabric, ops);
	FIELD(fi_ops_fabric, size);
	FIELD(fi_ops_fabric, domain);
	FIELD(fi_ops_fabric, passive_ep);
	FIELD(fi_ops_fabric, eq_open);
	FIELD(fi_ops_fabric, wait_open);
	FIELD(fi_ops_fabric, trywait);
	FIELD(fid_domain, fid);
	FIELD(fid_domain, ops);
	FIELD(fid_domain, mr);
	FIELD(fi_ops_domain, size);
	FIELD(fi_ops_domain, av_open);
	FIELD(fi_ops_domain, cq_open);
	FIELD(fi_ops_domain, endpoint);
	FIELD(fi_ops_mr, size);
	FIELD(fi_ops_mr, reg);
	FIELD(fi_ops_mr, regv);
	FIELD(fi_ops_mr, regattr);
	FIELD(fi_mr_attr, mr_iov);
	FIELD(fi_mr_attr, iov_count);
	FIELD(fi_mr_attr, access);
	FIELD(fi_mr_attr, offset);
	FIELD(fi_mr_attr, requested_key);
	FIELD(fi_mr_attr, context);
	FIELD(fi_mr_attr, auth_key_size);
	FIELD(fi_mr_attr, auth_key);
	FIELD(fi_mr_attr, iface);
	FIELD(fi_mr_attr, device);
#ifdef FI_MR_DMABUF
	FIELD(fi_mr_dmabuf, fd);
	FIELD(fi_mr_dmabuf, offset);
	FIELD(fi_mr_dmabuf, len);
	FIELD(fi_mr_dmabuf, base_addr);
#endif
	FIELD(fid_mr, fid);
	FIELD(fid_mr, mem_desc);
	FIELD(fid_mr, key);
	FIELD(fi_av_attr, type);
	FIELD(fi_av_attr, rx_ctx_bits);
	FIELD(fi_av_attr, count);
	FIELD(fi_av_attr, ep_per_node);
	FIELD(fi_av_attr, name);
	FIELD(fi_av_attr, map_addr);
	FIELD(fi_av_attr, flags);
	FIELD(fid_av, fid);
	FIELD(fid_av, ops);
	FIELD(fi_ops_av, size);
	FIELD(fi_ops_av, insert);
	FIELD(fi_cq_attr, size);
	FIELD(fi_cq_attr, flags);
	FIELD(fi_cq_attr, format);
	FIELD(fi_cq_attr, wait_obj);
	FIELD(fi_cq_attr, signaling_vector);
	FIELD(fi_cq_attr, wait_cond);
	FIELD(fi_cq_attr, wait_set);
	FIELD(fid_cq, fid);
	FIELD(fid_cq, ops);
	FIELD(fi_ops_cq, size);
	FIELD(fi_ops_cq, read);
	FIELD(fi_ops_cq, readfrom);
	FIELD(fi_ops_cq, readerr);
	FIELD(fi_ops_cq, sread);
	FIELD(fi_ops_cq, sreadfrom);
	FIELD(fi_ops_cq, signal);
	FIELD(fi_ops_cq, strerror);
	FIELD(fi_cq_tagged_entry, op_context);
	FIELD(fi_cq_tagged_entry, flags);
	FIELD(fi_cq_tagged_entry, len);
	FIELD(fi_cq_tagged_entry, buf);
	FIELD(fi_cq_tagged_entry, data);
	FIELD(fi_cq_tagged_entry, tag);
	FIELD(fi_cq_err_entry, op_context);
	FIELD(fi_cq_err_entry, flags);
	FIELD(fi_cq_err_entry, len);
	FIELD(fi_cq_err_entry, buf);
	FIELD(fi_cq_err_entry, data);
	FIELD(fi_cq_err_entry, tag);
	FIELD(fi_cq_err_entry, olen);
	FIELD(fi_cq_err_entry, err);
	FIELD(fi_cq_err_entry, prov_errno);
	FIELD(fi_cq_err_entry, err_data);
	FIELD(fi_cq_err_entry, err_data_size);
	FIELD(fid_ep, fid);
	FIELD(fid_ep, ops);
	FIELD(fid_ep, cm);
	FIELD(fid_ep, msg);
	FIELD(fid_ep, rma);
	FIELD(fid_ep, tagged);
	FIELD(fi_ops_ep, size);
	FIELD(fi_ops_ep, cancel);
	FIELD(fi_ops_ep, getopt);
	FIELD(fi_ops_ep, setopt);
	FIELD(fi_ops_cm, size);
	FIELD(fi_ops_cm, setname);
	FIELD(fi_ops_cm, getname);
	FIELD(fi_rma_iov, addr);
	FIELD(fi_rma_iov, len);
	FIELD(fi_rma_iov, key);
	FIELD(fi_msg_rma, msg_iov);
	FIELD(fi_msg_rma, desc);
	FIELD(fi_msg_rma, iov_count);
	FIELD(fi_msg_rma, addr);
	FIELD(fi_msg_rma, rma_iov);
	FIELD(fi_msg_rma, rma_iov_count);
	FIELD(fi_msg_rma, context);
	FIELD(fi_msg_rma, data);
	FIELD(fi_ops_rma, size);
	FIELD(fi_ops_rma, read);
	FIELD(fi_ops_rma, readv);
	FIELD(fi_ops_rma, readmsg);
	FIELD(fi_ops_rma, write);
	FIELD(fi_ops_rma, writev);
	FIELD(fi_ops_rma, writemsg);
	FIELD(fi_msg_tagged, msg_iov);
	FIELD(fi_msg_tagged, desc);
	FIELD(fi_msg_tagged, iov_count);
	FIELD(fi_msg_tagged, addr);
	FIELD(fi_msg_tagged, tag);
	FIELD(fi_msg_tagged, ignore);
	FIELD(fi_msg_tagged, context);
	FIELD(fi_msg_tagged, data);
	FIELD(fi_ops_tagged, size);
	FIELD(fi_ops_tagged, recv);
	FIELD(fi_ops_tagged, recvv);
	FIELD(fi_ops_tagged, recvmsg);
	FIELD(fi_ops_tagged, send);
	FIELD(fi_ops_tagged, sendv);
	FIELD(fi_ops_tagged, sendmsg);

	/* Those that we allocate and the library reads or writes. */
	SIZE(iovec);
	SIZE(fi_mr_attr);
	SIZE(fi_av_attr);
	SIZE(fi_cq_attr);
	SIZE(fi_cq_tagged_entry);
	SIZE(fi_cq_err_entry);
	SIZE(fi_rma_iov);
	SIZE(fi_msg_rma);
	SIZE(fi_msg_tagged);
	SIZE(fi_context2);

	VALUE(FI_MSG);
	VALUE(FI_RMA);
	VALUE(FI_TAGGED);
	VALUE(FI_READ);
	VALUE(FI_WRITE);
	VALUE(FI_RECV);
	VALUE(FI_SEND);
	VALUE(FI_REMOTE_READ);
	VALUE(FI_REMOTE_WRITE);
	VALUE(FI_COMPLETION);
	VALUE(FI_DELIVERY_COMPLETE);
#ifdef FI_MR_DMABUF
	VALUE(FI_MR_DMABUF);
#endif
	VALUE(FI_HMEM);
	VALUE(FI_LOCAL_COMM);
	VALUE(FI_REMOTE_COMM);
	VALUE(FI_SOURCE);
	VALUE(FI_CONTEXT);
	VALUE(FI_CONTEXT2);
	VALUE(FI_MR_LOCAL);
	VALUE(FI_MR_VIRT_ADDR);
	VALUE(FI_MR_ALLOCATED);
	VALUE(FI_MR_PROV_KEY);
	VALUE(FI_MR_ENDPOINT);
	VALUE(FI_MR_HMEM);
	VALUE(FI_SOCKADDR);
	VALUE(FI_SOCKADDR_IN);
	VALUE(FI_SOCKADDR_IN6);
	VALUE(FI_ADDR_STR);
	VALUE(FI_ADDR_EFA);
	VALUE(FI_ADDR_UNSPEC);
	VALUE(FI_EP_RDM);
	VALUE(FI_AV_TABLE);
	VALUE(FI_PROGRESS_MANUAL);
	VALUE(FI_THREAD_DOMAIN);
	VALUE(FI_CQ_FORMAT_TAGGED);
	VALUE(FI_WAIT_NONE);
	VALUE(FI_WAIT_FD);
	VALUE(FI_GETWAIT);
	VALUE(FI_ENABLE);
	VALUE(FI_HMEM_SYSTEM);
	VALUE(FI_HMEM_CUDA);
	VALUE(FI_HMEM_NEURON);
	VALUE(FI_OPT_ENDPOINT);
#if FI_VERSION_GE(FI_VERSION(FI_MAJOR_VERSION, FI_MINOR_VERSION), FI_VERSION(1, 19))
	VALUE(FI_OPT_SHARED_MEMORY_PERMITTED);
#endif
	VALUE(FI_EAGAIN);
	VALUE(FI_ENOSYS);
	VALUE(FI_ENODATA);
	VALUE(FI_ECANCELED);
	VALUE(FI_EAVAIL);
	VALUE(FI_ENOKEY);
	return 0;
}
