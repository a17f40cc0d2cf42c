//! Parses and validates request bodies into [`Ask`], with the name of the field at fault in every refusal.

mod chat;
mod completions;
mod content;
mod fields;
mod json;
mod messages;
mod passed;
mod plain;
mod responses;
mod sampling;
mod tokens;

use baton_config::protocol::Sampling;

use crate::reply::Refusal;
use fields::Fields;

pub(crate) use chat::Message;
pub(crate) use completions::Prompt;
pub(crate) use passed::{Passed, Passing, parse_passed};
pub(crate) use responses::Repeats;
pub(crate) use tokens::{
    Source, Tokenize, no_embeddings, parse_count_input, parse_count_messages, parse_detokenize,
    parse_embeddings, parse_tokenize,
};

/// A valid request: nothing in it needs checking again, except that the prompt fits the model once tokenized.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ask {
    /// The model under the name that the client used.
    pub(crate) model: String,
    /// What to go on from.
    pub(crate) input: Input,
    /// Answer as server-sent events.
    pub(crate) stream: bool,
    /// With `stream`: end with a chunk that carries the usage.
    pub(crate) include_usage: bool,
    /// Choices per prompt.
    pub(crate) n: u32,
    /// Tokens to generate at most; the rest of the context where absent.
    pub(crate) max_tokens: Option<u32>,
    /// How tokens are chosen; choice `i` adds `i` to the seed.
    pub(crate) sampling: Sampling,
    /// End before any of these texts.
    pub(crate) stop: Vec<String>,
    /// Begin the text with the prompt (completions only).
    pub(crate) echo: bool,
    /// The client's name for its own user, which may name a session.
    pub(crate) user: Option<String>,
    /// The debugging extension.
    pub(crate) debug: Debug,
    /// What the answer repeats of the request (responses only).
    pub(crate) repeats: Option<Box<Repeats>>,
}

/// What to go on from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Input {
    /// A conversation.
    Chat(Vec<Message>),
    /// Prompts, each answered by itself.
    Prompts(Vec<Prompt>),
}

/// The request field `baton`: what else each choice reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Debug {
    /// The field was there: each choice ends with where it ran and what its parts took.
    pub(crate) report: bool,
    /// Token ids beside the text.
    pub(crate) token_ids: bool,
    /// The running digest of the logits bits after each token.
    pub(crate) logits_digest: bool,
}

/// The bounds that depend on the model and the configuration.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    /// Token ids are below this.
    pub(crate) vocab: u32,
    /// Prompts times `n`.
    pub(crate) choices: u32,
    /// Messages of one chat.
    pub(crate) messages: usize,
}

/// Tokens of a completion whose request does not say how many (OpenAI's default).
const COMPLETION_DEFAULT_TOKENS: u32 = 16;
/// Most texts in `stop`.
const STOP_MAX: usize = 4;
/// Longest text in `stop`, in bytes.
const STOP_MAX_BYTES: usize = 1024;

/// What `service_tier` may say; there is one tier here.
const SERVICE_TIERS: &[&str] = &["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"];
/// What `prompt_cache_retention` may say; what is kept is for the workers to decide.
const CACHE_RETENTIONS: &[&str] = &["in_memory", "in-memory", "24h"];

/// Engine fields that never pass: with a forged one a client could reach into another request or worker.
const INTERNAL_FIELDS: [&str; 10] = [
    "kv_transfer_params",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "request_id",
    "rid",
    "data_parallel_rank",
    "cache_salt",
    "nvext",
    "disaggregated_params",
];

