//! Two workers and a conductor in one process, each worker on a runtime of its own, over loopback.

mod departures;
mod fleet;
mod frames;
mod lies;
mod openai;
mod peers;
mod tamper;
mod unfenced;

use std::time::Duration;

use baton_config::protocol::{
    FailureCode, FinishReason, GenerateEvent, HandoffOutcome, KvEvent, WorkerError, WorkerStatus,
};
use baton_config::{Epoch, HandoffId, KvLayout, Role};
use baton_engine::sim::oracle;
use baton_transfer::{ArenaMemory, BackendKind};

use crate::engine_thread::tests::Pass;
use crate::handoff::Limits;
use fleet::{Fleet, Setup, prompt, until};
use tamper::Tamper;

/// Lengths around the edges of blocks of 16 and 32 tokens and of chunks of 64.
const LENGTHS: [usize; 12] = [1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 130, 300];

/// Every prompt disaggregated gives the tokens and the logits bits of a worker alone.
fn proves_equal(setup: Setup) {
    let fleet = Fleet::start(setup);
    let (p, d, lone) = (fleet.prefill("p-0"), fleet.decode("d-0"), fleet.alone("lone"));
    fleet.block_on(async {
        for (n, length) in LENGTHS.into_iter().enumerate() {
            let request = fleet.request(prompt(n as u64, length, fleet.vocab()), 12);
            let alone = fleet.generate(&lone, &request).await;
            let (apart, reply) = fleet.hand_over(&p, &d, &request, n as u128 + 1).await;
            assert_eq!(alone.tokens, apart.tokens, "{length} tokens");
            assert_eq!(alone.digests, apart.digests, "{length} tokens");
            assert!(alone.digests.iter().all(Option::is_some));
            assert_eq!(apart.report.fallback, None, "{length} tokens");
            assert_eq!(apart.report.imported_tokens as usize, length);
            assert!(apart.report.imported_bytes > 0);
            let reply = reply.unwrap();
            assert_eq!(reply.outcome, HandoffOutcome::Done, "{length} tokens");
            if let Some(config) = fleet.sim() {
                assert_eq!(apart.tokens, oracle(&config, &fleet.model(), &request.tokens, 12));
            }
        }
        until("all blocks back", || p.in_use() == 0 && d.in_use() == 0).await;
        p.audit().await;
        d.audit().await;
        let text = d.text("/metrics").await;
        let line = format!("baton_transfer_bytes_total{{backend=\"{}\"}} 0", setup.backends[0]);
        assert!(!text.contains(&line), "the blocks came over {}", setup.backends[0]);
    });
}

#[test]
fn simulated_over_tcp_from_a_device_to_other_blocks() {
    proves_equal(Setup { backends: &[BackendKind::Tcp], ..Setup::sim() });
}

#[test]
fn simulated_over_shm_from_a_device_to_other_blocks() {
    proves_equal(Setup { backends: &[BackendKind::Shm], ..Setup::sim() });
}

#[test]
fn simulated_over_shm_from_host_memory() {
    proves_equal(Setup { backends: &[BackendKind::Shm], device: false, ..Setup::sim() });
}

#[test]
fn reference_over_tcp_from_host_memory() {
    proves_equal(Setup { backends: &[BackendKind::Tcp], device: false, ..Setup::reference() });
}

#[test]
fn reference_between_arenas_with_layers_outside_of_blocks() {
    for device in [false, true] {
        let layouts = (KvLayout::L2bHnd, KvLayout::Lbnhc);
        proves_equal(Setup { device, layouts, ..Setup::reference() });
    }
}

#[test]
fn reference_over_shm_from_a_device() {
    proves_equal(Setup { backends: &[BackendKind::Shm], ..Setup::reference() });
}

#[test]
fn reference_straight_between_devices_that_networks_reach() {
    use baton_transfer::probe;
    let works = |found: &[probe::Probe]| found.iter().any(|each| each.works);
    let libfabric = probe::libfabric(&baton_transfer::LibfabricOptions::default());
    let ucx = probe::ucx(&baton_transfer::UcxOptions::default());
    let (same, other) = ((KvLayout::Nhd, KvLayout::Nhd), (KvLayout::Nhd, KvLayout::Hnd));
    for (backend, is_here, layouts) in [
        // In place at the source, which copies what it sends; staged at the destination.
        (&[BackendKind::Tcp], true, same),
        (&[BackendKind::Libfabric], works(&libfabric), same),
        (&[BackendKind::Ucx], works(&ucx), other),
    ] {
        match is_here {
            true => proves_equal(Setup { backends: backend, direct: true, layouts, ..Setup::reference() }),
            false => println!("skipped: {} cannot be opened here", backend[0]),
        }
    }
}

