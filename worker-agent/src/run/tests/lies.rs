//! Peers that say what cannot be.

use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use baton_config::protocol::HandoffStatus;
use baton_config::{HandoffId, Role, WorkerId};
use baton_engine::sim::oracle;
use baton_transfer::{Agent, AgentOptions};
use http::StatusCode;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::fleet::{Fleet, Setup, offer, prompt, until};

#[test]
fn a_ticket_that_cannot_be_is_not_taken_from_an_answer_either() {
    let fleet = Fleet::start(Setup::sim());
    let d = fleet.decode("d-0");
    fleet.block_on(async {
        let worker: WorkerId = "p-9".parse().unwrap();
        let agent = Agent::start(AgentOptions::new(worker.clone())).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let published = STANDARD.encode(agent.metadata());
        let epoch = fleet.register("p-9", Role::Prefill, &address.to_string(), &published).await;
        agent.set_epoch(epoch);
        // All of it is right but for the first token, by which an engine looks up a row of a table.
        let mut ticket = offer(&agent, &worker, epoch, (HandoffId(1), d.epoch()), 16, d.geometry());
        ticket.first.as_mut().unwrap().token = u32::MAX;
        let phase = "prefill/computed".to_owned();
        let status = HandoffStatus { worker: worker.clone(), epoch, phase, pending: vec![ticket] };
        let answer = get(move || async move { Json(status) }).delete(|| async { StatusCode::NO_CONTENT });
        let routes = Router::new()
            .route("/v1/handoffs/{id}", answer)
            .route("/v1/handoffs/{id}/want", post(|| async { StatusCode::NO_CONTENT }));
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        crate::listen::serve(listener, routes, &tasks, stop.clone());
        until("it is seen", || d.knows("p-9") == Some(epoch)).await;
        let request = fleet.request(prompt(1, 16, fleet.vocab()), 3);
        let mut body = fleet.generate_with(&d, &d, &request, 1);
        let peer = &mut body.handoff.as_mut().unwrap().peer;
        (peer.worker, peer.epoch, peer.address) = (worker, epoch, address.to_string());
        let apart = fleet.generate(&d, &body).await;
        assert_eq!((apart.report.imported_tokens, d.imported_bytes()), (0, 0));
        assert_eq!(apart.tokens, oracle(&fleet.sim().unwrap(), &fleet.model(), &request.tokens, 3));
        stop.cancel();
        until("all blocks back", || d.in_use() == 0).await;
    });
}
