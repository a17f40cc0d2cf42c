//! Why a model directory was not loaded.

use std::path::PathBuf;

/// Why a model directory was not loaded. Every variant names the file, field or tensor and what to do about
/// it.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be opened or read.
    #[error("cannot read {}: check that the path is right and the file readable", path.display())]
    Unreadable {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A file is not what its name promises: not JSON, of the wrong type, cut short, inconsistent.
    #[error("{} is damaged: {problem}; download it again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A field of a JSON file is missing or holds an impossible value.
    #[error("{}: `{field}` {problem}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// The model needs something this engine does not compute. Ignoring it would give wrong tokens.
    #[error("{feature} is not supported (found {found}): {remedy}")]
    Unsupported {
        /// What the model needs.
        feature: &'static str,
        /// Where and what was found.
        found: String,
        /// What a user can do.
        remedy: &'static str,
    },
    /// The directory has no weights in a format read here.
    #[error("no model.safetensors or model.safetensors.index.json in {}: {remedy}", dir.display())]
    NoWeights {
        /// The directory.
        dir: PathBuf,
        /// What a user can do.
        remedy: String,
    },
    /// A weight file lacks a tensor that the configuration calls for.
    #[error("tensor `{name}` is missing from {}: {remedy}", path.display())]
    MissingTensor {
        /// The tensor.
        name: String,
        /// The weight file or index.
        path: PathBuf,
        /// What a user can do.
        remedy: &'static str,
    },
    /// A tensor's shape disagrees with the configuration.
    #[error(
        "tensor `{name}` has shape {found:?}, config.json calls for {expected:?}: weights and configuration are of different models"
    )]
    TensorShape {
        /// The tensor.
        name: String,
        /// What the configuration calls for.
        expected: Vec<u64>,
        /// What the file holds.
        found: Vec<u64>,
    },
    /// A tensor holds numbers of a format not read here.
    #[error("tensor `{name}` has dtype {found}: convert the weights to F32, BF16 or F16")]
    TensorDtype {
        /// The tensor.
        name: String,
        /// Its dtype as the file spells it.
        found: String,
    },
    /// A weight file holds tensors that this architecture does not use: computing without them would give
    /// wrong tokens.
    #[error("tensor `{name}` in {} (and {others} more) is not part of this architecture: weights and config.json are of different models, or adapters must be merged first", path.display())]
    UnexpectedTensor {
        /// The first of them.
        name: String,
        /// How many others there are.
        others: usize,
        /// The weight file.
        path: PathBuf,
    },
    /// The threads could not be started.
    #[error("cannot start {threads} compute threads")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// What the system said.
        #[source]
        source: rayon::ThreadPoolBuildError,
    },
}
