//! From a request's head to its answer.

mod apart;
mod pass_on;
mod text;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use baton_config::keys::Quota;
use baton_config::prefix::BlockHash;
use bytes::Bytes;
use futures_util::StreamExt as _;
use http::{HeaderMap, Request, Response, StatusCode};
use hyper::body::Incoming;
use serde_json::json;
use tokio::time::Instant;

use crate::account::Entry;
use crate::admit::{Gate, Place, Reason, Refused};
use crate::answer::{self, AnswerBody, Api, ChoiceSpec, EventStream, EventWriter, Head, Meter};
use crate::body;
use crate::clock::unix_seconds;
use crate::dispatch::{DispatchError, Dispatcher, Explanation, Job};
use crate::entropy;
use crate::forward::Forwarder;
use crate::metrics::Metrics;
use crate::model::{Model, PromptError, TemplateError};
use crate::options::{Limits, Timeouts};
use crate::reply::{self, Refusal};
use crate::request::{self, Ask, Bounds, Input, Prompt};
use crate::room::{Body, Room};
use crate::routes::{Dialect, Route, Work};
use crate::tenant::{Auth, Principal};
pub(crate) use apart::Apart;

/// Bodies larger than this are parsed and tokenized on a thread of their own, so that nobody else waits.
const INLINE_MAX_BYTES: usize = 8 << 10;

/// `1` asks how the workers were chosen; the answer has the same name.
const EXPLAIN_HEADER: &str = "x-baton-explain";

/// Everything a connection needs to answer requests.
#[derive(Debug)]
pub(crate) struct Gateway {
    pub(crate) model: Arc<Model>,
    pub(crate) dispatcher: Arc<Dispatcher>,
    /// Passes everything that a server of another project answers on to such servers, where there are any.
    pub(crate) forward: Option<Arc<Forwarder>>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) auth: Arc<Auth>,
    pub(crate) limits: Limits,
    pub(crate) timeouts: Timeouts,
    /// How long a prompt may have to wait at the worker where it waits shortest.
    pub(crate) slo_wait: Option<Duration>,
    /// The header that names the session of a request.
    pub(crate) session_header: String,
    /// Whether clients may ask how their workers were chosen.
    pub(crate) explain: bool,
    /// Memory for bodies.
    pub(crate) room: Room,
    /// Where large bodies are parsed and tokenized.
    pub(crate) apart: Apart,
    /// Off as soon as the router was asked to stop.
    pub(crate) accepting: AtomicBool,
}

/// A request whose prompts are tokens.
struct Prepared {
    ask: Ask,
    prompts: Vec<Tokenized>,
    cache_salt: u64,
    /// See [`Job::owner`].
    owner: u64,
    placing: Placing,
}

/// What a request holds while it is served.
struct Held {
    entry: Entry,
    place: Place,
}

/// Charges the tokens of an answer in one piece, also when its client has left.
struct Bill<'a> {
    place: &'a mut Place,
    entry: &'a Entry,
    meter: Meter,
}

impl Drop for Bill<'_> {
    fn drop(&mut self) {
        let tokens = self.meter.completion_tokens();
        self.place.used(tokens);
        self.entry.used(tokens);
    }
}

/// One prompt.
struct Tokenized {
    tokens: Vec<u32>,
    echo: Option<String>,
}

/// What a request says about where it should go.
#[derive(Debug, Default)]
struct Placing {
    session: Option<u64>,
    explain: Option<Explanation>,
}

impl Placing {
    /// The user of the body names the session if no header does.
    fn or_user(mut self, user: Option<&str>) -> Self {
        self.session = self.session.or_else(|| user.map(|user| session(user.as_bytes())));
        self
    }
}

/// The number of a session, the same in every router.
fn session(name: &[u8]) -> u64 {
    BlockHash::root(1).child(&name.iter().copied().map(u32::from).collect::<Vec<_>>()).0
}

