//! The table of paths.

use http::Method;

use crate::answer::Api;
use crate::reply::Refusal;
use crate::request::Passing;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// OpenAI's chat completions.
    Chat,
    /// OpenAI's completions.
    Completions,
    /// OpenAI's responses, of which none is kept.
    Responses,
    /// A response by its id, which nobody has.
    StoredResponse,
    /// How many tokens the input of a response has.
    CountInput,
    /// Anthropic's messages.
    Messages,
    /// How many tokens messages have.
    CountMessages,
    /// Text to token ids, as vLLM does it.
    Tokenize,
    /// Token ids to text.
    Detokenize,
    /// OpenAI's embeddings.
    Embeddings,
    /// The models served.
    Models,
    /// One of them.
    Model,
    /// Readiness under the name that OpenAI-compatible servers use.
    Health,
    /// Whether the process lives.
    Live,
    /// Whether it can serve.
    Ready,
    /// For Prometheus.
    Metrics,
    /// Anything else.
    Other,
}

/// How a route is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// Workers generate; the answer has the shape of this API.
    Generate(Api),
    /// The router answers by itself, from a body.
    Text(TextJob),
    /// The router answers by itself, from the head alone.
    Head,
}

/// What the router does with text by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TextJob {
    CountInput,
    CountMessages,
    Tokenize,
    Detokenize,
    Embeddings,
}

/// Whose API a client speaks, which decides the shape of errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    OpenAi,
    Anthropic,
}

impl Dialect {
    /// That of a path, whether anything is there or not.
    pub(crate) fn of_path(path: &str) -> Self {
        match path.strip_prefix(MESSAGES_PATH) {
            Some(rest) if rest.is_empty() || rest.starts_with('/') => Self::Anthropic,
            _ => Self::OpenAi,
        }
    }
}

const MESSAGES_PATH: &str = "/v1/messages";
const RESPONSES_BELOW: &str = "/v1/responses/";
const MODELS_BELOW: &str = "/v1/models/";

/// One line of the table.
struct Line {
    route: Route,
    /// Where it is; the first one is its name in metrics, for those below a path with a placeholder that matches nothing.
    paths: &'static [&'static str],
    work: Work,
    /// Whether it takes a key; probes and metrics are for those who run the router.
    needs_key: bool,
}

const fn generates(route: Route, api: Api, paths: &'static [&'static str]) -> Line {
    Line { route, paths, work: Work::Generate(api), needs_key: true }
}

const fn works(route: Route, job: TextJob, paths: &'static [&'static str]) -> Line {
    Line { route, paths, work: Work::Text(job), needs_key: true }
}

const fn tells(route: Route, paths: &'static [&'static str]) -> Line {
    Line { route, paths, work: Work::Head, needs_key: true }
}

const fn probe(route: Route, paths: &'static [&'static str]) -> Line {
    Line { route, paths, work: Work::Head, needs_key: false }
}

/// Everything there is, in the order of [`Route`].
static TABLE: [Line; 17] = [
    generates(Route::Chat, Api::Chat, &["/v1/chat/completions"]),
    generates(Route::Completions, Api::Completions, &["/v1/completions"]),
    generates(Route::Responses, Api::Responses, &["/v1/responses"]),
    tells(Route::StoredResponse, &["/v1/responses/{id}"]),
    works(Route::CountInput, TextJob::CountInput, &["/v1/responses/input_tokens"]),
    generates(Route::Messages, Api::Messages, &[MESSAGES_PATH]),
    works(Route::CountMessages, TextJob::CountMessages, &["/v1/messages/count_tokens"]),
    works(Route::Tokenize, TextJob::Tokenize, &["/tokenize", "/v1/tokenize"]),
    works(Route::Detokenize, TextJob::Detokenize, &["/detokenize", "/v1/detokenize"]),
    works(Route::Embeddings, TextJob::Embeddings, &["/v1/embeddings"]),
    tells(Route::Models, &["/v1/models"]),
    tells(Route::Model, &["/v1/models/{id}"]),
    probe(Route::Health, &["/health"]),
    probe(Route::Live, &["/livez"]),
    probe(Route::Ready, &["/readyz"]),
    probe(Route::Metrics, &["/metrics"]),
    probe(Route::Other, &["other"]),
];

impl Route {
    /// Every route.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|line| line.route)
    }

    fn line(self) -> &'static Line {
        &TABLE[self as usize]
    }

    /// How it is called at a server of another project, if it is passed on to one.
    pub(crate) fn passing(self) -> Option<Passing> {
        match self.work() {
            Work::Generate(Api::Chat) => Some(Passing::Chat),
            Work::Generate(Api::Completions) => Some(Passing::Completions),
            Work::Generate(Api::Responses) => Some(Passing::Responses),
            Work::Generate(Api::Messages) => Some(Passing::Messages),
            Work::Text(TextJob::CountInput) => Some(Passing::CountInput),
            Work::Text(TextJob::CountMessages) => Some(Passing::CountMessages),
            Work::Text(TextJob::Tokenize) => Some(Passing::Tokenize),
            Work::Text(TextJob::Detokenize) => Some(Passing::Detokenize),
            Work::Text(TextJob::Embeddings) => Some(Passing::Embeddings),
            Work::Head => None,
        }
    }

    /// The value of the `route` label.
    pub(crate) fn label(self) -> &'static str {
        self.line().paths[0]
    }

    /// Whether it takes a key.
    pub(crate) fn needs_key(self) -> bool {
        self.line().needs_key
    }

    /// How it is answered.
    pub(crate) fn work(self) -> Work {
        self.line().work
    }

    /// The route of a path, whatever the method.
    pub(crate) fn of_path(path: &str) -> Self {
        if let Some(line) = TABLE.iter().find(|line| line.paths.contains(&path)) {
            return line.route;
        }
        let below = |prefix: &str| path.strip_prefix(prefix).is_some_and(|rest| !rest.is_empty());
        if below(MODELS_BELOW) {
            Self::Model
        } else if below(RESPONSES_BELOW) {
            Self::StoredResponse
        } else {
            Self::Other
        }
    }

    /// Refuses what is not in the table.
    pub(crate) fn check(self, method: &Method, path: &str) -> Result<(), Refusal> {
        let (fits, allow) = match (self, self.work()) {
            (Self::Other, _) => {
                return Err(Refusal::UnknownPath { method: method.to_string(), path: path.to_owned() });
            }
            (Self::StoredResponse, _) => {
                let id = path.strip_prefix(RESPONSES_BELOW).unwrap_or_default().to_owned();
                return Err(Refusal::NotStored { id });
            }
            (_, Work::Generate(_) | Work::Text(_)) => (method == Method::POST, "POST"),
            (_, Work::Head) => (method == Method::GET || method == Method::HEAD, "GET, HEAD"),
        };
        if fits {
            return Ok(());
        }
        Err(Refusal::Method { method: method.to_string(), path: path.to_owned(), allow })
    }
}

#[cfg(test)]
mod tests;
