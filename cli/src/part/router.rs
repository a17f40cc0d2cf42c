//! `baton router`.

use baton_config::environment::Environment;
use baton_router::{RouterOptions, ServeError};

use super::{conductors, io_threads, listen, run_part};
use crate::args::RouterArgs;
use crate::check;
use crate::failure::{Failure, chain};

pub(crate) fn run(args: &RouterArgs, environment: &Environment) -> Result<(), Failure> {
    let fleet = check::load(args.part.config.as_deref(), environment)?;
    fleet.startable()?;
    let address = args.part.listen.unwrap_or(fleet.router.listen.address);
    let mut options = RouterOptions::from_fleet(&fleet);
    options.conductors = conductors(args.conductor.as_deref(), environment, &fleet)?;
    run_part(io_threads(), |stop| async move {
        let listener = listen(address).await?;
        let stop = baton_router::Stop { drain: stop.drain, now: stop.now };
        baton_router::serve(options, listener, stop).await.map_err(|error| match error {
            // What the fleet document names has to be put right first.
            ServeError::Auth(_) | ServeError::Tls(_) | ServeError::Servers(_) => {
                Failure::Usage(chain(&error))
            }
            error => Failure::of(&error),
        })
    })
}
