//! `baton bench router`: what a gateway costs.
//!
//! ```text
//!  load (this process) ──► gateway ──► simulated engines     measured in turns with
//!                      └───────────────► simulated engines   the same without it
//! ```
//!
//! Its own fleet runs in processes of their own, so that the CPU of the router is that of its process and of nothing else.

mod client;
mod engines;
mod fleet;
mod load;
mod process;
mod row;
mod start;
mod text;
mod workload;

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_router::measure::{self, TokenizerFigures};

pub(crate) use self::workload::Workload;

use self::engines::{Counters, Engines};
use self::fleet::{Fleet, Place, Wanted};
use self::load::{Load, Sample};
use self::row::Row;
use self::workload::{Pace, Requests};
use crate::args::BenchRouterArgs;
use crate::failure::Failure;
use crate::output;
use crate::part::runtime;
use crate::signals::Signals;

/// Threads that send the requests.
const THREADS: usize = 2;
/// Turns that a gateway and its engines alone take for one row.
const TURNS: u32 = 2;
/// How long streams that yield nothing are open at least, and when their memory should have been given back.
const OPEN_FOR: Duration = Duration::from_secs(5);
const AFTER: Duration = Duration::from_secs(3);

pub(crate) fn run(args: &BenchRouterArgs) -> Result<(), Failure> {
    runtime(THREADS)?.block_on(async {
        let mut signals = Signals::listen()?;
        let work = async {
            match args.hold {
                true => hold(args).await,
                false => measure_all(args).await,
            }
        };
        tokio::select! {
            biased;
            done = work => done,
            // The fleet ends with what is dropped here.
            () = signals.next() => if args.hold { Ok(()) } else { Err(Failure::failed("stopped by a signal")) },
        }
    })
}

/// Starts the fleet of a workload for others to measure.
async fn hold(args: &BenchRouterArgs) -> Result<(), Failure> {
    let workload = args.workload.first().copied().unwrap_or(Workload::Short);
    let fleet = start(args, workload).await?;
    let line = serde_json::to_string(&fleet.place).map_err(|error| Failure::of(&error))?;
    output::print(&format!("{line}\n"))?;
    std::future::pending().await
}

async fn start(args: &BenchRouterArgs, workload: Workload) -> Result<Fleet, Failure> {
    Fleet::start(Wanted {
        engines: workload.engines(),
        stretch: args.stretch,
        workers: args.workers,
        policy: &args.policy,
        model: &args.model,
        passing: args.passing,
    })
    .await
}

async fn measure_all(args: &BenchRouterArgs) -> Result<(), Failure> {
    let workloads = match args.workload.as_slice() {
        [] => Workload::DEFAULT.to_vec(),
        named => named.to_vec(),
    };
    let mut rows = Vec::new();
    // Workloads that need engines of one kind stand together.
    for group in workloads.chunk_by(|one, next| one.engines() == next.engines()) {
        let fleet = match args.url.is_empty() {
            true => Some(start(args, group[0]).await?),
            false => None,
        };
        let bench = Bench::new(args, fleet.as_ref())?;
        for workload in group {
            let concurrency = match (args.concurrency.as_slice(), workload.pace(1, 1)) {
                ([], _) | (_, Pace::Arrivals { .. }) => workload.concurrency(),
                (named, Pace::Closed | Pace::Open) => named,
            };
            for clients in concurrency {
                let row = bench.row(*workload, *clients).await?;
                if args.json {
                    let line = serde_json::to_string(&row).map_err(|error| Failure::of(&error))?;
                    output::print(&format!("{line}\n"))?;
                }
                rows.push(row);
            }
        }
        if let Some(fleet) = fleet {
            fleet.stop().await;
        }
    }
    let failed = rows.iter().find_map(|row| row.failure.as_deref().map(|why| (row, why)));
    if !args.json {
        output::print(&row::describe(&rows))?;
    }
    match failed {
        Some((row, why)) => {
            Err(Failure::failed(format!("{} of {} requests failed: {why}", row.failed, row.workload)))
        }
        None => Ok(()),
    }
}

/// Who is measured.
struct Bench {
    gateway: Subject,
    /// The engines without a gateway.
    direct: Option<Subject>,
    engines: Engines,
    engine_count: usize,
    model: String,
    time: Duration,
    stretch: u32,
    /// Of what was started here.
    place: Option<Place>,
    /// The model whose tokenizer is the floor, where the router has one.
    tokenizer: Option<PathBuf>,
}

struct Subject {
    name: String,
    targets: Vec<SocketAddr>,
    host: String,
    pids: Vec<u32>,
}

/// What was seen in the turns of one subject.
#[derive(Debug, Default)]
struct Measured {
    sample: Sample,
    cpu: Duration,
    /// Of all processors of this machine, whoever used them.
    machine: process::Busy,
    resident_bytes: u64,
    /// Before and after streams that were only open.
    around_bytes: Option<(u64, u64)>,
    done: Vec<Counters>,
}

impl Bench {
    fn new(args: &BenchRouterArgs, fleet: Option<&Fleet>) -> Result<Self, Failure> {
        let (gateway, engine_urls, model) = match fleet {
            Some(fleet) => {
                let place = &fleet.place;
                let (router, pid) = match &place.passing {
                    Some(passing) => (&passing.router, passing.router_pid),
                    None => (&place.router, place.router_pid),
                };
                let gateway = Subject::new(std::slice::from_ref(router), vec![pid])?;
                (gateway, place.engines.clone(), fleet::MODEL_ID.to_owned())
            }
            None => {
                (Subject::new(&args.url, args.pid.clone())?, args.engine_url.clone(), args.model_id.clone())
            }
        };
        let direct = match engine_urls.is_empty() || args.no_direct {
            true => None,
            false => Some(Subject::new(&engine_urls, Vec::new())?),
        };
        let engine_count = engine_urls.len();
        let engines = Engines::new(engine_urls)?;
        let time = Duration::from_secs_f64(args.seconds);
        let place = fleet.map(|fleet| fleet.place.clone());
        let tokenizer = place.as_ref().filter(|place| place.passing.is_none()).map(|_| args.model.clone());
        let stretch = args.stretch;
        Ok(Self { gateway, direct, engines, engine_count, model, time, stretch, place, tokenizer })
    }

