//! Which network devices go with the address a worker is bound to.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

#[repr(C)]
struct IfAddrs {
    next: *mut IfAddrs,
    name: *mut c_char,
    flags: c_uint,
    address: *const c_void,
}

unsafe extern "C" {
    fn getifaddrs(list: *mut *mut IfAddrs) -> c_int;
    fn freeifaddrs(list: *mut IfAddrs);
}

/// UCX's list of devices (`NET_DEVICES`) for a bind address.
///
/// Loopback stays on loopback. An address of an interface means that interface and every RDMA device, because those
/// have networks of their own; no address in particular means everything. None: no interface has the address.
pub(super) fn for_address(bind: IpAddr) -> Option<String> {
    if bind.is_unspecified() {
        return Some("all".to_owned());
    }
    let interface = interface_of(bind).or_else(|| bind.is_loopback().then(|| "lo".to_owned()))?;
    if bind.is_loopback() {
        return Some(interface);
    }
    let mut devices = vec![interface];
    devices.extend(rdma_ports(Path::new("/sys/class/infiniband")));
    Some(devices.join(","))
}

/// `mlx5_0:1` and the like.
fn rdma_ports(class: &Path) -> Vec<String> {
    let list = |path: &Path| -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(path) else { return Vec::new() };
        let mut names: Vec<_> =
            entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    };
    list(class)
        .into_iter()
        .flat_map(|device| {
            let ports = list(&class.join(&device).join("ports"));
            ports.into_iter().map(move |port| format!("{device}:{port}"))
        })
        .collect()
}

fn interface_of(wanted: IpAddr) -> Option<String> {
    let mut list = std::ptr::null_mut();
    // SAFETY: fills in a list that is freed below.
    if unsafe { getifaddrs(&raw mut list) } != 0 {
        return None;
    }
    let mut found = None;
    let mut at = list;
    while !at.is_null() {
        // SAFETY: an element of the list, which is not yet freed.
        let entry = unsafe { &*at };
        if found.is_none() && address_of(entry.address) == Some(wanted) {
            // SAFETY: interface names are terminated strings that live as long as the list.
            found = Some(unsafe { CStr::from_ptr(entry.name) }.to_string_lossy().into_owned());
        }
        at = entry.next;
    }
    // SAFETY: made by `getifaddrs`, freed once, not used after.
    unsafe { freeifaddrs(list) };
    found
}

fn address_of(socket: *const c_void) -> Option<IpAddr> {
    if socket.is_null() {
        return None;
    }
    // SAFETY: every socket address begins with its family.
    let family = unsafe { socket.cast::<u16>().read_unaligned() };
    match family {
        AF_INET => {
            // SAFETY: a `sockaddr_in`, whose address is at offset 4.
            let octets = unsafe { socket.byte_add(4).cast::<[u8; 4]>().read_unaligned() };
            Some(Ipv4Addr::from(octets).into())
        }
        AF_INET6 => {
            // SAFETY: a `sockaddr_in6`, whose address is at offset 8.
            let octets = unsafe { socket.byte_add(8).cast::<[u8; 16]>().read_unaligned() };
            Some(Ipv6Addr::from(octets).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_stays_on_loopback_and_foreign_addresses_have_no_device() {
        assert_eq!(for_address(Ipv4Addr::LOCALHOST.into()).as_deref(), Some("lo"));
        assert_eq!(for_address(Ipv4Addr::UNSPECIFIED.into()).as_deref(), Some("all"));
        assert_eq!(for_address(Ipv4Addr::new(192, 0, 2, 77).into()), None);
    }

    #[test]
    fn rdma_ports_are_named_as_ucx_names_them() {
        let class = std::env::temp_dir().join(format!("baton-rdma-ports-{}", std::process::id()));
        for port in ["mlx5_1/ports/1", "mlx5_0/ports/1", "mlx5_0/ports/2"] {
            std::fs::create_dir_all(class.join(port)).unwrap();
        }
        let found = rdma_ports(&class);
        std::fs::remove_dir_all(&class).unwrap();
        assert_eq!(found, ["mlx5_0:1", "mlx5_0:2", "mlx5_1:1"]);
    }
}
