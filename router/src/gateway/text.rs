//! What the router answers by itself, from a body: tokens of texts, texts of tokens, and how many there are.
//!
//! Such requests pass the same gate as generations, so that what a key may use bounds them too, and leave it at once.

use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use serde::Serialize;

use super::{Gateway, prompt_refusal};
use crate::answer::AnswerBody;
use crate::model::PromptError;
use crate::reply::{self, Refusal};
use crate::request::{self, Message, Source, Tokenize};
use crate::room::Body;
use crate::routes::TextJob;
use crate::tenant::Principal;

/// The answer to [`TextJob::Tokenize`], in the shape of vLLM.
#[derive(Serialize)]
struct Tokenized {
    count: usize,
    max_model_len: u32,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

/// The answer to [`TextJob::Detokenize`], in the shape of vLLM.
#[derive(Serialize)]
struct Detokenized {
    prompt: String,
}

/// The answer to [`TextJob::CountMessages`], in the shape of Anthropic.
#[derive(Serialize)]
struct CountedMessages {
    input_tokens: usize,
}

/// The answer to [`TextJob::CountInput`], in the shape of OpenAI.
#[derive(Serialize)]
struct CountedInput {
    object: &'static str,
    input_tokens: usize,
}

impl Gateway {
    /// Answers without workers.
    pub(super) async fn text(
        self: &Arc<Self>,
        job: TextJob,
        request: Request<Incoming>,
        principal: &Principal,
    ) -> Result<Response<AnswerBody>, Refusal> {
        let (body, _place) = self.admit(request, principal).await?;
        let salt = self.auth.salt(principal)?;
        let work = move |this: &Self, body: Body| this.text_body(job, &body.bytes, salt);
        let body = self.work(principal, body, work).await?;
        Ok(reply::json(StatusCode::OK, body))
    }

    fn text_body(&self, job: TextJob, bytes: &[u8], salt: u64) -> Result<Bytes, Refusal> {
        let bounds = self.bounds();
        match job {
            TextJob::Tokenize => json(&self.tokenized(request::parse_tokenize(bytes, &bounds)?, salt)?),
            TextJob::Detokenize => {
                let ask = request::parse_detokenize(bytes, &bounds)?;
                self.check_named(ask.model.as_deref())?;
                let prompt = self.model.vocabulary.spell(&ask.tokens).map_err(broken)?;
                json(&Detokenized { prompt })
            }
            TextJob::CountMessages => {
                let ask = request::parse_count_messages(bytes, &bounds)?;
                self.check_named(ask.model.as_deref())?;
                json(&CountedMessages { input_tokens: self.count(&ask.messages, "messages", salt)? })
            }
            TextJob::CountInput => {
                let ask = request::parse_count_input(bytes, &bounds)?;
                self.check_named(ask.model.as_deref())?;
                let input_tokens = self.count(&ask.messages, "input", salt)?;
                json(&CountedInput { object: "response.input_tokens", input_tokens })
            }
            TextJob::Embeddings => {
                let model = request::parse_embeddings(bytes, &bounds)?;
                self.check_model(&model)?;
                Err(request::no_embeddings(&model))
            }
        }
    }

    fn tokenized(&self, ask: Tokenize, salt: u64) -> Result<Tokenized, Refusal> {
        self.check_named(ask.model.as_deref())?;
        let text = match ask.source {
            Source::Text(text) => text,
            Source::Chat { messages, generation_prompt } => {
                let text = self.model.chat_text(&messages, generation_prompt);
                text.map_err(|error| prompt_refusal(&error, "messages"))?
            }
        };
        let vocabulary = &self.model.vocabulary;
        let tokens = vocabulary.encode(&text, ask.add_special, salt).map_err(broken)?;
        let token_strs = ask.names.then(|| tokens.iter().map(|token| vocabulary.name(*token)).collect());
        Ok(Tokenized { count: tokens.len(), max_model_len: self.model.max_context, tokens, token_strs })
    }

    /// The tokens that a conversation would be generated from.
    fn count(&self, messages: &[Message], field: &'static str, salt: u64) -> Result<usize, Refusal> {
        let tokens = self.model.chat_tokens(messages, salt).map_err(|error| prompt_refusal(&error, field))?;
        Ok(tokens.len())
    }

    /// Refuses a model that is not served, where one is named.
    fn check_named(&self, model: Option<&str>) -> Result<(), Refusal> {
        model.map_or(Ok(()), |model| self.check_model(model))
    }
}

fn broken(message: String) -> Refusal {
    prompt_refusal(&PromptError::Tokenizer(message), "prompt")
}

fn json(value: &impl Serialize) -> Result<Bytes, Refusal> {
    serde_json::to_vec(value).map(Bytes::from).map_err(|error| {
        tracing::error!(%error, "an answer could not be written");
        Refusal::Internal
    })
}
