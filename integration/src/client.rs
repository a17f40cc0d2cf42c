//! A client of the OpenAI endpoint that also reads what Baton adds to an answer.

use std::time::Duration;

use serde_json::{Value, json};

/// No answer may take longer: a hung request is a failed test.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// What to complete.
#[derive(Debug, Clone)]
pub enum Prompt {
    /// Text for the tokenizer.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

/// An answer with its proof.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Generated token ids.
    pub tokens: Vec<u32>,
    /// Running digest of the logits bits after the last token.
    pub digest: String,
    /// Generated text.
    pub text: String,
    /// Why it ended.
    pub finish_reason: String,
    /// Prompt tokens as counted by the server.
    pub prompt_tokens: u64,
    /// The `baton` object of the answer: decision, workers, parts of the first-token time.
    pub baton: Value,
}

impl Answer {
    /// Tokens and digest: what must be equal between fleets.
    pub fn proof(&self) -> (&[u32], &str) {
        (&self.tokens, &self.digest)
    }

    /// Whether the prompt's KV came from another worker (at least partly).
    pub fn imported_tokens(&self) -> u64 {
        self.baton["prefill"]["imported_tokens"].as_u64().unwrap_or(0)
    }

    /// Bytes of KV that moved for it.
    pub fn imported_bytes(&self) -> u64 {
        self.baton["prefill"]["imported_bytes"].as_u64().unwrap_or(0)
    }

    /// Why the handoff was given up, if it was.
    pub fn fallback(&self) -> Option<&str> {
        self.baton["prefill"]["fallback"].as_str()
    }
}

/// Talks to one router.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    base: String,
}

impl Client {
    /// For the router at `base` (`http://host:port`).
    pub fn new(base: &str) -> Self {
        Self { http: baton_conductor::http::client(), base: base.to_owned() }
    }

    /// POSTs JSON and returns status and body, whatever they are.
    ///
    /// # Errors
    /// When the connection fails or the body is not JSON.
    pub async fn post(&self, path: &str, body: &Value) -> anyhow::Result<(u16, Value)> {
        let answer =
            self.http.post(format!("{}{path}", self.base)).timeout(ANSWER_WITHIN).json(body).send().await?;
        let status = answer.status().as_u16();
        Ok((status, answer.json().await?))
    }

    /// Opens a stream and hands back the raw answer.
    ///
    /// # Errors
    /// When the connection fails or the status is not 200.
    pub async fn open(&self, path: &str, body: &Value) -> anyhow::Result<reqwest::Response> {
        let answer =
            self.http.post(format!("{}{path}", self.base)).timeout(ANSWER_WITHIN).json(body).send().await?;
        Ok(answer.error_for_status()?)
    }

    /// Completes a prompt, with proof; `extra` is merged into the request.
    ///
    /// # Errors
    /// When the answer is not a good one.
    pub async fn complete(&self, prompt: &Prompt, max_tokens: u32, extra: &Value) -> anyhow::Result<Answer> {
        let prompt = match prompt {
            Prompt::Text(text) => json!(text),
            Prompt::Tokens(ids) => json!(ids),
        };
        let mut body = json!({
            "model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
            "baton": {"logits_digest": true, "token_ids": true},
        });
        if let (Some(body), Some(extra)) = (body.as_object_mut(), extra.as_object()) {
            body.extend(extra.clone());
        }
        let (status, answer) = self.post("/v1/completions", &body).await?;
        anyhow::ensure!(status == 200, "{status}: {answer}");
        let choice = &answer["choices"][0];
        let tokens = choice["baton"]["token_ids"].as_array();
        let tokens = tokens.ok_or_else(|| anyhow::anyhow!("no token ids in {answer}"))?;
        Ok(Answer {
            tokens: tokens
                .iter()
                .filter_map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
                .collect(),
            digest: choice["baton"]["logits_digest"].as_str().unwrap_or_default().to_owned(),
            text: choice["text"].as_str().unwrap_or_default().to_owned(),
            finish_reason: choice["finish_reason"].as_str().unwrap_or_default().to_owned(),
            prompt_tokens: answer["usage"]["prompt_tokens"].as_u64().unwrap_or_default(),
            baton: choice["baton"].clone(),
        })
    }
}
