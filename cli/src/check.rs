//! `baton check`.

use std::path::{Path, PathBuf};

use baton_config::environment::Environment;
use baton_config::fleet::{EngineKind, Fleet, explain};
use baton_config::keys::KeysFile;
use baton_engine::reference::Reference;
use baton_router::RouterOptions;

use crate::args::CheckArgs;
use crate::failure::{Failure, chain};
use crate::output;

pub(crate) fn run(args: &CheckArgs, environment: &Environment) -> Result<(), Failure> {
    let fleet = load(args.fleet.as_deref(), environment)?;
    model(&fleet)?;
    let mut text = explain::explain(&fleet);
    text.push_str(&keys(&fleet)?);
    output::print(&text)
}

/// What is to be said of the file of keys; it may be made later, but if it is there it must be good.
fn keys(fleet: &Fleet) -> Result<String, Failure> {
    let Some(auth) = &fleet.router.auth else { return Ok(String::new()) };
    let path = auth.keys_file.display();
    if !auth.keys_file.exists() {
        return Ok(format!("\nkeys\n  {path} is not there: the router does not start without it\n"));
    }
    let file = KeysFile::load(&auth.keys_file)?;
    let keys: usize = file.tenants.iter().map(|tenant| tenant.keys.len()).sum();
    Ok(format!("\nkeys\n  {path}: {} tenants, {keys} keys\n", file.tenants.len()))
}

/// The fleet of a flag, else of the environment, else the built-in one.
pub(crate) fn load(flag: Option<&Path>, environment: &Environment) -> Result<Fleet, Failure> {
    let fleet = match fleet_path(flag, environment) {
        Some(path) => Fleet::load(&path),
        None => Fleet::laptop(),
    };
    Ok(fleet?)
}

/// Refuses a model directory that the parts of the fleet would refuse, before any of them is started.
pub(crate) fn model(fleet: &Fleet) -> Result<(), Failure> {
    let remedy = "use a complete directory of one Llama, Qwen2 or Qwen3 model, as it was published";
    // Whoever passes requests on needs no model of its own.
    let Some(directory) = fleet.model.directory.as_ref().filter(|_| !fleet.passes_on()) else {
        return Ok(());
    };
    if fleet.pools.iter().any(|pool| pool.engine.kind() == EngineKind::Reference) {
        Reference::inspect(&directory.path).map_err(|error| fleet.model_fault(chain(&error), remedy))?;
    }
    baton_router::inspect(&RouterOptions::from_fleet(fleet).model)
        .map_err(|error| fleet.model_fault(chain(&error), remedy))?;
    Ok(())
}

/// The fleet file, unless the built-in fleet is meant.
pub(crate) fn fleet_path(flag: Option<&Path>, environment: &Environment) -> Option<PathBuf> {
    flag.map(Path::to_owned).or_else(|| environment.fleet.as_ref().map(PathBuf::from))
}
