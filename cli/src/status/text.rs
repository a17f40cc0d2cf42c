//! The status for people: what is wrong, then who is there.

use baton_config::protocol::{DrainStatus, PathStatus};

use super::problems::Severity;
use super::{ConductorRow, FleetStatus, PoolRow, WorkerRow};
use crate::table::columns;

/// Tells a terminal to cut what is wider than it.
const CUT: &str = "\x1b[?7l";
/// Tells it to break lines again.
const BREAK: &str = "\x1b[?7h";

pub(super) fn describe(status: &FleetStatus, terminal: bool) -> String {
    let mut out = shown(&head(&status.conductor));
    out.push_str(&shown(&problems(status)));
    out.push_str(&format!("\n{}", table(&pools(&status.pools), terminal)));
    out.push_str(&format!("\n{}", table(&workers(&status.workers), terminal)));
    let details: Vec<String> = status.workers.iter().flat_map(details).collect();
    if !details.is_empty() {
        out.push_str(&format!("\n{}\n", shown(&details.join("\n"))));
    }
    if !status.paths.is_empty() {
        out.push_str(&format!("\n{}", table(&paths(&status.paths), terminal)));
    }
    out
}

/// Columns; a terminal cuts the lines that are wider than it, where it would break them into two.
fn table(rows: &[Vec<String>], terminal: bool) -> String {
    let text = shown(&columns(rows));
    if terminal { format!("{CUT}{text}{BREAK}") } else { text }
}

/// What others wrote steers no terminal.
fn shown(text: &str) -> String {
    text.replace(|letter: char| letter.is_control() && letter != '\n', "\u{fffd}")
}

fn head(conductor: &ConductorRow) -> String {
    let mut out = format!("conductor {}, store {}", conductor.url, conductor.store);
    let health = &conductor.store_health;
    if let Some(endpoint) = &health.endpoint {
        out.push_str(&format!(" at {endpoint}"));
    }
    match (health.up, health.last_ok_ms) {
        (true, _) => {}
        (false, Some(ms)) => out.push_str(&format!(" (last answer {})", ago(ms))),
        (false, None) => out.push_str(" (has never answered)"),
    }
    if conductor.view_age_ms > 0 {
        out.push_str(&format!(", view {} old", lasting(conductor.view_age_ms)));
    }
    out.push('\n');
    if conductor.conductors.len() > 1 {
        let each = conductor.conductors.iter().map(|one| {
            let known = &one.known;
            let leads = if known.leader { " leads" } else { "" };
            let silent = if one.answers { "" } else { " silent" };
            format!("{} ({}{leads}{silent})", known.name, known.url)
        });
        out.push_str(&format!("conductors: {}\n", each.collect::<Vec<_>>().join(", ")));
    }
    out
}

fn problems(status: &FleetStatus) -> String {
    if status.problems.is_empty() {
        return "no problems\n".to_owned();
    }
    let mut out = "\nPROBLEMS\n".to_owned();
    for problem in &status.problems {
        let mark = match problem.severity {
            Severity::Down => "!!",
            Severity::Degraded => "! ",
            Severity::Note => "- ",
        };
        out.push_str(&format!("{mark} {}\n     {}\n", problem.what, problem.remedy));
    }
    out
}

fn row(cells: &[&str]) -> Vec<String> {
    cells.iter().map(ToString::to_string).collect()
}

fn pools(pools: &[PoolRow]) -> Vec<Vec<String>> {
    let mut rows = vec![row(&["POOL", "ROLE", "WANTED", "JOINING", "READY", "DRAINING", "WANTED BECAUSE"])];
    for PoolRow { status, set_by } in pools {
        let scaled = status.autoscale.as_ref().map(|scale| {
            let (reason, when) = (&scale.reason, ago(scale.decided_ms_ago));
            match (scale.dry_run, *set_by) {
                (false, "autoscaler") => format!("autoscaler, {when}: {reason}"),
                (true, _) => format!("dry run wants {}, {when}: {reason}", scale.desired),
                (false, _) => format!("autoscaler wants {}, {when}: {reason}", scale.desired),
            }
        });
        let why = match (*set_by, scaled) {
            ("autoscaler", Some(scaled)) => scaled,
            ("operator", Some(scaled)) => format!("an operator said so; {scaled}"),
            ("operator", None) => "an operator said so".to_owned(),
            (_, Some(scaled)) => format!("the fleet file says so; {scaled}"),
            (_, None) => "the fleet file says so".to_owned(),
        };
        rows.push(vec![
            status.name.to_string(),
            status.role.to_string(),
            status.desired.to_string(),
            status.joining.to_string(),
            status.ready.to_string(),
            status.draining.to_string(),
            why,
        ]);
    }
    rows
}

