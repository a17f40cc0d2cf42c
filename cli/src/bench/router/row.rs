//! The figures of one workload at one concurrency.

use std::time::Duration;

use baton_config::Bytes;
use baton_router::measure::TokenizerFigures;
use serde::Serialize;

use super::client::Seen;
use super::engines::Done;
use super::start::Fresh;
use super::{Measured, Workload};
use crate::table::columns;

/// One row. Times are in microseconds; what is not known is left out.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    gateway: String,
    pub(super) workload: &'static str,
    concurrency: u32,
    requests: u64,
    pub(super) failed: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) failure: Option<String>,
    tokens: u64,
    seconds: f64,
    req_per_s: f64,
    tok_per_s: f64,
    first_p50_us: f64,
    first_p99_us: f64,
    whole_p50_us: f64,
    whole_p99_us: f64,
    /// Without the gateway, in the same run.
    direct: Option<Direct>,
    /// Of the gateway's processes.
    cpu_s: f64,
    cpu_s_per_1000: f64,
    cpu_us_per_token: f64,
    resident_mib: f64,
    /// Share of the machine's processors that was used, by whomever.
    machine_busy: f64,
    /// Before and after streams that were only open.
    #[serde(skip_serializing_if = "Option::is_none")]
    around_mib: Option<[f64; 2]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fresh: Option<FreshRouter>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokenizer: Option<TokenizerFigures>,
    /// Share of the prompt tokens that the engines did not have to compute.
    hit_rate: f64,
    /// Share of the requests that the busiest engine had.
    worst_share: f64,
    cancelled: u64,
}

/// A router that was just started.
#[derive(Debug, Clone, Serialize)]
struct FreshRouter {
    /// From its start to its first answer.
    live_ms: f64,
    idle_mib: f64,
    /// Of that, what is no file's.
    own_mib: f64,
}

#[derive(Debug, Clone, Serialize)]
struct Direct {
    req_per_s: f64,
    tok_per_s: f64,
    first_p50_us: f64,
    first_p99_us: f64,
    hit_rate: f64,
    /// Of the first token, by the gateway.
    added_p50_us: f64,
    added_p99_us: f64,
}

impl Row {
    pub(super) fn new(
        gateway: &str,
        workload: Workload,
        concurrency: u32,
        measured: &Measured,
        direct: Option<&Measured>,
    ) -> Self {
        let sample = &measured.sample;
        let (requests, tokens) = (sample.answers.len() as u64 + sample.opened, sample.tokens());
        let seconds = sample.wall.as_secs_f64();
        let cpu_s = measured.cpu.as_secs_f64();
        let per = |count: u64, unit: f64| if count == 0 { 0.0 } else { cpu_s * unit / count as f64 };
        let [first_p50_us, first_p99_us] = percentiles(&sample.answers, |seen| seen.first);
        let [whole_p50_us, whole_p99_us] = percentiles(&sample.answers, |seen| seen.whole);
        let Done { cancelled, hit_rate, worst_share } = Done::of(&measured.done);
        Self {
            gateway: gateway.to_owned(),
            workload: workload.name(),
            concurrency,
            requests,
            failed: sample.failed,
            failure: sample.failure.clone(),
            tokens,
            seconds,
            req_per_s: rate(requests, seconds),
            tok_per_s: rate(tokens, seconds),
            first_p50_us,
            first_p99_us,
            whole_p50_us,
            whole_p99_us,
            direct: direct.map(|direct| {
                let answers = &direct.sample.answers;
                let [p50, p99] = percentiles(answers, |seen| seen.first);
                let wall = direct.sample.wall.as_secs_f64();
                Direct {
                    req_per_s: rate(answers.len() as u64, wall),
                    tok_per_s: rate(direct.sample.tokens(), wall),
                    first_p50_us: p50,
                    first_p99_us: p99,
                    hit_rate: Done::of(&direct.done).hit_rate,
                    added_p50_us: first_p50_us - p50,
                    added_p99_us: first_p99_us - p99,
                }
            }),
            cpu_s,
            cpu_s_per_1000: per(requests, 1e3),
            cpu_us_per_token: per(tokens, 1e6),
            resident_mib: mib(measured.resident_bytes),
            machine_busy: measured.machine.share(),
            around_mib: measured.around_bytes.map(|(before, after)| [mib(before), mib(after)]),
            fresh: None,
            tokenizer: None,
            hit_rate,
            worst_share,
            cancelled,
        }
    }

