//! The long-running parts: `baton conductor`, `baton router`, `baton worker`.

pub(crate) mod conductor;
pub(crate) mod router;
pub(crate) mod worker;

use std::net::SocketAddr;
use std::time::Duration;

use baton_config::Bytes;
use baton_config::environment::Environment;
use baton_config::fleet::Fleet;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};

use crate::failure::Failure;
use crate::remote::conductor_endpoints;
use crate::signals::{self, Stop};

/// Runs a part on a runtime of its own until it ends or two signals end it.
fn run_part<F: Future<Output = Result<(), Failure>>>(
    threads: usize,
    part: impl FnOnce(Stop) -> F,
) -> Result<(), Failure> {
    let runtime = runtime(threads)?;
    let ended = runtime.block_on(signals::run_until_signalled(part));
    // What did not end by itself within its grace is not waited for.
    runtime.shutdown_timeout(Duration::from_millis(100));
    ended
}

/// A runtime of so many threads.
pub(crate) fn runtime(threads: usize) -> Result<Runtime, Failure> {
    Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .map_err(|error| Failure::because("cannot start threads", &error))
}

/// Threads for a part that only moves messages.
fn io_threads() -> usize {
    std::thread::available_parallelism().map_or(2, std::num::NonZero::get).clamp(1, 8)
}

/// The conductors of a flag, else of the environment, else of the fleet file.
fn conductors(flag: Option<&str>, environment: &Environment, fleet: &Fleet) -> Result<Vec<String>, Failure> {
    match flag.or(environment.conductor.as_deref()) {
        Some(urls) => conductor_endpoints(urls),
        None => match fleet.conductor.endpoints.iter().find(|url| url.ends_with(":0")) {
            None => Ok(fleet.conductor.endpoints.clone()),
            Some(url) => Err(Failure::Usage(format!(
                "the fleet file does not tell where the conductor is ({url} is any free port): give its URL with \
                 --conductor, or name a port in conductor.listen"
            ))),
        },
    }
}

/// Listens, or says which address is taken and what to do.
async fn listen(address: SocketAddr) -> Result<TcpListener, Failure> {
    TcpListener::bind(address).await.map_err(|error| cannot_listen(address, &error))
}

/// Refuses KV caches that this machine has no memory for, before anything allocates them.
pub(crate) fn fits_memory(wanted: Bytes, whose: &str) -> Result<(), Failure> {
    // Linux always tells; where it does not, the allocation itself will.
    let Some(there) = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| total_memory(&text))
    else {
        return Ok(());
    };
    if wanted <= there {
        return Ok(());
    }
    Err(Failure::Usage(format!(
        "{whose} {wanted} of KV cache, but this machine has {there} of memory: lower kv.memory or replicas"
    )))
}

fn total_memory(meminfo: &str) -> Option<Bytes> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Bytes(kib * 1024))
}

/// Why an address cannot be listened on, and what to do about it.
pub(crate) fn cannot_listen(address: SocketAddr, error: &std::io::Error) -> Failure {
    let remedy = match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            "another process listens there: stop it, or choose another with --listen"
        }
        std::io::ErrorKind::PermissionDenied => {
            "ports below 1024 need privileges: choose another with --listen"
        }
        std::io::ErrorKind::AddrNotAvailable => {
            "this machine has no such address: choose another with --listen"
        }
        _ => return Failure::because(format!("cannot listen on {address}"), error),
    };
    Failure::failed(format!("cannot listen on {address}: {remedy}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_of_the_machine_is_read_from_proc() {
        assert_eq!(total_memory("MemTotal:        8 kB\nMemFree: 1 kB\n"), Some(Bytes(8192)));
        assert_eq!(total_memory("MemFree: 1 kB\n"), None);
        assert!(fits_memory(Bytes(1), "this fleet wants").is_ok());
        let refused = fits_memory(Bytes(u64::MAX), "this fleet wants").unwrap_err().to_string();
        assert!(refused.starts_with("this fleet wants 16777216.00 TiB of KV cache"), "{refused}");
    }
}
