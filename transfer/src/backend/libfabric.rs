//! The libfabric driver: EFA and every other provider with reliable datagrams and one-sided operations.
//!
//! ```text
//! peer A:  endpoint of ours for A ──(reads, writes, sends)──► passive endpoint of A
//! peer B:  endpoint of ours for B ──────────────────────────► passive endpoint of B
//!          our passive endpoint   ◄──(of A, of B)              one of each per rail, that is, network interface
//! ```
//!
//! Invariants:
//! - An operation is posted from the endpoint of its peer alone: closing that ends it, whatever the peer does.
//! - Memory, contexts and queues outlive every endpoint that the library could use them from.
//! - The library is given nothing of a peer that was not checked for length and form.
//! - The process's environment is not read here, though the library itself looks at `FI_*`.

pub(crate) mod bare;
mod blob;
mod device;
mod object;
mod register;
mod requests;
mod select;
mod sinks;
mod slots;
mod work;

use std::net::{IpAddr, Ipv4Addr};

use baton_libfabric_sys::{Library, OpenError};

use self::object::{Info, Rail};
use self::select::SelectError;
use self::work::LibfabricDriver;
use crate::backend::fabric::driver::{Driver, DriverError, DriverInfo};
use crate::backend::handlers;
use crate::probe::Probe;

/// Longest one-sided operation: longer ones are the caller's to cut.
const OP_MAX_BYTES: usize = 1 << 30;
/// Longest message.
const MESSAGE_MAX_BYTES: usize = 64 << 20;
/// Bytes registered in one piece with providers that count pages: EFA takes a million pages of 4 KiB at most
/// (libfabric's issue 10402), one of which is lost where memory does not begin at a page.
const PINNED_SEGMENT_BYTES: u64 = (4 << 30) - (2 << 20);
/// The same for providers in software, where no limit is known.
const SEGMENT_BYTES: u64 = 1 << 46;
/// What `DriverInfo::wire` may be long.
const WIRE_MAX_BYTES: usize = 64;

/// Which provider of libfabric to use, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibfabricOptions {
    /// The provider by name, such as `efa`, `tcp`, `tcp;ofi_rxm`, `net`, `sockets`, `verbs;ofi_rxm` or `shm`;
    /// otherwise the best that works.
    pub provider: Option<String>,
    /// Network interfaces used side by side, at most.
    pub rails: usize,
    /// The address to bind to; the interface follows from it. Peers of a loopback address must have one too.
    pub bind: IpAddr,
}

impl Default for LibfabricOptions {
    fn default() -> Self {
        Self { provider: None, rails: 16, bind: IpAddr::V4(Ipv4Addr::LOCALHOST) }
    }
}

/// Opens the best provider that works here.
pub(crate) fn open(options: &LibfabricOptions) -> Result<Box<dyn Driver + Send>, DriverError> {
    let driver = handlers::keep(|| open_with(options, Tuning::USUAL))?;
    Ok(Box::new(driver))
}

/// What tests set differently, so that all code runs on small machines.
#[derive(Debug, Clone, Copy)]
struct Tuning {
    /// Bytes registered in one piece; otherwise what suits the provider.
    segment: Option<u64>,
    /// Rails opened on one network interface where there is no other.
    per_interface: usize,
}

impl Tuning {
    const USUAL: Self = Self { segment: None, per_interface: 1 };
}

fn open_with(options: &LibfabricOptions, tuning: Tuning) -> Result<LibfabricDriver, DriverError> {
    let library = library()?;
    let named = options.provider.as_deref();
    let candidates = named.map_or_else(|| select::ORDER.to_vec(), |name| vec![name]);
    let mut reasons = Vec::new();
    for provider in candidates {
        match try_provider(library, provider, options, tuning) {
            Ok(driver) => return Ok(driver),
            Err(error) => reasons.push((format!("{provider}: {}", error.what), error.remedy)),
        }
    }
    let remedy = match &reasons[..] {
        [(_, only)] => only.clone(),
        _ => "`baton doctor --bind ADDRESS` says what each of them lacks".to_owned(),
    };
    let reasons: Vec<_> = reasons.into_iter().map(|(reason, _)| reason).collect();
    let what = format!("no provider of libfabric works at {}: {}", options.bind, reasons.join("; "));
    Err(DriverError { what, remedy })
}

fn try_provider(
    library: &'static Library,
    provider: &str,
    options: &LibfabricOptions,
    tuning: Tuning,
) -> Result<LibfabricDriver, DriverError> {
    let failed = |what, remedy: &str| DriverError { what, remedy: remedy.to_owned() };
    let refused = |error: SelectError| match error {
        SelectError::Address(_) => failed(error.to_string(), "bind the worker to an address of this host"),
        _ => failed(error.to_string(), provider_remedy(provider)),
    };
    let found = select::interfaces(library, provider, options.bind).map_err(refused)?;
    let most = options.rails.clamp(1, blob::RAILS_MAX);
    let mut rails = Vec::new();
    for info in spread(library, found, most, tuning.per_interface) {
        let domain = info.domain();
        let broken = |errno| format!("{domain}: {}", library.strerror(errno));
        let rail = Rail::open(info).map_err(|errno| failed(broken(errno), provider_remedy(provider)))?;
        rails.push(rail);
    }
    let first = &rails.first().ok_or_else(|| refused(SelectError::Memory))?.info;
    let pinned = first.has_mr_mode(baton_libfabric_sys::abi::FI_MR_PROV_KEY);
    let segment = tuning.segment.unwrap_or(if pinned { PINNED_SEGMENT_BYTES } else { SEGMENT_BYTES });
    let info = describe(library, first, &rails, options.bind);
    Ok(LibfabricDriver::new(rails, info, options.bind.is_loopback(), segment))
}