#[test]
fn many_at_a_time() {
    let fleet = Fleet::start(Setup { blocks: 600, ..Setup::sim() });
    let (p, d) = (fleet.prefill("p-0"), fleet.decode("d-0"));
    fleet.block_on(async {
        let one = async |n: u64| {
            let request = fleet.request(prompt(n, 20 + (n as usize * 37) % 400, fleet.vocab()), 8);
            let (apart, _) = fleet.hand_over(&p, &d, &request, u128::from(n) + 1).await;
            let expected = oracle(&fleet.sim().unwrap(), &fleet.model(), &request.tokens, 8);
            assert_eq!(apart.tokens, expected, "request {n}");
            apart.report.fallback
        };
        let fallbacks = futures_util::future::join_all((0..64).map(one)).await;
        assert_eq!(fallbacks, vec![None; 64]);
        until("all blocks back", || p.in_use() == 0 && d.in_use() == 0).await;
        p.audit().await;
        d.audit().await;
    });
}

#[test]
fn only_what_is_not_cached_moves() {
    let fleet = Fleet::start(Setup { prefix_cache: true, ..Setup::sim() });
    let (p, d) = (fleet.prefill("p-0"), fleet.decode("d-0"));
    fleet.block_on(async {
        let shared = prompt(1, 128, fleet.vocab());
        let first = fleet.request(shared.clone(), 4);
        let (apart, _) = fleet.hand_over(&p, &d, &first, 1).await;
        assert_eq!(apart.report.imported_tokens, 128);
        let bytes_per_token = apart.report.imported_bytes / 128;
        let mut longer = shared;
        longer.extend(prompt(2, 40, fleet.vocab()));
        let second = fleet.request(longer.clone(), 4);
        let (apart, reply) = fleet.hand_over(&p, &d, &second, 2).await;
        assert_eq!((apart.report.cached_tokens, apart.report.imported_tokens), (128, 40));
        // Blocks of 32 tokens at the source: 40 tokens lie in two of them.
        assert_eq!(apart.report.imported_bytes, 2 * 32 * bytes_per_token);
        let reply = reply.unwrap();
        assert_eq!((reply.cached_tokens, reply.computed_tokens), (128, 40));
        until("nobody references what is cached", || p.in_use() == 0 && d.in_use() == 0).await;
        let told = d.status().await;
        assert!(told.kv_evictable > 0 && told.kv_evictable == told.kv_blocks.shared, "{told:?}");
        for (worker, cached, computed, imported) in [(&p, 128, 168, 0), (&d, 128, 0, 168)] {
            let text = worker.text("/metrics").await;
            for (kind, tokens) in [("cached", cached), ("computed", computed), ("imported", imported)] {
                let line = format!("baton_agent_tokens_total{{kind=\"{kind}\"}} {tokens}\n");
                assert!(text.contains(&line), "{line} in {text}");
            }
        }
        assert_eq!(apart.tokens, oracle(&fleet.sim().unwrap(), &fleet.model(), &longer, 4));
    });
}

#[test]
fn bytes_corrupted_after_the_ticket_are_caught_and_prefilled_again() {
    let fleet = Fleet::start(Setup { device: false, ..Setup::sim() });
    let (p, d) = (fleet.prefill("p-0"), fleet.decode("d-0"));
    fleet.block_on(async {
        let request = fleet.request(prompt(3, 160, fleet.vocab()), 6);
        let prefill = fleet.start_prefill(&p, &d, &request, 7);
        // The tickets wait at the decode worker, whose request has not come yet.
        until("tickets are out", || d.parked() > 0).await;
        until("the last ticket is out", || p.pending_blocks(7) == 5).await;
        let ArenaMemory::Host(memory) = p.memory() else { panic!("host memory") };
        let offset = p.pending_offsets(7)[3];
        let mut byte = [0];
        memory.read(offset + 100, &mut byte);
        memory.write(offset + 100, &[byte[0] ^ 4]);
        let apart = fleet.generate_from(&d, &p, &request, 7).await;
        assert_eq!(apart.report.fallback.as_deref(), Some("integrity"));
        assert!(apart.report.imported_tokens <= 96, "what came before the bad block, at most");
        assert_eq!(apart.tokens, oracle(&fleet.sim().unwrap(), &fleet.model(), &request.tokens, 6));
        let text = d.text("/metrics").await;
        assert!(text.contains("baton_transfer_checksum_mismatch_total 2"), "read twice, caught twice");
        assert!(text.contains("baton_agent_local_prefill_total{reason=\"integrity\"} 1"));
        assert_eq!(prefill.await.unwrap().outcome, HandoffOutcome::Cancelled);
        until("all blocks back", || p.in_use() == 0 && d.in_use() == 0).await;
    });
}

