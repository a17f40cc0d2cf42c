//! `baton drain` and `baton scale`: operators' wishes, kept by the conductor.

use std::time::Duration;

use baton_conductor::api::{Drained, Listing, PoolStatus, Replicas};
use baton_config::environment::Environment;
use baton_config::protocol::DrainStatus;
use reqwest::Method;
use tokio::time::Instant;

use crate::args::{DrainArgs, ScaleArgs, WantedReplicas};
use crate::failure::Failure;
use crate::output;
use crate::remote::{Conductor, block_on};
use crate::status::{ask_worker, drain_line};

/// How often a worker that drains is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// How often something is said although nothing changed.
const TELL_INTERVAL: Duration = Duration::from_secs(5);

pub(crate) fn drain(args: &DrainArgs, environment: &Environment) -> Result<(), Failure> {
    let conductor = Conductor::find(&args.conductor, environment)?;
    let path = format!("/v1/workers/{}/drain", args.worker);
    let drained: Drained = block_on(conductor.ask(conductor.request(Method::POST, &path)))?;
    let Some(seconds) = args.wait else {
        let text = format!("{} finishes what it has and leaves; see `baton status`\n", drained.worker);
        return output::print(&text);
    };
    block_on(wait(&conductor, &drained, Duration::from_secs(seconds.into())))
}

/// Waits until a drained worker has left the fleet, and tells what it waits for meanwhile.
async fn wait(conductor: &Conductor, drained: &Drained, patience: Duration) -> Result<(), Failure> {
    let (started, worker) = (Instant::now(), &drained.worker);
    let (mut told, mut told_at) = (None, None);
    loop {
        let listing =
            conductor.ask::<Listing>(conductor.request(Method::GET, "/v1/workers?metadata=no")).await;
        let mut line = None;
        match listing {
            Ok(listing) => {
                let same = |record: &&baton_conductor::api::ListedWorker| {
                    record.record.worker == *worker && record.record.epoch == drained.epoch
                };
                let Some(listed) = listing.workers.iter().find(same) else {
                    let after = started.elapsed().as_secs_f64();
                    return output::print(&format!("{worker} has left after {after:.1} s\n"));
                };
                if let Ok(status) = ask_worker(conductor.http(), &listed.record.address).await {
                    line = status.drain.map(|drain| (counts(&drain), drain_line(&drain)));
                }
            }
            // It may be back before the worker has drained.
            Err(failure) => line = Some((None, failure.to_string())),
        }
        let (what, text) = line.unwrap_or((None, "asked; it has not begun".to_owned()));
        let news = told != Some(what) || told_at.is_none_or(|at: Instant| at.elapsed() >= TELL_INTERVAL);
        if news {
            output::tell(&format!("{worker}: {text}"));
            (told, told_at) = (Some(what), Some(Instant::now()));
        }
        if started.elapsed() >= patience {
            return Err(Failure::failed(format!("{worker} has not left within {patience:?}: {text}")));
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// What makes a look at a drain news: requests that end, not blocks that fill or time that passes.
fn counts(drain: &DrainStatus) -> Option<(u32, u32)> {
    Some((drain.requests, drain.leases))
}

pub(crate) fn scale(args: &ScaleArgs, environment: &Environment) -> Result<(), Failure> {
    let conductor = Conductor::find(&args.conductor, environment)?;
    let path = format!("/v1/pools/{}/replicas", args.pool);
    let request = match args.replicas {
        WantedReplicas::Number(replicas) => {
            conductor.request(Method::PUT, &path).json(&Replicas { replicas })
        }
        WantedReplicas::Auto => conductor.request(Method::DELETE, &path),
    };
    let pool: PoolStatus = block_on(conductor.ask(request))?;
    output::print(&format!(
        "{} shall have {} workers; {} are ready now\n",
        pool.name, pool.desired, pool.ready
    ))
}
