//! The fleet document: every pool, engine, path and limit of one deployment, parsed and complete.
//!
//! A value of these types exists only if its document had no fault: numbers are in range, names are unique,
//! ports do not clash, every prefill pool has a decode pool it can reach. Nobody outside this crate can build
//! one (`#[non_exhaustive]`). What the file left out was filled in from [`defaults`], the one table of defaults.
//! What parses but is not part of this build is listed by [`Fleet::unsupported`].

pub mod access;
pub mod auth;
pub mod autoscale;
mod availability;
mod check;
pub mod conductor;
pub mod defaults;
pub mod engine;
pub mod explain;
pub mod listen;
pub mod openai;
pub mod pairs;
pub mod pool;
pub mod router;
pub mod transfer;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

pub use access::{ConductorAccess, ConductorGuard, Identity, ServerTls};
pub use auth::{AuthSpec, Isolation, JwksSource, JwtAlgorithm, JwtSpec, RemoteJwks};
pub use autoscale::{
    Autoscale, KubernetesSpec, ScaleTarget, ScalerKind, ScalerSpec, WebhookAuth, WebhookSpec, WorkloadKind,
};
pub use availability::{Unsupported, accelerator_is_available};
pub use conductor::{ConductorSpec, EtcdAuth, EtcdSpec, EtcdTls, StoreSpec};
pub use engine::{EngineKind, EngineLimits, EngineSpec, ReferenceSpec, RemoteSpec, SimSpec};
pub use listen::Listen;
pub use openai::OpenaiSpec;
pub use pairs::PairPath;
pub use pool::{KvCapacity, KvSpec, Pool, WorkerLimits};
pub use router::{Disaggregation, PolicyKind, PolicySpec, RouterLimits, RouterSpec, Slo};
pub use transfer::{BackendKind, Choose, Integrity, TransferLimitsSpec, TransferPath, TransferSpec};

use crate::environment;
use crate::fault::{Fault, Faults, Position};
use crate::model_shape::ModelShape;
use crate::names::PoolName;
use crate::reader::{Lookup, Origin, Reader, Resolved, Section, Text, read_scalar};
use crate::units::Bytes;
use crate::yaml::{self, MAX_DOCUMENT_BYTES};

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
    source: String,
    resolved: Vec<Resolved>,
    unsupported: Vec<Unsupported>,
    pairs: Vec<PairPath>,
}

/// The model a fleet serves.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ModelSpec {
    /// Name in answers and metrics; always accepted in requests. The last part of `path` by default.
    pub id: String,
    /// All names accepted in requests; `id` is the first.
    pub served_as: Vec<String>,
    /// `None` only in a fleet that passes every request on to servers of other projects.
    pub directory: Option<ModelDirectory>,
}

/// Where a model lies.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ModelDirectory {
    /// A Hugging Face directory: `config.json`, `tokenizer.json`, `*.safetensors`.
    ///
    /// A relative path of the file is looked up in the fleet file's directory first, then in the working directory.
    pub path: PathBuf,
    /// The numbers of its `config.json`.
    pub shape: ModelShape,
}

/// What a document is checked against.
pub struct Source<'e> {
    /// How faults name the document, usually its path.
    pub name: String,
    /// Where relative paths are looked up first.
    pub directory: Option<PathBuf>,
    /// The environment for `${NAME}`.
    pub environment: Lookup<'e>,
}

