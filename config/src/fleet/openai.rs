//! `engine: { kind: openai }`: pools whose requests are passed on to OpenAI-compatible servers of other projects.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::{EngineSpec, Pool, defaults};
use crate::reader::{Reader, Section, Text, read_scalar};
use crate::yaml::Node;

/// Any OpenAI-compatible server: what it is sent is what the client sent, what it answers is what the client gets.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct OpenaiSpec {
    /// `http://HOST:PORT` of the server of each replica, in their order; a single one is that of every replica. Never
    /// empty.
    pub urls: Vec<String>,
    /// File of the key that the servers ask for.
    pub api_key_file: Option<PathBuf>,
    /// Authority that signed the servers' certificates; those of the system without.
    pub ca_file: Option<PathBuf>,
    /// What the servers call the model, if it is another name than the fleet's.
    pub model: Option<String>,
    /// The path that tells whether a server is well; `/health`, or `/v1/models` where a server has no such path.
    pub health_path: Option<String>,
    /// A stream that has begun and yields nothing for so long is given up.
    pub silent_timeout: Duration,
    /// Fields of requests that are passed on besides the known ones.
    pub pass_fields: Vec<String>,
}

const URL_EXPECTED: &str =
    "http://HOST:PORT or https://HOST:PORT, without user, password and path (Baton adds /v1/...)";
const PATH_EXPECTED: &str = "a path, like /health";
const FIELD_EXPECTED: &str = "the name of a field of a request";

impl OpenaiSpec {
    /// Servers with every default.
    pub fn new(urls: Vec<String>) -> Self {
        Self {
            urls,
            api_key_file: None,
            ca_file: None,
            model: None,
            health_path: None,
            silent_timeout: defaults::SILENT_TIMEOUT,
            pass_fields: Vec::new(),
        }
    }

    pub(super) fn read(section: &mut Section<'_, '_>) -> Self {
        Self {
            urls: urls(section),
            api_key_file: section.file("api_key_file"),
            ca_file: section.file("ca_file"),
            model: section.text("model", "the name under which the server knows the model"),
            health_path: section.optional("health_path", PATH_EXPECTED, path),
            silent_timeout: section.duration("silent_timeout_ms", 1000..=3_600_000, defaults::SILENT_TIMEOUT),
            pass_fields: names(section),
        }
    }

    /// The server of replica number `replica`.
    pub fn url(&self, replica: u16) -> Option<&str> {
        let urls = self.urls.as_slice();
        let own = if urls.len() == 1 { urls.first() } else { urls.get(usize::from(replica)) };
        own.map(String::as_str)
    }

    /// The URL by which others reach a server: where it is of the worker's own host, that host takes its place.
    pub fn reached_at(url: &str, worker_address: &str) -> String {
        if !is_loopback(url) || is_loopback(worker_address) {
            return url.to_owned();
        }
        let host_at = url.find("://").map_or(0, |at| at + 3);
        let port_at = host_at + host(url).len();
        format!("{}{}{}", &url[..host_at], host(worker_address), &url[port_at..])
    }

    /// Whether a worker of this pool may say that its server is there.
    pub fn names(&self, server: &str, worker_address: &str) -> bool {
        self.urls.iter().any(|url| Self::reached_at(url, worker_address) == server)
    }
}

fn urls(section: &mut Section<'_, '_>) -> Vec<String> {
    let reader = section.reader;
    if section.has("url") && section.has("urls") {
        let problem = "has both `url` and `urls`";
        let remedy = "keep `url` for one server, or `urls` for one server of each replica";
        reader.fault(&section.path, section.at, problem, remedy);
    }
    let one = section.optional("url", URL_EXPECTED, origin);
    let at = section.position("urls");
    match section.list("urls") {
        None => {
            if one.is_none() && reader.is_clean(&section.path) {
                section.missing("url", URL_EXPECTED);
            }
            one.into_iter().collect()
        }
        Some(items) => {
            if items.is_empty() {
                reader.fault(&section.child("urls"), at, "is empty", "name at least one server");
            }
            let url = |(path, node): (String, Node)| read_scalar(reader, &path, node, URL_EXPECTED, origin);
            items.into_iter().filter_map(url).collect()
        }
    }
}

fn names(section: &mut Section<'_, '_>) -> Vec<String> {
    let reader = section.reader;
    let items = section.list("pass_fields").unwrap_or_default();
    let name = |(path, node): (String, Node)| {
        read_scalar(reader, &path, node, FIELD_EXPECTED, |text| {
            let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
            text.words().filter(|name| name.len() <= 64 && name.chars().all(good))
        })
    };
    items.into_iter().filter_map(name).collect()
}

