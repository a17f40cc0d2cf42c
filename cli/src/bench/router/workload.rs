//! What is asked for, and how its requests look.

use clap::ValueEnum;

use super::text::Words;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workload {
    /// 100 bytes of prompt, 4 tokens, not streamed.
    Short,
    /// 1,950 tokens of prompt of which 1,690 are shared with a 32nd of the others, 64 tokens, streamed.
    Shared,
    /// 512 tokens as fast as the engines can, streamed.
    Stream,
    /// 100 tokens, one every 20 ms, streamed.
    Paced,
    /// 1 MB of prompt, 4 tokens, not streamed.
    Large,
    /// Streams that are open and yield nothing: what they cost in memory.
    Quiet,
    /// 24 prefixes of 1,024 tokens, at a rate.
    Prefixes,
    /// 64 prefixes of 1,024 tokens, the first of which are asked for most (Zipf 1.2), at a rate.
    Zipf,
    /// Chats with one system prompt that grow turn by turn, eight for each worker, at a rate.
    Chats,
}

/// How the engines behind a workload behave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Engines {
    /// No step takes any time.
    Fast,
    /// A step takes 20 ms.
    Paced,
    /// A step takes longer than anybody waits.
    Still,
    /// A token of prompt takes 40 us, a step 2 ms, and the prefix cache of a worker holds 25,600 tokens.
    Timed,
}

/// When requests are sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Pace {
    /// Each connection sends the next one when it has its answer.
    Closed,
    /// Each connection sends one, waits, and leaves.
    Open,
    /// So many in a second, so many in all, whatever the answers.
    Arrivals { per_s: f64, count: u32 },
}

/// Shared prefixes of [`Workload::Shared`].
const SHARED_GROUPS: usize = 32;
const SHARED_TOKENS: usize = 1690;
const SHARED_OWN_TOKENS: usize = 260;
/// Prefixes where routing is what counts.
const PREFIX_TOKENS: usize = 1024;
const PREFIX_OWN_TOKENS: usize = 128;
/// Exponent of the popularity of prefixes.
const ZIPF: f64 = 1.2;
/// Chats for each worker: with four, all of them fill half of the KV memory in the end.
const CHATS_PER_WORKER: usize = 8;
/// Turns of chats.
const SYSTEM_TOKENS: usize = 200;
const TURN_TOKENS: usize = 64;
const ANSWER_TOKENS: u32 = 32;

impl Workload {
    /// Those measured where none is named.
    pub(super) const DEFAULT: [Self; 5] = [Self::Short, Self::Shared, Self::Stream, Self::Paced, Self::Large];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Short => "short",
            Self::Shared => "shared",
            Self::Stream => "stream",
            Self::Paced => "paced",
            Self::Large => "large",
            Self::Quiet => "quiet",
            Self::Prefixes => "prefixes",
            Self::Zipf => "zipf",
            Self::Chats => "chats",
        }
    }

    pub(super) fn engines(self) -> Engines {
        match self {
            Self::Short | Self::Shared | Self::Stream | Self::Large => Engines::Fast,
            Self::Paced => Engines::Paced,
            Self::Quiet => Engines::Still,
            Self::Prefixes | Self::Zipf | Self::Chats => Engines::Timed,
        }
    }

    /// When requests come, to so many workers that are so many times as slow as they could be.
    pub(super) fn pace(self, workers: usize, stretch: u32) -> Pace {
        // 600 at 75 a second for four workers: with cold caches as much as they can prefill.
        let part = workers as f64 / 4.0;
        match self.engines() {
            Engines::Timed => Pace::Arrivals {
                per_s: 75.0 * part / f64::from(stretch),
                count: (600.0 * part).max(1.0) as u32,
            },
            Engines::Fast | Engines::Paced => Pace::Closed,
            Engines::Still => Pace::Open,
        }
    }

    /// Chats that are held at once with so many workers; none where requests have nothing to do with one another.
    ///
    /// They grow with the workers as the rate does: a chat has as many turns, and a worker's memory as much of them, with any
    /// number of workers.
    pub(super) fn chats(self, workers: usize) -> Option<usize> {
        (self == Self::Chats).then_some(CHATS_PER_WORKER * workers)
    }

    /// Requests at once, unless told otherwise.
    pub(super) fn concurrency(self) -> &'static [u32] {
        match self {
            Self::Short | Self::Shared | Self::Stream => &[1, 32, 256, 1024],
            Self::Paced => &[256],
            Self::Large => &[8],
            Self::Quiet => &[2000],
            Self::Prefixes | Self::Zipf | Self::Chats => &[1024],
        }
    }

    pub(super) fn streams(self) -> bool {
        !matches!(self, Self::Short | Self::Large)
    }

    fn max_tokens(self) -> u32 {
        match self {
            Self::Short | Self::Large => 4,
            Self::Shared => 64,
            Self::Stream => 512,
            Self::Paced | Self::Quiet => 100,
            Self::Prefixes | Self::Zipf => 16,
            Self::Chats => ANSWER_TOKENS,
        }
    }
}

