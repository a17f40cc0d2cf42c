//! Chat templates of Hugging Face model directories, rendered as `transformers` renders them.

mod calendar;
mod sums;

use std::path::Path;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, ErrorKind, context};
use serde::Deserialize;
use serde::Serialize as _;

use super::{ModelError, read_file, read_json};
use crate::request::Message;

/// The name under which the template is kept in its environment.
const NAME: &str = "chat_template";
/// What a template writes around a message, more or less; and around all of them.
const AROUND_BYTES: usize = 64;

/// A compiled chat template with the special tokens it may write.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    special: SpecialTokens,
    exists: bool,
}

/// Why a conversation could not be rendered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TemplateError {
    /// The template itself says that it does not take such conversations.
    #[error("the model's chat template refuses these messages: {0}")]
    Refused(String),
    /// The template broke.
    #[error("the chat template failed")]
    Broken(#[source] Box<minijinja::Error>),
}

/// The parts of `tokenizer_config.json` that templates use.
#[derive(Debug, Default, Deserialize)]
struct TokenizerConfig {
    #[serde(default)]
    chat_template: Option<TemplateSource>,
    #[serde(default)]
    bos_token: Option<TokenName>,
    #[serde(default)]
    eos_token: Option<TokenName>,
    #[serde(default)]
    pad_token: Option<TokenName>,
    #[serde(default)]
    unk_token: Option<TokenName>,
}

#[derive(Debug, Default)]
struct SpecialTokens {
    bos: Option<String>,
    eos: Option<String>,
    pad: Option<String>,
    unk: Option<String>,
}

/// A template, or several with names of which `default` is meant.
#[derive(Debug)]
struct TemplateSource(Option<String>);

impl<'de> Deserialize<'de> for TemplateSource {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
        Ok(Self(match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::Array(named) => {
                let default = named.iter().find(|entry| entry["name"] == "default");
                default.or(named.first()).and_then(|entry| text(&entry["template"]))
            }
            value => text(&value),
        }))
    }
}

/// A token by its text, or an object that holds it as `content`.
#[derive(Debug)]
struct TokenName(Option<String>);

impl<'de> Deserialize<'de> for TokenName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        Ok(Self(value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned)))
    }
}

impl ChatTemplate {
    /// Reads `chat_template.jinja` or the template in `tokenizer_config.json`; `None` without either file.
    pub(super) fn load(dir: &Path) -> Result<Option<Self>, ModelError> {
        let config_path = dir.join("tokenizer_config.json");
        let file_path = dir.join("chat_template.jinja");
        let config: TokenizerConfig = if config_path.exists() {
            read_json(&config_path, "it names the special tokens")?
        } else if file_path.exists() {
            TokenizerConfig::default()
        } else {
            return Ok(None);
        };
        let (path, source) = if file_path.exists() {
            let bytes = read_file(&file_path, "it is the chat template")?;
            (file_path, Some(String::from_utf8_lossy(&bytes).into_owned()))
        } else {
            (config_path, config.chat_template.and_then(|source| source.0))
        };
        let name = |token: Option<TokenName>| token.and_then(|token| token.0);
        let special = SpecialTokens {
            bos: name(config.bos_token),
            eos: name(config.eos_token),
            pad: name(config.pad_token),
            unk: name(config.unk_token),
        };
        Self::compile(source, special)
            .map(Some)
            .map_err(|source| ModelError::Template { path, source: Box::new(source) })
    }

    fn compile(source: Option<String>, special: SpecialTokens) -> Result<Self, minijinja::Error> {
        let mut environment = Environment::new();
        // As in transformers: ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message).with_source(Raised))
        });
        environment.add_function("strftime_now", |format: String| calendar::strftime_now(&format));
        environment.add_filter("tojson", tojson);
        let exists = source.is_some();
        environment.add_filter(sums::FILTER, text_only);
        if let Some(source) = source
            && environment.add_template_owned(NAME, sums::apart(&source)).is_err()
        {
            environment.add_template_owned(NAME, source)?;
        }
        Ok(Self { environment, special, exists })
    }

    /// Whether there is a template, besides the special tokens.
    pub(super) fn exists(&self) -> bool {
        self.exists
    }

    /// The token that begins a text.
    pub(super) fn bos(&self) -> Option<&str> {
        self.special.bos.as_deref()
    }

    /// The text of a conversation, up to where the assistant's answer begins.
    pub(super) fn render(&self, messages: &[Message]) -> Result<String, TemplateError> {
        self.render_up_to(messages, true)
    }

    /// The text of a conversation, with or without what begins the assistant's answer.
    pub(super) fn render_up_to(
        &self,
        messages: &[Message],
        generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        let render = || {
            let context = context! {
                messages => messages,
                bos_token => self.special.bos.as_deref().unwrap_or_default(),
                eos_token => self.special.eos.as_deref().unwrap_or_default(),
                pad_token => self.special.pad.as_deref().unwrap_or_default(),
                unk_token => self.special.unk.as_deref().unwrap_or_default(),
                add_generation_prompt => generation_prompt,
            };
            // Made once for all of a long prompt: growing is copying.
            let room = messages.iter().map(|message| message.content.len() + AROUND_BYTES).sum::<usize>();
            let mut out = Vec::with_capacity(room + AROUND_BYTES);
            self.environment.get_template(NAME)?.render_captured_to(context, &mut out)?;
            String::from_utf8(out).map_err(|error| {
                minijinja::Error::new(ErrorKind::BadSerialization, "no UTF-8").with_source(error)
            })
        };
        render().map_err(|error: minijinja::Error| {
            match std::error::Error::source(&error).and_then(|source| source.downcast_ref::<Raised>()) {
                Some(Raised) => TemplateError::Refused(error.detail().unwrap_or_default().to_owned()),
                None => TemplateError::Broken(Box::new(error)),
            }
        })
    }
}

/// Marks errors that a template raised on purpose.
#[derive(Debug, thiserror::Error)]
#[error("raised by the template")]
struct Raised;

/// Lets texts through: of anything else and a text there is no sum.
fn text_only(value: Value) -> Result<Value, minijinja::Error> {
    if value.kind() == ValueKind::String {
        return Ok(value);
    }
    let message = format!("tried to use + operator on a string and {}", value.kind());
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// `json.dumps(value, ensure_ascii=False)`: separators with spaces, nothing escaped for HTML.
fn tojson(value: &Value, indent: Option<usize>, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent = indent.or(options.get::<Option<usize>>("indent")?);
    let failed = |error: serde_json::Error| {
        minijinja::Error::new(ErrorKind::BadSerialization, "cannot write as JSON").with_source(error)
    };
    let mut out = Vec::new();
    match indent {
        Some(width) => {
            let spaces = " ".repeat(width.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
                .map_err(failed)?;
        }
        None => {
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonFormatter))
                .map_err(failed)?;
        }
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// Writes `", "` and `": "` as Python does by default.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
mod tests;