impl Gateway {
    /// Answers one request. Never fails: what goes wrong is an answer too.
    pub(crate) async fn handle(self: Arc<Self>, request: Request<Incoming>) -> Response<AnswerBody> {
        let path = request.uri().path();
        let (route, dialect) = (Route::of_path(path), Dialect::of_path(path));
        let mut entry = Entry::open(Arc::clone(&self.metrics), route);
        let principal = match self.check(route, &request, &mut entry).await {
            Ok(principal) => principal,
            Err(refused) => {
                let response = refused.response(dialect);
                entry.refused(&refused);
                return response;
            }
        };
        if let (Some(forwarder), Some(passing), Some(principal)) =
            (&self.forward, route.passing(), &principal)
        {
            let (forwarder, principal) = (Arc::clone(forwarder), Arc::clone(principal));
            return self.pass_on(forwarder, passing, request, entry, principal).await;
        }
        let response = match (route.work(), &principal) {
            (Work::Generate(api), Some(principal)) => {
                let principal = Arc::clone(principal);
                return self.generate(api, request, entry, principal).await;
            }
            (Work::Text(job), Some(principal)) => self.text(job, request, principal).await,
            _ => self.simple(route, path),
        };
        let response = match response {
            Ok(response) => {
                entry.answered(response.status().as_u16());
                response
            }
            Err(refusal) => refused(entry, &refusal, dialect),
        };
        match &principal {
            Some(principal) => self.annotated(response, None, principal),
            None => response,
        }
    }

    /// What can be refused by the head alone; whose request it is, where that matters.
    async fn check(
        &self,
        route: Route,
        request: &Request<Incoming>,
        entry: &mut Entry,
    ) -> Result<Option<Arc<Principal>>, Refusal> {
        body::check_size(request.uri(), request.headers())?;
        route.check(request.method(), request.uri().path())?;
        if !route.needs_key() {
            return Ok(None);
        }
        self.principal(request.headers(), entry).await.map(Some)
    }

    /// Whose request it is.
    async fn principal(&self, headers: &HeaderMap, entry: &mut Entry) -> Result<Arc<Principal>, Refusal> {
        let principal = self.auth.authenticate(headers).await?;
        if self.auth.is_guarded() {
            entry.belongs_to(&principal);
        }
        Ok(principal)
    }

    /// Answers what takes no work.
    fn simple(&self, route: Route, path: &str) -> Result<Response<AnswerBody>, Refusal> {
        Ok(match route {
            Route::Models => self.models(),
            Route::Model => self.one_model(path)?,
            Route::Live => reply::text(true, "text/plain", "ok\n".to_owned()),
            Route::Health | Route::Ready => self.readiness(),
            Route::Metrics => reply::text(true, "text/plain; version=0.0.4", self.metrics.render()),
            // These go elsewhere before this is asked.
            _ => return Err(Refusal::Internal),
        })
    }

    fn readiness(&self) -> Response<AnswerBody> {
        let (ready, why) = if !self.accepting.load(Ordering::Acquire) {
            (false, "draining\n")
        } else if !self.dispatcher.fleet.can_serve() {
            (false, "no worker can serve\n")
        } else {
            (true, "ok\n")
        };
        reply::text(ready, "text/plain", why.to_owned())
    }

    fn model_object(&self, name: &str) -> serde_json::Value {
        let mut object = json!({
            "id": name, "object": "model", "created": 0, "owned_by": "baton", "root": self.model.id
        });
        // The servers that run it know better.
        if self.forward.is_none() {
            object["max_model_len"] = self.model.max_context.into();
        }
        object
    }

    fn models(&self) -> Response<AnswerBody> {
        let data: Vec<_> = self.model.names.iter().map(|name| self.model_object(name)).collect();
        let body = json!({ "object": "list", "data": data });
        reply::json(StatusCode::OK, Bytes::from(body.to_string()))
    }

    fn one_model(&self, path: &str) -> Result<Response<AnswerBody>, Refusal> {
        let name = path.strip_prefix("/v1/models/").unwrap_or_default();
        let name = percent_decoded(name);
        self.check_model(&name)?;
        Ok(reply::json(StatusCode::OK, Bytes::from(self.model_object(&name).to_string())))
    }

    fn check_model(&self, name: &str) -> Result<(), Refusal> {
        if self.model.names.iter().any(|known| known == name) {
            return Ok(());
        }
        Err(Refusal::UnknownModel { model: name.to_owned() })
    }

    async fn generate(
        self: Arc<Self>,
        api: Api,
        request: Request<Incoming>,
        entry: Entry,
        principal: Arc<Principal>,
    ) -> Response<AnswerBody> {
        let started = Instant::now();
        let placing = self.placing(request.headers(), principal.tenant.admin);
        let explanation = placing.explain.clone();
        let response = match self.begin(api, request, &principal).await {
            Ok((mut prepared, place)) => {
                prepared.placing = placing.or_user(prepared.ask.user.as_deref());
                Arc::clone(&self).answer(api, prepared, started, Held { entry, place }).await
            }
            Err(error) => refused(entry, &error, api.dialect()),
        };
        self.annotated(response, explanation.as_ref(), &principal)
    }

