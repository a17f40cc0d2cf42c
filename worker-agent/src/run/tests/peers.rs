//! Peers that have no room for long, that leave, and that hold a part of what is needed.

use std::time::Duration;

use baton_config::protocol::{HandoffOutcome, TicketAck};
use baton_config::{HandoffId, KvGeometry, Role, Shard};
use baton_engine::SeqId;
use baton_engine::sim::oracle;
use baton_transfer::BackendKind;
use futures_util::FutureExt as _;

use super::fleet::{Fleet, Setup, prompt, until};
use crate::handoff::Limits;

/// A decode worker of which one request with a long prompt takes most blocks: 64 of 16 tokens each.
fn cramped(decode_us: f64) -> Setup {
    Setup { blocks: 64, decode_us, ..Setup::sim() }
}

fn outlives_a_queue_longer_than_its_lease(device: bool) {
    let limits = Limits {
        lease: Duration::from_millis(1500),
        repost_after: Duration::from_millis(100),
        repost_after_max: Duration::from_millis(200),
        ..Limits::default()
    };
    let fleet = Fleet::start(Setup { device, ..cramped(85_000.0) });
    let (p, d) = (fleet.worker("p-0", Role::Prefill, |it| it.handoff = limits), fleet.decode("d-0"));
    fleet.block_on(async {
        // Nine seconds: six leases of the handoff, and time for an audit to find exports that nobody looked after.
        let before = fleet.request(prompt(1, 900, fleet.vocab()), 110);
        let before = fleet.start_generate_alone(&d, &before);
        until("most of the decode worker is taken", || d.in_use() > 50).await;
        let request = fleet.request(prompt(2, 300, fleet.vocab()), 4);
        let (apart, reply) = fleet.hand_over(&p, &d, &request, 1).await;
        assert_eq!(reply.unwrap().outcome, HandoffOutcome::Done);
        assert_eq!((apart.report.fallback, apart.report.imported_tokens), (None, 300));
        assert_eq!(apart.tokens, oracle(&fleet.sim().unwrap(), &fleet.model(), &request.tokens, 4));
        assert_eq!(before.await.unwrap().tokens.len(), 110);
        until("all blocks back", || p.in_use() == 0 && d.in_use() == 0).await;
        p.audit().await;
        d.audit().await;
    });
}

#[test]
fn a_handoff_outlives_a_queue_that_is_longer_than_its_lease() {
    outlives_a_queue_longer_than_its_lease(false);
}

#[test]
fn a_handoff_whose_blocks_are_to_be_staged_outlives_a_queue_that_is_longer_than_its_lease() {
    outlives_a_queue_longer_than_its_lease(true);
}

#[test]
fn a_prompt_larger_than_the_staging_passes_through_it() {
    let fleet = Fleet::start(Setup::sim());
    let (p, d) = (fleet.prefill("p-0"), fleet.decode("d-0"));
    fleet.block_on(async {
        // 38 blocks, of which 24 are staged at once: what was read makes room for the next.
        let request = fleet.request(prompt(1, 1200, fleet.vocab()), 4);
        let (apart, reply) = fleet.hand_over(&p, &d, &request, 1).await;
        assert_eq!((apart.report.fallback, apart.report.imported_tokens), (None, 1200));
        assert_eq!(reply.unwrap().outcome, HandoffOutcome::Done);
        assert_eq!(apart.tokens, oracle(&fleet.sim().unwrap(), &fleet.model(), &request.tokens, 4));
        p.audit().await;
    });
}

#[test]
fn who_asks_for_a_handoff_that_is_open_and_leaves_does_not_end_it() {
    let fleet = Fleet::start(Setup::sim());
    let (p, d) = (fleet.prefill("p-0"), fleet.decode("d-0"));
    fleet.block_on(async {
        let opening = p.opening(&d, 1, 64);
        // Sequences that the engine does not know.
        let open = |seq| p.handoffs().open_prefill(opening.clone(), SeqId(u64::MAX - seq));
        let mut end = open(0).await.unwrap();
        for seq in 1..50 {
            assert!(!matches!(open(seq).now_or_never(), Some(Ok(_))));
        }
        // Asked in this order, so that all of them were answered before.
        assert_eq!(p.handoffs().status(HandoffId(1)).await.unwrap().phase, "prefill/queued");
        assert!(end.try_recv().is_err());
        fleet.delete(&p, 1).await;
        assert_eq!(end.await.unwrap(), HandoffOutcome::Cancelled);
    });
}