/// Parses the body of `POST /v1/chat/completions`.
pub(crate) fn parse_chat(body: &[u8], bounds: &Bounds) -> Result<Ask, Refusal> {
    let mut fields = Fields::parse_body(body)?;
    let model = model_name(&mut fields)?;
    let messages = chat::messages(&mut fields, bounds.messages)?;
    chat::refuse_unsupported(&mut fields)?;
    let newer = fields.integer("max_completion_tokens", 1, i64::from(u32::MAX))?;
    let older = fields.integer("max_tokens", 1, i64::from(u32::MAX))?;
    let n = choices(&mut fields, 1, bounds)?;
    let mut sampling = sampling::common(&mut fields, bounds)?;
    sampling.logprobs = sampling::chat_logprobs(&mut fields)?;
    let ask = common(
        &mut fields,
        Ask {
            user: None,
            model,
            input: Input::Chat(messages),
            stream: false,
            include_usage: false,
            n,
            max_tokens: newer.or(older).map(saturate),
            sampling,
            stop: Vec::new(),
            echo: false,
            debug: Debug::default(),
            repeats: None,
        },
    )?;
    fields.finish(&INTERNAL_FIELDS)?;
    Ok(ask)
}

/// Parses the body of `POST /v1/completions`.
pub(crate) fn parse_completions(body: &[u8], bounds: &Bounds) -> Result<Ask, Refusal> {
    let mut fields = Fields::parse_body(body)?;
    let model = model_name(&mut fields)?;
    let prompts = completions::prompts(&mut fields, bounds)?;
    let max_tokens = fields.integer("max_tokens", 1, i64::from(u32::MAX))?;
    let n = choices(&mut fields, prompts.len(), bounds)?;
    completions::refuse_unsupported(&mut fields, n)?;
    let mut sampling = sampling::common(&mut fields, bounds)?;
    sampling.logprobs = sampling::completion_logprobs(&mut fields)?;
    let echo = fields.boolean("echo")?.unwrap_or(false);
    if echo && sampling.logprobs.is_some() {
        return Err(Refusal::invalid("echo", "'echo' together with 'logprobs' is not supported."));
    }
    let ask = common(
        &mut fields,
        Ask {
            user: None,
            model,
            input: Input::Prompts(prompts),
            stream: false,
            include_usage: false,
            n,
            max_tokens: Some(max_tokens.map_or(COMPLETION_DEFAULT_TOKENS, saturate)),
            sampling,
            stop: Vec::new(),
            echo,
            debug: Debug::default(),
            repeats: None,
        },
    )?;
    fields.finish(&INTERNAL_FIELDS)?;
    Ok(ask)
}

/// Parses the body of `POST /v1/responses`.
pub(crate) fn parse_responses(body: &[u8], bounds: &Bounds) -> Result<Ask, Refusal> {
    let mut fields = Fields::parse_body(body)?;
    let model = model_name(&mut fields)?;
    responses::refuse_state(&mut fields)?;
    let (messages, instructions) = responses::messages(&mut fields, bounds.messages)?;
    let max_tokens = fields.integer("max_output_tokens", 1, i64::from(u32::MAX))?.map(saturate);
    let (logprobs, top_logprobs) = responses::logprobs(&mut fields)?;
    let sampling = Sampling { logprobs, ..sampling::common(&mut fields, bounds)? };
    let stream = stream(&mut fields)?;
    if let Some(mut options) = stream_options(&mut fields, stream)? {
        options.boolean("include_obfuscation")?;
        options.finish(&[])?;
    }
    let repeats = Repeats {
        instructions,
        max_output_tokens: max_tokens,
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        top_logprobs,
        ..responses::repeats(&mut fields)?
    };
    let (stop, debug) = (stop(&mut fields)?, debug(&mut fields)?);
    fields.finish(&INTERNAL_FIELDS)?;
    Ok(Ask {
        model,
        input: Input::Chat(messages),
        stream,
        include_usage: false,
        n: 1,
        max_tokens,
        sampling,
        stop,
        echo: false,
        user: repeats.user.clone(),
        debug,
        repeats: Some(Box::new(repeats)),
    })
}

/// Parses the body of `POST /v1/messages`.
pub(crate) fn parse_messages(body: &[u8], bounds: &Bounds) -> Result<Ask, Refusal> {
    let mut fields = Fields::parse_body(body)?;
    let model = model_name(&mut fields)?;
    let max_tokens = messages::max_tokens(&mut fields)?;
    let messages = messages::messages(&mut fields, bounds.messages)?;
    messages::refuse_unsupported(&mut fields)?;
    let ask = Ask {
        model,
        input: Input::Chat(messages),
        stream: stream(&mut fields)?,
        include_usage: false,
        n: 1,
        max_tokens: Some(max_tokens),
        sampling: messages::sampling(&mut fields)?,
        stop: messages::stops(&mut fields)?,
        echo: false,
        user: messages::user(&mut fields)?,
        debug: debug(&mut fields)?,
        repeats: None,
    };
    fields.finish(&INTERNAL_FIELDS)?;
    Ok(ask)
}

