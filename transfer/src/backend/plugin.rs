//! Drivers out of tree: loaded from a shared object through a small versioned C ABI.

use std::path::PathBuf;

/// Which plugin is loaded.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PluginOptions {
    /// Its shared object.
    pub path: PathBuf,
}