/// One entry for each rail: of different interfaces, or all of the only one.
fn spread(library: &'static Library, mut found: Vec<Info>, most: usize, per_interface: usize) -> Vec<Info> {
    found.truncate(most);
    if let [only] = &found[..] {
        let raw = only.raw();
        // SAFETY: an intact entry, held by `found`.
        let more = (1..per_interface.min(most)).filter_map(|_| unsafe { Info::copy_of(library, raw) });
        let more: Vec<_> = more.collect();
        found.extend(more);
    }
    found
}

fn describe(library: &Library, first: &Info, rails: &[Rail], bind: IpAddr) -> DriverInfo {
    let (major, minor) = library.version();
    let provider = first.provider();
    let attr = first.endpoint_attr();
    let names: Vec<_> = rails.iter().map(|rail| rail.info.domain()).collect();
    let plural = if rails.len() == 1 { "rail" } else { "rails" };
    let detail =
        format!("libfabric {major}.{minor}, {provider}, {} {plural} ({})", rails.len(), names.join(", "));
    let mut wire = format!("{provider} {}.{}", attr.protocol, attr.protocol_version);
    wire.truncate(WIRE_MAX_BYTES);
    DriverInfo {
        detail,
        wire,
        same_host: provider == "shm" || bind.is_loopback(),
        read: true,
        // `shm` writes into the other process without asking it: what was granted could not be taken back.
        write: provider != "shm",
        emulated: ["tcp", "net", "sockets"].contains(&provider.split(';').next().unwrap_or_default()),
        message_max: attr.max_msg_size.min(MESSAGE_MAX_BYTES),
        requests: true,
        op_max: attr.max_msg_size.min(OP_MAX_BYTES),
        rails: rails.len(),
        device_memory: device::kinds(first),
    }
}

/// The library, with what it looks for at its first use already loaded.
fn library() -> Result<&'static Library, DriverError> {
    device::load_runtimes();
    Library::get()
        .map_err(|error| DriverError { what: error.to_string(), remedy: library_remedy(&error).to_owned() })
}

fn library_remedy(error: &OpenError) -> &'static str {
    match error {
        OpenError::Missing(_) => "install Debian's libfabric1 (or the EFA installer of AWS)",
        OpenError::Symbol { .. } | OpenError::Old(_) => "install libfabric 1.17 or later",
    }
}

fn provider_remedy(provider: &str) -> &'static str {
    match provider.split(';').next() {
        Some("efa") => "use the EFA installer of AWS, on an instance with an EFA interface",
        Some("tcp") => "install libfabric 1.18 or later, or name the provider `net`",
        Some("verbs") => {
            "install an RDMA network card and a libfabric built with verbs, which Debian's is not"
        }
        _ => "`fi_info -l` of Debian's libfabric-bin lists what this libfabric has",
    }
}

/// What of libfabric works here, for `baton doctor`: nothing stays open.
pub(crate) fn probe(options: &LibfabricOptions) -> Vec<Probe> {
    handlers::keep(|| probe_all(options))
}

fn probe_all(options: &LibfabricOptions) -> Vec<Probe> {
    let library = match library() {
        Ok(library) => library,
        Err(error) => return vec![Probe::fails("libfabric", error.what, error.remedy)],
    };
    let (major, minor) = library.version();
    let mut probes = vec![Probe::works("libfabric", format!("version {major}.{minor}"))];
    let mut best = None;
    for provider in select::ORDER.iter().copied().chain(["shm"]) {
        let name = format!("libfabric {provider}");
        let options = LibfabricOptions { provider: Some(provider.to_owned()), ..options.clone() };
        probes.push(match try_provider(library, provider, &options, Tuning::USUAL) {
            Ok(driver) => {
                let probe = Probe::works(name, driver.info.detail.clone());
                best = best.or_else(|| driver.rails.first().map(|rail| device::obstacles(&rail.info)));
                probe
            }
            Err(error) => Probe::fails(name, error.what, error.remedy),
        });
    }
    for (kind, obstacle) in best.into_iter().flatten() {
        let name = format!("libfabric {kind} memory");
        probes.push(match obstacle {
            None => Probe::works(name, "the provider takes it"),
            Some((what, remedy)) => Probe::fails(name, what, remedy),
        });
    }
    probes
}

#[cfg(test)]
mod tests;