    /// The answer with what is told beside it.
    fn annotated(
        &self,
        response: Response<AnswerBody>,
        explanation: Option<&Explanation>,
        principal: &Principal,
    ) -> Response<AnswerBody> {
        let response = match explanation.and_then(Explanation::get) {
            Some(text) => reply::explained(response, text),
            None => response,
        };
        if principal.quota == Quota::default() {
            return response;
        }
        reply::with_left(response, self.gate.left(principal))
    }

    /// What the head of a request says about where it should go.
    fn placing(&self, headers: &HeaderMap, admin: bool) -> Placing {
        let asks = (self.explain || admin) && headers.get(EXPLAIN_HEADER).is_some_and(|value| value == "1");
        let header = headers.get(&self.session_header);
        Placing {
            session: header.map(|value| session(value.as_bytes())),
            explain: asks.then(Explanation::default),
        }
    }

    /// Everything before workers are involved.
    async fn begin(
        self: &Arc<Self>,
        api: Api,
        request: Request<Incoming>,
        principal: &Principal,
    ) -> Result<(Prepared, Place), Refusal> {
        self.check_wait(request.headers())?;
        let (body, place) = self.admit(request, principal).await?;
        let cache_salt = self.auth.salt(principal)?;
        let prepare = move |this: &Self, body: Body| this.prepare(api, &body.bytes, cache_salt);
        let mut prepared = self.work(principal, body, prepare).await?;
        prepared.owner = self.auth.owner(principal);
        Ok((prepared, place))
    }

    /// Refuses what no worker would begin in time, before anything is read.
    pub(crate) fn check_wait(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let Some(bound) = [self.slo_wait, body::max_wait(headers)?].into_iter().flatten().min() else {
            return Ok(());
        };
        match self.dispatcher.shortest_wait() {
            Some(wait) if wait > bound => {
                let refused = Refused { reason: Reason::WorkersQueued, after: wait - bound };
                Err(Refusal::Overloaded(refused))
            }
            _ => Ok(()),
        }
    }

    /// Reads a body and waits for a place, as soon as the head says that both may be had.
    async fn admit(
        self: &Arc<Self>,
        request: Request<Incoming>,
        principal: &Principal,
    ) -> Result<(Body, Place), Refusal> {
        let headers = request.headers();
        body::check_head(headers, self.limits.body)?;
        let max_wait = body::max_wait(headers)?;
        let announced = body::announced(headers).unwrap_or(0);
        self.gate.check(principal, announced, max_wait).map_err(Refusal::Overloaded)?;
        let body = body::read(request.into_body(), self.limits.body, self.timeouts.body, &self.room).await?;
        let entered = self.gate.enter(principal, body.bytes.len() as u64, max_wait).await;
        Ok((body, entered.map_err(Refusal::Overloaded)?))
    }

