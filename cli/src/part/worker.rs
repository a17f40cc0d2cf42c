//! `baton worker`.

use std::net::SocketAddr;

use baton_config::environment::Environment;
use baton_config::fleet::{EngineKind, Fleet, Listen, Pool};
use baton_config::{Accelerator, PoolName, WorkerId};
use baton_worker_agent::{SidecarOptions, WorkerOptions};

use super::{conductors, fits_memory, io_threads, listen, run_part};
use crate::args::WorkerArgs;
use crate::check;
use crate::failure::{Failure, chain};

pub(crate) fn run(args: &WorkerArgs, environment: &Environment) -> Result<(), Failure> {
    let fleet = check::load(args.part.config.as_deref(), environment)?;
    fleet.startable()?;
    let index = args.index.or_else(|| args.name.as_ref().and_then(number_at_end)).unwrap_or(0);
    let name = match &args.name {
        Some(name) => name.clone(),
        None => default_name(&args.pool, index)?,
    };
    let address = match args.part.listen {
        Some(address) => address,
        None => own_address(&fleet, &args.pool, index)?,
    };
    let in_host_memory =
        |pool: &&Pool| !matches!(pool.accelerator, Accelerator::Cuda | Accelerator::Trainium);
    if let Some(pool) = fleet.pool(&args.pool).filter(in_host_memory) {
        fits_memory(fleet.kv_bytes(pool), "this worker takes")?;
    }
    if fleet.pool(&args.pool).is_some_and(|pool| pool.engine.kind() == EngineKind::Openai) {
        return sidecar(args, environment, &fleet, (name, index, address));
    }
    let mut options = WorkerOptions::from_fleet(&fleet, &args.pool, name, index)
        .map_err(|error| Failure::Usage(chain(&error)))?;
    options.conductors = conductors(args.conductor.as_deref(), environment, &fleet)?;
    run_part(io_threads(), |stop| async move {
        let listener = listen(address).await?;
        let stop = baton_worker_agent::Stop { drain: stop.drain, now: stop.now };
        baton_worker_agent::run(options, listener, stop).await.map_err(|error| {
            match error.is_configuration() {
                true => Failure::Usage(chain(&error)),
                false => Failure::of(&error),
            }
        })
    })
}

/// The worker of a pool whose requests are passed on to servers of another project.
fn sidecar(
    args: &WorkerArgs,
    environment: &Environment,
    fleet: &Fleet,
    (name, index, address): (WorkerId, u16, SocketAddr),
) -> Result<(), Failure> {
    let mut options = SidecarOptions::from_fleet(fleet, &args.pool, name, index)
        .map_err(|error| Failure::Usage(chain(&error)))?;
    options.conductors = conductors(args.conductor.as_deref(), environment, fleet)?;
    run_part(1, |stop| async move {
        let listener = listen(address).await?;
        let stop = baton_worker_agent::Stop { drain: stop.drain, now: stop.now };
        baton_worker_agent::sidecar::run(options, listener, stop).await.map_err(|error| {
            match error.is_configuration() {
                true => Failure::Usage(chain(&error)),
                false => Failure::of(&error),
            }
        })
    })
}

/// The number that a name ends in after its last dash.
fn number_at_end(name: &WorkerId) -> Option<u16> {
    name.as_str().rsplit_once('-').and_then(|(_, number)| number.parse().ok())
}

fn default_name(pool: &PoolName, index: u16) -> Result<WorkerId, Failure> {
    format!("{pool}-{index}").parse().map_err(|error| Failure::because("no name for the worker", &error))
}

/// The address of one replica: that of the pool, `index` ports up.
fn own_address(fleet: &Fleet, pool: &PoolName, index: u16) -> Result<SocketAddr, Failure> {
    let Some(Listen { address, .. }) = fleet.pool(pool).map(|pool| pool.listen) else {
        let known: Vec<String> = fleet.pools.iter().map(|pool| pool.name.to_string()).collect();
        return Err(Failure::Usage(format!("the fleet has no pool {pool}; it has {}", known.join(", "))));
    };
    let port = match address.port() {
        0 => 0,
        first => first
            .checked_add(index)
            .ok_or_else(|| Failure::Usage(format!("no port is left for replica {index} above {address}")))?,
    };
    Ok(SocketAddr::new(address.ip(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_is_the_number_a_name_ends_in() {
        let number = |name: &str| number_at_end(&name.parse().unwrap());
        assert_eq!(number("gpu-decode-12"), Some(12));
        assert_eq!(number("decode"), None);
        assert_eq!(number("decode-a"), None);
        assert_eq!(number("decode-99999"), None);
    }
}
