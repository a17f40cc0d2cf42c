//! The fields that only chat has: messages, and much that is refused.

use serde::Serialize;
use serde_json::value::RawValue;

use super::fields::{Fields, items_at, kind, string_at};
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

/// Most parts of one message.
const PARTS_MAX: usize = 1024;

/// Reads `messages`.
pub(super) fn messages(fields: &mut Fields<'_>, max: usize) -> Result<Vec<Message>, Refusal> {
    let Some(items) = fields.items("messages", max)? else {
        return Err(Refusal::coded("messages", "missing_required_parameter", "'messages' is required."));
    };
    if items.is_empty() {
        return Err(Refusal::coded("messages", "empty_array", "'messages' must have at least one message."));
    }
    items.iter().enumerate().map(|(i, raw)| message(i, raw)).collect()
}

fn message(index: usize, raw: &RawValue) -> Result<Message, Refusal> {
    let mut fields = Fields::parse(format!("messages[{index}]"), raw)?;
    let role = role(&mut fields)?;
    let name = fields.string("name")?;
    for field in ["tool_calls", "function_call", "audio"] {
        if fields.take(field).is_some() {
            let name = fields.name(field);
            return Err(Refusal::coded(
                name.clone(),
                "unsupported_parameter",
                format!("'{name}' is not supported."),
            ));
        }
    }
    fields.string("refusal")?;
    if role == "tool" {
        fields.string("tool_call_id")?;
    }
    let content_name = fields.name("content");
    let content = match fields.take("content") {
        None => {
            let message = format!("'{content_name}' is required: a string or an array of text parts.");
            return Err(Refusal::coded(content_name, "missing_required_parameter", message));
        }
        Some(raw) if kind(raw) == "a string" => string_at(&content_name, raw)?,
        Some(raw) if kind(raw) == "an array" => parts(&content_name, raw)?,
        Some(raw) => {
            let message =
                format!("'{content_name}' must be a string or an array of text parts, not {}.", kind(raw));
            return Err(Refusal::coded(content_name, "invalid_type", message));
        }
    };
    fields.finish(&[])?;
    Ok(Message { role, content, name })
}

fn role(fields: &mut Fields<'_>) -> Result<&'static str, Refusal> {
    let name = fields.name("role");
    let Some(role) = fields.string("role")? else {
        let message = format!("'{name}' is required.");
        return Err(Refusal::coded(name, "missing_required_parameter", message));
    };
    match role.as_str() {
        // Templates of open models know the role under its older name only.
        "system" | "developer" => Ok("system"),
        "user" => Ok("user"),
        "assistant" => Ok("assistant"),
        "tool" => Ok("tool"),
        _ => {
            let message = format!(
                "'{name}' must be one of system, developer, user, assistant and tool, not '{}'.",
                quoted(&role)
            );
            Err(Refusal::coded(name, "invalid_value", message))
        }
    }
}

fn parts(name: &str, raw: &RawValue) -> Result<String, Refusal> {
    let items = items_at(name, raw, PARTS_MAX)?;
    if items.is_empty() {
        return Err(Refusal::coded(name, "empty_array", format!("'{name}' must have at least one part.")));
    }
    let mut text = String::new();
    for (i, item) in items.iter().enumerate() {
        let mut part = Fields::parse(format!("{name}[{i}]"), item)?;
        let type_name = part.name("type");
        match part.string("type")?.as_deref() {
            Some("text") => {}
            Some("image_url" | "input_audio" | "file" | "refusal" | "video_url") => {
                let message = format!("'{name}[{i}]': only parts of type 'text' are supported.");
                return Err(Refusal::coded(format!("{name}[{i}]"), "unsupported_content_type", message));
            }
            Some(other) => {
                let message = format!("'{type_name}' must be 'text', not '{}'.", quoted(other));
                return Err(Refusal::coded(type_name, "invalid_value", message));
            }
            None => {
                let message = format!("'{type_name}' is required.");
                return Err(Refusal::coded(type_name, "missing_required_parameter", message));
            }
        }
        let text_name = part.name("text");
        let Some(piece) = part.string("text")? else {
            let message = format!("'{text_name}' is required.");
            return Err(Refusal::coded(text_name, "missing_required_parameter", message));
        };
        if i > 0 {
            text.push('\n');
        }
        text.push_str(&piece);
        part.take("cache_control");
        part.finish(&[])?;
    }
    Ok(text)
}

/// Refuses what would change the answer and is not supported; accepts the same fields where they ask for nothing.
pub(super) fn refuse_unsupported(fields: &mut Fields<'_>) -> Result<(), Refusal> {
    for name in ["tools", "functions"] {
        if fields.items(name, 128)?.is_some_and(|items| !items.is_empty()) {
            return Err(unsupported(name));
        }
    }
    for name in ["tool_choice", "function_call"] {
        if let Some(raw) = fields.take(name)
            && !matches!(raw.get(), "\"none\"" | "\"auto\"")
        {
            return Err(unsupported(name));
        }
    }
    for name in ["audio", "web_search_options"] {
        if fields.take(name).is_some() {
            return Err(unsupported(name));
        }
    }
    if let Some(mut format) = fields.object("response_format")? {
        match format.string("type")?.as_deref() {
            Some("text") => {}
            Some("json_object" | "json_schema") => return Err(unsupported("response_format")),
            _ => {
                let message = "'response_format.type' must be 'text'; other formats are not supported.";
                return Err(Refusal::coded("response_format.type", "invalid_value", message));
            }
        }
    }
    if let Some(modalities) = fields.strings("modalities", 8)?
        && modalities.iter().any(|modality| modality != "text")
    {
        return Err(unsupported("modalities"));
    }
    fields.boolean("parallel_tool_calls")?;
    for name in ["reasoning_effort", "verbosity"] {
        fields.string(name)?;
    }
    fields.object("prediction")?;
    Ok(())
}

fn unsupported(name: &str) -> Refusal {
    Refusal::coded(name, "unsupported_parameter", format!("'{name}' is not supported by this service."))
}
