//! The connection of frames, over real sockets.

use std::collections::BTreeMap;
use std::time::Duration;

use baton_config::frames::{self, News, Reader, StreamId};
use baton_config::protocol::{FailureCode, FinishReason, GenerateEvent, GenerateRequest, PrefillReport};
use baton_config::{Epoch, Role};
use baton_engine::sim::oracle;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use super::fleet::{Fleet, PATIENCE, Running, Setup, prompt, until};

/// The side of a router.
pub(super) struct Wire {
    io: TcpStream,
    reader: Reader,
    pub(super) got: BTreeMap<u32, Got>,
}

/// What came for one generation.
#[derive(Debug, Default)]
pub(super) struct Got {
    tokens: Vec<u32>,
    report: Option<PrefillReport>,
    pub(super) finished: Option<FinishReason>,
    pub(super) failed: Option<FailureCode>,
}

impl Wire {
    /// A connection, or the status of the refusal.
    pub(super) async fn connect(to: &Running, epoch: Epoch) -> Result<Self, u16> {
        Self::upgrade(TcpStream::connect(to.address()).await.unwrap(), epoch).await
    }

    async fn upgrade(mut io: TcpStream, epoch: Epoch) -> Result<Self, u16> {
        io.set_nodelay(true).unwrap();
        let head = format!(
            "GET {}?epoch={} HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: {}\r\n\r\n",
            frames::PATH,
            epoch.0,
            frames::PROTOCOL
        );
        io.write_all(head.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            answer.push(io.read_u8().await.unwrap());
        }
        match std::str::from_utf8(&answer[9..12]).unwrap().parse().unwrap() {
            101 => Ok(Self { io, reader: Reader::new(0), got: BTreeMap::new() }),
            status => Err(status),
        }
    }

    async fn say(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = Vec::new();
        write(&mut bytes);
        self.io.write_all(&bytes).await.unwrap();
    }

    pub(super) async fn open(&mut self, id: u32, credit: u32, request: &GenerateRequest) {
        self.say(|out| frames::open(out, StreamId(id), credit, request).unwrap()).await;
    }

    /// Reads once; whether the worker is still there.
    async fn read(&mut self) -> bool {
        let read = tokio::time::timeout(PATIENCE, self.io.read(self.reader.room())).await.expect("in time");
        let bytes = read.unwrap_or(0);
        self.reader.filled(bytes);
        while let Some((kind, payload)) = self.reader.next_frame().unwrap() {
            match News::decode(kind, payload).unwrap() {
                News::Tokens(tokens) => {
                    for (id, token) in tokens {
                        self.got.entry(id.0).or_default().tokens.push(token);
                    }
                }
                News::Event(id, event) => {
                    let got = self.got.entry(id.0).or_default();
                    match event {
                        GenerateEvent::Token { token, .. } => got.tokens.push(token),
                        GenerateEvent::Prefilled(report) => {
                            assert!(got.tokens.is_empty(), "before the first token");
                            got.report = Some(report);
                        }
                        GenerateEvent::Finished { reason } => got.finished = Some(reason),
                        GenerateEvent::Failed { code, .. } => got.failed = Some(code),
                    }
                }
            }
        }
        bytes > 0
    }

    pub(super) async fn read_until(&mut self, holds: impl Fn(&BTreeMap<u32, Got>) -> bool) {
        while !holds(&self.got) {
            assert!(self.read().await, "the worker ended it: {:?}", self.got);
        }
    }
}

fn plain(fleet: &Fleet, seed: u64, max_tokens: u32) -> GenerateRequest {
    let tokens = prompt(seed, 20 + seed as usize, fleet.vocab());
    GenerateRequest { logits_digest: false, ..fleet.request(tokens, max_tokens) }
}

/// Generations that were given up.
async fn cancelled(worker: &Running) -> u32 {
    let text = worker.text("/metrics").await;
    let name = "baton_agent_requests_total{end=\"cancelled\",kind=\"generate\"} ";
    text.lines().find_map(|line| line.strip_prefix(name)).expect("exported").parse().unwrap()
}