fn saturate(value: i64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn model_name(fields: &mut Fields<'_>) -> Result<String, Refusal> {
    match fields.string("model")? {
        Some(model) if !model.is_empty() => Ok(model),
        Some(_) => Err(Refusal::invalid("model", "'model' must not be empty.")),
        None => Err(Refusal::coded("model", "missing_required_parameter", "'model' is required.")),
    }
}

/// Reads `n`, bounded so that one request cannot become more generations than allowed.
fn choices(fields: &mut Fields<'_>, prompts: usize, bounds: &Bounds) -> Result<u32, Refusal> {
    let n = fields.integer("n", 1, i64::from(bounds.choices))?.map_or(1, saturate);
    if u64::from(n) * prompts as u64 > u64::from(bounds.choices) {
        let message = format!(
            "{prompts} prompts with {n} choices each are more than the limit of {} choices a request.",
            bounds.choices
        );
        return Err(Refusal::invalid("n", message));
    }
    Ok(n)
}

/// The fields that chat and completions share.
fn common(fields: &mut Fields<'_>, mut ask: Ask) -> Result<Ask, Refusal> {
    ask.stream = stream(fields)?;
    if let Some(mut options) = stream_options(fields, ask.stream)? {
        ask.include_usage = options.boolean("include_usage")?.unwrap_or(false);
        options.boolean("include_obfuscation")?;
        options.finish(&[])?;
    }
    ask.stop = stop(fields)?;
    ask.debug = debug(fields)?;
    ask.user = fields.string("user")?;
    for name in ["safety_identifier", "prompt_cache_key"] {
        fields.string(name)?;
    }
    fields.word("prompt_cache_retention", CACHE_RETENTIONS)?;
    fields.word("service_tier", SERVICE_TIERS)?;
    fields.boolean("store")?;
    fields.metadata("metadata")?;
    Ok(ask)
}

fn stream(fields: &mut Fields<'_>) -> Result<bool, Refusal> {
    Ok(fields.boolean("stream")?.unwrap_or(false))
}

fn stream_options<'a>(fields: &mut Fields<'a>, stream: bool) -> Result<Option<Fields<'a>>, Refusal> {
    let options = fields.object("stream_options")?;
    if options.is_some() && !stream {
        let message = "'stream_options' is only allowed when 'stream' is true.";
        return Err(Refusal::invalid("stream_options", message));
    }
    Ok(options)
}

fn debug(fields: &mut Fields<'_>) -> Result<Debug, Refusal> {
    let Some(mut object) = fields.object("baton")? else { return Ok(Debug::default()) };
    let debug = Debug {
        report: true,
        token_ids: object.boolean("token_ids")?.unwrap_or(false),
        logits_digest: object.boolean("logits_digest")?.unwrap_or(false),
    };
    object.finish(&[])?;
    Ok(debug)
}

fn stop(fields: &mut Fields<'_>) -> Result<Vec<String>, Refusal> {
    let stops = fields.strings("stop", STOP_MAX)?.unwrap_or_default();
    stops.into_iter().map(|stop| check_stop("stop", stop)).collect()
}

/// Bounds a text that ends an answer.
fn check_stop(name: &str, stop: String) -> Result<String, Refusal> {
    if stop.is_empty() {
        return Err(Refusal::invalid(name, format!("'{name}' must not contain an empty string.")));
    }
    if stop.len() > STOP_MAX_BYTES {
        let message = format!("Each text of '{name}' may have at most {STOP_MAX_BYTES} bytes.");
        return Err(Refusal::invalid(name, message));
    }
    Ok(stop)
}

#[cfg(test)]
mod tests;
