//! What an answer cost, from its last bytes: no chunk of a stream is parsed.

use serde::Deserialize;

use crate::request::Passed;

/// Tokens that no request has: more of them are a fault of the server, and would keep a key out for good.
const TOKENS_MAX: u64 = 1 << 32;
/// Bytes at the end of an answer among which its usage is looked for.
const TAIL_BYTES: usize = 4 << 10;

/// The end of an answer, and how much came.
#[derive(Debug)]
pub(super) struct Tally {
    tail: Vec<u8>,
    /// Line ends of a stream: two for each event.
    lines: u64,
    stream: bool,
    /// About the tokens of the prompt, should the server not say.
    prompt: u64,
}

/// Usage under the names of OpenAI's two APIs and of Anthropic's.
#[derive(Debug, Deserialize)]
struct Usage {
    #[serde(alias = "input_tokens", default)]
    prompt_tokens: Option<u64>,
    #[serde(alias = "output_tokens", default)]
    completion_tokens: Option<u64>,
}

impl Tally {
    pub(super) fn new(request: &Passed) -> Self {
        Self { tail: Vec::new(), lines: 0, stream: request.stream, prompt: request.words.len() as u64 }
    }

    /// Takes in what came.
    pub(super) fn push(&mut self, data: &[u8]) {
        if self.stream {
            self.lines += data.iter().filter(|byte| **byte == b'\n').count() as u64;
        }
        let last = &data[data.len().saturating_sub(TAIL_BYTES)..];
        if self.tail.len() + last.len() > 2 * TAIL_BYTES {
            let old = (self.tail.len() + last.len()).saturating_sub(TAIL_BYTES).min(self.tail.len());
            self.tail.drain(..old);
        }
        self.tail.extend_from_slice(last);
    }

    /// Tokens of prompt and answer: as the server says, else each event counts as a token and four bytes of the prompt do.
    pub(super) fn tokens(&self) -> (u64, u64) {
        let estimate = (self.prompt, self.lines / 2);
        let Some(usage) = self.usage() else { return estimate };
        let told = |tokens: u64, estimate| if tokens <= TOKENS_MAX { tokens } else { estimate };
        let prompt = usage.prompt_tokens.unwrap_or(estimate.0);
        (told(prompt, estimate.0), told(usage.completion_tokens.unwrap_or(0), estimate.1))
    }

    /// Whether the answer said that it ends, or why.
    pub(super) fn says_end(&self) -> bool {
        // At the beginning of a line: within a text there are no line ends.
        self.data_lines().any(|data| data == b"[DONE]")
            || find_last(&self.tail, b"\"finish_reason\":\"").is_some()
            || find_last(&self.tail, b"\"finish_reason\": \"").is_some()
    }

    /// Of the beginning of a stream: whether more came than one event, which may say no more than that there will be others.
    pub(super) fn says_more(&self) -> bool {
        self.data_lines().nth(1).is_some()
    }

    /// Whether the server said itself that the stream failed.
    pub(super) fn says_error(&self) -> bool {
        self.data_lines().any(|data| {
            let value = [&b"{"[..], b"\"error\"", b":"]
                .iter()
                .try_fold(data, |rest, part| rest.strip_prefix(*part).map(<[u8]>::trim_ascii_start));
            value.is_some_and(|value| !value.starts_with(b"null"))
        })
    }

    fn data_lines(&self) -> impl Iterator<Item = &[u8]> {
        self.tail
            .split(|byte| *byte == b'\n')
            .filter_map(|line| line.strip_prefix(b"data:").map(<[u8]>::trim_ascii))
    }

    fn usage(&self) -> Option<Usage> {
        let mut tail = self.tail.as_slice();
        // Chunks before the last one may have said `null`.
        loop {
            let at = find_last(tail, b"\"usage\":")?;
            let value = tail[at + b"\"usage\":".len()..].trim_ascii_start();
            if value.first() == Some(&b'{') {
                return serde_json::Deserializer::from_slice(value).into_iter().next()?.ok();
            }
            tail = &tail[..at];
        }
    }
}