    /// Adds what a router is that was just started.
    pub(super) fn fresh(&mut self, fresh: Fresh) {
        self.fresh = Some(FreshRouter {
            live_ms: fresh.live_after.as_secs_f64() * 1e3,
            idle_mib: mib(fresh.resident_bytes),
            own_mib: mib(fresh.own_bytes),
        });
    }

    /// Adds what tokenizing such a prompt costs by itself.
    pub(super) fn floor(&mut self, figures: TokenizerFigures) {
        self.tokenizer = Some(figures);
    }

    /// What does not fit into columns.
    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if let Some([before, after]) = self.around_mib {
            notes.push(format!(
                "{} streams, {} open until the end: {before:.1} MiB before, {:.1} MiB with them, {after:.1} MiB afterwards",
                self.concurrency, self.requests, self.resident_mib
            ));
        }
        if let Some(fresh) = &self.fresh {
            notes.push(format!(
                "a fresh router: {:.1} ms from its start to 200 of /livez; idle {:.1} MiB, of which {:.1} MiB are its own and the \
                 rest the program's file",
                fresh.live_ms, fresh.idle_mib, fresh.own_mib
            ));
        }
        if let Some(tokenizer) = &self.tokenizer {
            notes.push(format!(
                "tokenizing 1,000 such prompts of {} tokens: {:.2} CPU-s as wholes, {:.2} in pieces when these were seen \
                 before, {:.2} when not",
                tokenizer.tokens,
                tokenizer.whole_us / 1e3,
                tokenizer.known_us / 1e3,
                tokenizer.new_us / 1e3,
            ));
        }
        notes
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn rate(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

/// Median and 99th percentile, in microseconds.
fn percentiles(answers: &[Seen], of: impl Fn(&Seen) -> Duration) -> [f64; 2] {
    let mut times: Vec<Duration> = answers.iter().map(of).collect();
    times.sort_unstable();
    [0.5, 0.99].map(|part| {
        let at = (times.len() as f64 * part) as usize;
        times.get(at.min(times.len().saturating_sub(1))).map_or(0.0, |time| time.as_secs_f64() * 1e6)
    })
}

/// The rows for people.
pub(super) fn describe(rows: &[Row]) -> String {
    let head = [
        "WORKLOAD",
        "C",
        "REQ/S",
        "TOK/S",
        "FIRST P50",
        "P99",
        "DIRECT P50",
        "P99",
        "ADDED P50",
        "P99",
        "CPU S/1000",
        "CPU US/TOKEN",
        "RSS",
        "BUSY",
        "HITS",
        "WORST",
        "FAILED",
    ];
    let mut table = vec![Vec::from(head.map(str::to_owned))];
    table.extend(rows.iter().map(|row| {
        let direct =
            |value: fn(&Direct) -> f64| row.direct.as_ref().map_or("-".to_owned(), |d| time(value(d)));
        vec![
            row.workload.to_owned(),
            row.concurrency.to_string(),
            format!("{:.0}", row.req_per_s),
            format!("{:.0}", row.tok_per_s),
            time(row.first_p50_us),
            time(row.first_p99_us),
            direct(|d| d.first_p50_us),
            direct(|d| d.first_p99_us),
            direct(|d| d.added_p50_us),
            direct(|d| d.added_p99_us),
            format!("{:.3}", row.cpu_s_per_1000),
            format!("{:.2}", row.cpu_us_per_token),
            Bytes((row.resident_mib * f64::from(1 << 20)) as u64).to_string(),
            format!("{:.0} %", 100.0 * row.machine_busy),
            format!("{:.0} %", 100.0 * row.hit_rate),
            format!("{:.0} %", 100.0 * row.worst_share),
            row.failed.to_string(),
        ]
    }));
    let notes: Vec<String> = rows.iter().flat_map(Row::notes).map(|note| note + "\n").collect();
    columns(&table) + &notes.concat()
}

fn time(us: f64) -> String {
    if us.abs() < 10_000.0 { format!("{us:.0} us") } else { format!("{:.1} ms", us / 1e3) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_sorted_times() {
        let seen = |us: u64| Seen {
            first: Duration::from_micros(us),
            whole: Duration::from_micros(2 * us),
            tokens: 3,
        };
        let answers: Vec<Seen> = (1..=100).rev().map(seen).collect();
        assert_eq!(percentiles(&answers, |seen| seen.first), [51.0, 100.0]);
        assert_eq!(percentiles(&answers, |seen| seen.whole), [102.0, 200.0]);
        assert_eq!(percentiles(&[], |seen| seen.first), [0.0, 0.0]);
    }
}