    async fn row(&self, workload: Workload, clients: u32) -> Result<Row, Failure> {
        let workers = self.engine_count.max(1);
        let pace = workload.pace(workers, self.stretch);
        let turns = if pace == Pace::Closed && self.direct.is_some() { TURNS } else { 1 };
        let load = Load {
            workload,
            targets: Vec::new(),
            concurrency: clients as usize,
            pace,
            chats: workload.chats(workers),
            time: if pace == Pace::Open { self.time.max(OPEN_FOR) } else { self.time / turns },
        };
        // Streams that are only open say nothing about engines.
        let beside = self.direct.as_ref().filter(|_| pace != Pace::Open);
        let (mut gateway, mut direct) = (Measured::default(), beside.map(|_| Measured::default()));
        for turn in 0..turns {
            if let (Some(subject), Some(direct)) = (beside, &mut direct) {
                self.turn(subject, &load, 2 * turn, direct).await?;
            }
            self.turn(&self.gateway, &load, 2 * turn + 1, &mut gateway).await?;
        }
        let mut row = Row::new(&self.gateway.name, workload, clients, &gateway, direct.as_ref());
        if let (Workload::Quiet, Some(place)) = (workload, &self.place) {
            row.fresh(start::fresh(place).await?);
        }
        if let (Workload::Large, Some(model)) = (workload, &self.tokenizer) {
            row.floor(self.floor(model)?);
        }
        Ok(row)
    }

    /// What tokenizing a large prompt costs by itself.
    fn floor(&self, model: &Path) -> Result<TokenizerFigures, Failure> {
        let prompt = Requests::new(Workload::Large, &self.gateway.host, &self.model, 1).prompt();
        measure::tokenizer(model, &prompt).map_err(|error| Failure::of(&error))
    }

    async fn turn(
        &self,
        subject: &Subject,
        load: &Load,
        turn: u32,
        measured: &mut Measured,
    ) -> Result<(), Failure> {
        let load = Load { targets: subject.targets.clone(), ..load.clone() };
        // Another seed for each turn of each run: nobody has seen these prompts.
        let seed = u64::from(std::process::id()) << 32 | (load.concurrency as u64) << 8 | u64::from(turn);
        let requests = Requests::new(load.workload, &subject.host, &self.model, seed);
        let before = self.engines.read().await?;
        let (cold, cold_bytes) = (process::cpu_time(&subject.pids), process::resident_bytes(&subject.pids));
        let (mut cpu, mut bytes) = (Duration::ZERO, 0);
        let mut machine = process::Busy::default();
        let begin = || {
            machine = process::Busy::now();
            cpu = process::cpu_time(&subject.pids);
            bytes = process::resident_bytes(&subject.pids);
        };
        let sample = load.run(&requests, begin).await;
        measured.machine += process::Busy::now() - machine;
        if load.pace == Pace::Open {
            measured.cpu += cpu.saturating_sub(cold);
            measured.resident_bytes = bytes;
            tokio::time::sleep(AFTER).await;
            measured.around_bytes = Some((cold_bytes, process::resident_bytes(&subject.pids)));
        } else {
            measured.cpu += process::cpu_time(&subject.pids).saturating_sub(cpu);
            measured.resident_bytes = process::resident_bytes(&subject.pids);
        }
        let after = self.engines.read().await?;
        engines::add(&mut measured.done, &before, &after);
        measured.sample.join(sample);
        Ok(())
    }
}

impl Subject {
    fn new(urls: &[String], pids: Vec<u32>) -> Result<Self, Failure> {
        let hosts: Result<Vec<&str>, Failure> = urls.iter().map(|url| host_of(url)).collect();
        let hosts = hosts?;
        let address = |host: &&str| {
            host.to_socket_addrs()
                .ok()
                .and_then(|mut found| found.next())
                .ok_or_else(|| Failure::Usage(format!("{host:?} is no address: write http://HOST:PORT")))
        };
        let targets: Result<Vec<SocketAddr>, Failure> = hosts.iter().map(address).collect();
        let host = hosts.first().copied().unwrap_or_default().to_owned();
        Ok(Self { name: urls.join(","), targets: targets?, host, pids })
    }
}

/// `HOST:PORT` of a URL without a path.
fn host_of(url: &str) -> Result<&str, Failure> {
    let host = url.strip_prefix("http://").map(|rest| rest.trim_end_matches('/'));
    host.filter(|host| host.contains(':') && !host.contains('/'))
        .ok_or_else(|| Failure::Usage(format!("{url:?} is not what can be measured: write http://HOST:PORT")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateways_are_addresses_and_ports() {
        assert_eq!(host_of("http://127.0.0.1:80/").unwrap(), "127.0.0.1:80");
        for bad in ["127.0.0.1:80", "http://127.0.0.1", "http://127.0.0.1:80/v1", "https://127.0.0.1:80"] {
            assert!(matches!(host_of(bad), Err(Failure::Usage(_))), "{bad}");
        }
    }
}
