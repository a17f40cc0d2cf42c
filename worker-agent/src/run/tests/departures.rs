//! Those who are not there any more: peers that the view has lost, and clients that read nothing.

use std::time::Duration;

use baton_config::protocol::{HandoffOutcome, PrefillReply};
use baton_config::{Epoch, HandoffId, Role};
use serde_json::json;
use tokio::net::TcpListener;

use super::fleet::{Fleet, PATIENCE, Running, Setup, prompt, until};

type Reply = tokio::task::JoinHandle<reqwest::Result<String>>;

/// Prefills for a decode worker in this life, of which only the view can tell that it is not there.
fn start_prefill(fleet: &Fleet, p: &Running, (peer, epoch): (&str, Epoch), address: &str, id: u128) -> Reply {
    let body = json!({
        "request_id": "r", "tokens": prompt(1, 60, fleet.vocab()), "handoff": {
            "id": HandoffId(id), "own_epoch": p.epoch(),
            "peer": { "worker": peer, "epoch": epoch, "address": address },
        },
    });
    fleet.start_post(p.address(), "/v1/prefill", &body)
}

#[test]
fn what_was_handed_to_a_life_ends_when_the_view_has_lost_it_and_only_then() {
    let fleet = Fleet::start(Setup::sim());
    let p = fleet.worker("p-0", Role::Prefill, |it| {
        // Nothing but the view ends anything within this test.
        (it.handoff.lease, it.handoff.post_faults_max) = (10 * PATIENCE, u32::MAX);
    });
    fleet.block_on(async {
        // Takes connections and never says a word.
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = silent.local_addr().unwrap().to_string();
        // Whom no view has ever shown may have joined a moment ago.
        let unheard = start_prefill(&fleet, &p, ("d-8", Epoch(1)), &address, 8);
        let first = fleet.register("d-9", Role::Decode, &address, "").await;
        until("it is seen", || p.knows("d-9") == Some(first)).await;
        let reply = start_prefill(&fleet, &p, ("d-9", first), &address, 1);
        until("both are handed out", || p.leases() == 2).await;
        let ended = async |reply: Reply| {
            let reply = tokio::time::timeout(PATIENCE, reply).await.expect("it is noticed");
            let reply: PrefillReply = serde_json::from_str(&reply.unwrap().unwrap()).unwrap();
            assert_eq!(reply.outcome, HandoffOutcome::Cancelled);
        };
        // The same process in another life.
        let second = fleet.register("d-9", Role::Decode, &address, "").await;
        assert!(second > first);
        ended(reply).await;
        until("it is seen", || p.knows("d-9") == Some(second)).await;
        // It does not keep its lease alive. The router may have heard of its next life.
        let reply = start_prefill(&fleet, &p, ("d-9", second), &address, 2);
        let of_the_next = start_prefill(&fleet, &p, ("d-9", Epoch(second.0 + 1)), &address, 9);
        ended(reply).await;
        assert_eq!(p.knows("d-9"), None);
        assert_eq!(p.leases(), 2, "views have changed, and not about these");
        for (id, reply) in [(8, unheard), (9, of_the_next)] {
            fleet.delete(&p, id).await;
            ended(reply).await;
        }
        until("all blocks back", || p.in_use() == 0).await;
        p.audit().await;
    });
}

#[test]
fn a_client_that_reads_nothing_does_not_keep_its_request() {
    let fleet = Fleet::start(Setup { decode_us: 1.0, ..Setup::sim() });
    let d = fleet.worker("d-0", Role::Both, |it| it.stalled = Duration::from_millis(500));
    fleet.block_on(async {
        let request = fleet.request(prompt(1, 20, fleet.vocab()), 1900);
        let unread = d.call("/v1/generate", &request).await;
        assert_eq!(unread.status().as_u16(), 200);
        until("it is given up", || d.in_flight() == 0 && d.in_use() == 0).await;
        let cancelled = "baton_agent_requests_total{end=\"cancelled\",kind=\"generate\"} 1";
        assert!(d.text("/metrics").await.contains(cancelled));
        drop(unread);
    });
}
