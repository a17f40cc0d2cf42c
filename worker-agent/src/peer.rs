//! Calls to another worker agent.

use std::time::Duration;

use baton_config::HandoffId;
use baton_config::protocol::{HandoffStatus, Ticket, TicketAck, Want};
use http::StatusCode;
use reqwest::RequestBuilder;
use serde::de::DeserializeOwned;

use crate::handoff::PeerFault;

/// Limit of a connection attempt: a healthy peer accepts within a round trip.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Limit of a call that is answered at once. Two of them and their pauses stay under three seconds, the bound for
/// noticing a frozen worker.
const CALL_TIMEOUT: Duration = Duration::from_millis(750);
/// Limit of a ticket's call, which is answered when its blocks were read. Posts replace each other well before.
const TICKET_TIMEOUT: Duration = Duration::from_secs(20);
/// Largest answer taken: a status with every pending ticket of a long prompt.
const ANSWER_MAX_BYTES: usize = 8 << 20;

/// The HTTP client for calls to peers; clones share its connections.
#[derive(Debug, Clone)]
pub struct PeerClient {
    http: reqwest::Client,
}

impl PeerClient {
    /// A client that never goes through a proxy.
    ///
    /// # Errors
    /// When the HTTP client cannot be made.
    pub fn new() -> Result<Self, reqwest::Error> {
        let http = baton_conductor::http::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(Duration::from_secs(30))
            .build()?;
        Ok(Self { http })
    }

    /// Posts a ticket and waits until its blocks were read.
    ///
    /// # Errors
    /// Why there is no acknowledgement.
    pub async fn post_ticket(
        &self,
        address: &str,
        id: HandoffId,
        ticket: &Ticket,
    ) -> Result<TicketAck, PeerFault> {
        let url = format!("http://{address}/v1/handoffs/{id}/ticket");
        answer(self.http.post(url).timeout(TICKET_TIMEOUT).json(ticket)).await
    }

    /// Says which blocks are needed.
    ///
    /// # Errors
    /// Why the peer did not take note.
    pub async fn post_want(&self, address: &str, id: HandoffId, want: &Want) -> Result<(), PeerFault> {
        let url = format!("http://{address}/v1/handoffs/{id}/want");
        // Parked at the peer until its request arrives: longer than a call that is answered at once.
        call(self.http.post(url).timeout(CALL_TIMEOUT * 4).json(want)).await.map(drop)
    }

    /// Asks for the state of a handoff.
    ///
    /// # Errors
    /// Why there is no answer.
    pub async fn fetch_status(&self, address: &str, id: HandoffId) -> Result<HandoffStatus, PeerFault> {
        let url = format!("http://{address}/v1/handoffs/{id}");
        answer(self.http.get(url).timeout(CALL_TIMEOUT)).await
    }

    /// Ends a handoff at the peer.
    ///
    /// # Errors
    /// Why the peer may not have heard.
    pub async fn delete(&self, address: &str, id: HandoffId) -> Result<(), PeerFault> {
        let url = format!("http://{address}/v1/handoffs/{id}");
        call(self.http.delete(url).timeout(CALL_TIMEOUT)).await.map(drop)
    }
}

async fn answer<T: DeserializeOwned>(request: RequestBuilder) -> Result<T, PeerFault> {
    let mut response = call(request).await?;
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|_| PeerFault::Unreachable)? {
        if body.len() + chunk.len() > ANSWER_MAX_BYTES {
            return Err(PeerFault::Unreachable);
        }
        body.extend_from_slice(&chunk);
    }
    serde_json::from_slice(&body).map_err(|_| PeerFault::Unreachable)
}

