//! The fields that pass: those of the OpenAI API, and of vLLM, SGLang, llama.cpp and Anthropic's API what says how to
//! sample and how to answer. What reaches into a server (other templates, processors, adapters, priorities) is not here.

use super::Passing;

/// Most inputs of one request for embeddings (OpenAI's bound).
pub(super) const INPUTS_MAX: usize = 2048;

/// What a field holds, as far as it is the same for every server.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Any,
    Flag,
    Text,
    Texts(usize),
    Integer(i64, i64),
    Number(f64, f64),
    Object,
    List(usize),
    Metadata,
    Choices,
    Messages,
    Prompt,
    Input,
}

/// A field.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
}

const fn field(name: &'static str, kind: Kind) -> Known {
    Known { name, kind }
}

const MOST: i64 = u32::MAX as i64;

/// The fields of a path, in several tables.
pub(super) fn tables(passing: Passing) -> &'static [&'static [Known]] {
    match passing {
        Passing::Chat => &[CHAT, GENERATION, SAMPLING, ACCOUNT],
        Passing::Completions => &[COMPLETIONS, GENERATION, SAMPLING, ACCOUNT],
        Passing::Embeddings => &[EMBEDDINGS],
        Passing::Responses | Passing::CountInput => &[RESPONSES, ACCOUNT],
        Passing::Messages | Passing::CountMessages => &[MESSAGES],
        Passing::Tokenize => &[TOKENIZE],
        Passing::Detokenize => &[DETOKENIZE],
    }
}

const CHAT: &[Known] = &[
    field("messages", Kind::Messages),
    field("n", Kind::Choices),
    field("max_completion_tokens", Kind::Integer(1, MOST)),
    field("logprobs", Kind::Flag),
    field("top_logprobs", Kind::Integer(0, 20)),
    field("tools", Kind::List(1024)),
    field("tool_choice", Kind::Any),
    field("parallel_tool_calls", Kind::Flag),
    field("functions", Kind::List(1024)),
    field("function_call", Kind::Any),
    field("response_format", Kind::Object),
    field("modalities", Kind::Texts(8)),
    field("audio", Kind::Object),
    field("prediction", Kind::Object),
    field("reasoning_effort", Kind::Text),
    field("reasoning", Kind::Object),
    field("thinking", Kind::Object),
    field("verbosity", Kind::Text),
    field("web_search_options", Kind::Object),
    field("chat_template_kwargs", Kind::Object),
    field("add_generation_prompt", Kind::Flag),
    field("continue_final_message", Kind::Flag),
    field("include_reasoning", Kind::Flag),
    field("separate_reasoning", Kind::Flag),
    field("stream_reasoning", Kind::Flag),
    field("documents", Kind::List(1024)),
];

const COMPLETIONS: &[Known] = &[
    // Takes `n` with it.
    field("prompt", Kind::Prompt),
    field("logprobs", Kind::Integer(0, 20)),
    field("suffix", Kind::Text),
    field("best_of", Kind::Integer(1, 128)),
];

const GENERATION: &[Known] = &[
    field("stream", Kind::Flag),
    field("stream_options", Kind::Object),
    field("max_tokens", Kind::Integer(1, MOST)),
    field("min_tokens", Kind::Integer(0, MOST)),
    field("echo", Kind::Flag),
    field("stop", Kind::Texts(64)),
    field("stop_token_ids", Kind::List(256)),
    field("include_stop_str_in_output", Kind::Flag),
    field("ignore_eos", Kind::Flag),
    field("no_stop_trim", Kind::Flag),
    field("add_special_tokens", Kind::Flag),
    field("skip_special_tokens", Kind::Flag),
    field("spaces_between_special_tokens", Kind::Flag),
    field("truncate_prompt_tokens", Kind::Integer(-1, MOST)),
    field("prompt_logprobs", Kind::Integer(0, 20)),
    field("return_token_ids", Kind::Flag),
    field("return_tokens_as_token_ids", Kind::Flag),
    field("structured_outputs", Kind::Object),
    field("guided_json", Kind::Any),
    field("guided_regex", Kind::Text),
    field("guided_choice", Kind::Texts(1024)),
    field("guided_grammar", Kind::Text),
    field("guided_whitespace_pattern", Kind::Text),
    field("structural_tag", Kind::Any),
    field("json_schema", Kind::Any),
    field("regex", Kind::Text),
    field("ebnf", Kind::Text),
    field("grammar", Kind::Text),
];

