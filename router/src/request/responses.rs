//! The Responses API: input items become messages, and what the answer repeats of its request is kept.
//!
//! Nothing is stored, so whatever refers to something stored is refused.

use std::collections::BTreeMap;

use serde::Serialize;

use super::chat::Message;
use super::content::{self, Parts};
use super::fields::{Fields, items_at, string_at};
use super::json::Raw;
use super::plain::{EFFORTS, PLAIN_TEXT, VERBOSITIES, refuse_tools, text_format, unserved};
use crate::reply::{Refusal, quoted};

/// Most `top_logprobs` (OpenAI's bound).
const TOP_LOGPROBS_MAX: i64 = 20;
/// Longest `safety_identifier` in characters (OpenAI's bound).
const SAFETY_IDENTIFIER_MAX: usize = 128;
/// What `include` may name; only log-probabilities exist here, the others are parts of what is never generated.
const LOGPROBS: &str = "message.output_text.logprobs";
const INCLUDABLE: [&str; 8] = [
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
];

const INPUT_PARTS: Parts = Parts {
    texts: &["input_text"],
    others: &["input_image", "input_file", "input_audio", "input_video"],
    beside: &[("prompt_cache_breakpoint", "an object")],
};

/// An answer that is sent back with the next question has the parts that it was given in.
const OUTPUT_PARTS: Parts = Parts {
    texts: &["output_text", "input_text"],
    others: &["refusal", "input_image", "input_file", "input_audio", "reasoning_text", "summary_text"],
    beside: &[
        ("annotations", "an array"),
        ("logprobs", "an array"),
        ("prompt_cache_breakpoint", "an object"),
    ],
};

/// What a response repeats of its request, in the words of the API.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Repeats {
    pub(super) instructions: Option<String>,
    pub(super) max_output_tokens: Option<u32>,
    pub(super) max_tool_calls: Option<u32>,
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) temperature: f32,
    pub(super) top_p: f32,
    pub(super) top_logprobs: u32,
    pub(super) parallel_tool_calls: bool,
    pub(super) tool_choice: &'static str,
    pub(super) tools: [(); 0],
    pub(super) text: Text,
    pub(super) reasoning: Reasoning,
    pub(super) truncation: &'static str,
    pub(super) service_tier: &'static str,
    pub(super) store: bool,
    pub(super) background: bool,
    pub(super) previous_response_id: Option<()>,
    pub(super) user: Option<String>,
    pub(super) safety_identifier: Option<String>,
    pub(super) prompt_cache_key: Option<String>,
}

/// How text is to be answered.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Text {
    format: Format,
    verbosity: Option<&'static str>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Format {
    r#type: &'static str,
}

/// How much is to be thought before.
#[derive(Debug, Clone, PartialEq, Serialize, Default)]
pub(crate) struct Reasoning {
    effort: Option<&'static str>,
    summary: Option<&'static str>,
}

/// Refuses what refers to something stored, or asks for something to be.
pub(super) fn refuse_state(fields: &mut Fields<'_>) -> Result<(), Refusal> {
    const REMEDY: &str = "nothing is stored here. Send the whole conversation as 'input'.";
    for name in ["previous_response_id", "conversation", "prompt"] {
        if fields.take(name).is_some() {
            let message = format!("'{name}' is not supported: {REMEDY}");
            return Err(Refusal::coded(name, "unsupported_parameter", message));
        }
    }
    if fields.boolean("store")? == Some(true) {
        let message = format!("'store' must be false or absent: {REMEDY}");
        return Err(Refusal::coded("store", "unsupported_value", message));
    }
    if fields.boolean("background")? == Some(true) {
        let message = "'background' must be false or absent: nothing is stored here, so nobody could ask \
                       for the response later. Use 'stream'.";
        return Err(Refusal::coded("background", "unsupported_value", message));
    }
    Ok(())
}

/// Reads `instructions` and `input` as a conversation; the instructions also by themselves.
pub(super) fn messages(
    fields: &mut Fields<'_>,
    max: usize,
) -> Result<(Vec<Message>, Option<String>), Refusal> {
    let instructions = fields.string("instructions")?;
    let system = |content: &String| Message { role: "system", content: content.clone(), name: None };
    let mut messages: Vec<Message> = instructions.iter().map(system).collect();
    let Some(raw) = fields.take("input") else { return Err(fields.missing("input")) };
    match raw.kind() {
        "a string" => {
            let content = string_at("input", raw)?;
            messages.push(Message { role: "user", content, name: None });
        }
        "an array" => {
            let items = items_at("input", raw, max)?;
            if items.is_empty() {
                return Err(Refusal::coded("input", "empty_array", "'input' must have at least one item."));
            }
            for (i, item) in items.into_iter().enumerate() {
                messages.push(input_item(format!("input[{i}]"), item)?);
            }
        }
        other => {
            let message = format!("'input' must be a string or an array of items, not {other}.");
            return Err(Refusal::coded("input", "invalid_type", message));
        }
    }
    Ok((messages, instructions))
}