/// Scheme, host and port, and nothing else.
fn origin(text: &Text) -> Option<String> {
    let text = text.words()?;
    let (scheme, rest) = text.split_once("://").filter(|(scheme, _)| matches!(*scheme, "http" | "https"))?;
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (authority, None),
    };
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let host_fits = match bare {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.len() <= 253 && host.chars().all(named),
    };
    let is_port = |port: &str| {
        port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0)
    };
    (host_fits && port.is_none_or(is_port)).then(|| format!("{scheme}://{}", authority.to_ascii_lowercase()))
}

/// Whether a URL of a server, or the address of a worker, is one that only its own host reaches.
pub(super) fn is_loopback(address: &str) -> bool {
    let host = host(address);
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    bare == "localhost" || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// The host of an address or of a URL that has no path.
fn host(address: &str) -> &str {
    let authority = address.split_once("://").map_or(address, |(_, authority)| authority);
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => host,
        _ => authority,
    }
}

fn path(text: &Text) -> Option<String> {
    let good = |path: &String| {
        path.starts_with('/') && path.len() <= 256 && path.bytes().all(|b| b.is_ascii_graphic() && b != b'#')
    };
    text.words().filter(good)
}

/// Sections of a pool that mean nothing to a server that keeps its own KV cache; each one given is a fault.
pub(super) fn refuse_meaningless(section: &mut Section<'_, '_>) {
    for (key, why) in [
        ("kv", "the server keeps its own KV cache"),
        ("transfer", "the server's KV blocks never leave it"),
        ("autoscale", "the server tells neither its queue nor its KV cache in a way that could be followed"),
    ] {
        if section.has(key) {
            let problem = format!("means nothing for an openai engine: {why}");
            section.reader.fault(&section.child(key), section.position(key), problem, "remove it");
        }
        section.take(key);
    }
}

/// A fleet either passes all requests on or none: a router that passes bytes through knows no tokens.
pub(super) fn check(reader: &Reader<'_>, pools: &[(String, Pool)]) {
    let passes = |pool: &Pool| matches!(pool.engine, EngineSpec::Openai(_));
    if let Some((_, other)) = pools.iter().find(|(_, pool)| !passes(pool)) {
        for (path, _) in pools.iter().filter(|(_, pool)| passes(pool)) {
            let name = format!("{path}.engine.kind");
            let problem = format!(
                "is openai, but {} in {}: a fleet either passes every request on or none",
                other.engine.kind(),
                other.name
            );
            let remedy = "write a fleet file, with a router of its own, for the pools of kind openai";
            reader.fault(&name, reader.position(&name), problem, remedy);
        }
    }
    for (path, pool) in pools {
        let EngineSpec::Openai(spec) = &pool.engine else { continue };
        if spec.urls.len() > 1 && pool.replicas as usize > spec.urls.len() {
            let name = format!("{path}.replicas");
            let problem = format!("is {}, but engine.urls names {} servers", pool.replicas, spec.urls.len());
            reader.fault(&name, reader.position(&name), problem, "name a server for each replica");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_of_the_workers_own_host_is_reached_by_that_host() {
        let reached = OpenaiSpec::reached_at;
        assert_eq!(reached("http://127.0.0.1:8000", "10.0.0.5:7500"), "http://10.0.0.5:8000");
        assert_eq!(reached("http://localhost", "gpu-1:7500"), "http://gpu-1");
        assert_eq!(reached("https://[::1]:8000", "[fd00::5]:7500"), "https://[fd00::5]:8000");
        assert_eq!(reached("http://127.0.0.2:8000", "127.0.0.1:7500"), "http://127.0.0.2:8000");
        assert_eq!(reached("http://gpu-1:8000", "10.0.0.5:7500"), "http://gpu-1:8000");
    }

    #[test]
    fn a_worker_names_no_server_but_those_of_its_pool() {
        let spec = OpenaiSpec::new(vec!["http://127.0.0.1:8000".to_owned(), "http://gpu-1:8000".to_owned()]);
        assert!(spec.names("http://10.0.0.5:8000", "10.0.0.5:7500"));
        assert!(spec.names("http://gpu-1:8000", "10.0.0.5:7500"));
        for wrong in
            ["http://10.0.0.6:8000", "http://127.0.0.1:8000", "http://10.0.0.5:22", "https://gpu-1:8000"]
        {
            assert!(!spec.names(wrong, "10.0.0.5:7500"), "{wrong}");
        }
    }

    #[test]
    fn replicas_have_a_server_each_or_one_for_all() {
        let url = |name: &str| format!("http://{name}");
        let one = OpenaiSpec::new(vec![url("a")]);
        assert_eq!((one.url(0), one.url(7)), (Some("http://a"), Some("http://a")));
        let two = OpenaiSpec::new(vec![url("a"), url("b")]);
        assert_eq!((two.url(1), two.url(2)), (Some("http://b"), None));
    }
}