fn workers(workers: &[WorkerRow]) -> Vec<Vec<String>> {
    let head = [
        "WORKER",
        "STATE",
        "EPOCH",
        "AGE",
        "HEARD",
        "RUNNING",
        "WAITING",
        "KV",
        "KV BLOCKS",
        "CACHED",
        "PID",
        "ADDRESS",
    ];
    let mut rows = vec![row(&head)];
    let or_dash = |ms: Option<u64>, show: fn(u64) -> String| ms.map_or("-".to_owned(), show);
    for worker in workers {
        let kv = &worker.kv_blocks;
        let known = kv.total() > 0;
        rows.push(vec![
            worker.name.to_string(),
            worker.state.clone(),
            worker.epoch.to_string(),
            or_dash(worker.age_ms, lasting),
            or_dash(worker.seen_ms, ago),
            worker.requests_running.to_string(),
            worker.requests_waiting.to_string(),
            if known { format!("{}%", worker.kv_percent) } else { "-".to_owned() },
            if known { format!("{} of {}", kv.held(), kv.total()) } else { "-".to_owned() },
            if known { kv.shared.to_string() } else { "-".to_owned() },
            worker.pid.to_string(),
            worker.address.clone(),
        ]);
    }
    rows
}

/// What does not fit in a column: what a drain waits for, and what went wrong last.
fn details(worker: &WorkerRow) -> Vec<String> {
    let name = &worker.name;
    let drain = worker.drain.map(|drain| format!("{name} drains for {}", drain_line(&drain)));
    let error = worker.last_error.as_ref().map(|error| {
        let when = worker.last_error_ago_ms.map_or(String::new(), |ms| format!(", {}", ago(ms)));
        format!("{name}{when}: {error}")
    });
    drain.into_iter().chain(error).collect()
}

/// A drain in words.
pub(crate) fn drain_line(drain: &DrainStatus) -> String {
    let DrainStatus { requests, requests_running, requests_waiting, leases, handoffs, blocks_held, .. } =
        *drain;
    let taken_in = handoffs.saturating_sub(leases);
    let mut waits = Vec::new();
    if requests > 0 {
        waits.push(format!("{requests} requests ({requests_running} running, {requests_waiting} waiting)"));
    }
    if leases > 0 {
        waits.push(format!("{leases} handed out, not yet read"));
    }
    if taken_in > 0 {
        waits.push(format!("{taken_in} being read"));
    }
    if blocks_held > 0 {
        waits.push(format!("{blocks_held} KV blocks held"));
    }
    let waits = if waits.is_empty() { "nothing any more".to_owned() } else { waits.join(", ") };
    format!(
        "{}, {} of its grace left, waits for {waits}",
        lasting(drain.since_ms),
        lasting(drain.grace_left_ms)
    )
}

fn paths(paths: &[PathStatus]) -> Vec<Vec<String>> {
    let mut rows = vec![row(&["PREFILL", "DECODE", "BACKEND", "BANDWIDTH", "LATENCY", "WHY"])];
    for path in paths {
        let figure =
            |value: Option<f64>, unit: &str| value.map_or("-".to_owned(), |v| format!("{v:.2} {unit}"));
        rows.push(vec![
            path.prefill.to_string(),
            path.decode.to_string(),
            path.backend.clone(),
            figure(path.gb_per_s, "GB/s"),
            figure(path.latency_us, "us"),
            path.reason.clone(),
        ]);
    }
    rows
}

/// A duration in the unit that says most.
pub(super) fn lasting(ms: u64) -> String {
    match ms {
        0..10_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        10_000..120_000 => format!("{} s", ms / 1000),
        120_000..7_200_000 => format!("{} min", ms / 60_000),
        7_200_000..172_800_000 => format!("{} h", ms / 3_600_000),
        _ => format!("{} d", ms / 86_400_000),
    }
}

pub(super) fn ago(ms: u64) -> String {
    format!("{} ago", lasting(ms))
}