#[test]
fn a_generation_that_nobody_takes_is_given_up_and_says_so() {
    let fleet = Fleet::start(Setup { blocks: 600, decode_us: 20_000.0, ..Setup::sim() });
    let worker = fleet.worker("lone", Role::Both, |it| it.stalled = Duration::from_millis(400));
    fleet.block_on(async {
        let mut wire = Wire::connect(&worker, worker.epoch()).await.unwrap();
        // It would not end by itself in time.
        wire.open(1, 3, &plain(&fleet, 1, 1900)).await;
        wire.read_until(|got| got.get(&1).is_some_and(|got| got.failed.is_some())).await;
        let got = &wire.got[&1];
        assert_eq!((got.tokens.len(), got.failed, got.finished), (3, Some(FailureCode::Engine), None));
        // Credit that comes too late means nothing, and the connection is as good as before.
        wire.say(|out| frames::credit(out, StreamId(1), 20)).await;
        wire.open(2, 30, &plain(&fleet, 2, 30)).await;
        wire.read_until(|got| got.get(&2).is_some_and(|got| got.finished.is_some())).await;
        assert_eq!((wire.got[&1].tokens.len(), wire.got[&2].tokens.len()), (3, 30));
        until("all blocks back", || worker.in_use() == 0).await;
        worker.audit().await;
    });
}

#[test]
fn many_generations_share_a_connection_and_those_without_credit_wait() {
    let fleet = Fleet::start(Setup { blocks: 600, ..Setup::sim() });
    let worker = fleet.alone("lone");
    fleet.block_on(async {
        let mut wire = Wire::connect(&worker, worker.epoch()).await.unwrap();
        wire.open(99, 0, &plain(&fleet, 99, 30)).await;
        for id in 0..20 {
            // Some of them with what plain tokens do not carry.
            let request =
                GenerateRequest { logits_digest: id % 3 == 0, ..plain(&fleet, u64::from(id), 10 + id) };
            wire.open(id, 100, &request).await;
        }
        wire.read_until(|got| got.values().filter(|got| got.finished.is_some()).count() == 20).await;
        let model = (fleet.sim().unwrap(), fleet.model());
        for id in 0..20 {
            let request = plain(&fleet, u64::from(id), 10 + id);
            let wanted = oracle(&model.0, &model.1, &request.tokens, request.max_tokens as usize);
            assert_eq!(wire.got[&id].tokens, wanted, "stream {id}");
            assert!(wire.got[&id].report.is_some());
        }
        let wanted = oracle(&model.0, &model.1, &plain(&fleet, 99, 30).tokens, 30);
        assert!(wire.got.get(&99).is_none_or(|got| got.tokens.is_empty()), "no credit, no token");
        wire.say(|out| frames::credit(out, StreamId(99), 3)).await;
        wire.read_until(|got| got.get(&99).is_some_and(|got| got.tokens.len() >= 3)).await;
        // What is behind it on the connection arrives; the rest of it does not.
        wire.open(100, 100, &plain(&fleet, 100, 5)).await;
        wire.read_until(|got| got.get(&100).is_some_and(|got| got.finished.is_some())).await;
        assert_eq!(wire.got[&99].tokens, wanted[..3]);
        wire.say(|out| frames::credit(out, StreamId(99), 100)).await;
        wire.read_until(|got| got[&99].finished.is_some()).await;
        assert_eq!(wire.got[&99].tokens, wanted);
        until("all blocks back", || worker.in_use() == 0).await;
        worker.audit().await;
    });
}

#[test]
fn who_does_not_read_stops_the_engine_and_loses_nothing() {
    for prefix_cache in [true, false] {
        let fleet = Fleet::start(Setup { prefix_cache, ..Setup::sim() });
        let worker = fleet.alone("lone");
        fleet.block_on(async {
            let mut wire = Wire::connect(&worker, worker.epoch()).await.unwrap();
            let request = plain(&fleet, 1, 1900);
            wire.open(1, 10, &request).await;
            let generated = async || {
                let text = worker.text("/metrics").await;
                let name = "baton_agent_tokens_total{kind=\"generated\"} ";
                let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("exported");
                line.parse::<u64>().unwrap()
            };
            let (mut before, mut stopped) = (0, 1);
            while stopped < 1034 || before < stopped || worker.in_use() > 0 {
                tokio::time::sleep(Duration::from_millis(50)).await;
                (before, stopped) = (stopped, generated().await);
            }
            assert!(stopped < 1800, "credit, what waits, and what was under way: {stopped}");
            // Nothing more is computed of it, and what others ask for is.
            wire.open(2, 100, &plain(&fleet, 2, 50)).await;
            wire.read_until(|got| got.get(&2).is_some_and(|got| got.finished.is_some())).await;
            assert_eq!((generated().await, wire.got[&1].tokens.len()), (stopped + 50, 10));
            let wanted = oracle(&fleet.sim().unwrap(), &fleet.model(), &request.tokens, 1900);
            for at in (10..1900).step_by(100) {
                wire.say(|out| frames::credit(out, StreamId(1), 100)).await;
                wire.read_until(|got| got[&1].tokens.len() >= (at + 100).min(1900)).await;
            }
            wire.read_until(|got| got[&1].finished.is_some()).await;
            assert_eq!(wire.got[&1].tokens, wanted);
            until("all blocks back", || worker.in_use() == 0).await;
            worker.audit().await;
        });
    }
}

