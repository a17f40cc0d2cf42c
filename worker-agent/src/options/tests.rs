use std::path::Path;

use baton_config::fleet::Source;

use super::*;

/// Options of a replica of a pool that has these keys too.
fn options_of(pool: &str, replica: u16) -> WorkerOptions {
    options_in(pool, replica, "")
}

/// The same in a fleet that has more to say.
fn options_in(pool: &str, replica: u16, fleet: &str) -> WorkerOptions {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny");
    let text = format!(
        "version: 1\nmodel: {{ path: {} }}\npools: [{{ name: all, role: both, {pool} }}]\n{fleet}\n",
        models.display()
    );
    let source = Source { name: "fleet.yaml".to_owned(), directory: None, environment: &|_| None };
    let fleet = Fleet::parse(&text, &source).unwrap();
    let pool = fleet.pools[0].name.clone();
    WorkerOptions::from_fleet(&fleet, &pool, "all-0".parse().unwrap(), replica).unwrap()
}

fn sim_of(engine: &str) -> SimConfig {
    let options = options_of(&format!("engine: {{ kind: sim{engine} }}"), 0);
    match options.engine {
        EngineChoice::Sim { config, .. } => config,
        EngineChoice::Reference { .. } => panic!("asked for sim"),
    }
}

#[test]
fn the_simulation_is_the_one_of_the_fleet_file() {
    let config = sim_of(
        ", check_kv: false, seed: 7, prefill_us_base: 1, prefill_us_per_token: 2, prefill_ns_per_token2: 3, decode_us_base: 4, \
         decode_us_per_seq: 5, decode_ns_per_context_token: 6",
    );
    let expected = SimConfig {
        prefill_base_us: 1.0,
        prefill_per_token_us: 2.0,
        prefill_per_pair_ns: 3.0,
        decode_base_us: 4.0,
        decode_per_sequence_us: 5.0,
        decode_per_context_token_ns: 6.0,
        seed: 7,
        check_kv: false,
        ..SimConfig::default()
    };
    assert_eq!(config, expected);
    assert_eq!(sim_of("").seed, 0);
    assert!(sim_of("").check_kv, "what others hand over is checked unless the file says otherwise");
}

#[test]
fn replica_n_takes_device_n_of_its_host() {
    let device = |pool: &str, replica| {
        let device = options_of(pool, replica).arena.device?;
        Some((device.kind, device.direct))
    };
    assert_eq!(device("accelerator: cpu", 3), None);
    let emulated = DeviceKind::Simulated { bytes_per_s: None, reachable: false };
    assert_eq!(device("accelerator: simulated", 3), Some((emulated, false)));
    let gpu = DeviceKind::Cuda { ordinal: 3 };
    assert_eq!(device("accelerator: cuda", 3), Some((gpu, true)));
    assert_eq!(device("accelerator: cuda, transfer: { path: gpu_direct }", 3), Some((gpu, true)));
    assert_eq!(device("accelerator: cuda, transfer: { path: host_buffered }", 3), Some((gpu, false)));
    let core = DeviceKind::Neuron { core: 1 };
    assert_eq!(device("accelerator: trainium", 1), Some((core, false)), "host-buffered unless asked");
    assert_eq!(device("accelerator: trainium, transfer: { path: direct }", 1), Some((core, true)));
}

#[test]
fn the_patience_of_transfers_is_that_of_the_file() {
    let transfer = |pool: &str| {
        let transfer = options_of(pool, 0).transfer;
        let agent = transfer.agent("decode-0".parse().unwrap()).unwrap();
        (transfer.connect_timeout.as_millis(), agent.stall.as_millis())
    };
    assert_eq!(transfer("accelerator: cpu"), (1000, 1000));
    let asked = "transfer: { connect_timeout_ms: 250, stall_timeout_ms: 7000 }";
    assert_eq!(transfer(asked), (250, 7000));
}

