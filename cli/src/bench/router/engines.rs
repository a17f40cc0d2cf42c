//! What the engines counted.

use futures_util::future::join_all;
use reqwest::Client;

use crate::failure::Failure;

/// What one engine has counted since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Counters {
    pub(super) generations: u64,
    pub(super) cancelled: u64,
    /// Tokens of prompts that were in its cache, or came from another worker's.
    pub(super) cached: u64,
    /// Tokens of prompts.
    pub(super) prompt: u64,
}

impl Counters {
    fn parse(metrics: &str) -> Self {
        let mut counters = Self::default();
        for (name, value) in metrics.lines().filter_map(|line| line.rsplit_once(' ')) {
            let value = value.parse::<f64>().unwrap_or(0.0) as u64;
            if name.starts_with("baton_agent_requests_total{") && !name.contains("\"prefill\"") {
                let ended = |end: &str| if name.contains(end) { value } else { 0 };
                counters.generations += ended("end=\"ok\"");
                counters.cancelled += ended("end=\"cancelled\"");
            }
            if name.starts_with("baton_agent_tokens_total{") {
                let kind = |kind: &str| if name.contains(kind) { value } else { 0 };
                let cached = kind("\"cached\"") + kind("\"imported\"");
                counters.cached += cached;
                counters.prompt += cached + kind("\"computed\"");
            }
        }
        counters
    }
}

/// The engines behind a gateway.
pub(super) struct Engines {
    http: Client,
    urls: Vec<String>,
}

/// What they did together.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Done {
    pub(super) cancelled: u64,
    /// Share of the prompt tokens that were not computed.
    pub(super) hit_rate: f64,
    /// Share of the generations that the busiest of them had.
    pub(super) worst_share: f64,
}

impl Engines {
    pub(super) fn new(urls: Vec<String>) -> Result<Self, Failure> {
        Ok(Self { http: crate::remote::client()?, urls })
    }

    pub(super) async fn read(&self) -> Result<Vec<Counters>, Failure> {
        let answers = join_all(self.urls.iter().map(|url| self.one(url))).await;
        answers.into_iter().collect()
    }

    async fn one(&self, url: &str) -> Result<Counters, Failure> {
        let failed = |error: reqwest::Error| Failure::because(format!("the counters of {url}"), &error);
        let answer = self.http.get(format!("{url}/metrics")).send().await.map_err(failed)?;
        let text = answer.error_for_status().map_err(failed)?.text().await.map_err(failed)?;
        Ok(Counters::parse(&text))
    }
}

/// Adds what each engine did between two readings of them.
pub(super) fn add(done: &mut Vec<Counters>, before: &[Counters], after: &[Counters]) {
    done.resize(after.len(), Counters::default());
    for ((done, before), after) in done.iter_mut().zip(before).zip(after) {
        done.generations += after.generations.saturating_sub(before.generations);
        done.cancelled += after.cancelled.saturating_sub(before.cancelled);
        done.cached += after.cached.saturating_sub(before.cached);
        done.prompt += after.prompt.saturating_sub(before.prompt);
    }
}

impl Done {
    /// The sum of what each engine did.
    pub(super) fn of(each: &[Counters]) -> Self {
        let sum = |field: fn(&Counters) -> u64| each.iter().map(field).sum::<u64>();
        let share = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
        let most = each.iter().map(|counters| counters.generations).max().unwrap_or(0);
        Self {
            cancelled: sum(|counters| counters.cancelled),
            hit_rate: share(sum(|counters| counters.cached), sum(|counters| counters.prompt)),
            worst_share: share(most, sum(|counters| counters.generations)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_done_is_the_difference_of_two_readings() {
        let text = |ok: u64, cached: u64, computed: u64| {
            Counters::parse(&format!(
                "# HELP baton_agent_requests_total x\nbaton_agent_requests_total{{end=\"ok\",kind=\"openai\"}} {ok}\n\
                 baton_agent_requests_total{{end=\"ok\",kind=\"prefill\"}} 99\n\
                 baton_agent_requests_total{{end=\"cancelled\",kind=\"generate\"}} 1\n\
                 baton_agent_tokens_total{{kind=\"cached\"}} {cached}\nbaton_agent_tokens_total{{kind=\"computed\"}} {computed}\n\
                 baton_agent_tokens_total{{kind=\"generated\"}} 7\n"
            ))
        };
        let before = [text(5, 10, 20), text(5, 0, 0)];
        let after = [text(8, 40, 20), text(6, 0, 10)];
        let mut each = Vec::new();
        add(&mut each, &before, &after);
        let done = Done::of(&each);
        assert_eq!((done.hit_rate, done.worst_share, done.cancelled), (0.75, 0.75, 0));
    }
}
