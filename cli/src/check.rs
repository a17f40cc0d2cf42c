//! `baton check`.

use std::path::{Path, PathBuf};

use baton_config::environment::Environment;
use baton_config::fleet::{Fleet, explain};

use crate::args::CheckArgs;
use crate::failure::Failure;
use crate::output;

pub(crate) fn run(args: &CheckArgs, environment: &Environment) -> Result<(), Failure> {
    let fleet = load(args.fleet.as_deref(), environment)?;
    output::print(&explain::explain(&fleet))
}

/// The fleet of a flag, else of the environment, else the built-in one.
pub(crate) fn load(flag: Option<&Path>, environment: &Environment) -> Result<Fleet, Failure> {
    let fleet = match fleet_path(flag, environment) {
        Some(path) => Fleet::load(&path),
        None => Fleet::laptop(),
    };
    Ok(fleet?)
}

/// The fleet file, unless the built-in fleet is meant.
pub(crate) fn fleet_path(flag: Option<&Path>, environment: &Environment) -> Option<PathBuf> {
    flag.map(Path::to_owned).or_else(|| environment.fleet.as_ref().map(PathBuf::from))
}