#[test]
fn a_worker_gets_the_limits_of_the_file_and_each_replica_its_port() {
    let options = options_of(
        "engine: { kind: sim, max_batch: 3, max_waiting: 4, prefill_chunk: 5, prefix_cache: false }, \
         limits: { in_flight: 7, body: 2MiB, drain_grace_ms: 1500 }, transfer: { port: 7600, integrity: off }",
        2,
    );
    let limits = &options.limits;
    assert_eq!((limits.max_batch_sequences, limits.max_waiting_sequences), (3, 4));
    assert_eq!((limits.prefill_chunk_tokens, limits.prefix_cache, limits.mixed), (5, false, true));
    assert_eq!((options.in_flight_max, options.body_max.0), (7, 2 << 20));
    assert_eq!(options.drain_grace, Duration::from_millis(1500));
    assert_eq!(options.transfer.listen.port(), 7602);
    assert_eq!(options.transfer.integrity, baton_transfer::Integrity::Off);
    let usual = options_of("engine: { kind: sim }", 2).transfer;
    assert_eq!((usual.listen.port(), usual.integrity), (0, baton_transfer::Integrity::Digest));
}

#[test]
fn fabrics_use_the_interface_that_peers_are_told_where_tcp_listens_on_all() {
    let binds = |pool: &str| {
        let transfer =
            options_of(&format!("transfer: {{ {pool}, auth: {{ token_file: /a/token }} }}"), 0).transfer;
        assert_eq!(transfer.libfabric.bind, transfer.ucx.bind);
        (transfer.listen.ip().to_string(), transfer.ucx.bind.to_string())
    };
    let of = |listen: &str, fabric: &str| (listen.to_owned(), fabric.to_owned());
    assert_eq!(binds("bind: 0.0.0.0, advertise: 10.0.0.7:7000"), of("0.0.0.0", "10.0.0.7"));
    assert_eq!(
        binds("bind: 10.0.0.8, advertise: 10.0.0.7:7000"),
        of("10.0.0.8", "10.0.0.8"),
        "as behind a gateway"
    );
}

#[test]
fn whether_short_prompts_are_prefilled_by_decode_workers_is_for_the_fleet_to_say() {
    let local_prefill = |mode: &str| options_in("accelerator: cpu", 0, mode).local_prefill;
    assert!(local_prefill(""));
    assert!(local_prefill("router: { disaggregation: auto }"));
    assert!(!local_prefill("router: { disaggregation: always }"));
}

#[test]
fn a_token_that_the_file_names_is_used_or_nothing_starts() {
    let file = std::env::temp_dir().join(format!("baton-transfer-token-{}", std::process::id()));
    let key = format!("transfer: {{ auth: {{ token_file: {} }} }}", file.display());
    let agent = || options_of(&key, 0).transfer.agent("all-0".parse().unwrap());
    std::fs::write(&file, "0123456789abcdef0123456789abcdef\n").unwrap();
    assert!(agent().unwrap().auth.is_some());
    std::fs::write(&file, "short").unwrap();
    assert!(matches!(agent(), Err(TokenFault::Token { .. })));
    std::fs::remove_file(&file).unwrap();
    assert!(matches!(agent(), Err(TokenFault::Read { .. })));
    assert!(
        options_of("accelerator: cpu", 0).transfer.agent("all-0".parse().unwrap()).unwrap().auth.is_none()
    );
}

/// Machines with a GPU or a Neuron device have no reason to tell.
#[test]
fn a_machine_without_the_device_is_told_what_helps() {
    for (pool, library) in [("accelerator: cuda", "libcuda.so.1"), ("accelerator: trainium", "libnrt.so.1")] {
        match crate::arena::build(&options_of(pool, 0).arena) {
            Ok((memory, _)) => println!("there is {}", memory.kind()),
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("; what helps: "), "{text}");
                println!("{library}: {text}");
                assert!(crate::RunError::from(error).is_configuration());
            }
        }
    }
}