async fn call(request: RequestBuilder) -> Result<reqwest::Response, PeerFault> {
    let response = request.send().await.map_err(|error| fault_of(&error))?;
    match response.status() {
        status if status.is_success() => Ok(response),
        StatusCode::CONFLICT => Err(PeerFault::Stale),
        StatusCode::NOT_FOUND => Err(PeerFault::Unknown),
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Err(PeerFault::Busy),
        status if status == StatusCode::GONE || status.is_client_error() => Err(PeerFault::Ended),
        _ => Err(PeerFault::Unreachable),
    }
}

/// Nothing listens: the process is gone. Anything else may pass.
fn fault_of(error: &reqwest::Error) -> PeerFault {
    if is_refused(error) { PeerFault::Refused } else { PeerFault::Unreachable }
}

/// Whether nobody listens where the call went.
pub(crate) fn is_refused(error: &reqwest::Error) -> bool {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(io) = error.downcast_ref::<std::io::Error>()
            && io.kind() == std::io::ErrorKind::ConnectionRefused
        {
            return true;
        }
        source = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::extract::{Path, State};
    use axum::response::{IntoResponse as _, Response};
    use axum::routing::get;
    use baton_config::Epoch;
    use tokio::net::TcpListener;
    use tokio_util::sync::CancellationToken;
    use tokio_util::task::TaskTracker;

    use super::*;

    /// Answers a status with as many spaces before it as the id of the handoff has thousands, in the status that the rest is.
    async fn status(State(good): State<HandoffStatus>, Path(id): Path<String>) -> Response {
        let id = id.parse::<HandoffId>().unwrap().0 as usize;
        let mut body = " ".repeat(id / 1000 * 1000);
        body.push_str(&serde_json::to_string(&good).unwrap());
        (StatusCode::from_u16((id % 1000) as u16).unwrap(), body).into_response()
    }

    #[tokio::test]
    async fn an_answer_means_what_it_says() {
        let (worker, phase) = ("p-0".parse().unwrap(), "prefill/queued".to_owned());
        let good = HandoffStatus { worker, epoch: Epoch(1), phase, pending: Vec::new() };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let routes = Router::new().route("/v1/handoffs/{id}", get(status)).with_state(good.clone());
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        crate::listen::serve(listener, routes, &tasks, stop.clone());
        let peers = PeerClient::new().unwrap();
        let ask = async |id| peers.fetch_status(&address, HandoffId(id)).await;
        assert_eq!(ask(200).await, Ok(good.clone()));
        for (status, fault) in [
            (404, PeerFault::Unknown),
            (409, PeerFault::Stale),
            (410, PeerFault::Ended),
            (400, PeerFault::Ended),
            (429, PeerFault::Busy),
            (503, PeerFault::Busy),
            (500, PeerFault::Unreachable),
        ] {
            assert_eq!(ask(status).await, Err(fault), "{status}");
        }
        // As large as an answer may be, nearly, and larger.
        let long = (ANSWER_MAX_BYTES as u128 / 1000 - 1) * 1000;
        assert_eq!(ask(long + 200).await, Ok(good));
        assert_eq!(ask(long + 2200).await, Err(PeerFault::Unreachable));
        stop.cancel();
        tasks.close();
        tasks.wait().await;
        assert_eq!(ask(200).await, Err(PeerFault::Refused), "nobody listens any more");
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_does_not_answer_is_not_waited_for() {
        let frozen = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = frozen.local_addr().unwrap().to_string();
        let (peers, id) = (PeerClient::new().unwrap(), HandoffId(1));
        let begun = tokio::time::Instant::now();
        let (worker, epoch) = ("d-0".parse().unwrap(), Epoch(1));
        let want = Want { worker, epoch, to_epoch: epoch, from_token: 0 };
        assert_eq!(peers.fetch_status(&address, id).await, Err(PeerFault::Unreachable));
        assert_eq!(peers.delete(&address, id).await, Err(PeerFault::Unreachable));
        assert!(begun.elapsed() < Duration::from_secs(3), "a frozen worker is noticed in time");
        assert_eq!(peers.post_want(&address, id, &want).await, Err(PeerFault::Unreachable));
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
}
