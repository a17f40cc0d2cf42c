//! Drivers out of tree: loaded from a shared object through a small versioned C ABI, `plugin/baton_driver.h`.
//!
//! ```text
//! open ── load: symbol, version, size, every function ── Calls: one thin call each ── PluginDriver: impl Driver
//! ```
//!
//! A plugin is code in this process: nothing can stop it from writing where it likes. What it *says* is checked:
//!
//! - Its answers are bounded and validated before use: lengths, texts, statuses, descriptors, what it can do.
//! - It gets operation numbers that are never used twice, so that an end reported twice, or of nothing, is noticed.
//! - After a breach of the rules it is closed: what was posted has failed, and registered memory is kept for ever,
//!   because nothing vouches for its being left alone.
//! - It never calls back, so no panic of Rust can unwind through it.

mod abi;
#[expect(unsafe_code, reason = "calls the functions of the plugin")]
mod calls;
mod driver;
#[expect(unsafe_code, reason = "loads the plugin")]
mod load;

use std::net::IpAddr;
use std::path::PathBuf;

use self::calls::Calls;
use self::driver::PluginDriver;
use super::fabric::driver::{Driver, DriverError};
use super::handlers;
use crate::probe::Probe;

/// Which plugin to load, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PluginOptions {
    /// The shared object.
    pub path: PathBuf,
    /// Address of the network interface to use; without, the plugin chooses.
    pub bind: Option<IpAddr>,
}

impl PluginOptions {
    fn name(&self) -> String {
        self.path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
    }
}

/// Opens a driver of the plugin. The object stays loaded for the life of the process.
pub(crate) fn open(options: &PluginOptions) -> Result<Box<dyn Driver>, DriverError> {
    handlers::keep(|| open_driver(options)).map(|driver| Box::new(driver) as Box<dyn Driver>)
}

fn open_driver(options: &PluginOptions) -> Result<PluginDriver, DriverError> {
    let table = load::load(&options.path)
        .map_err(|error| DriverError { what: error.to_string(), remedy: error.remedy().to_owned() })?;
    let name = options.name();
    let opened = Calls::open(table, name.clone(), options.bind).and_then(PluginDriver::start);
    opened.map_err(|error| driver::explain(&name, error))
}

/// Tries the plugin out.
pub(crate) fn probe(options: &PluginOptions) -> Vec<Probe> {
    let name = format!("plugin {}", options.name());
    vec![match open(options) {
        Ok(driver) => Probe::works(name, driver.info().detail.clone()),
        Err(error) => Probe::fails(name, error.what, error.remedy),
    }]
}

#[cfg(test)]
mod tests;
