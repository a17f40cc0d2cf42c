//! From a path to a table of functions, every one of which is there.

use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::abi::{ABI_VERSION, ENTRY, Entry, RawTable, Table};

/// Largest table taken for one: later editions of version 1 may append functions.
const TABLE_MAX_BYTES: u32 = 1 << 16;

/// Why a shared object is not taken as a driver.
#[derive(Debug, thiserror::Error)]
pub(super) enum LoadError {
    #[error("there is no plugin at {}: {source}", path.display())]
    Missing { path: PathBuf, source: std::io::Error },
    #[error("the plugin {} is not a file", path.display())]
    NotAFile { path: PathBuf },
    #[error("the plugin {} cannot be loaded: {why}", path.display())]
    NotLoaded { path: PathBuf, why: String },
    #[error("the plugin {} does not export {ENTRY}", path.display())]
    NoEntry { path: PathBuf },
    #[error("the plugin {} gives no table of functions", path.display())]
    NoTable { path: PathBuf },
    #[error("the plugin {} is of ABI version {found}; this program takes {ABI_VERSION}", path.display())]
    Version { path: PathBuf, found: u32 },
    #[error("the plugin {} has a table of {found} bytes; version {ABI_VERSION} has {}", path.display(), size_of::<RawTable>())]
    Size { path: PathBuf, found: u32 },
    #[error("the plugin {} lacks the function `{function}`", path.display())]
    Function { path: PathBuf, function: &'static str },
}

impl LoadError {
    pub(super) fn remedy(&self) -> &'static str {
        match self {
            Self::Missing { .. } | Self::NotAFile { .. } => "give the path of the plugin's shared object",
            Self::NotLoaded { .. } => "install what it links to, or build it for this machine",
            Self::NoEntry { .. } | Self::NoTable { .. } => "build a plugin against baton_driver.h",
            Self::Version { .. } | Self::Size { .. } => {
                "build the plugin against this version's baton_driver.h"
            }
            Self::Function { .. } => "complete the plugin: every function of the table must be there",
        }
    }
}

/// Loads a plugin, which stays loaded for the life of the process: its threads and destructors may outlive every driver.
pub(super) fn load(path: &Path) -> Result<Table, LoadError> {
    let given = || path.to_owned();
    // Resolved here, so that a bare name means a file and never a search of library directories.
    let real = std::fs::canonicalize(path).map_err(|source| LoadError::Missing { path: given(), source })?;
    if !real.is_file() {
        return Err(LoadError::NotAFile { path: given() });
    }
    // SAFETY: runs the object's constructors. Whoever configures a plugin vouches for its code, as for this program's.
    let library = unsafe { Library::open(Some(&real), RTLD_NOW | RTLD_LOCAL) };
    let library = library
        .map_err(|error| LoadError::NotLoaded { path: given(), why: baton_libfabric_sys::reason(&error) })?;
    // Never unloaded: the address below stays valid for ever.
    let library = std::mem::ManuallyDrop::new(library);
    // SAFETY: the header declares the symbol of this name with exactly this signature.
    let entry = unsafe { library.get::<Entry>(ENTRY.as_bytes()) };
    let entry = *entry.map_err(|_| LoadError::NoEntry { path: given() })?;
    // SAFETY: takes no arguments and may be called on any thread (rule 6 of the header).
    let table = unsafe { entry() };
    check(table, path)
}

/// Reads a table that may be anything but a dangling pointer.
pub(super) fn check(table: *const RawTable, path: &Path) -> Result<Table, LoadError> {
    let path = || path.to_owned();
    if table.is_null() || !table.is_aligned() {
        return Err(LoadError::NoTable { path: path() });
    }
    // SAFETY: a table of any version begins with two 32-bit words; it is constant and lives on (rule 1 of the header).
    let [version, size] = unsafe { table.cast::<[u32; 2]>().read() };
    if version != ABI_VERSION {
        return Err(LoadError::Version { path: path(), found: version });
    }
    if !(size_of::<RawTable>() as u32..=TABLE_MAX_BYTES).contains(&size) {
        return Err(LoadError::Size { path: path(), found: size });
    }
    // SAFETY: the table says that it has at least the bytes of this version's, and any bytes make a `RawTable`:
    // integers and nullable function pointers.
    let table = unsafe { table.read() };
    table.complete().map_err(|function| LoadError::Function { path: path(), function })
}
