//! Whether a server died with a request, so that the request is kept from the others: see [`crate::dispatch::Suspects`].
//!
//! A server has no epoch. It has died if nobody listens where it was right after it failed the request, or if the worker
//! beside it found so soon afterwards: a server that is started again at once is seen by the former, one that says
//! 500 before it ends by the latter.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::attempt::Lost;
use super::{Asked, Forwarder};
use crate::dispatch::{Death, Suspects, Verdict};
use crate::fleet::Worker;
use crate::reply::Refusal;

/// For a connection, and for a worker to say how its server is. Who says nothing at all may be cut off, which is nobody's fault.
const PATIENCE: Duration = Duration::from_millis(500);
/// For a connection to a process that is ending to break.
const DYING: Duration = Duration::from_millis(200);
/// A server whose engine has died is given so long to end.
const ENDS_WITHIN: Duration = Duration::from_secs(15);

impl Asked {
    fn print(&self, suspects: &Suspects) -> u64 {
        suspects.print_of_body(self.passing.path(), self.request.body(), self.owner)
    }
}

impl Forwarder {
    /// Whether the request may be put to a server, or to another one.
    pub(super) async fn check(&self, asked: &Asked) -> Result<(), Refusal> {
        let suspects = &self.dispatcher.suspects;
        if suspects.is_empty() {
            return Ok(());
        }
        let print = asked.print(suspects);
        loop {
            let doubtful = match suspects.verdict(print, Instant::now()) {
                Verdict::Free => return Ok(()),
                Verdict::Doubtful(deaths) => deaths,
                Verdict::Barred => {
                    self.dispatcher.metrics.barred.inc();
                    tracing::error!(
                        request = asked.id,
                        "servers died with this very request: refused for a while, instead of killing another one"
                    );
                    return Err(Refusal::Barred);
                }
            };
            for death in doubtful {
                suspects.settle(print, &death, self.has_died(&death).await);
            }
        }
    }

    /// A server failed the request before anything of an answer came, which may have been its death.
    pub(super) fn suspect(&self, asked: &Asked, worker: &Arc<Worker>, sent_at: Instant) {
        let death = Death::of(worker, sent_at, Instant::now());
        let suspects = Arc::clone(&self.dispatcher.suspects);
        let print = asked.print(&suspects);
        suspects.broke(print, death.clone());
        let Some(address) = worker.member.server.as_deref().and_then(address) else { return };
        self.dispatcher.tracker.spawn(async move {
            if nobody_listens(&address).await {
                suspects.settle(print, &death, true);
            }
        });
    }

    /// A server has answered the request and lives.
    pub(super) fn survived(&self, asked: &Asked) {
        let suspects = &self.dispatcher.suspects;
        if !suspects.is_empty() {
            suspects.survived(asked.print(suspects));
        }
    }

    async fn has_died(&self, death: &Death) -> bool {
        let worker = &death.worker;
        if let Some(address) = worker.member.server.as_deref().and_then(address)
            && nobody_listens(&address).await
        {
            return true;
        }
        let state = timeout(PATIENCE, self.dispatcher.caller.state(worker.authority())).await;
        let Ok(Ok(status)) = state else { return false };
        let gone = status.server_gone_ms.map(Duration::from_millis);
        gone.is_some_and(|gone| gone < death.sent_at.elapsed() && death.at.elapsed() < gone + ENDS_WITHIN)
    }
}

impl Lost {
    /// Whether a server that dies may look like this.
    pub(super) fn may_be_death(&self) -> bool {
        matches!(self, Self::Broken(_) | Self::Failing(_))
    }
}

/// Host and port of a server.
fn address(url: &str) -> Option<(String, u16)> {
    let url: Uri = url.parse().ok()?;
    let port = if url.scheme_str()? == "https" { 443 } else { 80 };
    let host = url.host()?.trim_start_matches('[').trim_end_matches(']');
    Some((host.to_owned(), url.port_u16().unwrap_or(port)))
}

async fn nobody_listens((host, port): &(String, u16)) -> bool {
    match timeout(PATIENCE, TcpStream::connect((host.as_str(), *port))).await {
        Ok(Ok(mut connection)) => {
            // A process that ends may take connections until its last moment; one that lives waits for a request on them.
            matches!(timeout(DYING, connection.read(&mut [0])).await, Ok(Ok(0) | Err(_)))
        }
        Ok(Err(error)) => matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset),
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_looked_for_where_its_requests_go() {
        let found = |url: &str| address(url).map(|(host, port)| format!("{host} {port}"));
        assert_eq!(found("http://gpu-1:8000").as_deref(), Some("gpu-1 8000"));
        assert_eq!(found("http://gpu-1/base").as_deref(), Some("gpu-1 80"));
        assert_eq!(found("https://[::1]").as_deref(), Some("::1 443"));
        assert_eq!(found("gone"), None);
    }

    #[tokio::test]
    async fn a_connection_that_is_refused_or_ended_tells_that_nobody_listens() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = ("127.0.0.1".to_owned(), listener.local_addr().unwrap().port());
        assert!(!nobody_listens(&address).await);
        let dying = async {
            let _first = listener.accept().await.unwrap();
            drop(listener.accept().await.unwrap());
        };
        assert!(tokio::join!(nobody_listens(&address), dying).0);
        drop(listener);
        assert!(nobody_listens(&address).await);
        assert!(!nobody_listens(&("no-such-host.invalid".to_owned(), 80)).await);
    }
}
