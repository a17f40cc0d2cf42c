use std::time::Duration;

use super::*;
use crate::admit::{Reason, Refused};

/// The value of an exported line.
fn value(metrics: &Metrics, name: &str) -> f64 {
    let text = metrics.render();
    let line = text.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or_else(|| panic!("{name}:\n{text}"))
}

#[test]
fn every_way_out_is_booked_once() {
    let metrics = Arc::new(Metrics::new().unwrap());
    let open = || Entry::open(Arc::clone(&metrics), Route::Chat);
    open().answered(200);
    open().refused(&Refusal::invalid("n", "no"));
    open().refused(&Refusal::Overloaded(Refused { reason: Reason::QueueFull, after: Duration::ZERO }));
    open().refused(&Refusal::WorkerLost);
    open().broke();
    drop(open());
    let live = open();
    let ended = |outcome: &str| {
        value(&metrics, &format!("baton_router_requests_ended_total{{outcome=\"{outcome}\"}}"))
    };
    assert_eq!(
        [ended("ok"), ended("client_error"), ended("refused"), ended("failed")],
        [1.0, 2.0, 1.0, 2.0],
        "who leaves is a client error, a broken stream is a failure"
    );
    assert_eq!(value(&metrics, "baton_router_inflight"), 1.0);
    assert_eq!(value(&metrics, "baton_router_requests_started_total"), 7.0);
    assert_eq!(value(&metrics, "baton_router_rejected_total{reason=\"queue_full\"}"), 1.0);
    let left = "baton_router_requests_total{code=\"499\",route=\"/v1/chat/completions\"}";
    assert_eq!(value(&metrics, left), 1.0);
    drop(live);
    assert_eq!(value(&metrics, "baton_router_inflight"), 0.0);
}
