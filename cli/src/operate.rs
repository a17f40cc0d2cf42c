//! `baton drain` and `baton scale`: operators' wishes, kept by the conductor.

use std::time::Duration;

use baton_conductor::api::{Drained, Listing, PoolStatus, Replicas};
use baton_config::Epoch;
use baton_config::environment::Environment;
use baton_config::protocol::{DrainStatus, WorkerStatus};
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
    let mut known = Known::default();
    loop {
        let (what, text) = match known.look(conductor, drained).await {
            Ok(Sight::Gone) => {
                let after = started.elapsed().as_secs_f64();
                return output::print(&format!("{worker} has left after {after:.1} s\n"));
            }
            Ok(Sight::Drains(drain)) => (counts(&drain), drain_line(&drain)),
            // Its server ends some moments before it leaves the fleet.
            Ok(Sight::Idle) if told.is_some_and(|told: Option<_>| told.is_some()) => {
                (told.flatten(), "has drained and is about to leave".to_owned())
            }
            Ok(Sight::Idle) => (None, "asked; it has not begun".to_owned()),
            Ok(Sight::Anew) => {
                (None, "in a new life, which does not drain: restarted, or ask again".to_owned())
            }
            // It may be back before the worker has drained.
            Err(failure) => (None, failure.to_string()),
        };
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

/// What is seen of a worker that was asked to drain.
#[derive(Debug, PartialEq)]
enum Sight {
    /// Its process has ended.
    Gone,
    /// It drains.
    Drains(Box<DrainStatus>),
    /// It is there, or may be.
    Idle,
    /// It is there in another life, and does not drain.
    Anew,
}

/// What was first seen of it. The conductor alone cannot say that a worker is gone: one that has just begun, or lost a
/// lease, does not know it for a while.
#[derive(Default)]
struct Known {
    address: Option<String>,
    process: Option<(u32, Option<u64>)>,
}

impl Known {
    async fn look(&mut self, conductor: &Conductor, drained: &Drained) -> Result<Sight, Failure> {
        let listing: Listing =
            conductor.ask(conductor.request(Method::GET, "/v1/workers?metadata=no")).await?;
        let listed = listing.workers.iter().find(|listed| listed.record.worker == drained.worker);
        if let (None, Some(listed)) = (&self.address, listed) {
            self.address = Some(listed.record.address.clone());
        }
        let same = listed.is_some_and(|listed| listed.record.epoch == drained.epoch);
        let mut found = None;
        // Where it was, and where its name is now.
        let now =
            listed.map(|listed| &listed.record.address).filter(|now| self.address.as_ref() != Some(now));
        for address in [self.address.as_ref(), now].into_iter().flatten() {
            if found.is_none() {
                let status = ask_worker(conductor.http(), address).await.ok();
                found = status.filter(|status| status.worker == drained.worker);
            }
        }
        let Some(status) = found else {
            return Ok(match listed {
                None if !listing.warming => Sight::Gone,
                Some(_) if !same => Sight::Anew,
                _ => Sight::Idle,
            });
        };
        Ok(self.judge(status, same, drained.epoch))
    }

    /// What a worker of the name that answered is to the one that was asked to drain in life `epoch`; whether the
    /// conductor still lists it in that life.
    fn judge(&mut self, status: WorkerStatus, listed: bool, epoch: Epoch) -> Sight {
        let process = (status.pid, status.process);
        let same_process = *self.process.get_or_insert(process) == process;
        match status.drain {
            Some(drain) if same_process => Sight::Drains(Box::new(drain)),
            _ if !same_process => Sight::Gone,
            _ if listed || status.epoch.is_none_or(|now| now == epoch) => Sight::Idle,
            _ => Sight::Anew,
        }
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What a worker that is process 1 of its container says, of all that it could.
    fn status(process: Option<u64>, epoch: u64, drain: bool) -> WorkerStatus {
        let drain = drain.then(|| {
            json!({
                "since_ms": 10, "grace_left_ms": 20, "requests": 1, "requests_running": 1, "requests_waiting": 0,
                "handoffs": 0, "leases": 0, "blocks_held": 3
            })
        });
        serde_json::from_value(json!({
            "worker": "decode-0", "epoch": epoch, "pool": "decode", "role": "decode", "state": "ready", "pid": 1,
            "process": process, "requests_running": 1, "requests_waiting": 0, "prefill_tokens_pending": 0,
            "kv_blocks": {"free": 1, "reserved": 0, "filling": 0, "valid": 0, "shared": 0, "quarantined": 0},
            "prefill_tokens_per_s": null, "itl_ms": null, "paths": [], "last_error": null, "drain": drain
        }))
        .unwrap()
    }

    #[test]
    fn a_worker_restarted_under_the_same_pid_has_left() {
        let mut known = Known::default();
        let epoch = Epoch(7);
        assert!(matches!(known.judge(status(Some(1), 7, true), true, epoch), Sight::Drains(_)));
        assert_eq!(known.judge(status(Some(2), 8, false), false, epoch), Sight::Gone);
        assert_eq!(
            known.judge(status(Some(1), 8, false), false, epoch),
            Sight::Anew,
            "a lease lost is no end"
        );
    }

    #[test]
    fn of_workers_that_do_not_tell_their_processes_apart_the_pid_decides() {
        let mut known = Known::default();
        assert!(matches!(known.judge(status(None, 7, true), true, Epoch(7)), Sight::Drains(_)));
        assert_eq!(known.judge(status(None, 8, false), false, Epoch(7)), Sight::Anew);
    }
}
