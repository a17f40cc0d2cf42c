//! Which provider, and which interfaces of it.

use std::ffi::CString;
use std::io::ErrorKind;
use std::net::{IpAddr, UdpSocket};

use baton_libfabric_sys::abi::*;
use baton_libfabric_sys::{Errno, Library};

use super::blob::socket_ip;
use super::device;
use super::object::Info;

/// Tried in this order where none is named. `shm` and others are there for who names them.
pub(super) const ORDER: [&str; 6] = ["efa", "verbs;ofi_rxm", "tcp", "tcp;ofi_rxm", "net", "sockets"];
/// Longest name of a provider that is passed on.
const NAME_MAX_BYTES: usize = 48;

/// Why a provider is not there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum SelectError {
    #[error("the name of a provider is 1 to {NAME_MAX_BYTES} letters, digits and `;_-`")]
    Name,
    #[error("not used with the loopback address {0}: it reaches other machines")]
    Loopback(IpAddr),
    #[error("no network interface has the address {0}")]
    Address(IpAddr),
    #[error("nothing of it fits: {0}")]
    Nothing(String),
    #[error(
        "libfabric before 1.18 crashes when a connection of this provider ends in the middle of a read; its `net` does not"
    )]
    Crashes,
    #[error("the library is out of memory")]
    Memory,
}

/// Hints for `fi_getinfo`; the name of the provider is ours and taken out before the library frees the rest.
struct Hints {
    info: Info,
    _provider: CString,
}

impl Hints {
    fn new(library: &'static Library, provider: &str, extra: u64) -> Result<Self, SelectError> {
        let provider = CString::new(provider).map_err(|_| SelectError::Name)?;
        // SAFETY: null asks for an empty entry.
        let info = unsafe { Info::copy_of(library, std::ptr::null()) }.ok_or(SelectError::Memory)?;
        // SAFETY: an entry that only we hold, with all its attributes allocated by the library.
        let hints = unsafe { &mut *info.raw() };
        hints.caps = FI_MSG | FI_RMA | FI_TAGGED | FI_READ | FI_WRITE | FI_REMOTE_READ | FI_REMOTE_WRITE;
        hints.caps |= FI_SEND | FI_RECV | extra;
        hints.mode = FI_CONTEXT | FI_CONTEXT2;
        // SAFETY: as above: attributes of this entry.
        unsafe { (*hints.ep_attr).r#type = FI_EP_RDM };
        // SAFETY: as above.
        let domain = unsafe { &mut *hints.domain_attr };
        domain.mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_ENDPOINT;
        if extra & FI_HMEM != 0 {
            domain.mr_mode |= FI_MR_HMEM;
        }
        domain.threading = FI_THREAD_DOMAIN;
        domain.control_progress = FI_PROGRESS_MANUAL;
        domain.data_progress = FI_PROGRESS_MANUAL;
        // SAFETY: as above; the string lives as long as these hints.
        unsafe { (*hints.fabric_attr).prov_name = provider.as_ptr().cast_mut() };
        Ok(Self { info, _provider: provider })
    }
}

impl Drop for Hints {
    fn drop(&mut self) {
        // SAFETY: attributes of an entry that only we hold; the name is not the library's to free.
        unsafe { (*(*self.info.raw()).fabric_attr).prov_name = std::ptr::null_mut() };
    }
}

/// The interfaces of a provider, one entry for each, the best first.
pub(super) fn interfaces(
    library: &'static Library,
    provider: &str,
    bind: IpAddr,
) -> Result<Vec<Info>, SelectError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b";_-".contains(&byte);
    if provider.is_empty() || provider.len() > NAME_MAX_BYTES || !provider.bytes().all(plain) {
        return Err(SelectError::Name);
    }
    let by_ip = !matches!(provider, "efa" | "shm");
    if by_ip && is_foreign(bind) {
        return Err(SelectError::Address(bind));
    }
    if (provider == "tcp" || provider == "tcp;ofi_rxm") && frees_reads_twice(library) {
        return Err(SelectError::Crashes);
    }
    if provider == "efa" && bind.is_loopback() {
        return Err(SelectError::Loopback(bind));
    }
    let node = (by_ip && !bind.is_unspecified()).then(|| bind.to_string());
    let mut found = Err(Errno::NODATA);
    if device::any_loadable() {
        found = list(library, provider, node.as_deref(), FI_HMEM);
    }
    if found.as_ref().map_or(true, Vec::is_empty) {
        found = list(library, provider, node.as_deref(), 0);
    }
    let mut infos = found.map_err(|errno| SelectError::Nothing(library.strerror(errno)))?;
    infos.retain(|info| fits(info, provider, bind));
    keep_one_each(&mut infos);
    if infos.is_empty() {
        return Err(SelectError::Nothing(library.strerror(Errno::NODATA)));
    }
    Ok(infos)
}