    /// Does what takes a while for large bodies.
    async fn work<T: Send + 'static>(
        self: &Arc<Self>,
        principal: &Principal,
        body: Body,
        job: impl FnOnce(&Self, Body) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        if body.bytes.len() <= INLINE_MAX_BYTES {
            return job(self, body);
        }
        let this = Arc::clone(self);
        self.apart.run(&principal.tenant.name, move || job(&this, body)).await
    }

    fn bounds(&self) -> Bounds {
        Bounds { vocab: self.model.vocab, choices: self.limits.choices, messages: self.limits.messages }
    }

    /// Parses, validates and tokenizes.
    fn prepare(&self, api: Api, bytes: &[u8], cache_salt: u64) -> Result<Prepared, Refusal> {
        let parse = match api {
            Api::Chat => request::parse_chat,
            Api::Completions => request::parse_completions,
            Api::Responses => request::parse_responses,
            Api::Messages => request::parse_messages,
        };
        let mut ask = parse(bytes, &self.bounds())?;
        self.check_model(&ask.model)?;
        let input = std::mem::replace(&mut ask.input, Input::Prompts(Vec::new()));
        let prompts = match input {
            Input::Chat(messages) => {
                let tokens = self.model.chat_tokens(&messages, cache_salt);
                let tokens = tokens.map_err(|e| prompt_refusal(&e, api.prompt_field()))?;
                vec![Tokenized { tokens, echo: None }]
            }
            Input::Prompts(prompts) => {
                let tokenize = |prompt| self.tokenize(prompt, ask.echo, cache_salt);
                prompts.into_iter().map(tokenize).collect::<Result<_, _>>()?
            }
        };
        for prompt in &prompts {
            self.check_context(api, prompt.tokens.len(), ask.max_tokens)?;
        }
        Ok(Prepared { ask, prompts, cache_salt, owner: 0, placing: Placing::default() })
    }

    fn tokenize(&self, prompt: Prompt, echo: bool, salt: u64) -> Result<Tokenized, Refusal> {
        match prompt {
            Prompt::Text(text) => {
                let tokens = self.model.text_tokens(&text, salt).map_err(|e| prompt_refusal(&e, "prompt"))?;
                Ok(Tokenized { tokens, echo: echo.then_some(text) })
            }
            Prompt::Tokens(tokens) => {
                let echo = echo.then(|| self.model.vocabulary.decode(&tokens));
                Ok(Tokenized { tokens, echo })
            }
        }
    }

    fn check_context(&self, api: Api, prompt: usize, max_tokens: Option<u32>) -> Result<(), Refusal> {
        let limit = u64::from(self.model.max_context);
        let wanted = u64::from(max_tokens.unwrap_or(1));
        if prompt as u64 + wanted <= limit {
            return Ok(());
        }
        let param = api.prompt_field();
        let message = format!(
            "This model's maximum context length is {limit} tokens. However, you requested {} tokens ({prompt} in the \
             prompt, {wanted} in the completion). Please reduce the prompt or the completion length.",
            prompt as u64 + wanted
        );
        Err(Refusal::ContextLength { message, param })
    }

    /// Generates all choices and answers.
    async fn answer(
        self: Arc<Self>,
        api: Api,
        mut prepared: Prepared,
        started: Instant,
        held: Held,
    ) -> Response<AnswerBody> {
        let Held { entry, mut place } = held;
        let Ok(head) = self.head(api, &mut prepared.ask) else {
            return refused(entry, &Refusal::Internal, api.dialect());
        };
        let prompt_tokens: u64 = prepared.prompts.iter().map(|prompt| prompt.tokens.len() as u64).sum();
        self.metrics.prompt_tokens.inc_by(prompt_tokens);
        place.used(prompt_tokens);
        entry.used(prompt_tokens);
        let (stream, n) = (prepared.ask.stream, prepared.ask.n);
        let meter = Meter::new(prompt_tokens, n);
        let specs = self.specs(prepared, &head.id, started);
        let choices = specs.len();
        let mut deltas = answer::deltas(&self.dispatcher, &self.model, specs);
        if !stream {
            let collected = {
                let mut bill = Bill { place: &mut place, entry: &entry, meter };
                answer::collect(deltas, &head, &mut bill.meter, choices).await
            };
            return match collected {
                Ok(body) => {
                    entry.answered(200);
                    reply::named(reply::json(StatusCode::OK, body), &head.id, api.dialect())
                }
                Err(error) => refused(entry, &refusal(&error, api), api.dialect()),
            };
        }
        // The status is decided by the first token: no error may hide inside a 200 that has not begun. But a client, or a
        // proxy before it, that hears nothing for long gives up: then the answer begins without it.
        let keep_alive = self.timeouts.keep_alive;
        let first = match tokio::time::timeout(keep_alive, deltas.next()).await {
            Err(_) => None,
            Ok(Some(Ok(first))) => Some(first),
            Ok(Some(Err(error))) => return refused(entry, &refusal(&error, api), api.dialect()),
            Ok(None) => return refused(entry, &Refusal::Internal, api.dialect()),
        };
        let id = head.id.clone();
        let writer = EventWriter::new(head, choices);
        let events = EventStream::new(deltas, first, writer, meter, (entry, place), keep_alive);
        reply::named(reply::event_stream(AnswerBody::Events(Box::pin(events))), &id, api.dialect())
    }

    fn head(&self, api: Api, ask: &mut Ask) -> Result<Head, getrandom::Error> {
        let random = entropy::bytes::<12>()?;
        Ok(Head {
            api,
            id: named_id(api.id_prefix(), &random),
            created: unix_seconds(),
            model: ask.model.clone(),
            logprobs: ask.sampling.logprobs.is_some(),
            debug: ask.debug,
            include_usage: ask.include_usage,
            repeats: ask.repeats.take(),
            vocabulary: Arc::clone(&self.model.vocabulary),
        })
    }

    fn specs(&self, prepared: Prepared, id: &str, started: Instant) -> Vec<ChoiceSpec> {
        let Prepared { ask, prompts, cache_salt, owner, placing } = prepared;
        let mut end_tokens = ask.sampling.stop_tokens.clone();
        if !ask.sampling.ignore_eos {
            end_tokens.extend_from_slice(&self.model.eos);
        }
        let end_tokens: Arc<[u32]> = end_tokens.into();
        let mut specs = Vec::with_capacity(prompts.len() * ask.n as usize);
        for prompt in prompts {
            let room = self.model.max_context - u32::try_from(prompt.tokens.len()).unwrap_or(0);
            let tokens: Arc<[u32]> = prompt.tokens.into();
            for choice in 0..ask.n {
                let index = u32::try_from(specs.len()).unwrap_or(u32::MAX);
                let mut sampling = ask.sampling.clone();
                sampling.seed = sampling.seed.wrapping_add(u64::from(choice));
                let job = Job {
                    request_id: format!("{id}-{index}"),
                    prompt: Arc::clone(&tokens),
                    max_tokens: ask.max_tokens.map_or(room, |asked| asked.min(room)),
                    sampling,
                    cache_salt,
                    owner,
                    logits_digest: ask.debug.logits_digest,
                    whole: !ask.stream && ask.stop.is_empty(),
                    end_tokens: Arc::clone(&end_tokens),
                    deadline: started + self.timeouts.request,
                    session: placing.session,
                    explain: placing.explain.clone(),
                };
                specs.push(ChoiceSpec {
                    index,
                    job,
                    stop: ask.stop.clone(),
                    echo: prompt.echo.clone(),
                    every_token: ask.debug.token_ids || ask.debug.logits_digest,
                    started,
                });
            }
        }
        specs
    }
}