#[test]
fn blocks_damaged_on_one_path_are_read_again_over_the_other() {
    let fleet = Fleet::start(Setup { backends: &[BackendKind::Tcp, BackendKind::Shm], ..Setup::sim() });
    let tamper = fleet.block_on(Tamper::start());
    let (p, d) = (fleet.prefill_behind("p-0", &tamper), fleet.decode("d-0"));
    fleet.block_on(async {
        for n in 1..=2 {
            let request = fleet.request(prompt(n, 60, fleet.vocab()), 6);
            let (apart, reply) = fleet.hand_over(&p, &d, &request, u128::from(n)).await;
            assert_eq!((apart.report.fallback, apart.report.imported_tokens), (None, 60));
            assert_eq!(apart.tokens, oracle(&fleet.sim().unwrap(), &fleet.model(), &request.tokens, 6));
            assert_eq!(reply.unwrap().outcome, HandoffOutcome::Done);
        }
        assert!(tamper.damaged() >= 2, "each handoff tries its usual path first");
        assert!(d.transferred(BackendKind::Shm) > 0, "the good bytes came over the other path");
        assert!(!d.text("/metrics").await.contains("baton_transfer_checksum_mismatch_total 0"));
        // The second path is not taken for the path of the pair.
        let status: WorkerStatus = d.get("/v1/state").await.json().await.unwrap();
        assert_eq!(status.paths[0].backend, "tcp");
        until("all blocks back", || p.in_use() == 0 && d.in_use() == 0).await;
        let told: WorkerStatus = p.get("/v1/state").await.json().await.unwrap();
        assert_eq!(
            (told.prefilled_tokens, told.prompt_tokens),
            (120, Some(60.0)),
            "two prompts were computed"
        );
        assert_eq!(told.kv_evictable, told.kv_blocks.shared, "nobody references what is cached");
        p.audit().await;
        d.audit().await;
    });
}

#[test]
fn a_prefill_worker_killed_at_work_costs_only_time() {
    let fleet = Fleet::start(Setup { us_per_token: 1_500.0, ..Setup::sim() });
    let (p, d) = (fleet.prefill("p-0"), fleet.decode("d-0"));
    fleet.block_on(async {
        let request = fleet.request(prompt(4, 300, fleet.vocab()), 6);
        let prefill = fleet.start_prefill(&p, &d, &request, 1);
        let generate = fleet.generate_from(&d, &p, &request, 1);
        let kill = async {
            until("something was imported", || d.imported_bytes() > 0).await;
            p.kill();
        };
        let (apart, ()) = tokio::join!(generate, kill);
        assert!(prefill.await.is_err(), "the connection broke");
        assert_eq!(apart.tokens, oracle(&fleet.sim().unwrap(), &fleet.model(), &request.tokens, 6));
        let report = apart.report;
        assert!(
            report.fallback.is_some() && report.imported_tokens > 0,
            "verified blocks are kept: {report:?}"
        );
        until("all blocks back", || d.in_use() == 0).await;
        d.audit().await;
    });
}

#[test]
fn a_decode_worker_killed_frees_the_prefill_workers_blocks() {
    let fleet = Fleet::start(Setup { us_per_token: 1_500.0, ..Setup::sim() });
    let (p, d) = (fleet.prefill("p-0"), fleet.decode("d-0"));
    fleet.block_on(async {
        let request = fleet.request(prompt(5, 300, fleet.vocab()), 6);
        let prefill = fleet.start_prefill(&p, &d, &request, 1);
        let generate = fleet.start_generate(&d, &p, &request, 1);
        until("the prefill runs", || p.in_use() > 0 && d.imported_bytes() > 0).await;
        d.kill();
        drop(generate);
        let reply = prefill.await.unwrap();
        assert_eq!(reply.outcome, HandoffOutcome::Expired);
        until("all blocks back", || p.in_use() == 0).await;
        p.audit().await;
    });
}

#[test]
fn a_client_that_leaves_frees_everything_in_any_phase() {
    let fleet = Fleet::start(Setup { us_per_token: 500.0, decode_us: 3_000.0, ..Setup::sim() });
    let (p, d) = (fleet.prefill("p-0"), fleet.decode("d-0"));
    fleet.block_on(async {
        for (n, wait_ms) in [0u64, 5, 20, 60, 120, 200, 300, 500].into_iter().enumerate() {
            let id = n as u128 + 1;
            let request = fleet.request(prompt(n as u64, 300, fleet.vocab()), 400);
            let prefill = fleet.start_prefill(&p, &d, &request, id);
            let generate = fleet.start_generate(&d, &p, &request, id);
            tokio::time::sleep(Duration::from_millis(wait_ms)).await;
            drop((prefill, generate));
            let left = std::time::Instant::now();
            until("all blocks back", || p.in_use() == 0 && d.in_use() == 0).await;
            println!("left after {wait_ms} ms: blocks back in {:?}", left.elapsed());
        }
        p.audit().await;
        d.audit().await;
    });
}

#[test]
fn deleting_a_handoff_ends_it_on_both_sides_and_the_request_goes_on() {
    let fleet = Fleet::start(Setup { us_per_token: 800.0, ..Setup::sim() });
    let (p, d) = (fleet.prefill("p-0"), fleet.decode("d-0"));
    fleet.block_on(async {
        let request = fleet.request(prompt(8, 300, fleet.vocab()), 5);
        let prefill = fleet.start_prefill(&p, &d, &request, 1);
        let generate = fleet.generate_from(&d, &p, &request, 1);
        let delete = async {
            until("the prefill runs", || p.in_use() > 0 && d.imported_bytes() > 0).await;
            fleet.delete(&p, 1).await;
        };
        let (apart, ()) = tokio::join!(generate, delete);
        let reply = prefill.await.unwrap();
        assert_eq!(reply.outcome, HandoffOutcome::Cancelled);
        assert!((64..=300).contains(&reply.computed_tokens), "at least what was imported: {reply:?}");
        assert!(apart.report.fallback.is_some());
        assert_eq!(apart.tokens, oracle(&fleet.sim().unwrap(), &fleet.model(), &request.tokens, 5));
        // A request that comes after its handoff was deleted.
        fleet.delete(&d, 2).await;
        let apart = fleet.generate_from(&d, &p, &request, 2).await;
        assert_eq!(apart.report.fallback.as_deref(), Some("peer_ended"));
        fleet.delete(&p, 3).await;
        let reply = fleet.start_prefill(&p, &d, &request, 3).await.unwrap();
        assert_eq!((reply.outcome, reply.computed_tokens), (HandoffOutcome::Cancelled, 0));
        until("all blocks back", || p.in_use() == 0 && d.in_use() == 0).await;
    });
}