impl Fleet {
    /// Reads a fleet document, expands `${NAME}` from the environment, and checks all of it.
    ///
    /// # Errors
    /// Every fault of the document, together.
    pub fn load(path: &Path) -> Result<Self, Faults> {
        let unreadable = |e: std::io::Error| Faults::unreadable(path, format!("cannot be read: {e}"));
        let mut bytes = Vec::new();
        // One byte more than the limit is enough to be refused for its size.
        let file = File::open(path).map_err(unreadable)?;
        file.take(MAX_DOCUMENT_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(unreadable)?;
        let Ok(text) = String::from_utf8(bytes) else {
            return Err(Faults::unreadable(path, "is not text (UTF-8)"));
        };
        let directory = path.parent().map(Path::to_owned);
        let name = path.display().to_string();
        Self::parse(&text, &Source { name, directory, environment: &environment::variable })
    }

    /// The fleet of `baton up` without an argument: [`defaults::LAPTOP_FLEET`].
    ///
    /// # Errors
    /// As [`Fleet::load`]; the model directory may be missing, for one.
    pub fn laptop() -> Result<Self, Faults> {
        let name = "the built-in fleet (laptop.yaml)".to_owned();
        Self::parse(
            defaults::LAPTOP_FLEET,
            &Source { name, directory: None, environment: &environment::variable },
        )
    }

    /// Reads a fleet document from text.
    ///
    /// # Errors
    /// As [`Fleet::load`].
    pub fn parse(text: &str, source: &Source<'_>) -> Result<Self, Faults> {
        let failed = |faults: Vec<Fault>| Faults::new(source.name.clone(), faults);
        // Windows editors put a byte order mark first, which YAML allows.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let root = yaml::parse(text).map_err(|fault| failed(vec![fault]))?;
        let reader = Reader::new(source.environment, source.directory.clone());
        let mut document = Section::open(&reader, String::new(), root);
        read_version(&mut document);
        let draft = ModelDraft::read(&mut document);
        let conductor = ConductorSpec::read(document.section("conductor"));
        let router = RouterSpec::read(document.section("router"));
        let pools = pool::read_pools(&mut document);
        drop(document);
        let model = draft.and_then(|draft| draft.finish(&reader, &pools));
        check::names(&reader, &pools);
        check::roles(&reader, &pools);
        check::ports(&reader, &conductor, &router, &pools);
        check::memory(&reader, model.as_ref(), &pools);
        check::weights(&reader, model.as_ref(), &pools);
        check::seeds(&reader, &pools);
        check::autoscale(&reader, &pools);
        openai::check(&reader, &pools);
        let pairs = pairs::plan(&reader, &pools);
        let unsupported = availability::list(&reader, &pools);
        let (faults, resolved) = reader.finish();
        match model {
            Some(model) if faults.is_empty() => Ok(Self {
                model,
                conductor,
                router,
                pools: pools.into_iter().map(|(_, pool)| pool).collect(),
                source: source.name.clone(),
                resolved,
                unsupported,
                pairs,
            }),
            _ => Err(failed(faults)),
        }
    }

    /// Whether requests are passed on to servers of other projects: then all are, and nobody here knows tokens.
    pub fn passes_on(&self) -> bool {
        self.pools.iter().any(|pool| matches!(pool.engine, EngineSpec::Openai(_)))
    }

    /// Bytes of the KV cache of one worker of a pool; 0 where a server of another project holds it.
    pub fn kv_bytes(&self, pool: &Pool) -> Bytes {
        self.model.directory.as_ref().map_or(Bytes(0), |model| pool.kv_bytes(&model.shape))
    }

    /// The pool of that name.
    pub fn pool(&self, name: &PoolName) -> Option<&Pool> {
        self.pools.iter().find(|pool| pool.name == *name)
    }

    /// How the document was named: its path, usually.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Every value of the document with its origin, in the order it was read.
    pub fn resolved(&self) -> &[Resolved] {
        &self.resolved
    }

    /// What the document asks for and this build does not have.
    pub fn unsupported(&self) -> &[Unsupported] {
        &self.unsupported
    }

    /// The way KV blocks take between each prefill and each decode pool.
    pub fn pairs(&self) -> &[PairPath] {
        &self.pairs
    }

    /// A fault of the model directory that a part found: this crate reads no more than `config.json` of it.
    pub fn model_fault(&self, problem: impl Into<String>, remedy: impl Into<String>) -> Faults {
        let path = "model.path";
        let at = self.resolved.iter().find(|value| value.path == path).and_then(|value| match value.origin {
            Origin::File(at) => Some(at),
            Origin::Default => None,
        });
        let fault = Fault { path: path.to_owned(), at, problem: problem.into(), remedy: remedy.into() };
        Faults::new(self.source.clone(), vec![fault])
    }

    /// Refuses a fleet that this build cannot start.
    ///
    /// # Errors
    /// Everything it needs and this build does not have.
    pub fn startable(&self) -> Result<(), Faults> {
        let missing: Vec<Fault> =
            self.unsupported.iter().filter(|u| u.required).map(Unsupported::fault).collect();
        if missing.is_empty() { Ok(()) } else { Err(Faults::new(self.source.clone(), missing)) }
    }
}

fn read_version(document: &mut Section<'_, '_>) {
    let expected = "1, the only version there is";
    document.required("version", expected, |text| text.integer().filter(|version| *version == 1));
}

/// `model:` as written: whether a directory is needed depends on the pools.
struct ModelDraft {
    at: Option<Position>,
    id: Option<String>,
    served_as: Vec<String>,
    named: bool,
    directory: Option<ModelDirectory>,
}

impl ModelDraft {
    const PATH_EXPECTED: &str = "the path of a model directory";

    fn read(document: &mut Section<'_, '_>) -> Option<Self> {
        let reader = document.reader;
        let Some(mut section) = document.section_if_given("model") else {
            document.missing("model", "a section, such as { path: examples/models/tiny }");
            return None;
        };
        let given = section.optional("id", "a name without spaces", |text| {
            text.words().filter(|name| !name.contains(char::is_whitespace))
        });
        let named = section.has("path");
        let path =
            section.optional("path", Self::PATH_EXPECTED, Text::words).map(|path| reader.resolve(&path));
        let id = given.or_else(|| {
            let name = path.as_ref()?.file_name()?.to_string_lossy().replace(char::is_whitespace, "-");
            reader.record(section.child("id"), &name, None);
            Some(name)
        });
        let mut served_as: Vec<String> = id.iter().cloned().collect();
        for (path, node) in section.list("served_as").unwrap_or_default() {
            let name = read_scalar(reader, &path, node, "a name", Text::words);
            served_as.extend(name.filter(|name| !served_as.contains(name)));
        }
        let directory = path.and_then(|path| {
            let shape = check::model(&section, &path)?;
            Some(ModelDirectory { path, shape })
        });
        Some(Self { at: section.at, id, served_as, named, directory })
    }

    /// `None` if it is at fault, or lacks what the pools need.
    fn finish(self, reader: &Reader<'_>, pools: &[(String, Pool)]) -> Option<ModelSpec> {
        let Self { at, id, served_as, named, directory } = self;
        let passes_on =
            !pools.is_empty() && pools.iter().all(|(_, pool)| pool.engine.kind() == EngineKind::Openai);
        if !named && !passes_on {
            let remedy = format!("write `path:` with {}", Self::PATH_EXPECTED);
            reader.fault("model.path", at, "is missing", remedy);
            return None;
        }
        if !named && id.is_none() && reader.is_clean("model") {
            let remedy = "write `id:` with the name of the model, as clients ask for it";
            reader.fault("model.id", at, "is missing", remedy);
        }
        if named && directory.is_none() {
            return None;
        }
        Some(ModelSpec { id: id?, served_as, directory })
    }
}

#[cfg(test)]
mod tests;
