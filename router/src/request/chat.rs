//! The fields that only chat has: messages, and much that is refused.

use serde::Serialize;

use super::content::{self, Parts};
use super::fields::Fields;
use super::json::Raw;
use super::plain::{EFFORTS, VERBOSITIES, refuse_filled, refuse_tools, text_format, unsupported};
use crate::reply::{Refusal, quoted};

/// One message of a conversation, as the chat template sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub(crate) role: &'static str,
    /// Its text; several text parts are joined by newlines.
    pub(crate) content: String,
    /// Who speaks, if said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
}

/// The parts of chat's messages.
const PARTS: Parts = Parts {
    texts: &["text"],
    others: &["image_url", "input_audio", "file", "refusal", "video_url"],
    beside: &[("cache_control", "an object")],
};

/// Reads `messages`.
pub(super) fn messages(fields: &mut Fields<'_>, max: usize) -> Result<Vec<Message>, Refusal> {
    let Some(items) = fields.items("messages", max)? else { return Err(fields.missing("messages")) };
    if items.is_empty() {
        return Err(Refusal::coded("messages", "empty_array", "'messages' must have at least one message."));
    }
    items.into_iter().enumerate().map(|(i, raw)| message(i, raw)).collect()
}

fn message(index: usize, raw: Raw<'_>) -> Result<Message, Refusal> {
    let mut fields = Fields::parse(format!("messages[{index}]"), raw)?;
    let role = match fields.required("role")?.as_str() {
        // Templates of open models know the role under its older name only.
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => "assistant",
        "tool" => "tool",
        other => {
            let name = fields.name("role");
            let message = format!(
                "'{name}' must be one of system, developer, user, assistant and tool, not '{}'.",
                quoted(other)
            );
            return Err(Refusal::coded(name, "invalid_value", message));
        }
    };
    let name = fields.string("name")?;
    for field in ["tool_calls", "function_call", "audio"] {
        if fields.take(field).is_some() {
            return Err(unsupported(&fields.name(field)));
        }
    }
    fields.string("refusal")?;
    if role == "tool" {
        fields.string("tool_call_id")?;
    }
    let content = content::read(&mut fields, "content", &PARTS)?;
    fields.finish(&[])?;
    Ok(Message { role, content, name })
}

/// Refuses what would change the answer and is not supported; accepts the same fields where they ask for nothing.
pub(super) fn refuse_unsupported(fields: &mut Fields<'_>) -> Result<(), Refusal> {
    refuse_tools(fields)?;
    refuse_filled(fields, "functions")?;
    if let Some(raw) = fields.take("function_call")
        && !matches!(raw.get(), "\"none\"" | "\"auto\"")
    {
        return Err(unsupported("function_call"));
    }
    for name in ["audio", "web_search_options"] {
        if fields.take(name).is_some() {
            return Err(unsupported(name));
        }
    }
    if let Some(format) = fields.object("response_format")? {
        text_format(format)?;
    }
    if let Some(modalities) = fields.strings("modalities", 8)?
        && modalities.iter().any(|modality| modality != "text")
    {
        return Err(unsupported("modalities"));
    }
    fields.word("reasoning_effort", EFFORTS)?;
    fields.word("verbosity", VERBOSITIES)?;
    fields.object("prediction")?;
    Ok(())
}
