use std::path::Path;

use baton_config::fleet::Source;

use super::*;

fn sim_of(engine: &str) -> SimConfig {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny");
    let text = format!(
        "version: 1\nmodel: {{ path: {} }}\npools: [{{ name: all, role: both, engine: {{ kind: sim{engine} }} }}]\n",
        models.display()
    );
    let source = Source { name: "fleet.yaml".to_owned(), directory: None, environment: &|_| None };
    let fleet = Fleet::parse(&text, &source).unwrap();
    let pool = fleet.pools[0].name.clone();
    let options = WorkerOptions::from_fleet(&fleet, &pool, "all-0".parse().unwrap(), 0).unwrap();
    match options.engine {
        EngineChoice::Sim { config, .. } => config,
        EngineChoice::Reference { .. } => panic!("asked for sim"),
    }
}

#[test]
fn the_simulation_is_the_one_of_the_fleet_file() {
    let config = sim_of(
        ", seed: 7, prefill_us_base: 1, prefill_us_per_token: 2, prefill_ns_per_token2: 3, decode_us_base: 4, \
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
        ..SimConfig::default()
    };
    assert_eq!(config, expected);
    assert_eq!(sim_of("").seed, 0);
}