/// Makes the requests of a workload; no two are alike. What they share is the same for every gateway of a run and differs
/// from run to run, so that nobody finds it in a cache.
#[derive(Debug, Clone)]
pub(super) struct Requests {
    workload: Workload,
    host: String,
    model: String,
    shared: Vec<String>,
    /// Upper ends of the shares of the prefixes, where they are not equal.
    popularity: Vec<f64>,
    words: Words,
}

impl Requests {
    pub(super) fn new(workload: Workload, host: &str, model: &str, seed: u64) -> Self {
        let mut words = Words::new(seed);
        let (count, tokens) = match workload {
            Workload::Shared => (SHARED_GROUPS, SHARED_TOKENS),
            Workload::Prefixes => (24, PREFIX_TOKENS),
            Workload::Zipf => (64, PREFIX_TOKENS),
            Workload::Chats => (1, SYSTEM_TOKENS),
            Workload::Large => (1, (1 << 20) / 4 - 16),
            Workload::Short | Workload::Stream | Workload::Paced | Workload::Quiet => (0, 0),
        };
        let shared = (0..count).map(|_| words.text(tokens)).collect();
        let zipf = if workload == Workload::Zipf { count } else { 0 };
        let mut sum = 0.0;
        let popularity: Vec<f64> = (1..=zipf)
            .map(|rank| {
                sum += (rank as f64).powf(-ZIPF);
                sum
            })
            .collect();
        Self { workload, host: host.to_owned(), model: model.to_owned(), shared, popularity, words }
    }

    /// The same workload for another connection, with other texts of its own.
    pub(super) fn fork(&self, number: u64) -> Self {
        Self { words: self.words.fork(number), ..self.clone() }
    }

    /// The next request, as it goes over the wire.
    pub(super) fn next(&mut self, out: &mut Vec<u8>) {
        let message = ["{\"role\":\"user\",\"content\":\"", &self.prompt(), "\"}"].concat();
        self.request(&message, out);
    }

    /// What the user says in the next request: words without anything that JSON would escape.
    pub(super) fn prompt(&mut self) -> String {
        let own = match self.workload {
            Workload::Short => 25,
            Workload::Shared => SHARED_OWN_TOKENS,
            Workload::Stream | Workload::Paced | Workload::Quiet => 150,
            Workload::Large => 16,
            Workload::Prefixes | Workload::Zipf => PREFIX_OWN_TOKENS,
            Workload::Chats => TURN_TOKENS,
        };
        let own = self.words.text(own);
        match self.shared.len() {
            0 => own,
            // A large prompt begins with what is its own: nothing of it is in any cache of the engines.
            _ if self.workload == Workload::Large => [own.as_str(), &self.shared[0]].concat(),
            count => {
                let at = self.pick(count);
                [self.shared[at].as_str(), &own].concat()
            }
        }
    }

    /// Any number below `count`.
    pub(super) fn below(&mut self, count: usize) -> usize {
        self.words.below(count)
    }

    fn pick(&mut self, count: usize) -> usize {
        match self.popularity.last() {
            None => self.words.below(count),
            Some(total) => {
                let drawn = self.words.unit() * total;
                self.popularity.partition_point(|end| *end < drawn).min(count - 1)
            }
        }
    }

    /// The next turn of a chat, whose messages so far are in `chat`; what is said, and what will have been answered, is added.
    ///
    /// The answer is made up here: every gateway is then asked the same.
    pub(super) fn turn(&mut self, chat: &mut String, out: &mut Vec<u8>) {
        if chat.is_empty() {
            let system = &self.shared[0];
            chat.push_str("{\"role\":\"system\",\"content\":\"");
            chat.push_str(system);
            chat.push_str("\"}");
        }
        chat.push_str(",{\"role\":\"user\",\"content\":\"");
        chat.push_str(&self.words.text(TURN_TOKENS));
        chat.push_str("\"}");
        self.request(chat, out);
        chat.push_str(",{\"role\":\"assistant\",\"content\":\"");
        chat.push_str(&self.words.text(ANSWER_TOKENS as usize));
        chat.push_str("\"}");
    }

