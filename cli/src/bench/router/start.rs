//! How long a router takes from its start to its first answer.

use std::net::TcpListener;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::time::{Instant, sleep, timeout};

use super::fleet::Place;
use super::process;
use crate::failure::Failure;

/// Starts of which the median is told.
const STARTS: usize = 5;
/// Between two tries to be answered.
const TRY_EVERY: Duration = Duration::from_micros(200);
/// For the first answer.
const WITHIN: Duration = Duration::from_secs(30);
/// After which a router has heard of its workers and has nothing to do.
const IDLE_AFTER: Duration = Duration::from_secs(2);

/// What a router is when nobody asks it for anything.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fresh {
    /// From its start to `200` of `/livez`.
    pub(super) live_after: Duration,
    /// Memory once it is idle.
    pub(super) resident_bytes: u64,
    /// Of that, what is no file's: the rest is the program itself.
    pub(super) own_bytes: u64,
}

/// Starts further routers of a fleet, one after the other.
pub(super) async fn fresh(place: &Place) -> Result<Fresh, Failure> {
    let mut times = Vec::with_capacity(STARTS);
    let mut idle = (0, 0);
    for turn in 0..STARTS {
        let failed =
            |error: std::io::Error| Failure::because("a router of the bench cannot be started", &error);
        let address = free_address().map_err(failed)?;
        let program = std::env::current_exe().map_err(failed)?;
        let begun = Instant::now();
        let mut router = Command::new(program)
            .args([
                "--log",
                "warn",
                "router",
                "--config",
                place.config(),
                "--conductor",
                place.conductor.as_str(),
            ])
            .args(["--listen", address.as_str()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let answered = timeout(WITHIN, async {
            while !matches!(is_live(&address).await, Ok(true)) {
                sleep(TRY_EVERY).await;
            }
        });
        answered
            .await
            .map_err(|_| Failure::failed(format!("a router of the bench was not live within {WITHIN:?}")))?;
        times.push(begun.elapsed());
        if turn + 1 == STARTS {
            sleep(IDLE_AFTER).await;
            let pids: Vec<u32> = router.id().into_iter().collect();
            idle = (process::resident_bytes(&pids), process::own_bytes(&pids));
        }
        router.kill().await.map_err(failed)?;
    }
    times.sort_unstable();
    Ok(Fresh { live_after: times[STARTS / 2], resident_bytes: idle.0, own_bytes: idle.1 })
}

/// An address that nobody listens on, as far as can be told.
fn free_address() -> std::io::Result<String> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}

async fn is_live(address: &str) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(b"GET /livez HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n").await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(answer.starts_with(b"HTTP/1.1 200 "))
}
