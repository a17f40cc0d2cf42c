//! `/v1/handoffs/{id}`: what two workers say to each other.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use baton_config::protocol::{HandoffStatus, Ticket, TicketAck, Want};
use http::StatusCode;

use super::Shared;
use super::fault::{Fault, handoff_id, of_answer, parse};
use crate::handoff::Answer;
use crate::validate;

pub(super) async fn ticket(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<TicketAck>, Fault> {
    let id = handoff_id(&id)?;
    let ticket: Ticket = parse(body)?;
    validate::ticket(&ticket, &shared.model)?;
    match shared.handoffs.ticket(id, ticket).await {
        Answer::Ack(ack) => Ok(Json(ack)),
        answer => Err(of_answer(answer)),
    }
}

pub(super) async fn want(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<StatusCode, Fault> {
    let id = handoff_id(&id)?;
    let want: Want = parse(body)?;
    match shared.handoffs.want(id, want).await {
        Answer::Noted => Ok(StatusCode::NO_CONTENT),
        answer => Err(of_answer(answer)),
    }
}

pub(super) async fn status(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
) -> Result<Json<HandoffStatus>, Fault> {
    let id = handoff_id(&id)?;
    shared.handoffs.status(id).await.map(Json).map_err(of_answer)
}

pub(super) async fn delete(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
) -> Result<StatusCode, Fault> {
    let id = handoff_id(&id)?;
    shared.handoffs.delete(id).await;
    Ok(StatusCode::NO_CONTENT)
}
