//! How busy a server is, as far as it tells Prometheus: the names under which the servers in use tell it.

/// What a server told of itself at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Gauges {
    /// Requests it works on.
    pub(super) running: u32,
    /// Requests waiting for room.
    pub(super) waiting: u32,
    /// Tokens of prompts and answers since it started: grows as long as requests make progress. `None` where it does not
    /// tell.
    pub(super) tokens: Option<u64>,
}

impl Gauges {
    /// Requests that have not ended.
    pub(super) fn requests(&self) -> u32 {
        self.running.saturating_add(self.waiting)
    }
}

/// What a look learnt of how busy a server is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Busy {
    /// It told.
    Told(Gauges),
    /// It does not tell.
    Untold,
    /// It tells, but not this time: what it told before may still be so or not.
    Missed,
}

impl Busy {
    /// What it told, if that says how many requests there are; `tells` of a server that did so before.
    pub(super) fn of(metrics: Option<&str>, tells: bool) -> Self {
        match metrics.and_then(read) {
            Some(gauges) => Self::Told(gauges),
            None if tells => Self::Missed,
            None => Self::Untold,
        }
    }
}

/// The metrics of one kind of server.
struct Names {
    running: &'static str,
    waiting: &'static str,
    tokens: [&'static str; 2],
    /// Requests that only ask for the metrics, and are counted too.
    own: u32,
}

const KNOWN: [Names; 5] = [
    Names {
        running: "vllm:num_requests_running",
        waiting: "vllm:num_requests_waiting",
        tokens: ["vllm:prompt_tokens_total", "vllm:generation_tokens_total"],
        own: 0,
    },
    Names {
        running: "sglang:num_running_reqs",
        waiting: "sglang:num_queue_reqs",
        tokens: ["sglang:prompt_tokens_total", "sglang:generation_tokens_total"],
        own: 0,
    },
    Names {
        running: "llamacpp:requests_processing",
        waiting: "llamacpp:requests_deferred",
        tokens: ["llamacpp:prompt_tokens_total", "llamacpp:tokens_predicted_total"],
        own: 0,
    },
    Names { running: "tgi_batch_current_size", waiting: "tgi_queue_size", tokens: ["", ""], own: 0 },
    Names {
        running: "baton_router_inflight",
        waiting: "baton_router_queue_depth",
        tokens: ["baton_router_prompt_tokens_total", "baton_router_completion_tokens_total"],
        own: 1,
    },
];

/// Reads the text exposition format; `None` when nothing in it tells how many requests there are.
fn read(text: &str) -> Option<Gauges> {
    let names = KNOWN.iter().find(|names| sum(text, names.running).is_some())?;
    let count = |name| sum(text, name).map_or(0, |value| value.clamp(0.0, f64::from(u32::MAX)) as u32);
    let totals = names.tokens.map(|name| sum(text, name));
    let tokens = totals.into_iter().flatten().reduce(|a, b| a + b);
    Some(Gauges {
        running: count(names.running).saturating_sub(names.own),
        waiting: count(names.waiting),
        tokens: tokens.map(|tokens| tokens.max(0.0) as u64),
    })
}

/// The sum of a metric over its labels; `None` if it is not there.
fn sum(text: &str, name: &str) -> Option<f64> {
    let value = |line: &str| {
        let rest = line.strip_prefix(name).filter(|_| !name.is_empty())?;
        let rest = match rest.as_bytes().first()? {
            b'{' => rest.rsplit_once('}')?.1,
            b' ' | b'\t' => rest,
            _ => return None,
        };
        // A time stamp may follow.
        let value: f64 = rest.split_whitespace().next()?.parse().ok()?;
        value.is_finite().then_some(value)
    };
    text.lines().filter_map(value).reduce(|a, b| a + b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_server_is_understood() {
        let vllm = "# HELP vllm:num_requests_running Number.\n# TYPE vllm:num_requests_running gauge\n\
            vllm:num_requests_running{engine=\"0\",model_name=\"m}\"} 3.0\n\
            vllm:num_requests_running{engine=\"1\",model_name=\"m\"} 1.0\n\
            vllm:num_requests_waiting{engine=\"0\"} 2.0 1700000000000\n\
            vllm:num_requests_waiting_by_reason{engine=\"0\"} 9.0\n\
            vllm:prompt_tokens_total{engine=\"0\"} 1e3\nvllm:generation_tokens_total{engine=\"0\"} 24\n";
        assert_eq!(read(vllm), Some(Gauges { running: 4, waiting: 2, tokens: Some(1024) }));
        assert_eq!(read(vllm).map(|gauges| gauges.requests()), Some(6));
        let llama = "llamacpp:requests_processing 1\nllamacpp:requests_deferred 0\n";
        assert_eq!(read(llama), Some(Gauges { running: 1, waiting: 0, tokens: None }));
        let baton =
            "baton_router_inflight 1\nbaton_router_queue_depth 0\nbaton_router_prompt_tokens_total 7\n";
        assert_eq!(read(baton), Some(Gauges { running: 0, waiting: 0, tokens: Some(7) }));
    }

    #[test]
    fn nonsense_is_no_gauge() {
        for text in [
            "",
            "ok",
            "vllm:num_requests_running",
            "vllm:num_requests_running{ 1",
            "vllm:num_requests_running NaN",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
        let wild = "tgi_batch_current_size -5\ntgi_queue_size 1e300\n";
        assert_eq!(read(wild), Some(Gauges { running: 0, waiting: u32::MAX, tokens: None }));
    }
}