#[test]
fn a_handoff_over_frames_is_one_over_http() {
    let fleet = Fleet::start(Setup { prefix_cache: false, ..Setup::sim() });
    let (p, d) = (fleet.prefill("p-0"), fleet.decode("d-0"));
    fleet.block_on(async {
        let mut wire = Wire::connect(&d, d.epoch()).await.unwrap();
        for id in 1..=4 {
            let request = plain(&fleet, u64::from(id) * 60, 8);
            let asked = fleet.generate_with(&d, &p, &request, u128::from(id));
            let prefill = fleet.start_prefill(&p, &d, &request, u128::from(id));
            wire.open(id, 100, &asked).await;
            wire.read_until(|got| got.get(&id).is_some_and(|got| got.finished.is_some())).await;
            let got = &wire.got[&id];
            let report = got.report.as_ref().unwrap();
            assert_eq!((report.imported_tokens as usize, &report.fallback), (request.tokens.len(), &None));
            assert_eq!(got.tokens, oracle(&fleet.sim().unwrap(), &fleet.model(), &request.tokens, 8));
            prefill.await.unwrap();
        }
        // The prefill side gives up before the request comes.
        let request = plain(&fleet, 50, 8);
        fleet.delete(&d, 9).await;
        wire.open(9, 100, &fleet.generate_with(&d, &p, &request, 9)).await;
        wire.read_until(|got| got.get(&9).is_some_and(|got| got.finished.is_some())).await;
        assert_eq!(wire.got[&9].report.as_ref().unwrap().fallback.as_deref(), Some("peer_ended"));
        assert_eq!(wire.got[&9].tokens, oracle(&fleet.sim().unwrap(), &fleet.model(), &request.tokens, 8));
        // One for another life of this worker gets nothing and leaves nothing.
        let mut stale = fleet.generate_with(&d, &p, &request, 10);
        stale.handoff.as_mut().unwrap().own_epoch = Epoch(d.epoch().0 + 100);
        wire.open(10, 100, &stale).await;
        wire.read_until(|got| got.get(&10).is_some_and(|got| got.failed.is_some())).await;
        assert_eq!(wire.got[&10].failed, Some(FailureCode::Unavailable));
        assert!(d.text("/metrics").await.contains("baton_stale_epoch_refused_total 1"));
        until("all blocks back", || p.in_use() == 0 && d.in_use() == 0).await;
        d.audit().await;
    });
}

#[test]
fn what_is_cancelled_or_cut_off_gives_everything_back() {
    let fleet = Fleet::start(Setup { decode_us: 20_000.0, ..Setup::sim() });
    let worker = fleet.alone("lone");
    fleet.block_on(async {
        let mut wire = Wire::connect(&worker, worker.epoch()).await.unwrap();
        for id in 0..3 {
            wire.open(id, 1000, &plain(&fleet, u64::from(id), 1900)).await;
        }
        wire.read_until(|got| got.values().filter(|got| !got.tokens.is_empty()).count() == 3).await;
        for id in 0..3 {
            wire.say(|out| frames::cancel(out, StreamId(id))).await;
        }
        until("cancelled, all blocks back", || worker.in_use() == 0).await;
        wire.open(7, 1000, &plain(&fleet, 7, 1900)).await;
        wire.read_until(|got| got.contains_key(&7)).await;
        drop(wire);
        until("cut off, all blocks back", || worker.in_use() == 0).await;
        // The same for those that have only just begun. None of them would end by itself in time.
        for cut_off in [false, true] {
            let mut wire = Wire::connect(&worker, worker.epoch()).await.unwrap();
            let before = cancelled(&worker).await;
            wire.say(|out| {
                for id in 0..30 {
                    frames::open(out, StreamId(id), 10, &plain(&fleet, u64::from(id), 1900)).unwrap();
                    if !cut_off {
                        frames::cancel(out, StreamId(id));
                    }
                }
            })
            .await;
            let wire = (!cut_off).then_some(wire);
            while cancelled(&worker).await < before + 30 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            // By the end of this one the engine has been told of all of them.
            fleet.generate(&worker, &plain(&fleet, 1, 3)).await;
            until("all blocks back", || worker.in_use() == 0 && worker.in_flight() == 0).await;
            assert_eq!(worker.status().await.requests_waiting, 0);
            drop(wire);
        }
        worker.audit().await;
    });
}

