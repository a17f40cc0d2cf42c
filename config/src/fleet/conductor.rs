//! `conductor:` of the fleet document.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::access::{self, ConductorAccess, ConductorGuard};
use super::defaults;
use super::listen::{Listen, URL_EXPECTED, url};
use crate::reader::{Section, Text, read_scalar};
use crate::yaml::Value;

/// The conductor.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ConductorSpec {
    /// Where it listens.
    pub listen: Listen,
    /// Where routers, workers and operators reach it (`http://HOST:PORT`, `https://` with TLS); never empty.
    pub endpoints: Vec<String>,
    /// Whom it lets in.
    pub guard: ConductorGuard,
    /// How routers, workers and operators prove who they are, and whom they believe to be a conductor.
    pub access: ConductorAccess,
    /// Where its state lives.
    pub store: StoreSpec,
    /// How long a worker that stops renewing stays registered; renewed every third of it.
    pub lease_ttl: Duration,
}

/// Where the conductor keeps its state.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreSpec {
    /// In the memory of one conductor.
    Embedded {
        /// Keeps the epoch counter and operator intents over restarts; memory only without it.
        state_file: Option<PathBuf>,
    },
    /// In etcd, shared by several conductors.
    Etcd(EtcdSpec),
}

/// How to reach etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct EtcdSpec {
    /// `http://HOST:PORT` or `https://HOST:PORT`; never empty.
    pub endpoints: Vec<String>,
    /// Under which key everything is kept.
    pub prefix: String,
    /// Certificates, for `https`.
    pub tls: Option<EtcdTls>,
    /// User and password.
    pub auth: Option<EtcdAuth>,
}

/// Certificates for etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct EtcdTls {
    /// Authority that signed the servers' certificates.
    pub ca_file: PathBuf,
    /// This client's certificate.
    pub cert_file: Option<PathBuf>,
    /// This client's key.
    pub key_file: Option<PathBuf>,
}

/// User of etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct EtcdAuth {
    /// Name.
    pub user: String,
    /// File that holds the password.
    pub password_file: PathBuf,
}

impl ConductorSpec {
    pub(super) fn read(mut section: Section<'_, '_>) -> Self {
        let listen = Listen::read(&mut section, defaults::CONDUCTOR_LISTEN);
        let mut endpoints = urls(&mut section, "endpoints");
        let (guard, access) = access::read(&mut section, listen);
        let secure = guard.tls.is_some();
        if endpoints.is_empty() {
            let scheme = if secure { "https" } else { "http" };
            endpoints.push(format!("{scheme}://{}", reachable(listen.address)));
            section.reader.record(section.child("endpoints"), &endpoints[0], None);
        }
        for (i, plain) in endpoints.iter().enumerate().filter(|(_, url)| secure && url.starts_with("http:")) {
            let name = format!("{}[{i}]", section.child("endpoints"));
            let (problem, remedy) =
                ("is plain HTTP, but the conductor speaks TLS", plain.replacen("http:", "https:", 1));
            section.reader.fault(&name, section.reader.position(&name), problem, format!("write {remedy}"));
        }
        let lease_ttl = section.duration("lease_ttl_ms", 500..=600_000, defaults::LEASE_TTL);
        let store = read_store(&mut section);
        Self { listen, endpoints, guard, access, store, lease_ttl }
    }
}

/// The address a client on this machine uses for a listener.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

/// A list of URLs; empty if it is missing or at fault.
fn urls(section: &mut Section<'_, '_>, key: &'static str) -> Vec<String> {
    let Some(items) = section.list(key) else { return Vec::new() };
    items
        .into_iter()
        .filter_map(|(path, node)| read_scalar(section.reader, &path, node, URL_EXPECTED, url))
        .collect()
}

/// `embedded`, `{ embedded: {...} }` or `{ etcd: {...} }`.
fn read_store(section: &mut Section<'_, '_>) -> StoreSpec {
    let embedded = StoreSpec::Embedded { state_file: None };
    let path = section.child("store");
    let reader = section.reader;
    let Some(node) = section.take("store") else {
        reader.record(path, "embedded", None);
        return embedded;
    };
    if matches!(node.value, Value::Scalar { .. }) {
        read_scalar(reader, &path, node, "`embedded`, or a section `etcd:` with endpoints", |text| {
            (text.text == "embedded").then_some(())
        });
        return embedded;
    }
    reader.record(path.clone(), "a section", Some(node.at));
    let mut store = Section::open(reader, path, node);
    let etcd = store.section_if_given("etcd");
    let embedded_section = store.section_if_given("embedded");
    match (etcd, embedded_section) {
        (Some(_), Some(_)) => {
            reader.fault(&store.path, store.at, "has both `embedded` and `etcd`", "keep one of them");
            embedded
        }
        (Some(etcd), None) => read_etcd(etcd),
        (None, Some(mut section)) => StoreSpec::Embedded { state_file: section.file("state_file") },
        (None, None) => embedded,
    }
}

fn read_etcd(mut section: Section<'_, '_>) -> StoreSpec {
    let given = section.has("endpoints");
    let endpoints = urls(&mut section, "endpoints");
    if !given {
        section.missing("endpoints", "a list of URLs, such as [http://10.0.0.1:2379]");
    }
    let path = section.child("prefix");
    let prefix = section.text("prefix", "a key prefix, such as /baton").unwrap_or_else(|| {
        section.reader.record(path, defaults::ETCD_PREFIX, None);
        defaults::ETCD_PREFIX.to_owned()
    });
    let has_tls = section.has("tls");
    let tls = section.section_if_given("tls").and_then(|mut tls| {
        let ca_file = tls.file("ca_file");
        if ca_file.is_none() {
            tls.missing("ca_file", "the path of a PEM file");
        }
        let (cert_file, key_file) = (tls.file("cert_file"), tls.file("key_file"));
        match (&cert_file, &key_file) {
            (Some(_), None) => tls.missing("key_file", "the path of the certificate's key"),
            (None, Some(_)) => tls.missing("cert_file", "the path of the key's certificate"),
            _ => {}
        }
        Some(EtcdTls { ca_file: ca_file?, cert_file, key_file })
    });
    for (i, url) in endpoints.iter().enumerate() {
        let name = format!("{}[{i}]", section.child("endpoints"));
        let (problem, remedy) = match (has_tls, url.starts_with("https:")) {
            (true, false) => ("is plain HTTP beside a `tls` section", "write https, or remove `tls`"),
            (false, true) => ("is HTTPS, but no authority is known", "add `tls: { ca_file: PATH }`"),
            _ => continue,
        };
        section.reader.fault(&name, section.reader.position(&name), problem, remedy);
    }
    let auth = section.section_if_given("auth").and_then(|mut auth| {
        let user = auth.required("user", "the user's name", Text::words);
        let password_file = auth.file("password_file");
        if password_file.is_none() {
            auth.missing("password_file", "the path of a file that holds the password");
        }
        Some(EtcdAuth { user: user?, password_file: password_file? })
    });
    StoreSpec::Etcd(EtcdSpec { endpoints, prefix, tls, auth })
}
