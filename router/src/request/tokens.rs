//! Requests that the router answers without workers: tokens of texts, texts of tokens, and how many there are.

use super::chat::{self, Message};
use super::completions::token_ids;
use super::fields::Fields;
use super::plain::{PLAIN_TEXT, refuse_filled};
use super::{Bounds, INTERNAL_FIELDS, messages, model_name, responses};
use crate::reply::Refusal;

/// Most inputs of one request for embeddings (OpenAI's bound).
const EMBEDDING_INPUTS_MAX: u32 = 2048;

/// A valid request to tokenize.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tokenize {
    /// The one model there is where the client names none.
    pub(crate) model: Option<String>,
    pub(crate) source: Source,
    /// Add the special tokens that the tokenizer adds by itself.
    pub(crate) add_special: bool,
    /// Tell the names of the tokens too.
    pub(crate) names: bool,
}

/// What is tokenized.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Source {
    Text(String),
    Chat {
        messages: Vec<Message>,
        /// End with what begins an answer.
        generation_prompt: bool,
    },
}

/// A valid request for the text of tokens.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Detokenize {
    pub(crate) model: Option<String>,
    pub(crate) tokens: Vec<u32>,
}

/// A valid request for the number of tokens of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Count {
    pub(crate) model: Option<String>,
    pub(crate) messages: Vec<Message>,
}

/// Parses the body of `POST /tokenize`, in either of its shapes.
pub(crate) fn parse_tokenize(body: &[u8], bounds: &Bounds) -> Result<Tokenize, Refusal> {
    let mut fields = Fields::parse_body(body)?;
    let model = fields.string("model")?;
    let names = fields.boolean("return_token_strs")?.unwrap_or(false);
    let add_special = fields.boolean("add_special_tokens")?;
    let prompt = fields.string("prompt")?;
    let source = match (prompt, fields.peek("messages")) {
        (Some(text), None) => Source::Text(text),
        (None, Some(_)) => chat_source(&mut fields, bounds)?,
        (Some(_), Some(_)) => {
            let message = "'messages' must not be there beside 'prompt': one of them is tokenized.";
            return Err(Refusal::invalid("messages", message));
        }
        (None, None) => {
            let message = "'prompt' or 'messages' is required.";
            return Err(Refusal::coded("prompt", "missing_required_parameter", message));
        }
    };
    fields.finish(&INTERNAL_FIELDS)?;
    // A chat template writes the special tokens itself.
    let add_special = add_special.unwrap_or(matches!(source, Source::Text(_)));
    Ok(Tokenize { model, source, add_special, names })
}

fn chat_source(fields: &mut Fields<'_>, bounds: &Bounds) -> Result<Source, Refusal> {
    let messages = chat::messages(fields, bounds.messages)?;
    let generation_prompt = fields.boolean("add_generation_prompt")?.unwrap_or(true);
    if fields.boolean("continue_final_message")? == Some(true) {
        let message = "'continue_final_message' must be false: going on with a message is not supported.";
        return Err(Refusal::coded("continue_final_message", "unsupported_value", message));
    }
    if fields.take("chat_template").is_some() {
        let message = "'chat_template' is not supported: the model's own template is used.";
        return Err(Refusal::coded("chat_template", "unsupported_parameter", message));
    }
    for name in ["chat_template_kwargs", "mm_processor_kwargs", "media_io_kwargs"] {
        if fields.object(name)?.is_some_and(|object| !object.keys().is_empty()) {
            let message = format!("'{name}' is not supported: the template takes messages only.");
            return Err(Refusal::coded(name, "unsupported_parameter", message));
        }
    }
    refuse_filled(fields, "tools")?;
    Ok(Source::Chat { messages, generation_prompt })
}

/// Parses the body of `POST /detokenize`.
pub(crate) fn parse_detokenize(body: &[u8], bounds: &Bounds) -> Result<Detokenize, Refusal> {
    let mut fields = Fields::parse_body(body)?;
    let model = fields.string("model")?;
    let Some(raw) = fields.take("tokens") else { return Err(fields.missing("tokens")) };
    let tokens = token_ids("tokens", raw, bounds)?;
    fields.finish(&INTERNAL_FIELDS)?;
    Ok(Detokenize { model, tokens })
}

/// Parses the body of `POST /v1/messages/count_tokens`.
pub(crate) fn parse_count_messages(body: &[u8], bounds: &Bounds) -> Result<Count, Refusal> {
    let mut fields = Fields::parse_body(body)?;
    let model = model_name(&mut fields)?;
    let messages = messages::messages(&mut fields, bounds.messages)?;
    messages::refuse_unsupported(&mut fields)?;
    fields.finish(&INTERNAL_FIELDS)?;
    Ok(Count { model: Some(model), messages })
}

/// Parses the body of `POST /v1/responses/input_tokens`.
pub(crate) fn parse_count_input(body: &[u8], bounds: &Bounds) -> Result<Count, Refusal> {
    let mut fields = Fields::parse_body(body)?;
    let model = fields.string("model")?;
    responses::refuse_state(&mut fields)?;
    let (messages, _) = responses::messages(&mut fields, bounds.messages)?;
    responses::repeats(&mut fields)?;
    fields.short("personality", 64)?;
    fields.finish(&INTERNAL_FIELDS)?;
    Ok(Count { model, messages })
}

/// Parses the body of `POST /v1/embeddings`; gives the model that was asked for.
pub(crate) fn parse_embeddings(body: &[u8], bounds: &Bounds) -> Result<String, Refusal> {
    let mut fields = Fields::parse_body(body)?;
    let model = model_name(&mut fields)?;
    let bounds = Bounds { choices: EMBEDDING_INPUTS_MAX, ..*bounds };
    super::completions::texts(&mut fields, "input", &bounds)?;
    fields.integer("dimensions", 1, i64::from(u32::MAX))?;
    fields.word("encoding_format", &["float", "base64"])?;
    fields.string("user")?;
    fields.finish(&INTERNAL_FIELDS)?;
    Ok(model)
}

/// What is said of a model that is asked for embeddings and has none.
pub(crate) fn no_embeddings(model: &str) -> Refusal {
    let model = crate::reply::quoted(model);
    Refusal::coded(
        "model",
        "unsupported_model",
        format!("The model '{model}' has no embeddings: {PLAIN_TEXT}"),
    )
}
