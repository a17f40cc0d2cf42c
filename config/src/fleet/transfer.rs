//! `pools[].transfer:` of the fleet document.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::defaults;
use super::listen::{ADDRESS_EXPECTED, address};
use crate::choice::choice;
use crate::names::Accelerator;
use crate::reader::{Section, Text, read_choice};
use crate::units::{ByteRate, Bytes};

choice! {
    /// Which way KV blocks take between a worker's memory and the wire.
    TransferPath {
        /// The best one the memory allows.
        Auto => "auto",
        /// Through registered host memory, copied in chunks.
        HostBuffered => "host_buffered",
        /// From registered GPU memory.
        GpuDirect => "gpu_direct",
        /// From registered memory, whichever kind it is.
        Direct => "direct",
    }
}

choice! {
    /// What moves bytes between two workers.
    BackendKind {
        /// Shared memory of one host.
        Shm => "shm",
        /// TCP streams.
        Tcp => "tcp",
        /// The kernel copies between two processes of one host.
        Cma => "cma",
        /// libfabric (EFA, verbs).
        Libfabric => "libfabric",
        /// UCX.
        Ucx => "ucx",
        /// A driver in a shared object.
        Plugin => "plugin",
        /// Files.
        File => "file",
        /// An object store.
        Object => "object",
    }
}

choice! {
    /// Which of the backends that both sides have is used.
    Choose {
        /// The one that was measured to be the quickest; the order of the list decides where they are close.
        Measured => "measured",
        /// The first of the list that works.
        Listed => "listed",
    }
}

choice! {
    /// Whether the receiver verifies a digest of every block before it is used.
    Integrity {
        /// It does.
        Digest => "digest",
        /// It trusts the wire.
        Off => "off",
    }
}

/// How KV blocks leave and reach the workers of a pool.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TransferSpec {
    /// Which way.
    pub path: TransferPath,
    /// Which backends, best first; never empty, no repeats.
    pub backends: Vec<BackendKind>,
    /// Which of the backends is used.
    pub choose: Choose,
    /// Provider of libfabric, such as `efa`.
    pub provider: Option<String>,
    /// Network interfaces of one backend used side by side, at most.
    pub rails: usize,
    /// Transports of UCX, such as `rc,cuda_ipc,tcp`; those that suit the machine without.
    pub transports: Option<String>,
    /// The shared object of the backend `plugin`.
    pub plugin: Option<PathBuf>,
    /// File of the token that all transfer agents of the fleet share.
    pub token_file: Option<PathBuf>,
    /// Bounds of one agent.
    pub limits: TransferLimitsSpec,
    /// Whether blocks are verified.
    pub integrity: Integrity,
    /// TCP streams per peer.
    pub streams: usize,
    /// Address the transfer agent listens on.
    pub bind: IpAddr,
    /// Port of the first replica, the next ones take the following ports; 0 is any free one.
    pub port: u16,
    /// Address peers connect to, if not the one it listens on; the port of the first replica, as above.
    pub advertise: Option<SocketAddr>,
    /// Registered host memory that blocks of a device pass through.
    pub staging: Bytes,
    /// Copy speed of the emulated device; unlimited without.
    pub device_bandwidth: Option<ByteRate>,
    /// Time to reach a peer.
    pub connect_timeout: Duration,
    /// Time a transfer may go without progress.
    pub stall_timeout: Duration,
}

/// Bounds of what one transfer agent registers and has under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct TransferLimitsSpec {
    /// Memory registered with network libraries.
    pub registered: Bytes,
    /// Regions registered.
    pub regions: u32,
    /// Operations under way with one peer.
    pub peer_ops: u32,
    /// Bytes under way with one peer.
    pub peer_bytes: Bytes,
}

impl TransferLimitsSpec {
    fn read(mut section: Section<'_, '_>) -> Self {
        Self {
            registered: section.bytes("registered", Bytes(1 << 20)..=Bytes(1 << 50), defaults::REGISTERED),
            regions: section.count("regions", 1..=1024, defaults::REGIONS),
            peer_ops: section.count("peer_ops", 1..=4096, defaults::PEER_OPS),
            peer_bytes: section.bytes("peer_bytes", Bytes(64 << 10)..=Bytes(1 << 34), defaults::PEER_BYTES),
        }
    }
}