/// Whether an address is none of this host: providers say so in words of their own, and some of them late.
fn is_foreign(bind: IpAddr) -> bool {
    UdpSocket::bind((bind, 0)).is_err_and(|error| error.kind() == ErrorKind::AddrNotAvailable)
}

/// Whether this is a libfabric whose providers over TCP report and free a read twice when its connection ends while
/// the answer is arriving: all of them do up to 1.17, and none from 1.18 on, which takes the read off the queue as
/// soon as its answer begins. `ofi_rxm` follows a null pointer then. `net` survives, but what it allocates next in
/// that domain is broken: so every peer has a domain of its own there.
pub(super) fn frees_reads_twice(library: &Library) -> bool {
    library.version() < (1, 18)
}

/// All entries that match.
fn list(
    library: &'static Library,
    provider: &str,
    node: Option<&str>,
    extra: u64,
) -> Result<Vec<Info>, Errno> {
    let Ok(hints) = Hints::new(library, provider, extra) else { return Err(Errno::NODATA) };
    let node = node.and_then(|node| CString::new(node).ok());
    let flags = if node.is_some() { FI_SOURCE } else { 0 };
    // SAFETY: hints made from an empty entry of the library.
    let first = unsafe { library.getinfo(node.as_deref(), flags, hints.info.raw()) }?;
    let mut infos = Vec::new();
    let mut entry = first;
    while !entry.is_null() {
        // SAFETY: an entry of the list just returned, which is freed only below.
        infos.extend(unsafe { Info::copy_of(library, entry) });
        // SAFETY: as above.
        entry = unsafe { (*entry).next };
    }
    // SAFETY: the list as returned; its entries were copied.
    unsafe { library.freeinfo(first) };
    Ok(infos)
}

/// Whether an entry is of the provider as named, and on the interface asked for.
fn fits(info: &Info, provider: &str, bind: IpAddr) -> bool {
    let name = info.provider();
    // Debian's 1.17 has reliable datagrams over `tcp` and `verbs` only with the help of `ofi_rxm`.
    if name != provider && name != format!("{provider};ofi_rxm") {
        return false;
    }
    // The other fabric of this provider, `efa-direct`, has short messages and wants peers to be known in advance.
    if provider == "efa" && info.fabric() != "efa" {
        return false;
    }
    match socket_ip(&info.source()) {
        Some(ip) if bind.is_unspecified() => ip.is_ipv4() == bind.is_ipv4() && !ip.is_loopback(),
        Some(ip) => ip == bind,
        None => true,
    }
}

/// Keeps the first entry of each interface: the library lists the best first.
fn keep_one_each(infos: &mut Vec<Info>) {
    let best = infos.first().map(Info::provider);
    let mut seen = Vec::new();
    infos.retain(|info| {
        let domain = info.domain();
        let new = Some(info.provider()) == best && !seen.contains(&domain);
        seen.push(domain);
        new
    });
}