#[test]
fn a_prefill_that_never_comes_is_not_waited_for() {
    let fleet = Fleet::start(Setup::sim());
    let (p, d) = (fleet.prefill("p-0"), fleet.decode("d-0"));
    fleet.block_on(async {
        let request = fleet.request(prompt(9, 50, fleet.vocab()), 5);
        let apart = fleet.generate_from(&d, &p, &request, 1).await;
        assert_eq!(apart.report.fallback.as_deref(), Some("peer_unknown"));
        assert_eq!(apart.tokens, oracle(&fleet.sim().unwrap(), &fleet.model(), &request.tokens, 5));
        let reply = fleet.start_prefill(&p, &d, &request, 2).await.unwrap();
        assert_eq!(reply.outcome, HandoffOutcome::Expired, "nor is a decode that never comes");
        until("all blocks back", || p.in_use() == 0 && d.in_use() == 0).await;
    });
}

#[test]
fn messages_of_another_life_are_refused_and_counted() {
    let fleet = Fleet::start(Setup::sim());
    let (p, d) = (fleet.prefill("p-0"), fleet.decode("d-0"));
    fleet.block_on(async {
        let request = fleet.request(prompt(9, 50, fleet.vocab()), 5);
        let mut body = fleet.generate_with(&d, &p, &request, 1);
        body.handoff.as_mut().unwrap().own_epoch = Epoch(d.epoch().0 + 100);
        let response = fleet.post(&d, "/v1/generate", &body).await.unwrap();
        assert_eq!(response.status().as_u16(), 409);
        let error: WorkerError = response.json().await.unwrap();
        assert_eq!(error.code, FailureCode::Unavailable);
        let want = serde_json::json!({"worker": "d-0", "epoch": d.epoch(), "to_epoch": 0, "from_token": 0});
        let path = format!("/v1/handoffs/{}/want", HandoffId(1));
        assert_eq!(fleet.post(&p, &path, &want).await.unwrap().status().as_u16(), 409);
        assert!(d.text("/metrics").await.contains("baton_stale_epoch_refused_total 1"));
        assert!(p.text("/metrics").await.contains("baton_stale_epoch_refused_total 1"));
        let mut opening = serde_json::to_value(&body).unwrap();
        opening
            .as_object_mut()
            .unwrap()
            .retain(|key, _| ["request_id", "tokens", "handoff"].contains(&key.as_str()));
        assert_eq!(fleet.post(&d, "/v1/prefill", &opening).await.unwrap().status().as_u16(), 409);
        // By the end of this one the engine has seen the others.
        fleet.generate(&d, &request).await;
        until("what was begun before it was refused is back", || d.in_use() == 0).await;
    });
}

