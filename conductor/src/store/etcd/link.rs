//! One connection to one member of etcd, and what its errors mean.

use std::time::Duration;

use baton_config::secret::{SecretFault, read_public, read_secret};
use etcd_client::{
    Certificate, Client, ConnectOptions, Error, GetOptions, Identity, KvClient, LeaseClient,
    MaintenanceClient, TlsOptions, WatchClient,
};

use super::pin::Place;
use super::{CALL_TIMEOUT, EtcdOptions};
use crate::store::{PAGE_MAX_KEYS, StoreError, VALUE_MAX_BYTES};

/// Limit of a connection attempt.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Limit of a first answer, where etcd must check a password first (it takes its time on purpose).
const LOGIN_TIMEOUT: Duration = Duration::from_secs(3);
/// etcd ends connections that are pinged more often than every 5 s.
const PING_EVERY: Duration = Duration::from_secs(6);
const PING_TIMEOUT: Duration = Duration::from_secs(3);
/// A full page of the largest values.
const PAGE_MAX_BYTES: usize = PAGE_MAX_KEYS * (VALUE_MAX_BYTES + 1024);
/// Most that a watch takes at once. etcd sends up to 1,000 revisions together to a watch that has to catch up.
const EVENTS_MAX_BYTES: usize = 256 << 20;

/// What a call that went wrong means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failure {
    /// An answer that any member would give.
    Final(StoreError),
    /// There is no such lease.
    NoLease,
    /// etcd takes no more data until its operator acts.
    NoSpace,
    /// A message larger than the limit.
    TooLarge,
    /// Nothing was done: another member may do it.
    NotDone(String),
    /// Nobody knows whether it was done.
    Unknown(String),
}

/// A connection that answered once.
#[derive(Clone)]
pub(super) struct Link {
    pub(super) place: Place,
    /// Identity of the member's cluster.
    pub(super) cluster: u64,
    pub(super) kv: KvClient,
    pub(super) lease: LeaseClient,
    pub(super) watch: WatchClient,
    pub(super) maintenance: MaintenanceClient,
}

impl Link {
    /// Connects, logs in, and asks whose member this is. Nothing is written.
    pub(super) async fn open(options: &EtcdOptions, place: Place) -> Result<Self, Failure> {
        let limit = if options.auth.is_some() { LOGIN_TIMEOUT } else { CALL_TIMEOUT };
        let late = |_| Failure::NotDone(format!("no answer within {limit:?}"));
        tokio::time::timeout(limit, Self::connect(options, place)).await.map_err(late)?
    }

    async fn connect(options: &EtcdOptions, place: Place) -> Result<Self, Failure> {
        let wanted = connect_options(options).map_err(|fault| Failure::NotDone(chain(&fault)))?;
        let not_done = |error: Error| match classify(&error) {
            Failure::Unknown(what) => Failure::NotDone(what),
            failure => failure,
        };
        let client = Client::connect([&options.endpoints[place.endpoint]], Some(wanted)).await;
        let client = client.map_err(not_done)?;
        let mut kv = client.kv_client().max_decoding_message_size(PAGE_MAX_BYTES);
        // Answered by the member itself, whatever the others do, if it knows a leader.
        let asked = GetOptions::new().with_serializable().with_count_only();
        let reply = kv.get(options.prefix.as_str(), Some(asked)).await.map_err(not_done)?;
        let cluster = reply.header().map_or(0, etcd_client::ResponseHeader::cluster_id);
        Ok(Self {
            place,
            cluster,
            kv,
            lease: client.lease_client(),
            watch: client.watch_client().max_decoding_message_size(EVENTS_MAX_BYTES),
            maintenance: client.maintenance_client(),
        })
    }
}

/// The files are read for each connection, so that renewed certificates and passwords need no restart.
fn connect_options(options: &EtcdOptions) -> Result<ConnectOptions, SecretFault> {
    let mut wanted = ConnectOptions::new()
        .with_connect_timeout(CONNECT_TIMEOUT)
        .with_keep_alive(PING_EVERY, PING_TIMEOUT)
        // Without an open stream etcd allows a ping every two hours.
        .with_keep_alive_while_idle(false)
        .with_require_leader(true)
        .with_auto_token_refresh(true);
    if let Some(tls) = &options.tls {
        let mut with = TlsOptions::new().ca_certificate(Certificate::from_pem(read_public(&tls.ca_file)?));
        if let Some((cert_file, key_file)) = &tls.identity {
            with = with.identity(Identity::from_pem(read_public(cert_file)?, read_secret(key_file)?));
        }
        wanted = wanted.with_tls(with);
    }
    if let Some(auth) = &options.auth {
        let password = String::from_utf8_lossy(&read_secret(&auth.password_file)?).into_owned();
        wanted = wanted.with_user(&auth.user, password.trim_end_matches(['\r', '\n']));
    }
    Ok(wanted)
}

/// Numbers of gRPC.
mod code {
    pub(super) const INVALID_ARGUMENT: i32 = 3;
    pub(super) const NOT_FOUND: i32 = 5;
    pub(super) const PERMISSION_DENIED: i32 = 7;
    pub(super) const RESOURCE_EXHAUSTED: i32 = 8;
    pub(super) const FAILED_PRECONDITION: i32 = 9;
    pub(super) const OUT_OF_RANGE: i32 = 11;
    pub(super) const UNAVAILABLE: i32 = 14;
    pub(super) const UNAUTHENTICATED: i32 = 16;
}

/// What an error of a call means. Where in doubt, the call may have been done.
pub(super) fn classify(error: &Error) -> Failure {
    let Error::GRpcStatus(status) = error else {
        return match error {
            Error::LeaseKeepAliveError(what) if what == "lease not found" => Failure::NoLease,
            Error::InvalidArgs(_) | Error::InvalidUri(_) => {
                Failure::Final(StoreError::Invalid(error.to_string()))
            }
            Error::TransportError(_) if refused(error) => Failure::NotDone(chain(error)),
            _ => Failure::Unknown(chain(error)),
        };
    };
    let message = status.message().to_owned();
    match i32::from(status.code()) {
        code::INVALID_ARGUMENT if message.contains("authentication failed") => Failure::NotDone(message),
        code::INVALID_ARGUMENT => Failure::Final(StoreError::Invalid(message)),
        code::NOT_FOUND => Failure::NoLease,
        code::RESOURCE_EXHAUSTED if message.contains("space exceeded") => Failure::NoSpace,
        code::PERMISSION_DENIED | code::FAILED_PRECONDITION => {
            Failure::Final(StoreError::Unavailable(message))
        }
        code::OUT_OF_RANGE => Failure::TooLarge,
        // Said before anything else is looked at.
        code::UNAVAILABLE if message == "etcdserver: no leader" => Failure::NotDone(message),
        code::UNAUTHENTICATED | code::RESOURCE_EXHAUSTED => Failure::NotDone(message),
        _ if refused(status) => Failure::NotDone(chain(status)),
        _ => Failure::Unknown(chain(status)),
    }
}

/// Whether nobody listens there, so that nothing was sent.
fn refused(error: &(dyn std::error::Error + 'static)) -> bool {
    causes(error).any(|cause| {
        let io = cause.downcast_ref::<std::io::Error>();
        io.is_some_and(|io| io.kind() == std::io::ErrorKind::ConnectionRefused)
    })
}

/// The innermost causes are the ones that help.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut texts: Vec<String> = causes(error).map(ToString::to_string).collect();
    texts.dedup_by(|later, earlier| earlier.contains(later.as_str()));
    texts.join(": ")
}

fn causes<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |error| error.source())
}
