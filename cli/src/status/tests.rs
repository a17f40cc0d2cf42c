use baton_conductor::api::{AutoscaleStatus, ConductorStatus, PoolStatus};
use expect_test::expect;

use super::problems::Severity;
use super::*;

fn pool(name: &str, role: Role, desired: u32, ready: u32) -> PoolRow {
    let status = PoolStatus {
        name: name.parse().unwrap(),
        role,
        desired,
        operator_set: false,
        min: 0,
        max: 8,
        joining: 0,
        ready,
        draining: 0,
        short_ms: None,
        empty_ms: None,
        autoscale: None,
    };
    PoolRow { status, set_by: "document" }
}

fn worker(name: &str, pool: &str, role: Role, epoch: u64) -> WorkerRow {
    WorkerRow {
        name: name.parse().unwrap(),
        pool: pool.parse().unwrap(),
        role,
        epoch: Epoch(epoch),
        state: "ready".to_owned(),
        address: format!("10.0.0.{epoch}:7500"),
        pid: 4000 + u32::try_from(epoch).unwrap(),
        requests_running: 3,
        requests_waiting: 0,
        kv_blocks: BlockCounts { free: 50, valid: 30, shared: 20, ..BlockCounts::default() },
        last_error: None,
        last_error_ago_ms: None,
        age_ms: Some(7_500_000),
        seen_ms: Some(1_200),
        state_ms: Some(7_400_000),
        draining: false,
        kv_percent: 30,
        drain: None,
        unreachable: None,
        own_epoch: Some(Epoch(epoch)),
    }
}

fn conductor(name: &str, leader: bool, answers: bool) -> OtherConductor {
    let url = format!("http://{name}:7400");
    OtherConductor { known: ConductorStatus { name: name.to_owned(), url, leader }, answers }
}

fn path(prefill: &str, decode: &str, backend: &str) -> PathStatus {
    PathStatus {
        prefill: prefill.parse().unwrap(),
        decode: decode.parse().unwrap(),
        backend: backend.to_owned(),
        reason: format!("{backend}: both have the same fabric"),
        gb_per_s: Some(11.25),
        latency_us: Some(9.5),
        fell_back: None,
    }
}

fn well() -> FleetStatus {
    FleetStatus {
        conductor: ConductorRow {
            url: "http://conductor-0:7400".to_owned(),
            store: "etcd".to_owned(),
            leader: true,
            view_age_ms: 0,
            warming: false,
            ttl_ms: 10_000,
            store_health: StoreStatus {
                kind: "etcd".to_owned(),
                up: true,
                endpoint: Some("http://etcd-1:2379".to_owned()),
                last_ok_ms: Some(300),
                problem: None,
            },
            conductors: vec![conductor("conductor-0", true, true), conductor("conductor-1", false, true)],
        },
        problems: Vec::new(),
        pools: vec![pool("prefill", Role::Prefill, 1, 1), pool("decode", Role::Decode, 2, 2)],
        workers: vec![
            worker("prefill-0", "prefill", Role::Prefill, 11),
            worker("decode-0", "decode", Role::Decode, 12),
            worker("decode-1", "decode", Role::Decode, 13),
        ],
        paths: vec![path("prefill-0", "decode-0", "libfabric")],
    }
}

/// What is seen on a bad night.
fn sick() -> FleetStatus {
    let mut status = well();
    status.conductor.view_age_ms = 95_000;
    status.conductor.leader = false;
    status.conductor.store_health = StoreStatus {
        kind: "etcd".to_owned(),
        up: false,
        endpoint: Some("http://etcd-1:2379".to_owned()),
        last_ok_ms: Some(95_400),
        problem: Some("etcd has no space".to_owned()),
    };
    status.conductor.conductors =
        vec![conductor("conductor-0", false, true), conductor("conductor-1", false, false)];
    let prefill = &mut status.pools[0].status;
    (prefill.desired, prefill.joining, prefill.short_ms) = (4, 1, Some(60_000));
    (prefill.operator_set, status.pools[0].set_by) = (true, "operator");
    let decode = &mut status.pools[1].status;
    (decode.ready, decode.draining, decode.empty_ms, decode.short_ms) = (0, 1, Some(40_000), Some(41_000));
    decode.autoscale = Some(AutoscaleStatus {
        desired: 2,
        decision: "at_max".to_owned(),
        reason: "KV 97% over 80%, and 2 is the most".to_owned(),
        dry_run: false,
        scaler: "kubernetes".to_owned(),
        decided_ms_ago: 21_000,
        problem: Some("403 from the API server".to_owned()),
    });
    status.pools[1].set_by = "autoscaler";
    let [prefill, silent, drained] = &mut status.workers[..] else { panic!("three workers") };
    prefill.state = "unhealthy".to_owned();
    prefill.last_error = Some("the engine made no progress for 14s".to_owned());
    prefill.last_error_ago_ms = Some(4_200);
    (silent.kv_percent, silent.requests_waiting) = (97, 12);
    (silent.seen_ms, silent.unreachable) = (Some(8_000), Some("connection refused".to_owned()));
    (silent.last_error, silent.last_error_ago_ms) =
        (Some("a transfer could not be confirmed".to_owned()), Some(260_000));
    drained.state = "draining".to_owned();
    drained.draining = true;
    drained.drain = Some(DrainStatus {
        since_ms: 12_300,
        grace_left_ms: 107_700,
        requests: 3,
        requests_running: 2,
        requests_waiting: 1,
        handoffs: 2,
        leases: 1,
        blocks_held: 34,
    });
    status.paths[0].backend = "tcp".to_owned();
    status.paths[0].reason = "tcp: reached by address; libfabric: connection reset".to_owned();
    status.paths[0].fell_back = Some("libfabric: connection reset".to_owned());
    let mut none = path("prefill-0", "decode-1", "none");
    (none.reason, none.gb_per_s, none.latency_us) = ("tcp: connection timed out".to_owned(), None, None);
    status.paths.push(none);
    status.problems = problems(&status);
    status
}

