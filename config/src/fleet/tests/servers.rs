//! Pools of servers of other projects.

use expect_test::expect;

use super::*;

/// A fleet whose requests are passed on, with every key.
pub(super) const PASSING: &str = "version: 1
model: { id: llama }
pools:
  - name: servers
    role: both
    engine: { kind: openai, url: \"http://127.0.0.1:8000/\", api_key_file: engine.key, ca_file: ca.pem, model: meta/Llama, health_path: /ping, pass_fields: [baton] }
";

#[test]
fn a_fleet_that_passes_requests_on_needs_no_model_directory() {
    let fleet = parse(PASSING).unwrap();
    assert!(fleet.passes_on() && fleet.startable().is_ok() && fleet.model.directory.is_none());
    assert_eq!(fleet.kv_bytes(&fleet.pools[0]), Bytes(0));
    let EngineSpec::Openai(spec) = &fleet.pools[0].engine else { panic!("an openai engine") };
    assert_eq!(spec.urls, ["http://127.0.0.1:8000"]);
    assert_eq!((spec.model.as_deref(), spec.health_path.as_deref()), (Some("meta/Llama"), Some("/ping")));
    assert_eq!(spec.silent_timeout, Duration::from_secs(60));
    let several = "version: 1\nmodel: { id: llama }\npools: [{ name: a, role: both, engine: { kind: openai, urls: [http://x:1, https://y] } }]\n";
    assert_eq!(parse(several).unwrap().pools[0].replicas, 2, "one for each server");
}

#[test]
fn explains_a_fleet_that_passes_requests_on() {
    let text = explain::explain(&parse(PASSING).unwrap());
    expect![[r#"
        fleet.yaml: no faults

        model llama
          served as llama

        values
          version                            1                         line 1
          model.id                           llama                     line 2
          conductor.listen                   127.0.0.1:7400            default
          conductor.endpoints                http://127.0.0.1:7400     default
          conductor.lease_ttl_ms             10000                     default
          conductor.store                    embedded                  default
          router.listen                      127.0.0.1:8080            default
          router.policy.kind                 kv_aware                  default
          router.policy.seed                 0                         default
          router.policy.slo.ttft_ms          500                       default
          router.policy.slo.itl_ms           50                        default
          router.policy.slo.early_rejection  false                     default
          router.policy.spill_requests       0                         default
          router.policy.session_header       x-session-id              default
          router.limits.body                 4 MiB                     default
          router.limits.bodies               1 GiB                     default
          router.limits.queue                1024                      default
          router.limits.in_flight            4096                      default
          router.limits.connections          8192                      default
          router.limits.header_timeout_ms    10000                     default
          router.limits.body_timeout_ms      10000                     default
          router.limits.queue_timeout_ms     30000                     default
          router.limits.request_timeout_ms   600000                    default
          router.limits.keep_alive_ms        10000                     default
          router.limits.drain_settle_ms      0                         default
          router.limits.drain_grace_ms       120000                    default
          router.disaggregation              auto                      default
          router.index.memory                256 MiB                   default
          router.explain                     false                     default
          pools[0].name                      servers                   line 4
          pools[0].role                      both                      line 5
          pools[0].accelerator               cpu                       default
          pools[0].engine.kind               openai                    line 6
          pools[0].engine.url                http://127.0.0.1:8000/    line 6
          pools[0].engine.api_key_file       engine.key                line 6
          pools[0].engine.ca_file            ca.pem                    line 6
          pools[0].engine.model              meta/Llama                line 6
          pools[0].engine.health_path        /ping                     line 6
          pools[0].engine.silent_timeout_ms  60000                     default
          pools[0].engine.pass_fields[0]     baton                     line 6
          pools[0].listen                    127.0.0.1:7500            default
          pools[0].replicas                  1                         default
          pools[0].limits.in_flight          1024                      default
          pools[0].limits.body               16 MiB                    default
          pools[0].limits.drain_grace_ms     120000                    default

        servers that requests are passed on to
          servers: 1 x http://127.0.0.1:8000
            know the model as meta/Llama: requests and answers are changed accordingly
            are shown the key in engine.key, by each router and worker
            a loopback address is that of the host of the worker beside the server
            are well while GET /ping is answered and requests make progress
            get at most 1024 requests of each router at once
    "#]]
    .assert_eq(&text);
}

#[test]
fn servers_are_named_plainly_and_mean_nothing_else() {
    let text = "version: 1
model: { served_as: [x] }
pools:
  - name: a
    role: both
    engine: { kind: openai, url: \"http://x:8000/v1\", health_path: ping, pass_fields: [a b] }
    kv: { block_tokens: 16 }
    autoscale: { max: 4 }
  - { name: b, role: decode, transfer: { streams: 2 }, engine: { kind: openai, urls: [http://a, \"ftp://b\", http://u:p@c], api_key: sk-secret } }
  - { name: c, role: both, replicas: 3, engine: { kind: openai, urls: [http://a, http://b] } }
  - { name: d, role: both, engine: { kind: openai } }
  - { name: e, role: both, engine: { kind: openai, url: http://a, urls: [] } }
";
    faults(
        text,
        &expect![[r#"
        fleet.yaml:2:8: model.id: is missing
          remedy: write `id:` with the name of the model, as clients ask for it
        fleet.yaml:6:34: pools[0].engine.url: is http://x:8000/v1 in quotes, which is not http://HOST:PORT or https://HOST:PORT, without user, password and path (Baton adds /v1/...)
          remedy: write http://HOST:PORT or https://HOST:PORT, without user, password and path (Baton adds /v1/...)
        fleet.yaml:6:67: pools[0].engine.health_path: is ping, which is not a path, like /health
          remedy: write a path, like /health
        fleet.yaml:6:87: pools[0].engine.pass_fields[0]: is a b, which is not the name of a field of a request
          remedy: write the name of a field of a request
        fleet.yaml:7:9: pools[0].kv: means nothing for an openai engine: the server keeps its own KV cache
          remedy: remove it
        fleet.yaml:8:16: pools[0].autoscale: means nothing for an openai engine: the server tells neither its queue nor its KV cache in a way that could be followed
          remedy: remove it
        fleet.yaml:9:40: pools[1].transfer: means nothing for an openai engine: the server's KV blocks never leave it
          remedy: remove it
        fleet.yaml:9:97: pools[1].engine.urls[1]: is ftp://b in quotes, which is not http://HOST:PORT or https://HOST:PORT, without user, password and path (Baton adds /v1/...)
          remedy: write http://HOST:PORT or https://HOST:PORT, without user, password and path (Baton adds /v1/...)
        fleet.yaml:9:108: pools[1].engine.urls[2]: is http://(credentials)@..., which is not http://HOST:PORT or https://HOST:PORT, without user, password and path (Baton adds /v1/...)
          remedy: write http://HOST:PORT or https://HOST:PORT, without user, password and path (Baton adds /v1/...)
        fleet.yaml:9:123: pools[1].engine.api_key: would hold a secret in clear text
          remedy: write the secret into a file and give its path as `api_key_file:`
        fleet.yaml:10:38: pools[2].replicas: is 3, but engine.urls names 2 servers
          remedy: name a server for each replica
        fleet.yaml:11:36: pools[3].engine.url: is missing
          remedy: write `url:` with http://HOST:PORT or https://HOST:PORT, without user, password and path (Baton adds /v1/...)
        fleet.yaml:12:36: pools[4].engine: has both `url` and `urls`
          remedy: keep `url` for one server, or `urls` for one server of each replica
        fleet.yaml:12:73: pools[4].engine.urls: is empty
          remedy: name at least one server
        14 faults in fleet.yaml"#]],
    );
}

#[test]
fn passing_on_and_generating_do_not_mix() {
    let text = with_head(
        "pools:
  - { name: own, role: both }
  - { name: other, role: both, engine: { kind: openai, url: http://127.0.0.1:8000 } }
",
    );
    faults(
        &text,
        &expect![[r#"
        fleet.yaml:5:48: pools[1].engine.kind: is openai, but reference in own: a fleet either passes every request on or none
          remedy: write a fleet file, with a router of its own, for the pools of kind openai"#]],
    );
}
