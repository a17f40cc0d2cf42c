//! The bindings against the installed headers: every offset, width and constant.
#![cfg(test)]

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::path::Path;
use std::process::Command;

use baton_libfabric_sys::Errno;
use baton_libfabric_sys::abi::*;

/// The width of a field, found from a function that would return it.
fn width<S, F>(_: impl Fn(&S) -> &F) -> usize {
    size_of::<F>()
}

/// `struct.field` -> (offset, width), as the Rust declarations have it.
macro_rules! fields {
    ($($type:ident { $($field:ident),* })*) => {
        BTreeMap::from([$($((
            format!("{}.{}", stringify!($type), stringify!($field)),
            (offset_of!($type, $field), width(|value: &$type| &value.$field)),
        ),)*)*])
    };
}

macro_rules! sizes {
    ($($type:ident)*) => { [$((stringify!($type), size_of::<$type>()),)*] };
}

macro_rules! values {
    ($($name:ident)*) => { [$((stringify!($name), $name as u64),)*] };
}

fn rust_fields() -> BTreeMap<String, (usize, usize)> {
    fields! {
        iovec { iov_base, iov_len }
        fid { fclass, context, ops }
        fi_ops { size, close, bind, control }
        fi_tx_attr { caps, mode, op_flags, msg_order, comp_order, inject_size, size, iov_limit, rma_iov_limit }
        fi_rx_attr { caps, mode, op_flags, msg_order, comp_order, total_buffered_recv, size }
        fi_ep_attr { r#type, protocol, protocol_version, max_msg_size }
        fi_domain_attr { domain, name, threading, control_progress, data_progress, resource_mgmt, av_type, mr_mode, mr_key_size, cq_data_size, cq_cnt, ep_cnt }
        fi_fabric_attr { fabric, name, prov_name, prov_version, api_version }
        fi_info { next, caps, mode, addr_format, src_addrlen, dest_addrlen, src_addr, dest_addr, handle, tx_attr, rx_attr, ep_attr, domain_attr, fabric_attr, nic }
        fid_fabric { fid, ops }
        fi_ops_fabric { size, domain, passive_ep, eq_open, wait_open, trywait }
        fid_domain { fid, ops, mr }
        fi_ops_domain { size, av_open, cq_open, endpoint }
        fi_ops_mr { size, reg, regv, regattr }
        fi_mr_attr { memory, iov_count, access, offset, requested_key, context, auth_key_size, auth_key, iface, device }
        fi_mr_dmabuf { fd, offset, len, base_addr }
        fid_mr { fid, mem_desc, key }
        fi_av_attr { r#type, rx_ctx_bits, count, ep_per_node, name, map_addr, flags }
        fid_av { fid, ops }
        fi_ops_av { size, insert }
        fi_cq_attr { size, flags, format, wait_obj, signaling_vector, wait_cond, wait_set }
        fid_cq { fid, ops }
        fi_ops_cq { size, read, readfrom, readerr, sread, sreadfrom, signal, strerror }
        fi_cq_tagged_entry { op_context, flags, len, buf, data, tag }
        fi_cq_err_entry { op_context, flags, len, buf, data, tag, olen, err, prov_errno, err_data, err_data_size }
        fid_ep { fid, ops, cm, msg, rma, tagged }
        fi_ops_ep { size, cancel, getopt, setopt }
        fi_ops_cm { size, setname, getname }
        fi_rma_iov { addr, len, key }
        fi_msg_rma { msg_iov, desc, iov_count, addr, rma_iov, rma_iov_count, context, data }
        fi_ops_rma { size, read, readv, readmsg, write, writev, writemsg }
        fi_msg_tagged { msg_iov, desc, iov_count, addr, tag, ignore, context, data }
        fi_ops_tagged { size, recv, recvv, recvmsg, send, sendv, sendmsg }
    }
}

/// Sizes of what we allocate: at least what the library reads, or exactly that where it steps through an array.
fn rust_sizes() -> [(&'static str, usize); 9] {
    sizes! {
        iovec fi_mr_attr fi_av_attr fi_cq_attr fi_cq_tagged_entry fi_cq_err_entry fi_rma_iov fi_msg_rma fi_msg_tagged
    }
}

fn rust_values() -> Vec<(&'static str, u64)> {
    let constants = values! {
        FI_MSG FI_RMA FI_TAGGED FI_READ FI_WRITE
        FI_RECV FI_SEND FI_REMOTE_READ FI_REMOTE_WRITE FI_COMPLETION
        FI_DELIVERY_COMPLETE FI_MR_DMABUF FI_HMEM FI_LOCAL_COMM FI_REMOTE_COMM
        FI_SOURCE FI_CONTEXT FI_CONTEXT2 FI_MR_LOCAL FI_MR_VIRT_ADDR
        FI_MR_ALLOCATED FI_MR_PROV_KEY FI_MR_ENDPOINT FI_MR_HMEM FI_SOCKADDR
        FI_SOCKADDR_IN FI_SOCKADDR_IN6 FI_ADDR_STR FI_ADDR_EFA FI_ADDR_UNSPEC
        FI_EP_RDM FI_AV_TABLE FI_PROGRESS_MANUAL FI_THREAD_DOMAIN FI_CQ_FORMAT_TAGGED
        FI_WAIT_NONE FI_WAIT_FD FI_GETWAIT FI_ENABLE FI_HMEM_SYSTEM
        FI_HMEM_CUDA FI_HMEM_NEURON FI_OPT_ENDPOINT FI_OPT_SHARED_MEMORY_PERMITTED
    };
    let errnos = [
        ("FI_EAGAIN", Errno::AGAIN),
        ("FI_ENOSYS", Errno::NOSYS),
        ("FI_ENODATA", Errno::NODATA),
        ("FI_ECANCELED", Errno::CANCELED),
        ("FI_EAVAIL", Errno::AVAIL),
        ("FI_ENOKEY", Errno::NOKEY),
    ];
    constants.into_iter().chain(errnos.map(|(name, errno)| (name, errno.0 as u64))).collect()
}

/// What only later headers have: not required of older ones, compared where it is there.
const LATER: [&str; 6] = [
    "fi_mr_dmabuf.fd",
    "fi_mr_dmabuf.offset",
    "fi_mr_dmabuf.len",
    "fi_mr_dmabuf.base_addr",
    "FI_MR_DMABUF",
    "FI_OPT_SHARED_MEMORY_PERMITTED",
];

/// Runs `offsets.c`; none, and why is printed, where there is no compiler or there are no headers.
fn printed_by_c() -> Option<String> {
    if !Path::new("/usr/include/rdma/fabric.h").exists() {
        println!("skipped: no rdma/fabric.h; Debian's package libfabric-dev brings it");
        return None;
    }
    if Command::new("cc").arg("--version").output().is_err() {
        println!("skipped: no C compiler; Debian's package gcc brings it");
        return None;
    }
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("libfabric-offsets");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("c/offsets.c");
    let compiled = Command::new("cc").arg("-w").arg("-o").arg(&program).arg(source).output().unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let run = Command::new(program).output().unwrap();
    assert!(run.status.success());
    Some(String::from_utf8(run.stdout).unwrap())
}

#[test]
fn every_offset_and_constant_is_that_of_the_headers() {
    let Some(printed) = printed_by_c() else { return };
    let (mut fields, mut sizes, mut values) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for line in printed.lines() {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["sizeof", name, bytes] => drop(sizes.insert(name, bytes.parse::<usize>().unwrap())),
            [name, offset, width] => {
                fields.insert(name, (offset.parse::<usize>().unwrap(), width.parse::<usize>().unwrap()));
            }
            [name, value] => drop(values.insert(name, value.parse::<u64>().unwrap())),
            _ => panic!("{line:?}"),
        }
    }
    let rust_fields = rust_fields();
    assert!(rust_fields.len() > 150, "{}", rust_fields.len());
    for (name, at) in &rust_fields {
        // The first field of the attributes of a registration is an anonymous union in later headers.
        let c_name = if name == "fi_mr_attr.memory" { "fi_mr_attr.mr_iov" } else { name };
        let c_name = c_name.replace("r#", "");
        match fields.remove(c_name.as_str()) {
            Some(c_at) => assert_eq!(*at, c_at, "{name}"),
            None => assert!(LATER.contains(&c_name.as_str()), "{name} is not compared"),
        }
    }
    assert!(fields.is_empty(), "not in Rust: {fields:?}");
    for (name, value) in rust_values() {
        match values.remove(name) {
            Some(c_value) => assert_eq!(value, c_value, "{name}"),
            None => assert!(LATER.contains(&name), "{name} is not compared"),
        }
    }
    assert!(values.is_empty(), "not in Rust: {values:?}");
    for (name, bytes) in rust_sizes() {
        let c_bytes = sizes.remove(name).unwrap();
        if ["fi_mr_attr", "fi_av_attr", "fi_cq_attr", "fi_cq_err_entry"].contains(&name) {
            assert!(bytes >= c_bytes + 32, "{name}: {bytes} leaves no room over {c_bytes}");
        } else {
            assert_eq!(bytes, c_bytes, "{name}");
        }
    }
    assert_eq!(sizes.remove("fi_context2"), Some(64));
    assert!(sizes.is_empty(), "not in Rust: {sizes:?}");
}