#[test]
fn a_well_fleet_has_no_problems() {
    let mut status = well();
    status.problems = problems(&status);
    expect![[r#"
        conductor http://conductor-0:7400, store etcd at http://etcd-1:2379
        conductors: conductor-0 (http://conductor-0:7400 leads), conductor-1 (http://conductor-1:7400)
        no problems

        POOL     ROLE     WANTED  JOINING  READY  DRAINING  WANTED BECAUSE
        prefill  prefill  1       0        1      0         the fleet file says so
        decode   decode   2       0        2      0         the fleet file says so

        WORKER     STATE  EPOCH  AGE  HEARD      RUNNING  WAITING  KV   KV BLOCKS  CACHED  PID   ADDRESS
        prefill-0  ready  11     2 h  1.2 s ago  3        0        30%  30 of 100  20      4011  10.0.0.11:7500
        decode-0   ready  12     2 h  1.2 s ago  3        0        30%  30 of 100  20      4012  10.0.0.12:7500
        decode-1   ready  13     2 h  1.2 s ago  3        0        30%  30 of 100  20      4013  10.0.0.13:7500

        PREFILL    DECODE    BACKEND    BANDWIDTH   LATENCY  WHY
        prefill-0  decode-0  libfabric  11.25 GB/s  9.50 us  libfabric: both have the same fabric
    "#]].assert_eq(&text::describe(&status, false));
}

#[test]
fn a_sick_fleet_says_what_is_wrong_and_what_to_do() {
    expect![[r#"
        conductor http://conductor-0:7400, store etcd at http://etcd-1:2379 (last answer 95 s ago), view 95 s old
        conductors: conductor-0 (http://conductor-0:7400), conductor-1 (http://conductor-1:7400 silent)

        PROBLEMS
        !! no ready decode worker in pool decode since 40 s (2 wanted, 0 joining): requests are refused with 503
             nobody has registered: see whether its workers are started (pods pending, `baton up` restarting) and read their logs
        !  the etcd store at http://etcd-1:2379 has not answered for 95 s: etcd has no space
             bring it back; until then requests are served by the last view, and nobody joins, scales or is drained
        !  no conductor leads: nothing is scaled
             wait some seconds for an election; if it lasts, look at the store
        !  pool prefill wanted 4 and has 1 ready for 60 s (1 joining, 0 draining)
             they are starting; if it lasts, read their logs
        !  pool decode shall have 2 workers, and the scaler kubernetes fails: 403 from the API server
             mend it, or change the number where the scaler would; what runs goes on
        !  worker prefill-0 is unhealthy: the engine made no progress for 14s
             restart it (its liveness probe does after a minute); routers go around it
        !  worker decode-0 is silent for 8.0 s and does not answer (connection refused); its lease ends in 2.0 s
             frozen, dead, or cut off: look at its host; routers go around it
        !  the KV cache of worker decode-0 is full: 12 requests wait for room
             add decode workers (`baton scale`), or give it more kv.memory
        !  blocks from prefill-0 to decode-0 fell back to tcp: libfabric: connection reset
             run `baton doctor` on both hosts
        !  no path from prefill-0 to decode-1: tcp: connection timed out
             run `baton doctor` on both hosts
        -  conductor conductor-1 does not answer at http://conductor-1:7400
             the others do its work; look at its process, or reach it from within its network

        POOL     ROLE     WANTED  JOINING  READY  DRAINING  WANTED BECAUSE
        prefill  prefill  4       1        1      0         an operator said so
        decode   decode   2       0        0      1         autoscaler, 21 s ago: KV 97% over 80%, and 2 is the most

        WORKER     STATE      EPOCH  AGE  HEARD      RUNNING  WAITING  KV   KV BLOCKS  CACHED  PID   ADDRESS
        prefill-0  unhealthy  11     2 h  1.2 s ago  3        0        30%  30 of 100  20      4011  10.0.0.11:7500
        decode-0   ready      12     2 h  8.0 s ago  3        12       97%  30 of 100  20      4012  10.0.0.12:7500
        decode-1   draining   13     2 h  1.2 s ago  3        0        30%  30 of 100  20      4013  10.0.0.13:7500

        prefill-0, 4.2 s ago: the engine made no progress for 14s
        decode-0, 4 min ago: a transfer could not be confirmed
        decode-1 drains for 12 s, 107 s of its grace left, waits for 3 requests (2 running, 1 waiting), 1 handed out, not yet read, 1 being read, 34 KV blocks held

        PREFILL    DECODE    BACKEND  BANDWIDTH   LATENCY  WHY
        prefill-0  decode-0  tcp      11.25 GB/s  9.50 us  tcp: reached by address; libfabric: connection reset
        prefill-0  decode-1  none     -           -        tcp: connection timed out
    "#]].assert_eq(&text::describe(&sick(), false));
}

#[test]
fn the_keys_of_the_json_stay() {
    let json = serde_json::to_value(sick()).unwrap();
    let has = |value: &serde_json::Value, keys: &[&str]| {
        for key in keys {
            assert!(value.get(key).is_some(), "{key} in {value}");
        }
    };
    has(&json, &["conductor", "problems", "pools", "workers", "paths"]);
    has(&json["conductor"], &["url", "store", "leader", "view_age_ms", "conductors", "store_health"]);
    has(&json["conductor"]["conductors"][0], &["name", "url", "leader", "answers"]);
    has(&json["problems"][0], &["severity", "what", "remedy"]);
    has(&json["pools"][0], &["name", "role", "desired", "ready", "draining", "joining", "set_by"]);
    let worker = [
        "name",
        "pool",
        "role",
        "epoch",
        "state",
        "address",
        "pid",
        "requests_running",
        "requests_waiting",
        "kv_blocks",
        "last_error",
        "last_error_ago_ms",
        "age_ms",
        "seen_ms",
        "kv_percent",
        "drain",
    ];
    has(&json["workers"][0], &worker);
    has(
        &json["paths"][0],
        &["prefill", "decode", "backend", "reason", "gb_per_s", "latency_us", "fell_back"],
    );
}

#[test]
fn a_problem_is_told_only_when_it_is_one() {
    let worst = |change: fn(&mut FleetStatus)| {
        let mut status = well();
        change(&mut status);
        problems(&status).first().map(|problem| (problem.severity, problem.what.clone()))
    };
    let decode = |status: &mut FleetStatus| {
        (status.pools[1].status.ready, status.pools[1].status.empty_ms) = (0, Some(2_000));
    };
    assert_eq!(worst(decode).unwrap().0, Severity::Down);
    let replaced = |status: &mut FleetStatus| {
        (status.pools[1].status.ready, status.pools[1].status.empty_ms) = (0, Some(2_000));
        status.pools.push(pool("both", Role::Both, 1, 1));
    };
    assert_eq!(worst(replaced).unwrap().0, Severity::Degraded, "another pool decodes");
    let prefill = |status: &mut FleetStatus| status.pools[0].status.ready = 0;
    assert_eq!(worst(prefill).unwrap().0, Severity::Degraded, "decode workers can prefill");
    let scaled_to_none = |status: &mut FleetStatus| {
        (status.pools[0].status.ready, status.pools[0].status.desired) = (0, 0);
    };
    assert_eq!(worst(scaled_to_none), None);
    let starting = |status: &mut FleetStatus| {
        (status.pools[1].status.desired, status.pools[1].status.short_ms) = (3, Some(9_000));
    };
    assert_eq!(worst(starting), None, "workers take a while to start");
    let late = |status: &mut FleetStatus| status.workers[0].seen_ms = Some(4_000);
    assert_eq!(worst(late), None, "within two keepalives");
    let election = |status: &mut FleetStatus| status.conductor.view_age_ms = 2_500;
    assert_eq!(worst(election), None, "etcd elects its leader");
    let deaf = |status: &mut FleetStatus| {
        (status.workers[1].draining, status.workers[1].state_ms) = (true, Some(20_000));
    };
    assert!(worst(deaf).unwrap().1.contains("has not begun"));
    let anew = |status: &mut FleetStatus| status.workers[1].own_epoch = Some(Epoch(99));
    assert_eq!(worst(anew).unwrap().0, Severity::Note);
}

#[test]
fn a_drain_is_told_in_words() {
    let drain = DrainStatus {
        since_ms: 900,
        grace_left_ms: 119_000,
        requests: 0,
        requests_running: 0,
        requests_waiting: 0,
        handoffs: 1,
        leases: 0,
        blocks_held: 0,
    };
    assert_eq!(drain_line(&drain), "0.9 s, 119 s of its grace left, waits for 1 being read");
    let done = DrainStatus { handoffs: 0, ..drain };
    assert!(drain_line(&done).ends_with("waits for nothing any more"));
}

#[test]
fn what_a_worker_says_steers_no_terminal() {
    let mut status = well();
    status.workers[0].last_error = Some("a\x1b[2Jb\u{9b}31mc\r\nd".to_owned());
    status.paths[0].reason = "e\x07".to_owned();
    status.problems = problems(&status);
    let text = text::describe(&status, false);
    assert!(text.contains("a\u{fffd}[2Jb") && text.contains("e\u{fffd}"), "{text}");
    assert!(!text.chars().any(|letter| letter.is_control() && letter != '\n'), "{text:?}");
}
