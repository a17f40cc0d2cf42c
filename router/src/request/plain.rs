//! What engines that generate plain text cannot do, in every API, and what is said of it.

use super::fields::Fields;
use crate::reply::Refusal;

/// Why something is refused, and what it needs.
pub(super) const PLAIN_TEXT: &str = "the engines of this model take and generate plain text. It needs a pool of \
                                     OpenAI-compatible servers (engine kind 'openai') that support it.";

/// How hard a model that reasons should do so.
pub(super) const EFFORTS: &[&str] = &["none", "minimal", "low", "medium", "high", "xhigh", "max"];
/// How much a model should say.
pub(super) const VERBOSITIES: &[&str] = &["low", "medium", "high"];

/// Most tools that are looked at.
const TOOLS_MAX: usize = 128;

/// What is said of a field that asks for more than plain text.
pub(super) fn unsupported(name: &str) -> Refusal {
    Refusal::coded(name, "unsupported_parameter", format!("'{name}' is not supported: {PLAIN_TEXT}"))
}

/// What is said of a field of a service that does more than serve a model.
pub(super) fn unserved(name: &str) -> Refusal {
    let message = format!("'{name}' is not supported: there is nothing of the kind here. Leave it out.");
    Refusal::coded(name, "unsupported_parameter", message)
}

/// Refuses an array with something in it.
pub(super) fn refuse_filled(fields: &mut Fields<'_>, field: &str) -> Result<(), Refusal> {
    match fields.items(field, TOOLS_MAX)? {
        Some(items) if !items.is_empty() => Err(unsupported(&fields.name(field))),
        _ => Ok(()),
    }
}

/// Refuses tools; without any, a model is free not to choose one.
pub(super) fn refuse_tools(fields: &mut Fields<'_>) -> Result<(), Refusal> {
    refuse_filled(fields, "tools")?;
    if let Some(raw) = fields.take("tool_choice")
        && !matches!(raw.get(), "\"none\"" | "\"auto\"")
    {
        return Err(unsupported("tool_choice"));
    }
    fields.boolean("parallel_tool_calls")?;
    Ok(())
}

/// Refuses formats of the answer other than text.
pub(super) fn text_format(mut format: Fields<'_>) -> Result<(), Refusal> {
    let own = format.path().to_owned();
    let kind = format.string("type")?;
    match kind.as_deref() {
        Some("text") => format.finish(&[]),
        Some("json_object" | "json_schema" | "grammar" | "regex") => Err(unsupported(&own)),
        _ => {
            let name = format.name("type");
            let message = format!("'{name}' must be 'text'; other formats are not supported: {PLAIN_TEXT}");
            Err(Refusal::coded(name, "invalid_value", message))
        }
    }
}
