//! The text side of a model directory: tokenizer, chat template, special tokens, limits.

mod decode;
mod encode;
mod template;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use tokenizers::Tokenizer;
use tokenizers::models::bpe::BPE;

use crate::options::ModelOptions;
use crate::request::Message;

pub(crate) use decode::{Decoder, Vocabulary};
pub(crate) use template::{ChatTemplate, TemplateError};

/// Largest file of a model directory that is read here.
const FILE_MAX_BYTES: u64 = 256 << 20;
/// Tokens of context where neither `config.json` nor the options say.
const CONTEXT_DEFAULT: u32 = 4096;

/// Why a model directory cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file is missing or unreadable.
    #[error("cannot read {path}: {hint}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the file is needed for.
        hint: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A file is larger than anything of its kind.
    #[error("{path} has {bytes} bytes, more than the {FILE_MAX_BYTES} that are accepted")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// A JSON file does not parse.
    #[error("{path} is not valid JSON of its kind")]
    Json {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// The tokenizer does not load.
    #[error("{path} does not load as a tokenizer: {message}")]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What the tokenizer library said.
        message: String,
    },
    /// The tokenizer knows ids that the model has no logits for.
    #[error(
        "the tokenizer in {path} knows token id {id} but the model's vocabulary ends at {vocab}: they do not belong together"
    )]
    Vocabulary {
        /// The directory.
        path: PathBuf,
        /// The largest id of the tokenizer.
        id: u32,
        /// The size of the model's vocabulary.
        vocab: u32,
    },
    /// The chat template does not compile.
    #[error("the chat template in {path} does not compile")]
    Template {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Box<minijinja::Error>,
    },
}

/// What the router knows of the model it serves.
#[derive(Debug)]
pub(crate) struct Model {
    /// Its id; the first of `names`.
    pub(crate) id: String,
    /// Every name it is served as.
    pub(crate) names: Vec<String>,
    /// Token ids are below this.
    pub(crate) vocab: u32,
    /// Prompt and answer together.
    pub(crate) max_context: u32,
    /// The model's own end tokens.
    pub(crate) eos: Vec<u32>,
    /// Token ids to text.
    pub(crate) vocabulary: Arc<Vocabulary>,
    bos: Option<u32>,
    template: Option<ChatTemplate>,
}

/// Why a prompt could not be made of a request.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PromptError {
    /// The model has no chat template.
    #[error("the model has no chat template")]
    NoTemplate,
    /// The template refused the conversation or broke on it.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The tokenizer broke.
    #[error("the tokenizer failed: {0}")]
    Tokenizer(String),
    /// There is nothing to go on from.
    #[error("the prompt is empty")]
    Empty,
}

/// The parts of `config.json` and `generation_config.json` that matter here.
#[derive(Debug, Default, Deserialize)]
struct ModelConfig {
    vocab_size: Option<u32>,
    max_position_embeddings: Option<u32>,
    #[serde(default)]
    eos_token_id: OneOrMany,
    #[serde(default)]
    bos_token_id: OneOrMany,
}

/// A token id, several, or none: model directories have all three.
#[derive(Debug, Default)]
struct OneOrMany(Vec<u32>);

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let id = |value: &serde_json::Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        Ok(Self(match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::Array(ids) => ids.iter().filter_map(id).collect(),
            value => id(&value).into_iter().collect(),
        }))
    }
}

fn read_file(path: &Path, hint: &'static str) -> Result<Vec<u8>, ModelError> {
    let refused = |source| ModelError::Read { path: path.to_owned(), hint, source };
    let bytes = std::fs::metadata(path).map_err(refused)?.len();
    if bytes > FILE_MAX_BYTES {
        return Err(ModelError::TooLarge { path: path.to_owned(), bytes });
    }
    std::fs::read(path).map_err(refused)
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path, hint: &'static str) -> Result<T, ModelError> {
    let bytes = read_file(path, hint)?;
    serde_json::from_slice(&bytes).map_err(|source| ModelError::Json { path: path.to_owned(), source })
}

/// Checks that a router could serve the model of `options`: its limits, its tokenizer, its chat template.
///
/// # Errors
/// As a router would say them when it starts.
pub fn inspect(options: &ModelOptions) -> Result<(), ModelError> {
    Model::load(options).map(|_| ())
}