impl TransferSpec {
    pub(super) fn read(mut section: Section<'_, '_>, accelerator: Accelerator) -> Self {
        let path = section.choice("path", defaults::TRANSFER_PATH);
        if let Some((problem, remedy)) = path_fault(path, accelerator) {
            let name = section.child("path");
            section.reader.fault(&name, section.reader.position(&name), problem, remedy);
        }
        let backends = read_backends(&mut section);
        let choose = section.choice("choose", defaults::CHOOSE);
        let provider = section.text("provider", "the name of a libfabric provider, like efa");
        let rails = section.integer("rails", 1..=16, defaults::RAILS as u64);
        let transports = section.text("transports", "transports of UCX, like rc,cuda_ipc,tcp");
        let plugin = section.file("plugin");
        if plugin.is_none() && backends.contains(&BackendKind::Plugin) {
            section.missing("plugin", "the path of the plugin's shared object");
        }
        let integrity = section.choice("integrity", defaults::INTEGRITY);
        let streams = section.integer("streams", 1..=64, defaults::STREAMS as u64);
        let bind = ip(&mut section, "bind");
        let token_file = read_token_file(&mut section, bind);
        let limits = TransferLimitsSpec::read(section.section("limits"));
        let port = section.count("port", 0..=65_535, u32::from(defaults::TRANSFER_PORT));
        let advertise = section.optional("advertise", ADDRESS_EXPECTED, address);
        let staging = section.bytes("staging", Bytes(4 << 10)..=Bytes(1 << 40), defaults::STAGING);
        let device_bandwidth = section
            .optional("device_bandwidth", "a rate, like 8GiB/s", |text| text.text.parse::<ByteRate>().ok());
        if device_bandwidth.is_some() && accelerator != Accelerator::Simulated {
            let name = section.child("device_bandwidth");
            let problem =
                format!("sets the speed of an emulated device, but the accelerator is {accelerator}");
            let remedy = "remove it, or set accelerator: simulated";
            section.reader.fault(&name, section.reader.position(&name), problem, remedy);
        }
        Self {
            path,
            backends,
            choose,
            provider,
            rails: usize::try_from(rails).unwrap_or(defaults::RAILS),
            transports,
            plugin,
            token_file,
            limits,
            integrity,
            streams: usize::try_from(streams).unwrap_or(defaults::STREAMS),
            bind,
            port: u16::try_from(port).unwrap_or(defaults::TRANSFER_PORT),
            advertise,
            staging,
            device_bandwidth,
            connect_timeout: section.duration("connect_timeout_ms", 10..=60_000, defaults::CONNECT_TIMEOUT),
            stall_timeout: section.duration("stall_timeout_ms", 10..=600_000, defaults::STALL_TIMEOUT),
        }
    }
}

fn ip(section: &mut Section<'_, '_>, key: &'static str) -> IpAddr {
    let default = defaults::TRANSFER_BIND;
    section.value(key, "an IP address, like 10.0.0.7", default, |text: &Text| text.text.parse().ok())
}

/// Where other hosts can connect, agents must know each other.
fn read_token_file(section: &mut Section<'_, '_>, bind: IpAddr) -> Option<PathBuf> {
    let token_file = section.section_if_given("auth").and_then(|mut auth| {
        let token_file = auth.file("token_file");
        if token_file.is_none() {
            auth.missing("token_file", "the path of a file of at least 32 random characters");
        }
        token_file
    });
    if token_file.is_none() && !bind.is_loopback() {
        let name = section.child("bind");
        let problem = format!("is {bind}, where other hosts can connect, and the agents share no token");
        let remedy = "add auth: { token_file: PATH } with the same file for every pool, or bind 127.0.0.1";
        section.reader.fault(&name, section.reader.position(&name), problem, remedy);
    }
    token_file
}

/// Why memory of this kind cannot take that path, and what can.
fn path_fault(path: TransferPath, accelerator: Accelerator) -> Option<(String, &'static str)> {
    match (path, accelerator) {
        (TransferPath::GpuDirect, Accelerator::Cpu | Accelerator::Simulated | Accelerator::Trainium) => {
            let problem =
                format!("is gpu_direct, but the KV cache is not in GPU memory (accelerator: {accelerator})");
            Some((problem, "write path: auto, or accelerator: cuda"))
        }
        (TransferPath::Direct, Accelerator::Simulated) => Some((
            "is direct, but the network cannot reach the memory of an emulated device".to_owned(),
            "write path: host_buffered, or accelerator: cpu",
        )),
        (TransferPath::Auto | TransferPath::HostBuffered, _)
        | (TransferPath::GpuDirect, Accelerator::Cuda)
        | (TransferPath::Direct, Accelerator::Cpu | Accelerator::Cuda | Accelerator::Trainium) => None,
    }
}

fn read_backends(section: &mut Section<'_, '_>) -> Vec<BackendKind> {
    let path = section.child("backends");
    let reader = section.reader;
    let given = section.has("backends");
    let at = section.at;
    let Some(items) = section.list("backends") else {
        if !given {
            let words: Vec<String> = defaults::BACKENDS.iter().map(ToString::to_string).collect();
            reader.record(path, format!("[{}]", words.join(", ")), None);
        }
        return defaults::BACKENDS.to_vec();
    };
    let mut backends: Vec<BackendKind> = Vec::with_capacity(items.len());
    let empty = items.is_empty();
    for (path, node) in items {
        let at = node.at;
        match read_choice(reader, &path, node) {
            Some(backend) if backends.contains(&backend) => {
                reader.fault(
                    &path,
                    Some(at),
                    format!("names {backend} again"),
                    "name each backend once, best first",
                );
            }
            Some(backend) => backends.push(backend),
            None => {}
        }
    }
    if empty {
        reader.fault(
            &path,
            at,
            "is empty",
            "name at least one backend, or remove the key: the default is [shm, tcp]",
        );
    }
    if backends.is_empty() { defaults::BACKENDS.to_vec() } else { backends }
}
