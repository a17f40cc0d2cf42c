//! `baton drain` and `baton scale`: operators' wishes, kept by the conductor.

use baton_conductor::api::{Drained, PoolStatus, Replicas};
use baton_config::environment::Environment;
use reqwest::Method;

use crate::args::{DrainArgs, ScaleArgs};
use crate::failure::Failure;
use crate::output;
use crate::remote::{Conductor, block_on};

pub(crate) fn drain(args: &DrainArgs, environment: &Environment) -> Result<(), Failure> {
    let conductor = Conductor::find(&args.conductor, environment)?;
    let path = format!("/v1/workers/{}/drain", args.worker);
    let drained: Drained = block_on(conductor.ask(conductor.request(Method::POST, &path)))?;
    output::print(&format!("{} finishes what it has and leaves; see `baton status`\n", drained.worker))
}

pub(crate) fn scale(args: &ScaleArgs, environment: &Environment) -> Result<(), Failure> {
    let conductor = Conductor::find(&args.conductor, environment)?;
    let path = format!("/v1/pools/{}/replicas", args.pool);
    let request = conductor.request(Method::PUT, &path).json(&Replicas { replicas: args.replicas });
    let pool: PoolStatus = block_on(conductor.ask(request))?;
    output::print(&format!(
        "{} shall have {} workers; {} are ready now\n",
        pool.name, pool.desired, pool.ready
    ))
}
