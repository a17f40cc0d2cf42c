//! Anthropic's Messages API: a system prompt beside the messages, blocks in place of parts, its own names and ranges.

use baton_config::protocol::Sampling;

use super::chat::Message;
use super::content::{self, Parts};
use super::fields::{Fields, string_at};
use super::json::Raw;
use super::plain::{refuse_filled, unserved, unsupported};
use super::sampling::{SMALLEST_TOP_P, random_seed};
use crate::reply::{Refusal, quoted};

/// Most texts in `stop_sequences`.
const STOP_SEQUENCES_MAX: usize = 16;
/// Longest `metadata.user_id` in characters (Anthropic's bound).
const USER_ID_MAX: usize = 256;

const BLOCKS: Parts = Parts {
    texts: &["text"],
    others: &[
        "image",
        "document",
        "tool_use",
        "tool_result",
        "thinking",
        "redacted_thinking",
        "search_result",
        "server_tool_use",
        "web_search_tool_result",
        "container_upload",
    ],
    beside: &[("cache_control", "an object"), ("citations", "an array")],
};

/// Reads `system` and `messages` as a conversation.
pub(super) fn messages(fields: &mut Fields<'_>, max: usize) -> Result<Vec<Message>, Refusal> {
    let mut messages: Vec<Message> = Vec::new();
    if let Some(raw) = fields.take("system") {
        let content = content::read_value("system", raw, &BLOCKS)?;
        messages.push(Message { role: "system", content, name: None });
    }
    let Some(items) = fields.items("messages", max)? else { return Err(fields.missing("messages")) };
    if items.is_empty() {
        return Err(Refusal::coded("messages", "empty_array", "'messages' must have at least one message."));
    }
    for (i, raw) in items.into_iter().enumerate() {
        let next = message(format!("messages[{i}]"), raw)?;
        match messages.last_mut() {
            // Turns of one side in a row are one turn, as parts of one message are.
            Some(last) if last.role == next.role => {
                last.content.push('\n');
                last.content.push_str(&next.content);
            }
            _ => messages.push(next),
        }
    }
    if messages.last().is_some_and(|last| last.role == "assistant") {
        let message = "'messages' must end with a message of the user: beginning the answer for the model \
                       is not supported.";
        return Err(Refusal::coded("messages", "unsupported_value", message));
    }
    Ok(messages)
}

fn message(path: String, raw: Raw<'_>) -> Result<Message, Refusal> {
    let mut fields = Fields::parse(path, raw)?;
    let role = match fields.required("role")?.as_str() {
        "user" => "user",
        "assistant" => "assistant",
        "system" => "system",
        other => {
            let name = fields.name("role");
            let message =
                format!("'{name}' must be one of user, assistant and system, not '{}'.", quoted(other));
            return Err(Refusal::coded(name, "invalid_value", message));
        }
    };
    let content = content::read(&mut fields, "content", &BLOCKS)?;
    fields.finish(&[])?;
    Ok(Message { role, content, name: None })
}

/// Reads how tokens are chosen.
pub(super) fn sampling(fields: &mut Fields<'_>) -> Result<Sampling, Refusal> {
    let default = Sampling::default();
    let top_k = fields.integer("top_k", 0, i64::from(u32::MAX))?.unwrap_or(0);
    Ok(Sampling {
        temperature: fields.number("temperature", 0.0, 1.0)?.unwrap_or(default.temperature),
        top_p: fields.number("top_p", 0.0, 1.0)?.unwrap_or(default.top_p).max(SMALLEST_TOP_P),
        top_k: u32::try_from(top_k).unwrap_or(0),
        seed: random_seed()?,
        ..default
    })
}

/// Reads `stop_sequences`.
pub(super) fn stops(fields: &mut Fields<'_>) -> Result<Vec<String>, Refusal> {
    let items = fields.items("stop_sequences", STOP_SEQUENCES_MAX)?.unwrap_or_default();
    let stop = |(i, raw): (usize, Raw<'_>)| {
        let name = format!("stop_sequences[{i}]");
        let text = string_at(&name, raw)?;
        if text.trim().is_empty() {
            let message = format!("'{name}' must hold more than white space.");
            return Err(Refusal::coded(name, "invalid_value", message));
        }
        super::check_stop(&name, text)
    };
    items.into_iter().enumerate().map(stop).collect()
}

/// Reads `metadata`: the client's name for its own user.
pub(super) fn user(fields: &mut Fields<'_>) -> Result<Option<String>, Refusal> {
    let Some(mut metadata) = fields.object("metadata")? else { return Ok(None) };
    let user = metadata.short("user_id", USER_ID_MAX)?;
    metadata.finish(&[])?;
    Ok(user)
}

/// Refuses what would change the answer and is not supported; accepts the same fields where they ask for nothing.
pub(super) fn refuse_unsupported(fields: &mut Fields<'_>) -> Result<(), Refusal> {
    refuse_filled(fields, "tools")?;
    refuse_filled(fields, "mcp_servers")?;
    if let Some(mut choice) = fields.object("tool_choice")? {
        if !matches!(choice.required("type")?.as_str(), "none" | "auto") {
            return Err(unsupported("tool_choice"));
        }
        choice.boolean("disable_parallel_tool_use")?;
        choice.finish(&[])?;
    }
    if let Some(mut thinking) = fields.object("thinking")? {
        // A model that decides for itself may as well not think.
        match thinking.word("type", &["enabled", "disabled", "adaptive", "between_tools"])? {
            Some("enabled") => return Err(unsupported("thinking")),
            Some(_) => {}
            None => return Err(thinking.missing("type")),
        }
        thinking.word("display", &["summarized", "omitted"])?;
        thinking.finish(&[])?;
    }
    if let Some(mut output) = fields.object("output_config")? {
        output.word("effort", &["low", "medium", "high", "xhigh", "max"])?;
        if output.take("format").is_some() {
            return Err(unsupported("output_config.format"));
        }
        output.finish(&[])?;
    }
    for name in ["container", "inference_geo", "context_management", "diagnostics"] {
        if fields.take(name).is_some() {
            return Err(unserved(name));
        }
    }
    fields.word("service_tier", &["auto", "standard_only"])?;
    fields.word("speed", &["standard", "fast"])?;
    fields.object("cache_control")?;
    Ok(())
}

/// Refuses `max_tokens: 0` by what it means there.
pub(super) fn max_tokens(fields: &mut Fields<'_>) -> Result<u32, Refusal> {
    match fields.peek("max_tokens").map(|raw| (raw.kind(), raw.get())) {
        None => Err(fields.missing("max_tokens")),
        Some(("a number", "0")) => {
            let message =
                "'max_tokens' must be at least 1: filling a cache without generating is not supported.";
            Err(Refusal::coded("max_tokens", "integer_below_min_value", message))
        }
        Some(_) => {
            let tokens = fields.integer("max_tokens", 1, i64::from(u32::MAX))?;
            Ok(tokens.map_or(1, super::saturate))
        }
    }
}