#[test]
fn what_must_not_be_is_refused_and_costs_at_most_the_connection() {
    let fleet = Fleet::start(Setup::sim());
    let worker = fleet.alone("lone");
    fleet.block_on(async {
        let stale = Epoch(worker.epoch().0 + 1);
        assert_eq!(Wire::connect(&worker, stale).await.err(), Some(409));
        let plainly = worker.get(&format!("{}?epoch={}", frames::PATH, worker.epoch().0)).await;
        assert_eq!(plainly.status().as_u16(), 400, "no upgrade was asked for");
        let mut wire = Wire::connect(&worker, worker.epoch()).await.unwrap();
        // A request that is wrong is its own affair.
        let wrong = GenerateRequest { tokens: vec![fleet.vocab()], ..plain(&fleet, 1, 5) };
        wire.open(1, 10, &wrong).await;
        wire.open(2, 10, &plain(&fleet, 2, 5)).await;
        wire.read_until(|got| got.contains_key(&1) && got.get(&2).is_some_and(|got| got.finished.is_some()))
            .await;
        assert_eq!(wire.got[&1].failed, Some(FailureCode::Refused));
        // Frames that are wrong end the connection, and nothing else.
        let twice = |out: &mut Vec<u8>| {
            for _ in 0..2 {
                frames::open(out, StreamId(3), 10, &plain(&fleet, 3, 5)).unwrap();
            }
        };
        let garbage =
            |out: &mut Vec<u8>| out.extend_from_slice(&[9, 0, 0, 0, 200, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        let endless = |out: &mut Vec<u8>| out.extend_from_slice(&[255, 255, 255, 255, 1]);
        let greedy = |out: &mut Vec<u8>| {
            frames::open(out, StreamId(4), u32::MAX, &plain(&fleet, 4, 5)).unwrap();
        };
        for case in 0..4 {
            let mut wire = Wire::connect(&worker, worker.epoch()).await.unwrap();
            match case {
                0 => wire.say(twice).await,
                1 => wire.say(garbage).await,
                2 => wire.say(endless).await,
                _ => wire.say(greedy).await,
            }
            while wire.read().await {}
        }
        wire.open(5, 10, &plain(&fleet, 5, 5)).await;
        wire.read_until(|got| got.get(&5).is_some_and(|got| got.finished.is_some())).await;
        until("all blocks back", || worker.in_use() == 0).await;
        worker.audit().await;
    });
}

#[test]
fn what_was_begun_in_a_former_life_goes_on_and_nothing_new_is() {
    let mut fleet = Fleet::start(Setup { decode_us: 20_000.0, ..Setup::sim() });
    let worker = fleet.alone("lone");
    let former = worker.epoch();
    let mut wire = fleet.block_on(async {
        let mut wire = Wire::connect(&worker, former).await.unwrap();
        wire.open(1, 400, &plain(&fleet, 1, 300)).await;
        wire.read_until(|got| got.contains_key(&1)).await;
        wire
    });
    fleet.stop_conductor();
    fleet.start_conductor();
    fleet.block_on(async {
        until("it is in a new life", || worker.epoch() > former).await;
        wire.open(2, 10, &plain(&fleet, 2, 5)).await;
        wire.read_until(|got| got.get(&2).is_some_and(|got| got.failed.is_some())).await;
        assert_eq!((wire.got[&2].failed, wire.got[&2].tokens.len()), (Some(FailureCode::Unavailable), 0));
        assert!(worker.text("/metrics").await.contains("baton_stale_epoch_refused_total 1"));
        wire.read_until(|got| got[&1].finished.is_some()).await;
        let wanted = oracle(&fleet.sim().unwrap(), &fleet.model(), &plain(&fleet, 1, 300).tokens, 300);
        assert_eq!(wire.got[&1].tokens, wanted);
    });
}

#[test]
fn a_router_that_reads_nothing_is_cut_off_and_a_slow_one_is_not() {
    let fleet = Fleet::start(Setup { decode_us: 1.0, blocks: 5_000, ..Setup::sim() });
    let worker = fleet.worker("lone", Role::Both, |it| it.stalled = Duration::from_secs(2));
    fleet.block_on(async {
        for reads in [true, false] {
            let socket = TcpSocket::new_v4().unwrap();
            socket.set_recv_buffer_size(4096).unwrap();
            let io = socket.connect(worker.address()).await.unwrap();
            let mut wire = Wire::upgrade(io, worker.epoch()).await.unwrap();
            // More than the system keeps of it: some megabytes.
            let rich = |id| GenerateRequest { logits_digest: true, ..plain(&fleet, id, 1900) };
            for id in 0..40 {
                wire.open(id, 1900, &rich(u64::from(id))).await;
            }
            if reads {
                let over = |wire: &Wire| wire.got.values().filter(|got| got.finished.is_some()).count() == 40;
                while !over(&wire) {
                    assert!(wire.read().await, "it is cut off");
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                assert!(wire.got.values().all(|got| got.tokens.len() == 1900));
            }
            until("they came, or are over", || reads || worker.in_flight() > 0).await;
            until("nothing is in flight", || worker.in_flight() == 0).await;
        }
        assert!(cancelled(&worker).await > 0);
        worker.audit().await;
    });
}

#[test]
fn a_worker_whose_time_is_over_says_so_to_everybody() {
    let fleet = Fleet::start(Setup { decode_us: 20_000.0, ..Setup::sim() });
    for second_signal in [false, true] {
        let grace = if second_signal { Duration::from_secs(3600) } else { Duration::from_millis(300) };
        let name = format!("whole-{}", u8::from(second_signal));
        let worker = fleet.whole(&name, grace);
        fleet.block_on(async {
            let io = TcpStream::connect(worker.address).await.unwrap();
            let mut wire = Wire::upgrade(io, worker.epoch).await.unwrap();
            let request = plain(&fleet, 1, 1500);
            wire.open(1, 2000, &request).await;
            wire.read_until(|got| got.get(&1).is_some_and(|got| !got.tokens.is_empty())).await;
            let lines = fleet.start_post(worker.address, "/v1/generate", &request);
            // Its decode side takes connections and never says a word.
            let peer = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let prefill = serde_json::json!({
                "request_id": "r", "tokens": request.tokens, "handoff": {
                    "id": baton_config::HandoffId(7), "own_epoch": worker.epoch,
                    "peer": { "worker": "d-9", "epoch": 1, "address": peer.local_addr().unwrap() },
                },
            });
            let reply = fleet.start_post(worker.address, "/v1/prefill", &prefill);
            let endless = serde_json::json!({ "prompt": "x", "max_tokens": 1500, "stream": true });
            let whole = serde_json::json!({ "prompt": "x", "max_tokens": 1500 });
            let whole = fleet.start_post(worker.address, "/v1/completions", &whole);
            let url = format!("http://{}/v1/completions", worker.address);
            let streamed = baton_conductor::http::client().post(url).json(&endless).send().await.unwrap();
            let follower = fleet.start_get(worker.address, "/v1/kv/events");
            let (_asks, _) = peer.accept().await.unwrap();
            worker.stop.drain.cancel();
            if second_signal {
                worker.stop.now.cancel();
            }
            wire.read_until(|got| got[&1].failed.is_some()).await;
            assert_eq!(wire.got[&1].failed, Some(FailureCode::Unavailable));
            while wire.read().await {}
            let lines = lines.await.unwrap().unwrap();
            assert!(lines.lines().last().is_some_and(|line| line.contains("unavailable")), "{lines}");
            let reply = reply.await.unwrap().unwrap();
            assert!(reply.contains("\"outcome\":\"cancelled\""), "{reply}");
            let streamed = streamed.text().await.unwrap();
            assert!(streamed.contains("this worker is shutting down"), "{streamed}");
            let whole = whole.await.unwrap().unwrap();
            assert!(whole.contains("this worker is shutting down"), "{whole}");
            follower.await.unwrap().expect("events end as they should");
            tokio::time::timeout(PATIENCE, worker.ended).await.expect("it ends").unwrap().unwrap();
            fleet.wait_gone(&name).await;
            let metrics = fleet.conductor_metrics().await;
            assert!(metrics.contains("conductor_lease_expired_total 0"), "it said goodbye: {metrics}");
        });
    }
}
