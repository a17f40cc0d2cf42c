//! `GET /v1/stream`: frames in both directions, any number of generations at once (`baton_config::frames`).

mod connection;
mod start;
mod streams;

use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::response::{IntoResponse, Response};
use baton_config::Epoch;
use baton_config::frames::PROTOCOL;
use http::header::{CONNECTION, UPGRADE};
use http::{HeaderMap, HeaderValue, StatusCode};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde::Deserialize;

use super::Shared;
use super::fault::Fault;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Params {
    /// The life of this worker that is meant.
    epoch: u64,
}

pub(super) async fn stream(
    State(shared): State<Arc<Shared>>,
    params: Result<Query<Params>, QueryRejection>,
    mut request: Request,
) -> Result<Response, Fault> {
    let Query(params) = params.map_err(|rejection| Fault::refused(rejection.body_text()))?;
    if !asks_for_frames(request.headers()) {
        return Err(Fault::refused(format!("ask for 'Upgrade: {PROTOCOL}' with 'Connection: upgrade'")));
    }
    let epoch = Epoch(params.epoch);
    check_life(&shared, epoch)?;
    let unable = || Fault::refused("this connection cannot be upgraded: use HTTP/1.1");
    let upgrade = request.extensions_mut().remove::<OnUpgrade>().ok_or_else(unable)?;
    let tasks = shared.tasks.clone();
    tasks.spawn(async move {
        let stop = shared.stop.clone();
        match stop.run_until_cancelled(upgrade).await {
            Some(Ok(upgraded)) => {
                let limit = shared.body_max;
                connection::Connection::new(shared, epoch, limit).run(TokioIo::new(upgraded)).await;
            }
            Some(Err(error)) => tracing::debug!(%error, "a connection was not upgraded"),
            None => {}
        }
    });
    let headers =
        [(CONNECTION, HeaderValue::from_static("upgrade")), (UPGRADE, HeaderValue::from_static(PROTOCOL))];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// Refuses what is meant for another life of this worker.
fn check_life(shared: &Shared, meant: Epoch) -> Result<(), Fault> {
    let current = shared.life.borrow().map(|life| life.epoch);
    if current == Some(meant) {
        return Ok(());
    }
    shared.metrics.stale_epoch.inc();
    Err(Fault::stale(current))
}

fn asks_for_frames(headers: &HeaderMap) -> bool {
    let says = |name, wanted: &str| {
        let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|part| part.trim().eq_ignore_ascii_case(wanted))
    };
    says(UPGRADE, PROTOCOL) && says(CONNECTION, "upgrade")
}
