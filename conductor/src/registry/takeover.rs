//! Whether the holder of a name still lives, as far as its host tells.

use std::net::SocketAddr;
use std::sync::LazyLock;
use std::time::Duration;

use baton_config::{Epoch, WorkerId};
use serde::Deserialize;
use tokio::net::TcpStream;

use crate::record::WorkerRecord;

/// How long the holder of a contested name has to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(300);
/// How long it has to say who it is. Together with the rest of a registration this stays below the limit of a call.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(700);
/// More than a worker has to say about itself.
const ANSWER_MAX_BYTES: usize = 1 << 20;

/// Keeps no connections: what answered before may be gone, and somebody else listen there.
static HTTP: LazyLock<Option<reqwest::Client>> =
    LazyLock::new(|| crate::http::builder().pool_max_idle_per_host(0).build().ok());

/// Of a worker's `GET /v1/state`: who it is.
#[derive(Debug, Deserialize)]
struct Identity {
    worker: WorkerId,
    epoch: Option<Epoch>,
}

/// Whether the very life that holds the name answers at its address. Silence and nonsense are no proof of life: a
/// holder that does not answer its own API serves nobody.
pub(super) async fn holder_answers(record: &WorkerRecord) -> bool {
    let ask = async {
        let mut answer =
            HTTP.as_ref()?.get(format!("http://{}/v1/state", record.address)).send().await.ok()?;
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await.ok()? {
            if body.len() + chunk.len() > ANSWER_MAX_BYTES {
                return None;
            }
            body.extend_from_slice(&chunk);
        }
        serde_json::from_slice::<Identity>(&body).ok()
    };
    match tokio::time::timeout(ANSWER_TIMEOUT, ask).await {
        Ok(Some(Identity { worker, epoch })) => worker == record.worker && epoch == Some(record.epoch),
        Ok(None) | Err(_) => false,
    }
}

/// Whether the host says that nothing listens there. Silence is no proof of death.
pub(super) async fn refuses_connections(address: &str) -> bool {
    let attempt = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await;
    matches!(attempt, Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused)
}

/// Whether two addresses are of one host, as far as they say.
pub(super) fn same_host(one: &str, other: &str) -> bool {
    let host = |address: &str| match address.parse::<SocketAddr>() {
        Ok(address) => address.ip().to_string(),
        Err(_) => address.rsplit_once(':').map_or(address, |(host, _)| host).to_owned(),
    };
    host(one) == host(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_compared_without_ports() {
        assert!(same_host("127.0.0.1:1", "127.0.0.1:2") && same_host("a.b:1", "a.b:2"));
        assert!(same_host("[::1]:1", "[0:0::1]:2"));
        assert!(!same_host("10.0.0.1:1", "10.0.0.2:1") && !same_host("a:1", "b:1"));
    }
}