    fn request(&self, messages: &str, out: &mut Vec<u8>) {
        let Self { model, host, .. } = self;
        let (max_tokens, options) = (
            self.workload.max_tokens(),
            match self.workload.streams() {
                true => "\"stream\":true,\"stream_options\":{\"include_usage\":true}",
                false => "\"stream\":false",
            },
        );
        let tail = format!(
            "],\"max_tokens\":{max_tokens},\"temperature\":0,\"ignore_eos\":true,\"model\":\"{model}\",{options}}}"
        );
        const BEGIN: &str = "{\"messages\":[";
        let length = BEGIN.len() + messages.len() + tail.len();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nAccept: */*\r\nContent-Length: {length}\r\n\r\n"
        );
        out.clear();
        for part in [head.as_str(), BEGIN, messages, &tail] {
            out.extend_from_slice(part.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(request: &[u8]) -> serde_json::Value {
        let at = request.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
        let head = std::str::from_utf8(&request[..at]).unwrap();
        assert!(head.contains(&format!("Content-Length: {}\r\n", request.len() - at)), "{head}");
        serde_json::from_slice(&request[at..]).unwrap()
    }

    #[test]
    fn requests_have_the_promised_sizes_and_are_never_the_same() {
        for workload in Workload::value_variants() {
            let mut requests = Requests::new(*workload, "h:1", "m", 7);
            let (mut first, mut second) = (Vec::new(), Vec::new());
            requests.next(&mut first);
            requests.next(&mut second);
            let bodies = [body(&first), body(&second)];
            let text = |at: usize| bodies[at]["messages"][0]["content"].as_str().unwrap().to_owned();
            assert_ne!(text(0), text(1), "{workload:?}");
            let tokens = text(0).len() / 4;
            let expected = match workload {
                Workload::Short => 25,
                Workload::Shared => 1950,
                Workload::Stream | Workload::Paced | Workload::Quiet => 150,
                Workload::Large => 1 << 18,
                Workload::Prefixes | Workload::Zipf => 1152,
                Workload::Chats => 264,
            };
            assert_eq!(tokens, expected, "{workload:?}");
            assert_eq!(bodies[0]["stream"], workload.streams());
        }
    }

    #[test]
    fn a_chat_grows_at_its_end_and_begins_like_the_others() {
        let mut requests = Requests::new(Workload::Chats, "h:1", "m", 7);
        let (mut out, mut ours, mut theirs) = (Vec::new(), String::new(), String::new());
        requests.turn(&mut ours, &mut out);
        let first = body(&out)["messages"].as_array().unwrap().clone();
        requests.turn(&mut ours, &mut out);
        let second = body(&out)["messages"].as_array().unwrap().clone();
        assert_eq!((first.len(), second.len()), (2, 4));
        assert_eq!(first[..2], second[..2]);
        requests.turn(&mut theirs, &mut out);
        let other = body(&out)["messages"].as_array().unwrap().clone();
        assert_eq!(first[0], other[0]);
        assert_ne!(first[1], other[1]);
    }

    #[test]
    fn a_worker_gets_as_much_with_any_number_of_them() {
        let each = |workers: usize| {
            let Pace::Arrivals { per_s, count } = Workload::Chats.pace(workers, 2) else { panic!("no rate") };
            let chats = Workload::Chats.chats(workers).unwrap();
            (per_s / workers as f64, f64::from(count) / chats as f64, chats / workers)
        };
        assert_eq!(each(4), (9.375, 18.75, 8));
        assert_eq!(each(64), each(4));
        assert_eq!(Workload::Zipf.chats(4), None);
    }

    #[test]
    fn popular_prefixes_are_asked_for_most() {
        let mut requests = Requests::new(Workload::Zipf, "h:1", "m", 7);
        let mut seen = [0u32; 64];
        for _ in 0..2000 {
            seen[requests.pick(64)] += 1;
        }
        assert!(seen[0] > 400 && seen[0] > 5 * seen[9] && seen[63] < 40, "{seen:?}");
    }
}