#[test]
fn bad_input_is_refused_with_a_reason() {
    let fleet = Fleet::start(Setup::sim());
    let d = fleet.decode("d-0");
    fleet.block_on(async {
        for (path, body, status) in [
            ("/v1/generate", "", 400),
            ("/v1/generate", "{", 400),
            ("/v1/generate", r#"{"request_id":"r","tokens":[],"max_tokens":1}"#, 400),
            ("/v1/generate", r#"{"request_id":"r","tokens":[1],"max_tokens":1,"surprise":1}"#, 400),
            ("/v1/generate", r#"{"request_id":"r","tokens":["1"],"max_tokens":1}"#, 400),
            ("/v1/generate", r#"{"request_id":"r","tokens":[-1],"max_tokens":1}"#, 400),
            ("/v1/prefill", r#"{"request_id":"r","tokens":[1]}"#, 400),
            ("/v1/handoffs/zz/ticket", "{}", 400),
            ("/v1/handoffs/00000000000000000000000000000001/ticket", "{}", 400),
            ("/v1/handoffs/00000000000000000000000000000001/want", "[]", 400),
            ("/v1/nothing", "", 404),
        ] {
            let response = fleet.post_text(&d, path, body).await;
            let answered = response.status().as_u16();
            let error: WorkerError = response.json().await.unwrap();
            assert_eq!((answered, error.code), (status, FailureCode::Refused), "{path} {body}: {error:?}");
            assert!(!error.message.is_empty());
        }
        let large = "x".repeat(fleet::BODY_MAX + 1);
        assert_eq!(fleet.post_text(&d, "/v1/generate", &large).await.status().as_u16(), 413);
        let unknown = d.get("/v1/handoffs/00000000000000000000000000000001").await;
        assert_eq!(unknown.status().as_u16(), 404);
        assert_eq!(d.get("/v1/kv/events?since=x").await.status().as_u16(), 400);
    });
}

#[test]
fn a_drained_worker_finishes_what_it_has_and_leaves() {
    let fleet = Fleet::start(Setup { decode_us: 10_000.0, ..Setup::sim() });
    let d = fleet.decode("d-0");
    fleet.block_on(async {
        let request = fleet.request(prompt(1, 20, fleet.vocab()), 60);
        let running = fleet.start_generate_alone(&d, &request);
        until("it runs", || d.in_use() > 0).await;
        assert!(d.status().await.drain.is_none());
        assert_eq!(fleet.post_text(&d, "/v1/drain", "").await.status().as_u16(), 202);
        until("it says so", || d.readyz() == 503).await;
        until("whoever chooses workers has heard", || d.refuses()).await;
        let refused = fleet.post(&d, "/v1/generate", &request).await.unwrap();
        assert_eq!(refused.status().as_u16(), 503);
        let status = d.status().await;
        assert_eq!((status.state.as_str(), status.epoch), ("draining", Some(d.epoch())));
        let waits_for = status.drain.expect("what it waits for");
        assert_eq!((waits_for.requests, waits_for.requests_running, waits_for.handoffs), (1, 1, 0));
        assert!(waits_for.blocks_held > 0 && waits_for.grace_left_ms <= 20_000, "{waits_for:?}");
        d.ended().await;
        assert_eq!(d.in_flight(), 0, "it was waited for");
        let done = running.await.unwrap();
        assert_eq!(done.tokens, oracle(&fleet.sim().unwrap(), &fleet.model(), &request.tokens, 60));
        assert_eq!(done.reason, Some(FinishReason::Length));
        fleet.wait_gone("d-0").await;
    });
}

#[test]
fn a_drain_without_a_conductor_ends_all_the_same_and_requests_of_those_who_have_not_heard_are_taken() {
    let mut fleet = Fleet::start(Setup { decode_us: 10_000.0, ..Setup::sim() });
    let d = fleet.decode("d-0");
    fleet.stop_conductor();
    fleet.block_on(async {
        let request = fleet.request(prompt(1, 20, fleet.vocab()), 30);
        let asked = std::time::Instant::now();
        assert_eq!(fleet.post_text(&d, "/v1/drain", "").await.status().as_u16(), 202);
        until("it says so", || d.readyz() == 503).await;
        // Nobody can hear that it leaves: what comes in the first second is still served.
        tokio::time::sleep(Duration::from_millis(200)).await;
        match fleet.start_generate_alone(&d, &request).await {
            Ok(taken) => {
                let expected = oracle(&fleet.sim().unwrap(), &fleet.model(), &request.tokens, 30);
                assert_eq!(taken.tokens, expected);
            }
            Err(status) => {
                assert_eq!(status, 503);
                assert!(asked.elapsed() >= Duration::from_secs(1), "refused before the second was over");
            }
        }
        d.ended().await;
    });
}

#[test]
fn a_drain_ends_with_its_grace() {
    let fleet = Fleet::start(Setup { decode_us: 20_000.0, ..Setup::sim() });
    let d = fleet.worker("d-0", Role::Decode, |it| it.drain_grace = Duration::from_millis(300));
    fleet.block_on(async {
        // Two hundred seconds of tokens.
        let request = fleet.request(prompt(1, 20, fleet.vocab()), 1500);
        let _running = fleet.start_generate_alone(&d, &request);
        until("it runs", || d.in_use() > 0).await;
        assert_eq!(fleet.post_text(&d, "/v1/drain", "").await.status().as_u16(), 202);
        d.ended().await;
        fleet.wait_gone("d-0").await;
    });
}

#[test]
fn an_engine_that_hangs_keeps_its_worker_neither_from_a_new_life_nor_from_its_end() {
    let mut fleet = Fleet::start(Setup::sim());
    let (d, _hangs) = fleet.stuck("d-0", Duration::from_millis(300));
    let before = d.epoch();
    fleet.stop_conductor();
    fleet.start_conductor();
    fleet.block_on(async {
        let _waits = fleet.start_generate_alone(&d, &fleet.request(vec![1], 4));
        until("it is in a new life", || d.epoch() > before).await;
        assert_eq!(fleet.post_text(&d, "/v1/drain", "").await.status().as_u16(), 202);
        d.ended().await;
        fleet.wait_gone("d-0").await;
    });
}

#[test]
fn a_worker_whose_engine_dies_says_so_and_ends() {
    let fleet = Fleet::start(Setup::sim());
    let (d, passes) = fleet.stuck("d-0", Duration::from_secs(3600));
    fleet.block_on(async {
        let waits = fleet.start_post(d.address(), "/v1/generate", &fleet.request(vec![1], 4));
        until("it is in flight", || d.in_flight() == 1).await;
        assert_eq!(d.get("/livez").await.status().as_u16(), 200);
        // A bug of the engine.
        passes.go.send(Pass::InPanic).unwrap();
        let end = d.end().await;
        assert!(matches!(end, Err(super::RunError::EngineEnded { .. })), "{end:?}");
        let told = waits.await.unwrap().unwrap();
        assert!(told.contains("unavailable"), "{told}");
        assert_eq!(d.status().await.state, "unhealthy");
        for path in ["/livez", "/readyz"] {
            let answer = d.get(path).await;
            assert_eq!(answer.status().as_u16(), 503, "{path}");
            assert!(answer.text().await.unwrap().contains("engine"), "{path}");
        }
    });
}

#[test]
fn a_prefill_ends_with_its_engine_and_with_its_router() {
    let fleet = Fleet::start(Setup::sim());
    // Its decode side takes connections and never says a word: only the lease would end it.
    let silent = fleet.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let prefill = |p: &fleet::Running, id| {
        serde_json::json!({
            "request_id": "r", "tokens": [1, 2, 3], "handoff": {
                "id": HandoffId(id), "own_epoch": p.epoch(),
                "peer": { "worker": "d-9", "epoch": 1, "address": silent.local_addr().unwrap() },
            },
        })
    };
    for (pass, next) in [(Pass::Well, Pass::InPanic), (Pass::Well, Pass::Badly)] {
        let name = if matches!(next, Pass::Badly) { "p-1" } else { "p-0" };
        let (p, passes) = fleet.stuck(name, Duration::ZERO);
        fleet.block_on(async {
            let reply = fleet.start_post(p.address(), "/v1/prefill", &prefill(&p, 1));
            until("it is taken", || p.in_flight() == 1).await;
            // It waits for the end of the pass under way; the next one is its own.
            tokio::time::sleep(Duration::from_millis(200)).await;
            for pass in [pass, next] {
                passes.go.send(pass).unwrap();
            }
            let reply =
                tokio::time::timeout(fleet::PATIENCE, reply).await.expect("it ends").unwrap().unwrap();
            assert!(reply.contains("cancelled") || reply.contains("unavailable"), "{reply}");
            until("nothing is in flight", || p.in_flight() == 0 && p.leases() == 0).await;
        });
    }
    let p = fleet.prefill("p-2");
    fleet.block_on(async {
        let reply = fleet.start_post(p.address(), "/v1/prefill", &prefill(&p, 1));
        until("its blocks are handed out", || p.leases() == 1 && p.in_use() > 0).await;
        reply.abort();
        until("nothing is held", || p.in_flight() == 0 && p.leases() == 0 && p.in_use() == 0).await;
        p.audit().await;
    });
}

#[test]
fn an_operator_drains_a_worker_by_the_conductor_who_knows_how_busy_it_is() {
    let fleet = Fleet::start(Setup { decode_us: 10_000.0, ..Setup::sim() });
    let d = fleet.decode("d-0");
    fleet.block_on(async {
        let request = fleet.request(prompt(1, 20, fleet.vocab()), 300);
        let running = fleet.start_generate_alone(&d, &request);
        let deadline = std::time::Instant::now() + fleet::PATIENCE;
        while fleet.told("d-0").await["load"]["requests_running"] != 1 {
            assert!(std::time::Instant::now() < deadline, "never told: {}", fleet.told("d-0").await);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(d.get("/readyz").await.status().as_u16(), 200);
        fleet.wish_drain("d-0").await;
        until("it says so", || d.readyz() == 503).await;
        assert_eq!(d.get("/readyz").await.text().await.unwrap(), "draining\n");
        d.ended().await;
        assert_eq!(running.await.unwrap().tokens.len(), 300);
    });
}

#[test]
fn what_was_forgotten_is_found_and_counted() {
    let fleet = Fleet::start(Setup::sim());
    let limits = Limits { lease: Duration::from_millis(20), ..Limits::default() };
    let p = fleet.worker("p-0", Role::Prefill, |it| it.handoff = limits);
    fleet.block_on(async {
        assert_eq!(p.forget_an_export().await, 0, "it was taken back");
        assert!(p.text("/metrics").await.contains("baton_agent_audit_failures_total 1"));
    });
    assert_eq!(
        [(0, 100), (1_000, 100), (10_000, 0)].map(|(s, b)| super::staging_slots(s, b)),
        [8, 10, 10_000]
    );
}

#[test]
fn a_client_that_leaves_ends_its_request_before_its_first_token_and_after() {
    let fleet = Fleet::start(Setup { us_per_token: 12_000.0, decode_us: 20_000.0, ..Setup::sim() });
    let d = fleet.alone("d-0");
    fleet.block_on(async {
        // Half a minute until its first token, and the same until its last.
        for (length, tokens) in [(1900, 4), (1, 1900)] {
            let request = fleet.request(prompt(1, length, fleet.vocab()), tokens);
            let running = fleet.start_generate_alone(&d, &request);
            until("it runs", || d.in_use() > 0).await;
            drop(running);
            until("it is given up", || d.in_flight() == 0 && d.in_use() == 0).await;
        }
    });
}

#[test]
fn a_drained_prefill_worker_keeps_what_it_handed_out_until_it_is_read() {
    let fleet = Fleet::start(Setup::sim());
    let (p, d) = (fleet.prefill("p-0"), fleet.decode("d-0"));
    fleet.block_on(async {
        let request = fleet.request(prompt(7, 200, fleet.vocab()), 4);
        let prefill = fleet.start_prefill(&p, &d, &request, 1);
        let drain = async {
            // All is computed, and its decode side has not even come.
            until("blocks are handed out", || p.in_use() > 0 && p.leases() == 1).await;
            assert_eq!(fleet.post_text(&p, "/v1/drain", "").await.status().as_u16(), 202);
            until("it takes no more", || p.refuses()).await;
            let waits_for = p.status().await.drain.expect("what it waits for");
            assert_eq!((waits_for.requests, waits_for.leases, waits_for.handoffs), (1, 1, 1));
            tokio::time::sleep(Duration::from_millis(300)).await;
            assert!(!p.has_ended(), "it was not read yet");
            let apart = fleet.generate_from(&d, &p, &request, 1).await;
            assert_eq!((apart.report.fallback, apart.report.imported_tokens), (None, 200));
            assert_eq!(apart.tokens, oracle(&fleet.sim().unwrap(), &fleet.model(), &request.tokens, 4));
        };
        let (reply, ()) = tokio::join!(prefill, drain);
        assert_eq!(reply.unwrap().outcome, HandoffOutcome::Done);
        p.ended().await;
        fleet.wait_gone("p-0").await;
    });
}

#[test]
fn kv_events_can_be_followed_and_taken_up_again() {
    let fleet = Fleet::start(Setup { prefix_cache: true, ..Setup::sim() });
    let d = fleet.decode("d-0");
    fleet.block_on(async {
        let tasks = d.tasks();
        let mut follower = d.follow(0).await;
        let request = fleet.request(prompt(1, 64, fleet.vocab()), 2);
        fleet.generate(&d, &request).await;
        let batch = follower.next().await;
        assert_eq!((batch.epoch, batch.snapshot, batch.block_tokens), (d.epoch(), false, 16));
        let KvEvent::Stored { blocks, .. } = &batch.events[0] else { panic!("{batch:?}") };
        let hashes = baton_config::prefix::block_hashes(0, 16, &request.tokens);
        assert_eq!(blocks[0], hashes[0]);
        let other = fleet.request(prompt(2, 64, fleet.vocab()), 2);
        fleet.generate(&d, &other).await;
        let mut seq = batch.seq;
        let mut again = d.follow(seq).await;
        let next = again.next().await;
        assert!(!next.snapshot && next.seq > seq);
        seq = next.seq;
        // A number this life has not reached yet comes from another one: a snapshot replaces all.
        let snapshot = d.follow(seq + 1000).await.next().await;
        assert!(snapshot.snapshot);
        let known: Vec<_> = snapshot
            .events
            .iter()
            .flat_map(|e| match e {
                KvEvent::Stored { blocks, .. } => blocks.clone(),
                _ => panic!("{e:?} in a snapshot"),
            })
            .collect();
        assert!(hashes.iter().all(|hash| known.contains(hash)));
        // So does a number of another life, be it one that this life has reached.
        let of_another = d.follow_after(Epoch(d.epoch().0 - 1), seq).await.next().await;
        assert_eq!((of_another.snapshot, of_another.epoch, of_another.seq), (true, d.epoch(), snapshot.seq));
        // Nobody writes for those who have left.
        drop((follower, again));
        until("all followers are gone", || d.tasks() <= tasks + 1).await;
    });
}

#[test]
fn a_lost_conductor_is_not_missed_and_found_again() {
    let mut fleet = Fleet::start(Setup::sim());
    let (p, d) = (fleet.prefill("p-0"), fleet.decode("d-0"));
    let before = d.epoch();
    fleet.stop_conductor();
    fleet.block_on(async {
        let request = fleet.request(prompt(1, 100, fleet.vocab()), 4);
        let (apart, _) = fleet.hand_over(&p, &d, &request, 1).await;
        assert_eq!(apart.report.fallback, None);
    });
    fleet.start_conductor();
    fleet.block_on(async {
        until("both are in a new life", || d.epoch() > before && p.epoch() > before).await;
        fleet.wait_ready("p-0", p.epoch()).await;
        fleet.wait_ready("d-0", d.epoch()).await;
        until("each sees the other", || p.sees(&d) && d.sees(&p)).await;
        // What led to the former life is gone, and what leads to this one is found.
        let deadline = std::time::Instant::now() + fleet::PATIENCE;
        while !d.status().await.paths.is_empty() {
            assert!(std::time::Instant::now() < deadline, "the session with a former life is kept");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let request = fleet.request(prompt(2, 100, fleet.vocab()), 4);
        let (apart, _) = fleet.hand_over(&p, &d, &request, 2).await;
        assert_eq!(apart.report.fallback, None);
        assert_eq!(d.status().await.paths.len(), 1);
        assert_eq!(apart.tokens, oracle(&fleet.sim().unwrap(), &fleet.model(), &request.tokens, 4));
    });
}

#[test]
fn a_short_prompt_is_prefilled_where_it_is_decoded_once_that_is_known_to_be_quicker() {
    let fleet = Fleet::start(Setup { local_prefill: true, us_per_token: 5.0, ..Setup::sim() });
    let (p, d) = (fleet.prefill("p-0"), fleet.decode("d-0"));
    fleet.block_on(async {
        // Measures the link, then the own prefill; what took long on a busy machine is no measure, so it may take several.
        let long = fleet.request(prompt(1, 400, fleet.vocab()), 2);
        let short = fleet.request(prompt(3, 2, fleet.vocab()), 4);
        for round in 0.. {
            let (apart, _) = fleet.hand_over(&p, &d, &long, 2 * round + 1).await;
            assert!(apart.report.fallback.is_none() && (round > 0 || apart.report.imported_tokens == 400));
            fleet.generate(&d, &fleet.request(prompt(2, 400, fleet.vocab()), 2)).await;
            let (apart, reply) = fleet.hand_over(&p, &d, &short, 2 * round + 2).await;
            assert_eq!(apart.tokens, oracle(&fleet.sim().unwrap(), &fleet.model(), &short.tokens, 4));
            if apart.report.imported_tokens == 0 {
                // A choice, nothing that went wrong.
                assert_eq!(apart.report.fallback, None);
                assert_eq!(reply.unwrap().outcome, HandoffOutcome::Cancelled);
                break;
            }
            assert!(round < 50, "never known to be quicker");
        }
        let text = d.text("/metrics").await;
        assert!(text.contains("baton_agent_local_prefill_total{reason=\"short\"} 1"), "{text}");
        until("all blocks back", || p.in_use() == 0 && d.in_use() == 0).await;
    });
}

#[test]
fn a_stream_is_a_line_an_event_and_a_report_before_the_first_token() {
    let fleet = Fleet::start(Setup::sim());
    let d = fleet.decode("d-0");
    fleet.block_on(async {
        let request = fleet.request(prompt(1, 20, fleet.vocab()), 3);
        let body = fleet.post(&d, "/v1/generate", &request).await.unwrap().text().await.unwrap();
        let events: Vec<GenerateEvent> = body.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert!(matches!(events[0], GenerateEvent::Prefilled(_)));
        assert!(events[1..4].iter().all(|e| matches!(e, GenerateEvent::Token { .. })));
        assert!(matches!(events[4], GenerateEvent::Finished { reason: FinishReason::Length }));
        assert_eq!(events.len(), 5);
        let text = d.text("/metrics").await;
        for (kind, tokens) in [("cached", 0), ("computed", 20), ("generated", 3)] {
            let line = format!("baton_agent_tokens_total{{kind=\"{kind}\"}} {tokens}\n");
            assert!(text.contains(&line), "{line} in {text}");
        }
    });
}

#[test]
fn a_prefill_worker_restarted_under_its_name_serves_again_and_its_old_life_is_void() {
    let fleet = Fleet::start(Setup::sim());
    let (old, d) = (fleet.prefill("p-0"), fleet.decode("d-0"));
    fleet.block_on(async {
        let request = fleet.request(prompt(1, 100, fleet.vocab()), 3);
        let (apart, _) = fleet.hand_over(&old, &d, &request, 1).await;
        assert_eq!(apart.report.fallback, None);
        old.kill();
        fleet.wait_gone("p-0").await;
    });
    let new = fleet.prefill("p-0");
    fleet.block_on(async {
        until("seen", || d.sees(&new)).await;
        let request = fleet.request(prompt(2, 100, fleet.vocab()), 3);
        let expected = oracle(&fleet.sim().unwrap(), &fleet.model(), &request.tokens, 3);
        // A router whose view is behind still names the old life.
        let apart = fleet.generate_from(&d, &old, &request, 2).await;
        assert!(apart.report.fallback.is_some());
        assert_eq!(apart.tokens, expected);
        let (apart, _) = fleet.hand_over(&new, &d, &request, 3).await;
        assert_eq!((apart.report.fallback, apart.report.imported_tokens), (None, 100));
        assert_eq!(apart.tokens, expected);
    });
}

#[test]
fn a_peer_with_another_model_is_refused_and_the_prompt_prefilled() {
    let fleet = Fleet::start(Setup::sim());
    let other = fleet.prefill_of_another_model("p-0");
    let d = fleet.decode("d-0");
    fleet.block_on(async {
        let request = fleet.request(prompt(1, 100, fleet.vocab()), 3);
        let (apart, _) = fleet.hand_over(&other, &d, &request, 1).await;
        assert_eq!(apart.report.fallback.as_deref(), Some("geometry"));
        assert_eq!(apart.tokens, oracle(&fleet.sim().unwrap(), &fleet.model(), &request.tokens, 3));
        assert!(d.text("/metrics").await.contains("baton_transfer_errors_total{kind=\"geometry\"} 1"));
        until("all blocks back", || other.in_use() == 0 && d.in_use() == 0).await;
    });
}