#[test]
fn blocks_that_wait_for_room_are_freed_when_the_client_leaves_or_the_decode_worker_dies() {
    let fleet = Fleet::start(cramped(200_000.0));
    let (p, d) = (fleet.prefill("p-0"), fleet.decode("d-0"));
    fleet.block_on(async {
        let before = fleet.request(prompt(1, 900, fleet.vocab()), 100);
        let _before = fleet.start_generate_alone(&d, &before);
        until("most of the decode worker is taken", || d.in_use() > 50).await;
        let request = fleet.request(prompt(2, 300, fleet.vocab()), 4);
        // Both sooner than the lease of half a minute, which is longer than this test waits.
        for dies in [false, true] {
            let id = 1 + u128::from(dies);
            let prefill = fleet.start_prefill(&p, &d, &request, id);
            let generate = fleet.start_generate(&d, &p, &request, id);
            until("the prompt has its blocks", || p.in_use() >= 10).await;
            // Long enough to be put off.
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert!(p.in_use() >= 10 && d.imported_bytes() == 0, "it waits");
            match dies {
                false => drop((prefill, generate)),
                true => {
                    d.kill();
                    assert_eq!(prefill.await.unwrap().outcome, HandoffOutcome::Expired);
                }
            }
            until("all blocks back", || p.in_use() == 0).await;
        }
        p.audit().await;
    });
}

/// Memory of other workers that is mapped into this process: a worker maps its own to be written.
fn mapped() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains(" r--s ") && line.contains("/memfd:baton-")).count()
}

#[test]
fn what_was_opened_to_a_peer_is_closed_when_it_has_left() {
    let shm = &[BackendKind::Shm];
    let fleet = Fleet::start(Setup { backends: shm, device: false, ..Setup::sim() });
    let (p, d) = (fleet.prefill("p-0"), fleet.decode("d-0"));
    fleet.block_on(async {
        let before = mapped();
        let request = fleet.request(prompt(1, 100, fleet.vocab()), 4);
        let (apart, _) = fleet.hand_over(&p, &d, &request, 1).await;
        assert_eq!(apart.report.fallback, None);
        assert!(mapped() > before && d.sessions() == 1, "its blocks were read where they are");
        assert_eq!(fleet.post_text(&p, "/v1/drain", "").await.status().as_u16(), 202);
        p.ended().await;
        // Its memory is still there: the process has not ended.
        until("the decode worker lets go of it", || mapped() == before && d.sessions() == 0).await;
        assert_eq!(d.status().await.paths.len(), 0, "nothing is told of who is not there");
        let metrics = d.text("/metrics").await;
        assert!(metrics.contains("baton_metadata_cache_invalidations_total 1"), "{metrics}");
    });
}

#[test]
fn blocks_with_some_of_the_heads_are_refused_and_the_prompt_prefilled() {
    let fleet = Fleet::start(Setup::sim());
    let (p, d) = (fleet.prefill("p-0"), fleet.decode("d-0"));
    fleet.block_on(async {
        let whole = p.geometry();
        let heads = whole.kv_heads;
        let shard = Shard::Tensor { rank: 0, degree: 2, heads };
        // It can be read, and has the digest and the first token it should have.
        let ticket = p.offer(&d, 1, 32, KvGeometry { kv_heads: heads / 2, shard, ..whole });
        let request = fleet.request(prompt(1, 32, fleet.vocab()), 3);
        let path = format!("/v1/handoffs/{}/ticket", HandoffId(1));
        let post = fleet.post(&d, &path, &ticket);
        let (apart, ack) = tokio::join!(fleet.generate_from(&d, &p, &request, 1), post);
        assert_eq!(apart.report.fallback.as_deref(), Some("geometry"));
        assert_eq!((apart.report.imported_tokens, d.imported_bytes()), (0, 0));
        assert_eq!(apart.tokens, oracle(&fleet.sim().unwrap(), &fleet.model(), &request.tokens, 3));
        assert_eq!(ack.unwrap().json::<TicketAck>().await.unwrap(), TicketAck::Abandoned);
        assert!(d.text("/metrics").await.contains("baton_transfer_errors_total{kind=\"geometry\"} 1"));
        until("all blocks back", || d.in_use() == 0).await;
    });
}
