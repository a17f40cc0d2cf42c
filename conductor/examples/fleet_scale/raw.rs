//! What etcd does by itself: the limit that a conductor on it cannot pass.

use std::time::Duration;

use anyhow::{Context, Result};
use etcd_client::{Client, PutOptions};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::Instant;

use crate::METADATA_BYTES;

const CONCURRENT: usize = 64;

/// A lease and a put for each worker, as few calls as a registration can be, 64 at a time on one connection.
pub(crate) async fn registrations(url: &str, workers: usize) -> Result<Duration> {
    let client = Client::connect([url], None).await?;
    let start = Instant::now();
    let mut running = FuturesUnordered::new();
    for i in 0..workers {
        if running.len() == CONCURRENT {
            running.next().await.context("one is running")??;
        }
        running.push(register(client.clone(), i));
    }
    while let Some(done) = running.next().await {
        done?;
    }
    Ok(start.elapsed())
}

async fn register(mut client: Client, i: usize) -> Result<()> {
    let lease = client.lease_grant(600, None).await?.id();
    let value = vec![b'A'; METADATA_BYTES + 300];
    let options = PutOptions::new().with_lease(lease);
    client.put(format!("/raw-{}/{i}", std::process::id()), value, Some(options)).await?;
    Ok(())
}
