//! The numbers of a model directory that size its KV cache.
//!
//! Only `config.json` is read; whether an engine can run the model is the engine's to say.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Larger `config.json` files are refused.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// No model has more of anything.
const MAX_NUMBER: u32 = 1 << 24;

/// Numbers of a Hugging Face `config.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ModelShape {
    /// First of `architectures`, such as `LlamaForCausalLM`.
    pub architecture: String,
    /// `num_hidden_layers`.
    pub layers: u32,
    /// `num_attention_heads`.
    pub heads: u32,
    /// `num_key_value_heads`, or `heads`.
    pub kv_heads: u32,
    /// `head_dim`, or `hidden_size / heads`.
    pub head_dim: u32,
    /// `vocab_size`.
    pub vocab: u32,
    /// `max_position_embeddings`, in tokens.
    pub max_context: u32,
}

/// Why a model directory could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ModelShapeError {
    /// There is no such directory.
    #[error("model directory {} does not exist", dir.display())]
    Missing {
        /// The directory.
        dir: PathBuf,
    },
    /// The path is a file.
    #[error("{} is not a directory", dir.display())]
    NotADirectory {
        /// The path.
        dir: PathBuf,
    },
    /// A file cannot be read.
    #[error("{} cannot be read", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is larger than any real one.
    #[error("{} is larger than {MAX_CONFIG_BYTES} bytes", file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
    },
    /// Not the JSON of a model.
    #[error("{} is not a model configuration", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A number makes no sense.
    #[error("{}: {key} is {value}, which cannot be", file.display())]
    Number {
        /// The file.
        file: PathBuf,
        /// The key of the number.
        key: &'static str,
        /// The number.
        value: u64,
    },
}

#[derive(Deserialize)]
#[serde(expecting = "a JSON object with the numbers of a model")]
struct Raw {
    #[serde(default)]
    architectures: Vec<String>,
    num_hidden_layers: u64,
    num_attention_heads: u64,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    hidden_size: u64,
    vocab_size: u64,
    max_position_embeddings: u64,
}

impl ModelShape {
    /// Reads `config.json` of a model directory.
    ///
    /// # Errors
    /// [`ModelShapeError`], naming the file and what is wrong with it.
    pub fn read(dir: &Path) -> Result<Self, ModelShapeError> {
        if !dir.exists() {
            return Err(ModelShapeError::Missing { dir: dir.to_owned() });
        }
        if !dir.is_dir() {
            return Err(ModelShapeError::NotADirectory { dir: dir.to_owned() });
        }
        let file = dir.join("config.json");
        let unreadable = |source| ModelShapeError::Unreadable { file: file.clone(), source };
        let mut text = Vec::new();
        // Opening a pipe would wait for its writer.
        if !std::fs::metadata(&file).map_err(unreadable)?.is_file() {
            return Err(unreadable(std::io::Error::other("it is not a regular file")));
        }
        let open = File::open(&file).map_err(unreadable)?;
        open.take(MAX_CONFIG_BYTES + 1).read_to_end(&mut text).map_err(unreadable)?;
        if text.len() as u64 > MAX_CONFIG_BYTES {
            return Err(ModelShapeError::TooLarge { file });
        }
        let raw: Raw = serde_json::from_slice(&text)
            .map_err(|source| ModelShapeError::Json { file: file.clone(), source })?;
        Self::check(raw, &file)
    }

    fn check(raw: Raw, file: &Path) -> Result<Self, ModelShapeError> {
        let number = |key, value: u64| match u32::try_from(value) {
            Ok(n) if (1..=MAX_NUMBER).contains(&n) => Ok(n),
            _ => Err(ModelShapeError::Number { file: file.to_owned(), key, value }),
        };
        let heads = number("num_attention_heads", raw.num_attention_heads)?;
        let hidden = number("hidden_size", raw.hidden_size)?;
        let head_dim = match raw.head_dim {
            Some(dim) => number("head_dim", dim)?,
            None => number("hidden_size / num_attention_heads", u64::from(hidden / heads))?,
        };
        let layers = number("num_hidden_layers", raw.num_hidden_layers)?;
        let kv_heads = match raw.num_key_value_heads {
            Some(count) => number("num_key_value_heads", count)?,
            None => heads,
        };
        if u64::from(layers) * u64::from(kv_heads) * u64::from(head_dim) > 1 << 32 {
            let value = u64::from(layers);
            return Err(ModelShapeError::Number { file: file.to_owned(), key: "num_hidden_layers", value });
        }
        Ok(Self {
            architecture: raw.architectures.into_iter().next().unwrap_or_else(|| "unknown".to_owned()),
            layers,
            heads,
            kv_heads,
            head_dim,
            vocab: number("vocab_size", raw.vocab_size)?,
            max_context: number("max_position_embeddings", raw.max_position_embeddings)?,
        })
    }
}
