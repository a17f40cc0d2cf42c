//! Where servers are, what they are shown, and the connections to them: all from this router's own fleet document. A
//! worker's registration only says which of them it stands beside.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::Duration;

use baton_conductor::TlsError;
use baton_config::PoolName;
use baton_config::fleet::OpenaiSpec;
use baton_config::secret::{SecretFault, Token, read_api_key};
use bytes::Bytes;
use http::header::{ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use http::{Method, Request};
use http_body_util::Full;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{Client, ResponseFuture};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::time::Instant;

use super::{Asked, ForwardOptions, ForwardPool};
use crate::fleet::Member;

/// Idle connections kept per server.
const IDLE_CONNECTIONS: usize = 256;
/// How long an idle connection is kept: less than the five seconds after which uvicorn, under vLLM and SGLang, closes it.
const IDLE_FOR: Duration = Duration::from_secs(4);
/// Bytes of an answer that the kernel keeps for a client that does not read.
const RECEIVE_BYTES: usize = 256 << 10;
/// Some host that is not this one.
const ELSEWHERE: &str = "192.0.2.1:1";
/// The file of a key is read again at most so often.
const KEY_INTERVAL: Duration = Duration::from_secs(1);

/// Why the servers cannot be called.
#[derive(Debug, thiserror::Error)]
pub enum ServersError {
    /// A key can't be read.
    #[error("the key for the servers of pool {pool} cannot be read")]
    Key {
        /// The pool.
        pool: PoolName,
        /// Why not.
        #[source]
        source: SecretFault,
    },
    /// Certificates of servers can't be checked.
    #[error("the servers of pool {pool} cannot be trusted")]
    Trust {
        /// The pool.
        pool: PoolName,
        /// Why not.
        #[source]
        source: Box<TlsError>,
    },
}

/// The servers of all pools.
#[derive(Debug)]
pub(super) struct Servers {
    pools: BTreeMap<PoolName, Pool>,
}

/// The servers of a pool.
#[derive(Debug)]
pub(super) struct Pool {
    pub(super) options: ForwardPool,
    pub(super) in_flight_max: u32,
    /// The URLs that are the same wherever a worker is: of many, one is found without looking at all.
    fixed: HashSet<String>,
    http: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    authorization: RwLock<Option<HeaderValue>>,
    read_at: Mutex<Instant>,
}

/// One server.
pub(super) struct Server<'a> {
    pub(super) pool: &'a Pool,
    url: &'a str,
}

impl Servers {
    pub(super) fn new(options: &ForwardOptions, connect: Duration) -> Result<Self, ServersError> {
        let pool = |(name, options): (&PoolName, &ForwardPool)| {
            Ok((name.clone(), Pool::new(name, options, connect)?))
        };
        Ok(Self { pools: options.pools.iter().map(pool).collect::<Result<_, _>>()? })
    }

    /// The server beside a worker, if it is one of the worker's pool.
    pub(super) fn of<'a>(&'a self, member: &'a Member) -> Option<Server<'a>> {
        let pool = self.pools.get(&member.pool)?;
        let url = member.server.as_deref()?;
        pool.names(url, &member.address).then_some(Server { pool, url })
    }

    /// Reads the key of a pool again, after it was refused; whether it is another one now.
    pub(super) async fn read_key_again(&self, pool: &PoolName) -> bool {
        match self.pools.get(pool) {
            Some(found) => found.read_key_again(pool).await,
            None => false,
        }
    }
}

impl Pool {
    fn new(name: &PoolName, options: &ForwardPool, connect: Duration) -> Result<Self, ServersError> {
        let spec = &options.servers;
        let urls = spec.urls.iter().map(String::as_str);
        let tls = baton_conductor::http::server_tls(urls, spec.ca_file.as_deref(), "engine.ca_file")
            .map_err(|source| ServersError::Trust { pool: name.clone(), source: Box::new(source) })?;
        let key = spec.api_key_file.as_deref().map(read_api_key).transpose();
        let key = key.map_err(|source| ServersError::Key { pool: name.clone(), source })?;
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(connect));
        tcp.set_nodelay(true);
        tcp.set_recv_buffer_size(Some(RECEIVE_BYTES));
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let http = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_FOR)
            .pool_max_idle_per_host(IDLE_CONNECTIONS)
            .build(connector);
        Ok(Self {
            options: options.clone(),
            in_flight_max: options.in_flight_max,
            fixed: spec
                .urls
                .iter()
                .filter(|url| OpenaiSpec::reached_at(url, ELSEWHERE) == **url)
                .cloned()
                .collect(),
            http,
            authorization: RwLock::new(key.as_ref().and_then(header)),
            read_at: Mutex::new(Instant::now()),
        })
    }

    /// Whether a worker of the pool may say that its server is there.
    fn names(&self, url: &str, worker_address: &str) -> bool {
        self.fixed.contains(url) || self.options.servers.names(url, worker_address)
    }

    async fn read_key_again(&self, name: &PoolName) -> bool {
        let Some(path) = self.options.servers.api_key_file.clone() else { return false };
        {
            let mut read_at = self.read_at.lock().unwrap_or_else(PoisonError::into_inner);
            if read_at.elapsed() < KEY_INTERVAL {
                return false;
            }
            *read_at = Instant::now();
        }
        // A file system that hangs must not hang the router.
        let key = match tokio::task::spawn_blocking(move || read_api_key(&path)).await {
            Ok(Ok(key)) => header(&key),
            Ok(Err(error)) => {
                tracing::warn!(pool = %name, %error, "the servers refuse the key, and it cannot be read again");
                return false;
            }
            // The runtime ends.
            Err(_) => return false,
        };
        let mut current = self.authorization.write().unwrap_or_else(PoisonError::into_inner);
        let news = *current != key;
        *current = key;
        news
    }
}

impl Server<'_> {
    /// Sends a request; the future resolves when the head of the answer is there. `None` if there is no such URL.
    pub(super) fn send(&self, asked: &Asked) -> Option<ResponseFuture> {
        let spec = &self.pool.options.servers;
        let body = asked.request.body_for(spec.model.as_deref());
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = format!("{}{}", self.url, asked.passing.path()).parse().ok()?;
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let accept = if asked.request.stream { "text/event-stream" } else { "application/json" };
        headers.insert(ACCEPT, HeaderValue::from_static(accept));
        // Its tokens are counted and its model renamed.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if let Ok(id) = HeaderValue::from_str(&asked.id) {
            headers.insert("x-request-id", id);
        }
        let authorization = self.pool.authorization.read().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(authorization) = authorization {
            headers.insert(AUTHORIZATION, authorization);
        }
        Some(self.pool.http.request(request))
    }
}

fn header(key: &Token) -> Option<HeaderValue> {
    // Keys are printable ASCII: that is checked where they are read.
    let mut value = HeaderValue::try_from(format!("Bearer {}", key.reveal())).ok()?;
    value.set_sensitive(true);
    Some(value)
}