/// An id of these bytes after a prefix, in lower-case hex.
fn named_id(prefix: &str, random: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut id = String::with_capacity(prefix.len() + 2 * random.len());
    id.push_str(prefix);
    for byte in random {
        id.push(char::from(DIGITS[usize::from(byte >> 4)]));
        id.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    id
}

fn refused(entry: Entry, refusal: &Refusal, dialect: Dialect) -> Response<AnswerBody> {
    entry.refused(refusal);
    refusal.response(dialect)
}

/// What a client is told of a generation that failed.
pub(crate) fn refusal(error: &DispatchError, api: Api) -> Refusal {
    match error {
        DispatchError::NoWorker => Refusal::NoWorker,
        DispatchError::Overloaded => Refusal::WorkersBusy,
        DispatchError::Refused => Refusal::malformed("The model's workers cannot serve this request."),
        DispatchError::TooLong { tokens } => Refusal::coded(
            api.prompt_field(),
            "context_length_exceeded",
            format!(
                "The KV cache of the workers is too small for {tokens} prompt tokens. Please reduce the prompt, \
                 or have kv.memory of the decode pools raised."
            ),
        ),
        DispatchError::WorkerLost => Refusal::WorkerLost,
        DispatchError::Barred => Refusal::Barred,
        DispatchError::TimedOut => Refusal::TimedOut,
        DispatchError::Entropy => Refusal::Internal,
    }
}

fn prompt_refusal(error: &PromptError, param: &'static str) -> Refusal {
    match error {
        PromptError::NoTemplate => {
            Refusal::coded(param, "no_chat_template", "This model has no chat template; use /v1/completions.")
        }
        PromptError::Template(TemplateError::Refused(why)) => Refusal::invalid(
            param,
            format!("The model's chat template refuses these messages: {}.", reply::quoted(why)),
        ),
        PromptError::Template(TemplateError::Broken(cause)) => {
            // The error names the template's line; it may quote values, which the log must not see.
            tracing::warn!(line = cause.line(), kind = %cause.kind(), "the chat template failed on a request");
            Refusal::invalid(param, "The model's chat template cannot render these messages.")
        }
        PromptError::Tokenizer(message) => {
            tracing::error!(message, "the tokenizer failed on a request");
            Refusal::Internal
        }
        PromptError::Empty => Refusal::coded(
            param,
            "empty_prompt",
            format!("'{param}' must not be empty: this model has no token to begin with."),
        ),
    }
}

/// Undoes percent-encoding, as clients apply it to model ids with slashes.
fn percent_decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = (bytes[at] == b'%').then(|| text.get(at + 1..at + 3)).flatten();
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}