fn find_last(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).rposition(|window| window == what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(stream: bool, pieces: &[&str]) -> Tally {
        let mut tally = Tally { tail: Vec::new(), lines: 0, stream, prompt: 9 };
        for piece in pieces {
            tally.push(piece.as_bytes());
        }
        tally
    }

    #[test]
    fn usage_is_found_at_the_end_whatever_it_is_called() {
        let whole = "{\"choices\":[],\"usage\": {\"prompt_tokens\":3,\"completion_tokens\":4,\"total_tokens\":7},\"x\":{}}";
        assert_eq!(tally(false, &[whole]).tokens(), (3, 4));
        let embeddings = "{\"data\":[],\"usage\":{\"prompt_tokens\":3,\"total_tokens\":3}}";
        assert_eq!(tally(false, &[embeddings]).tokens(), (3, 0));
        let messages = "event: message_delta\ndata: {\"usage\":{\"output_tokens\":5}}\n\nevent: message_stop\ndata: {}\n\n";
        assert_eq!(tally(true, &[messages]).tokens(), (9, 5));
        let long = "x".repeat(5000);
        let cut = [
            "data: {\"usage\":null}\n\n",
            &long,
            "data: {\"usage\":{\"prompt_tokens\":1,\"compl",
            "etion_tokens\":2}}\n\ndata: [DONE]\n\n",
        ];
        assert_eq!(tally(true, &cut).tokens(), (1, 2));
    }

    #[test]
    fn without_usage_events_are_counted() {
        let events = ["data: {\"usage\":null}\n\n", "data: a\n\ndata: [DONE]\n\n"];
        assert_eq!(tally(true, &events).tokens(), (9, 3));
        assert_eq!(tally(false, &["{\"usage\":{\"prompt_tokens\":\"x\"}}\n"]).tokens(), (9, 0));
        assert_eq!(tally(true, &[]).tokens(), (9, 0));
        // Nor where it cannot be.
        let absurd =
            "{\"usage\":{\"prompt_tokens\":18446744073709551615,\"completion_tokens\":18446744073709551615}}";
        assert_eq!(tally(false, &[absurd]).tokens(), (9, 0));
        let beyond = "{\"usage\":{\"prompt_tokens\":99999999999999999999,\"completion_tokens\":-1}}";
        assert_eq!(tally(false, &[beyond]).tokens(), (9, 0));
    }

    #[test]
    fn an_error_is_one_that_the_server_said() {
        assert!(tally(true, &["data: x\n\ndata: {\"error\":{\"message\":\"m\"}}\n\n"]).says_error());
        assert!(!tally(true, &["data: {\"content\":\"data: {\\\"error\\\":1}\"}\n\n"]).says_error());
        assert!(!tally(true, &["data: {\"error\": null, \"choices\":[]}\n\n"]).says_error());
    }

    #[test]
    fn a_beginning_says_nothing_more_or_an_error() {
        let told = |pieces: &[&str]| {
            let tally = tally(true, pieces);
            (tally.says_more(), tally.says_error())
        };
        assert_eq!(told(&[": ping\n\n: ping\n\n", "data: {\"choices\":[]}\n\n"]), (false, false));
        assert_eq!(told(&["data: {\"choices\":[]}\n\n", "data: {\"error\": \"said\"}"]), (true, true));
        assert_eq!(told(&["data: { \"error\": {}}\n\ndata: [DONE]\n\n"]), (true, true));
        assert_eq!(told(&["event: a\ndata:{\"text\":\"{\\\"error\\\"\"}\n\ndata:{}"]), (true, false));
    }

    #[test]
    fn an_end_is_one_that_was_said() {
        assert!(tally(true, &["data: [DO", "NE]\n\n"]).says_end());
        assert!(tally(true, &["data: {\"finish_reason\": \"stop\"}\n\n"]).says_end());
        assert!(tally(true, &["data: x\r\n\r\ndata:[DONE]\r\n\r\n"]).says_end());
        assert!(!tally(true, &["data: {\"finish_reason\":null}\n\n"]).says_end());
        // What a model says is no end.
        for said in ["[DONE]", "data: [DONE]", "\\ndata: [DONE]\\n", "\\\"finish_reason\\\":\\\"stop"] {
            let chunk = format!("data: {{\"content\":\"{said}\"}}\n\n");
            assert!(!tally(true, &[&chunk]).says_end(), "{chunk}");
        }
    }
}
