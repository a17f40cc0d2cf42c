//! The fleet document: every pool, engine, path and limit of one deployment, parsed and complete.
//!
//! A value of these types exists only if its document had no fault: numbers are in range, names are unique,
//! ports do not clash, every prefill pool has a decode pool it can reach. Nobody outside this crate can build
//! one (`#[non_exhaustive]`). What the file left out was filled in from [`defaults`], the one table of defaults.
//! What parses but is not part of this build is listed by [`Fleet::unsupported`].

pub mod conductor;
pub mod defaults;
pub mod engine;
pub mod pool;
pub mod router;
pub mod transfer;

use std::path::{Path, PathBuf};

pub use conductor::{ConductorSpec, EtcdAuth, EtcdSpec, EtcdTls, StoreSpec};
pub use engine::{EngineLimits, EngineSpec, ReferenceSpec, RemoteSpec, SimSpec};
pub use pool::{Autoscale, KvCapacity, KvSpec, Pool, ScalerKind, WorkerLimits};
pub use router::{
    AuthSpec, Disaggregation, Isolation, PolicyKind, PolicySpec, RouterLimits, RouterSpec, Slo,
};
pub use transfer::{BackendKind, Integrity, TransferPath, TransferSpec};

use crate::fault::Faults;
use crate::names::PoolName;

/// A whole fleet document.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Fleet {
    /// The model all pools serve.
    pub model: ModelSpec,
    /// The conductor and its store.
    pub conductor: ConductorSpec,
    /// The router.
    pub router: RouterSpec,
    /// The pools, in the order of the file; at least one decodes.
    pub pools: Vec<Pool>,
}

/// The model a fleet serves.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ModelSpec {
    /// Name in answers and metrics; always accepted in requests.
    pub id: String,
    /// A Hugging Face directory: `config.json`, `tokenizer.json`, `*.safetensors`.
    ///
    /// A relative path of the file is looked up in the fleet file's directory first, then in the working directory.
    pub path: PathBuf,
    /// Further names accepted in requests; contains `id`, first.
    pub served_as: Vec<String>,
}

/// Where a part listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Listen {
    /// The address; for a pool, that of its first replica, the next ones take the following ports.
    pub address: std::net::SocketAddr,
    /// Whether the file names it; `baton up` replaces unnamed ports by free ones (except the router's).
    pub named: bool,
}

/// Something the document asks for that this build does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Unsupported {
    /// Where it is asked for, such as `pools[0].engine.kind`.
    pub path: String,
    /// Line and column, counted from 1; `None` when a default asks for it.
    pub at: Option<crate::fault::Position>,
    /// What is not there.
    pub what: String,
    /// What to write instead.
    pub remedy: String,
    /// Whether a fleet cannot start without it; otherwise it starts and simply goes without.
    pub required: bool,
}

impl Fleet {
    /// Reads a fleet document, expands `${NAME}` from the environment, and checks all of it.
    ///
    /// # Errors
    /// Every fault of the document, together.
    pub fn load(path: &Path) -> Result<Self, Faults> {
        Err(Faults::unreadable(path, "the parser is not part of this build yet"))
    }

    /// The fleet of `baton up` without an argument: [`defaults::LAPTOP_FLEET`].
    ///
    /// # Errors
    /// As [`Fleet::load`]; the model directory may be missing, for one.
    pub fn laptop() -> Result<Self, Faults> {
        Err(Faults::unreadable(Path::new("laptop.yaml"), "the parser is not part of this build yet"))
    }

    /// The pool of that name.
    pub fn pool(&self, name: &PoolName) -> Option<&Pool> {
        self.pools.iter().find(|pool| pool.name == *name)
    }

    /// What the document asks for and this build does not have.
    pub fn unsupported(&self) -> &[Unsupported] {
        &[]
    }
}
