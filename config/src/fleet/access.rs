//! `conductor.auth`, `conductor.tls` and `conductor.allowed_addresses`: who may speak with the conductor.

use std::path::PathBuf;

use super::listen::Listen;
use crate::cidr::{Cidr, CidrError};
use crate::reader::{Section, read_scalar};

/// What a client of the conductors shows and whom it believes; the paths of files, never what they hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConductorAccess {
    /// File of the token it shows.
    pub token_file: Option<PathBuf>,
    /// Authority that signed the conductors' certificates; those of the system without.
    pub ca_file: Option<PathBuf>,
    /// The certificate it shows.
    pub identity: Option<Identity>,
}

/// A certificate and its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Certificates in PEM, the own one first.
    pub cert_file: PathBuf,
    /// Private key in PEM.
    pub key_file: PathBuf,
}

/// Who is let in by the conductor itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConductorGuard {
    /// File of the tokens that are accepted; without it none is asked for.
    pub token_file: Option<PathBuf>,
    /// Certificates it shows; plain HTTP without.
    pub tls: Option<ServerTls>,
    /// Where workers may say they are; anywhere when empty.
    pub allowed_addresses: Vec<Cidr>,
}

/// TLS of a listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerTls {
    /// What it shows.
    pub identity: Identity,
    /// Authority of its clients: who shows no certificate of it may ask for nothing but health and metrics.
    pub client_ca_file: Option<PathBuf>,
}

impl ConductorGuard {
    /// Whether callers have to prove who they are.
    pub fn authenticates(&self) -> bool {
        self.token_file.is_some() || self.tls.as_ref().is_some_and(|tls| tls.client_ca_file.is_some())
    }
}

/// Reads all three keys.
pub(super) fn read(section: &mut Section<'_, '_>, listen: Listen) -> (ConductorGuard, ConductorAccess) {
    let token_file = section.section_if_given("auth").and_then(|mut auth| {
        let token_file = auth.file("token_file");
        if token_file.is_none() {
            auth.missing("token_file", "the path of a file of at least 32 random characters");
        }
        token_file
    });
    let (tls, ca_file, identity) = match section.section_if_given("tls") {
        Some(tls) => read_tls(tls),
        None => (None, None, None),
    };
    let guard = ConductorGuard { token_file: token_file.clone(), tls, allowed_addresses: ranges(section) };
    // A fault of the two sections already says what is missing there.
    let clean = ["auth", "tls"].iter().all(|key| section.reader.is_clean(&section.child(key)));
    if clean && !listen.address.ip().is_loopback() && !guard.authenticates() {
        let name = section.child("listen");
        let problem =
            format!("is {}, where other hosts can connect, and nobody proves who they are", listen.address);
        let remedy = "add auth: { token_file: PATH } or tls: { cert_file: PATH, key_file: PATH, client_ca_file: PATH }, or listen on 127.0.0.1";
        section.reader.fault(&name, section.reader.position(&name), problem, remedy);
    }
    (guard, ConductorAccess { token_file, ca_file, identity })
}

type Tls = (Option<ServerTls>, Option<PathBuf>, Option<Identity>);

fn read_tls(mut section: Section<'_, '_>) -> Tls {
    let identity = read_identity(&mut section, "cert_file", "key_file");
    let at = section.position("client_ca_file");
    let client_ca_file = section.file("client_ca_file");
    if client_ca_file.is_some() && identity.is_none() && section.reader.is_clean(&section.path) {
        let name = section.child("client_ca_file");
        let problem = "asks clients for certificates, but the conductor itself has none";
        section.reader.fault(&name, at, problem, "add cert_file: PATH and key_file: PATH");
    }
    let ca_file = section.file("ca_file");
    let client = read_identity(&mut section, "client_cert_file", "client_key_file");
    (identity.map(|identity| ServerTls { identity, client_ca_file }), ca_file, client)
}

/// A certificate and its key: both or neither.
pub(super) fn read_identity(
    section: &mut Section<'_, '_>,
    cert: &'static str,
    key: &'static str,
) -> Option<Identity> {
    let (cert_file, key_file) = (section.file(cert), section.file(key));
    match (&cert_file, &key_file) {
        (Some(_), None) => section.missing(key, "the path of the PEM file of the key"),
        (None, Some(_)) => section.missing(cert, "the path of the PEM file of the certificate"),
        _ => {}
    }
    Some(Identity { cert_file: cert_file?, key_file: key_file? })
}

fn ranges(section: &mut Section<'_, '_>) -> Vec<Cidr> {
    let Some(items) = section.list("allowed_addresses") else { return Vec::new() };
    if items.is_empty() {
        let (name, remedy) =
            (section.child("allowed_addresses"), "name at least one range, or remove the key");
        section.reader.fault(&name, section.at, "is empty: no worker could register", remedy);
    }
    let mut out = Vec::with_capacity(items.len());
    for (path, node) in items {
        let at = node.at;
        let mut wide = None;
        let expected = "a range of addresses, like 10.0.0.0/8";
        let range =
            read_scalar(section.reader, &path, node, expected, |text| match text.text.parse::<Cidr>() {
                Ok(range) => Some(Some(range)),
                Err(CidrError::HostBits { range }) => {
                    wide = Some(range);
                    Some(None)
                }
                Err(CidrError::Shape | CidrError::Prefix) => None,
            });
        if let Some(range) = wide {
            let (problem, remedy) = ("has bits beyond its prefix", format!("write {range}"));
            section.reader.fault(&path, Some(at), problem, remedy);
        }
        out.extend(range.flatten());
    }
    out
}
