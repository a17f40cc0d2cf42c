//! `baton conductor`.

use baton_conductor::store::etcd::{EtcdAuth, EtcdOptions, EtcdTls};
use baton_conductor::{ConductorOptions, PoolOptions, StoreOptions};
use baton_config::environment::Environment;
use baton_config::fleet::{EtcdSpec, Fleet, Pool, StoreSpec};

use super::{listen, run_part};
use crate::args::ConductorArgs;
use crate::check;
use crate::failure::Failure;
use crate::remote::conductor_endpoint;

/// Most workers of a pool that does not say.
const REPLICAS_MAX: u32 = 1024;

pub(crate) fn run(args: &ConductorArgs, environment: &Environment) -> Result<(), Failure> {
    let fleet = check::load(args.part.config.as_deref(), environment)?;
    fleet.startable()?;
    let address = args.part.listen.unwrap_or(fleet.conductor.listen.address);
    let mut options = options(&fleet);
    keep_state(&mut options, args)?;
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    options.name = Some(args.name.clone().unwrap_or_else(|| format!("{host}-{}", std::process::id())));
    options.url = args.url.as_deref().map(conductor_endpoint).transpose()?;
    // Nobody reaches 0.0.0.0; the name of the host may do.
    if options.url.is_none() && address.ip().is_unspecified() && address.port() != 0 {
        let scheme = if options.guard.tls.is_some() { "https" } else { "http" };
        options.url = Some(format!("{scheme}://{host}:{}", address.port()));
    }
    run_part(2, |stop| async move {
        let listener = listen(address).await?;
        baton_conductor::serve(options, listener, stop.drain).await.map_err(|error| Failure::of(&error))
    })
}

/// The state file of the flag, where the fleet file names none.
fn keep_state(options: &mut ConductorOptions, args: &ConductorArgs) -> Result<(), Failure> {
    match (&mut options.store, &args.state_file) {
        (StoreOptions::Embedded { state_file }, Some(path)) => {
            state_file.get_or_insert_with(|| path.clone());
            Ok(())
        }
        (StoreOptions::Etcd(_), Some(_)) => Err(Failure::Usage(
            "--state-file is of the embedded store, and the fleet file names etcd".to_owned(),
        )),
        (_, None) => Ok(()),
    }
}

fn options(fleet: &Fleet) -> ConductorOptions {
    let pools = fleet.pools.iter().map(pool).collect();
    let mut options = ConductorOptions::new(pools);
    options.lease_ttl = fleet.conductor.lease_ttl;
    options.model = Some(fleet.model.id.clone());
    options.guard = fleet.conductor.guard.clone();
    let scaling = |pool: &Pool| Some((pool.name.clone(), pool.autoscale.clone()?));
    options.autoscale = fleet.pools.iter().filter_map(scaling).collect();
    match &fleet.conductor.store {
        StoreSpec::Embedded { state_file } => {
            options.store = StoreOptions::Embedded { state_file: state_file.clone() };
        }
        StoreSpec::Etcd(spec) => options.store = StoreOptions::Etcd(etcd(spec)),
        // The document's kinds of store grow with this program.
        _ => {}
    }
    options
}

fn etcd(spec: &EtcdSpec) -> EtcdOptions {
    let mut options = EtcdOptions::new(spec.endpoints.clone(), &spec.prefix);
    options.tls = spec.tls.as_ref().map(|tls| EtcdTls {
        ca_file: tls.ca_file.clone(),
        identity: tls.cert_file.clone().zip(tls.key_file.clone()),
    });
    options.auth = spec
        .auth
        .as_ref()
        .map(|auth| EtcdAuth { user: auth.user.clone(), password_file: auth.password_file.clone() });
    options
}

fn pool(pool: &Pool) -> PoolOptions {
    let (min, max) = pool.autoscale.as_ref().map_or((0, REPLICAS_MAX), |scale| (scale.min, scale.max));
    PoolOptions { name: pool.name.clone(), role: pool.role, replicas: pool.replicas, min, max }
}