fn input_item(path: String, raw: Raw<'_>) -> Result<Message, Refusal> {
    let mut item = Fields::parse(path.clone(), raw)?;
    match item.string("type")?.as_deref() {
        None | Some("message") => {}
        Some("item_reference") => {
            let message = format!(
                "'{path}' refers to a stored item, but nothing is stored here. Send the item itself."
            );
            return Err(Refusal::coded(path, "unsupported_item", message));
        }
        Some(other) => {
            let message =
                format!("'{path}' is of type '{}', which is not supported: {PLAIN_TEXT}", quoted(other));
            return Err(Refusal::coded(path, "unsupported_item", message));
        }
    }
    let (role, rules) = match item.required("role")?.as_str() {
        // Templates of open models know the role under its older name only.
        "system" | "developer" => ("system", &INPUT_PARTS),
        "user" => ("user", &INPUT_PARTS),
        "assistant" => ("assistant", &OUTPUT_PARTS),
        other => {
            let name = item.name("role");
            let message = format!(
                "'{name}' must be one of system, developer, user and assistant, not '{}'.",
                quoted(other)
            );
            return Err(Refusal::coded(name, "invalid_value", message));
        }
    };
    let content = content::read(&mut item, "content", rules)?;
    item.string("id")?;
    item.word("status", &["in_progress", "completed", "incomplete"])?;
    item.word("phase", &["commentary", "final_answer"])?;
    item.finish(&[])?;
    Ok(Message { role, content, name: None })
}

/// Reads `include` and `top_logprobs`: log-probabilities to report, and the bound as given.
pub(super) fn logprobs(fields: &mut Fields<'_>) -> Result<(Option<u32>, u32), Refusal> {
    let top = fields.integer("top_logprobs", 0, TOP_LOGPROBS_MAX)?;
    let top = top.and_then(|top| u32::try_from(top).ok()).unwrap_or(0);
    let mut wanted = false;
    for (i, raw) in fields.items("include", INCLUDABLE.len())?.unwrap_or_default().into_iter().enumerate() {
        let name = format!("include[{i}]");
        let what = string_at(&name, raw)?;
        if !INCLUDABLE.contains(&what.as_str()) {
            let message =
                format!("'{name}' must be one of {}, not '{}'.", INCLUDABLE.join(", "), quoted(&what));
            return Err(Refusal::coded(name, "invalid_value", message));
        }
        wanted |= what == LOGPROBS;
    }
    Ok((wanted.then_some(top), top))
}

/// Refuses what would change the answer and is not supported; reads what the answer repeats.
pub(super) fn repeats(fields: &mut Fields<'_>) -> Result<Repeats, Refusal> {
    let tool_choice = match fields.peek("tool_choice").map(Raw::get) {
        Some("\"none\"") => "none",
        _ => "auto",
    };
    let parallel_tool_calls = fields.peek("parallel_tool_calls").is_none_or(|raw| raw.get() != "false");
    refuse_tools(fields)?;
    for name in ["context_management", "moderation"] {
        if fields.take(name).is_some() {
            return Err(unserved(name));
        }
    }
    let max_tool_calls = fields.integer("max_tool_calls", 1, i64::from(u32::MAX))?;
    let verbosity = match fields.object("text")? {
        Some(mut text) => {
            if let Some(format) = text.object("format")? {
                text_format(format)?;
            }
            let verbosity = text.word("verbosity", VERBOSITIES)?;
            text.finish(&[])?;
            verbosity
        }
        None => None,
    };
    if fields.word("truncation", &["auto", "disabled"])? == Some("auto") {
        let message =
            "'truncation' must be 'disabled' or absent: input that is too long is refused, never cut.";
        return Err(Refusal::coded("truncation", "unsupported_value", message));
    }
    fields.word("prompt_cache_retention", super::CACHE_RETENTIONS)?;
    fields.object("prompt_cache_options")?;
    fields.word("service_tier", super::SERVICE_TIERS)?;
    Ok(Repeats {
        instructions: None,
        max_output_tokens: None,
        max_tool_calls: max_tool_calls.and_then(|calls| u32::try_from(calls).ok()),
        metadata: fields.metadata("metadata")?.unwrap_or_default(),
        temperature: 1.0,
        top_p: 1.0,
        top_logprobs: 0,
        parallel_tool_calls,
        tool_choice,
        tools: [],
        text: Text { format: Format { r#type: "text" }, verbosity },
        reasoning: reasoning(fields)?,
        truncation: "disabled",
        service_tier: "default",
        store: false,
        background: false,
        previous_response_id: None,
        user: fields.string("user")?,
        safety_identifier: fields.short("safety_identifier", SAFETY_IDENTIFIER_MAX)?,
        prompt_cache_key: fields.string("prompt_cache_key")?,
    })
}

/// Reads `reasoning`, which no engine of plain text does: any effort is as good as none.
fn reasoning(fields: &mut Fields<'_>) -> Result<Reasoning, Refusal> {
    const SUMMARIES: &[&str] = &["auto", "concise", "detailed"];
    let Some(mut object) = fields.object("reasoning")? else { return Ok(Reasoning::default()) };
    let effort = object.word("effort", EFFORTS)?;
    let summary = object.word("summary", SUMMARIES)?;
    let older = object.word("generate_summary", SUMMARIES)?;
    object.word("context", &["auto", "current_turn", "all_turns"])?;
    object.string("mode")?;
    object.finish(&[])?;
    Ok(Reasoning { effort, summary: summary.or(older) })
}