const SAMPLING: &[Known] = &[
    field("temperature", Kind::Number(0.0, 2.0)),
    field("top_p", Kind::Number(0.0, 1.0)),
    field("top_k", Kind::Integer(-1, MOST)),
    field("min_p", Kind::Number(0.0, 1.0)),
    field("typical_p", Kind::Number(0.0, 1.0)),
    field("presence_penalty", Kind::Number(-2.0, 2.0)),
    field("frequency_penalty", Kind::Number(-2.0, 2.0)),
    field("repetition_penalty", Kind::Number(0.01, 10.0)),
    field("repeat_penalty", Kind::Number(0.01, 10.0)),
    field("repeat_last_n", Kind::Integer(-1, MOST)),
    field("length_penalty", Kind::Number(-10.0, 10.0)),
    field("use_beam_search", Kind::Flag),
    field("seed", Kind::Integer(i64::MIN, i64::MAX)),
    field("logit_bias", Kind::Object),
    field("allowed_token_ids", Kind::List(1 << 20)),
    field("bad_words", Kind::Texts(1024)),
];

/// Of the client and its account.
const ACCOUNT: &[Known] = &[
    field("metadata", Kind::Metadata),
    field("store", Kind::Flag),
    field("service_tier", Kind::Text),
    field("safety_identifier", Kind::Text),
    field("prompt_cache_key", Kind::Text),
    field("prompt_cache_retention", Kind::Text),
];

const EMBEDDINGS: &[Known] = &[
    field("input", Kind::Input),
    field("encoding_format", Kind::Text),
    field("dimensions", Kind::Integer(1, 1 << 20)),
    field("truncate_prompt_tokens", Kind::Integer(-1, MOST)),
    field("add_special_tokens", Kind::Flag),
    field("normalize", Kind::Flag),
];

const RESPONSES: &[Known] = &[
    field("input", Kind::Input),
    field("instructions", Kind::Text),
    field("stream", Kind::Flag),
    field("stream_options", Kind::Object),
    field("max_output_tokens", Kind::Integer(1, MOST)),
    field("max_tool_calls", Kind::Integer(1, MOST)),
    field("temperature", Kind::Number(0.0, 2.0)),
    field("top_p", Kind::Number(0.0, 1.0)),
    field("top_k", Kind::Integer(-1, MOST)),
    field("top_logprobs", Kind::Integer(0, 20)),
    field("tools", Kind::List(1024)),
    field("tool_choice", Kind::Any),
    field("parallel_tool_calls", Kind::Flag),
    field("text", Kind::Object),
    field("reasoning", Kind::Object),
    field("include", Kind::Texts(64)),
    field("truncation", Kind::Text),
    field("background", Kind::Flag),
    field("previous_response_id", Kind::Text),
    field("include_reasoning", Kind::Flag),
];

const MESSAGES: &[Known] = &[
    field("messages", Kind::Messages),
    field("system", Kind::Any),
    field("stream", Kind::Flag),
    field("max_tokens", Kind::Integer(1, MOST)),
    field("stop_sequences", Kind::Texts(64)),
    field("temperature", Kind::Number(0.0, 1.0)),
    field("top_p", Kind::Number(0.0, 1.0)),
    field("top_k", Kind::Integer(-1, MOST)),
    field("tools", Kind::List(1024)),
    field("tool_choice", Kind::Object),
    field("thinking", Kind::Object),
    field("metadata", Kind::Object),
    field("service_tier", Kind::Text),
];

const TOKENIZE: &[Known] = &[
    field("prompt", Kind::Text),
    field("content", Kind::Text),
    field("messages", Kind::List(2048)),
    field("tools", Kind::List(1024)),
    field("add_special_tokens", Kind::Flag),
    field("add_special", Kind::Flag),
    field("with_pieces", Kind::Flag),
    field("add_generation_prompt", Kind::Flag),
    field("continue_final_message", Kind::Flag),
    field("return_token_strs", Kind::Flag),
    field("chat_template_kwargs", Kind::Object),
];

const DETOKENIZE: &[Known] =
    &[field("tokens", Kind::List(1 << 22)), field("skip_special_tokens", Kind::Flag)];