fn names(options: &ModelOptions) -> Vec<String> {
    let mut names = vec![options.id.clone()];
    for name in &options.served_as {
        if !names.contains(name) {
            names.push(name.clone());
        }
    }
    names
}

impl Model {
    /// A model that other servers run: nothing is known of it but its names, and it makes no tokens of any text.
    pub(crate) fn elsewhere(options: &ModelOptions) -> Self {
        Self {
            id: options.id.clone(),
            names: names(options),
            vocab: 0,
            max_context: 0,
            eos: Vec::new(),
            vocabulary: Arc::new(Vocabulary::new(Tokenizer::new(BPE::default()))),
            bos: None,
            template: None,
        }
    }

    /// Reads the model directory of `options`.
    pub(crate) fn load(options: &ModelOptions) -> Result<Self, ModelError> {
        let dir = &options.path;
        let config: ModelConfig = read_json(&dir.join("config.json"), "the router needs the model's limits")?;
        let generation_path = dir.join("generation_config.json");
        let generation: ModelConfig = if generation_path.exists() {
            read_json(&generation_path, "it names the model's end tokens")?
        } else {
            ModelConfig::default()
        };
        let tokenizer_path = dir.join("tokenizer.json");
        let bytes = read_file(&tokenizer_path, "the router needs the model's tokenizer")?;
        let tokenizer = Tokenizer::from_bytes(&bytes).map_err(|error| ModelError::Tokenizer {
            path: tokenizer_path.clone(),
            message: error.to_string(),
        })?;
        drop(bytes);
        let vocabulary = Vocabulary::new(tokenizer);
        let vocab = config.vocab_size.unwrap_or_else(|| vocabulary.len());
        if let Some(id) = vocabulary.largest_id().filter(|id| *id >= vocab) {
            return Err(ModelError::Vocabulary { path: dir.clone(), id, vocab });
        }
        let template = ChatTemplate::load(dir)?;
        let eos =
            if generation.eos_token_id.0.is_empty() { config.eos_token_id } else { generation.eos_token_id };
        let named_bos = template.as_ref().and_then(|template| vocabulary.id(template.bos()?));
        let bos = named_bos.or_else(|| config.bos_token_id.0.first().copied()).filter(|id| *id < vocab);
        let limit = config.max_position_embeddings.unwrap_or(CONTEXT_DEFAULT);
        Ok(Self {
            id: options.id.clone(),
            names: names(options),
            vocab,
            max_context: options.max_context.map_or(limit, |asked| asked.min(limit)),
            eos: eos.0,
            vocabulary: Arc::new(vocabulary),
            bos,
            template,
        })
    }

    /// The tokens of a conversation, ready for the answer of the assistant; `salt` as in [`Vocabulary::encode`].
    pub(crate) fn chat_tokens(&self, messages: &[Message], salt: u64) -> Result<Vec<u32>, PromptError> {
        let template = self.template.as_ref().filter(|template| template.exists());
        let text = template.ok_or(PromptError::NoTemplate)?.render(messages)?;
        // The template writes the special tokens itself.
        let tokens = self.vocabulary.encode(&text, false, salt).map_err(PromptError::Tokenizer)?;
        self.or_bos(tokens)
    }

    /// The text of a conversation, with or without what begins the assistant's answer.
    pub(crate) fn chat_text(
        &self,
        messages: &[Message],
        generation_prompt: bool,
    ) -> Result<String, PromptError> {
        let template = self.template.as_ref().filter(|template| template.exists());
        Ok(template.ok_or(PromptError::NoTemplate)?.render_up_to(messages, generation_prompt)?)
    }

    /// The tokens of a text to be continued; `salt` as in [`Vocabulary::encode`].
    pub(crate) fn text_tokens(&self, text: &str, salt: u64) -> Result<Vec<u32>, PromptError> {
        let tokens = self.vocabulary.encode(text, true, salt).map_err(PromptError::Tokenizer)?;
        self.or_bos(tokens)
    }

    fn or_bos(&self, tokens: Vec<u32>) -> Result<Vec<u32>, PromptError> {
        match (tokens.is_empty(), self.bos) {
            (false, _) => Ok(tokens),
            (true, Some(bos)) => Ok(vec![bos]),
            (true, None) => Err(PromptError::Empty),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
