mod autoscale;
mod conductor;
mod servers;

use std::path::Path;
use std::time::Duration;

use expect_test::{Expect, expect, expect_file};
use proptest::prelude::*;

use super::*;
use crate::names::{Accelerator, Role};
use crate::units::Bytes;

const CONFIG: &str = r#"{"architectures":["LlamaForCausalLM"],"num_hidden_layers":4,"num_attention_heads":4,
    "num_key_value_heads":2,"hidden_size":128,"vocab_size":1024,"max_position_embeddings":4096}"#;

/// A directory that looks like a model, as far as this crate looks.
fn model_dir(root: &Path) {
    let dir = root.join("examples/models/tiny");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("config.json"), CONFIG).unwrap();
    std::fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    std::fs::write(dir.join("model.safetensors"), "").unwrap();
}

fn parse(text: &str) -> Result<Fleet, Faults> {
    let root = tempfile::tempdir().unwrap();
    model_dir(root.path());
    parse_in(root.path(), text)
}

fn parse_in(root: &Path, text: &str) -> Result<Fleet, Faults> {
    let environment = |name: &str| match name {
        "PORT" => Some("9000".to_owned()),
        "SECRET" => Some("hunter2".to_owned()),
        _ => None,
    };
    let directory = Some(root.to_owned());
    Fleet::parse(text, &Source { name: "fleet.yaml".to_owned(), directory, environment: &environment })
}

fn faults(text: &str, expected: &Expect) {
    let root = tempfile::tempdir().unwrap();
    model_dir(root.path());
    let faults = parse_in(root.path(), text).expect_err("the document has faults");
    expected.assert_eq(&faults.to_string().replace(&root.path().display().to_string(), "ROOT"));
}

const HEAD: &str = "version: 1\nmodel: { path: examples/models/tiny }\n";

fn with_head(rest: &str) -> String {
    format!("{HEAD}{rest}")
}

#[test]
fn the_smallest_fleet_is_three_lines() {
    let fleet = parse(&with_head("pools: [{ name: all, role: both }]\n")).unwrap();
    assert_eq!(fleet.model.id, "tiny");
    assert_eq!(fleet.model.served_as, ["tiny"]);
    assert_eq!(fleet.router.listen.address.to_string(), "127.0.0.1:8080");
    assert!(!fleet.router.listen.named);
    assert_eq!(fleet.conductor.endpoints, ["http://127.0.0.1:7400"]);
    assert_eq!(fleet.pools[0].role, Role::Both);
    assert_eq!(fleet.pools[0].listen.address.port(), 7500);
    assert_eq!(fleet.pools[0].kv.capacity, KvCapacity::Memory(Bytes(256 << 20)));
    assert!(fleet.unsupported().is_empty());
    assert!(fleet.startable().is_ok());
}

#[test]
fn flow_sections_may_end_in_a_comma() {
    let pools = "router: { listen: 127.0.0.1:0, disaggregation: always }
pools:
  - { name: p, role: prefill, accelerator: simulated, transfer: { device_bandwidth: 8MB/s, port: 4000 }, }
  - { name: d, role: decode, transfer: { advertise: \"127.0.0.1:9\" }, }
";
    let fleet = parse(&with_head(pools)).unwrap();
    assert_eq!(fleet.router.listen.address.port(), 0, "any free port");
    assert_eq!(fleet.router.disaggregation, Disaggregation::Always);
    assert_eq!(fleet.pools[0].transfer.device_bandwidth.unwrap().0, 8_000_000);
    assert_eq!(fleet.pools[1].transfer.advertise, Some("127.0.0.1:9".parse().unwrap()));
}

#[test]
fn the_laptop_fleet_has_two_geometries() {
    let fleet = parse(defaults::LAPTOP_FLEET).unwrap();
    let [prefill, decode] = fleet.pools.as_slice() else { panic!("two pools") };
    assert_eq!(
        (prefill.role, prefill.accelerator, prefill.replicas),
        (Role::Prefill, Accelerator::Simulated, 2)
    );
    assert_eq!((decode.role, decode.accelerator, decode.replicas), (Role::Decode, Accelerator::Cpu, 2));
    let shape = &fleet.model.directory.as_ref().expect("a directory").shape;
    assert_eq!(prefill.kv.geometry(shape).to_string(), expect_geometry(32, "nhd"));
    assert_eq!(decode.kv.geometry(shape).to_string(), expect_geometry(16, "hnd"));
    assert_eq!(decode.listen.address.port(), 7502, "replicas of all pools follow each other");
}

fn expect_geometry(block_tokens: u32, layout: &str) -> String {
    format!("4 layers x 2 kv heads x 32 dims, blocks of {block_tokens} tokens, {layout}, bf16")
}

#[test]
fn the_example_fleets_have_no_faults() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/fleets");
    let mut seen = 0;
    for file in std::fs::read_dir(examples).unwrap() {
        let file = file.unwrap().path();
        let text = std::fs::read_to_string(&file).unwrap();
        parse(&text).unwrap_or_else(|faults| panic!("{}:\n{faults}", file.display()));
        seen += 1;
    }
    assert!(seen >= 4);
}

#[test]
fn the_documentation_has_every_key_with_its_default() {
    let page = include_str!("../../../docs/fleet.md");
    let sim = parse(&with_head("pools: [{ name: all, role: both, engine: { kind: sim } }]\n")).unwrap();
    let reference = parse(&with_head("pools: [{ name: all, role: both }]\n")).unwrap();
    let scaling = parse(&with_head(autoscale::SCALING)).unwrap();
    let scaling = scaling.resolved().iter().filter(|value| value.path.contains("[0].autoscale"));
    let openai = parse(servers::PASSING).unwrap();
    let values = sim.resolved().iter().chain(reference.resolved()).chain(scaling).chain(openai.resolved());
    for value in values {
        let key =
            format!("| `{}` |", value.path.replace("[0]", "[]").replace("pass_fields[]", "pass_fields"));
        let line = page.lines().find(|line| line.starts_with(&key));
        let line = line.unwrap_or_else(|| panic!("{key} is not documented"));
        // The defaults that depend on the machine and on the file are told in words.
        let in_words = ["threads", "model.id", "autoscale.max"].iter().any(|words| key.contains(words));
        if value.origin == crate::reader::Origin::Default && !in_words {
            let default = line.rsplit("| ").next().unwrap_or_default();
            assert!(
                default.starts_with(&format!("`{}`", value.value)),
                "{key}: {default}, not {}",
                value.value
            );
        }
    }
}

#[test]
fn explains_the_laptop_fleet() {
    let root = tempfile::tempdir().unwrap();
    model_dir(root.path());
    let fleet = parse_in(root.path(), defaults::LAPTOP_FLEET).unwrap();
    let text = explain::explain(&fleet).replace(&root.path().display().to_string(), "ROOT");
    expect_file!["golden/laptop-explained.txt"].assert_eq(&text);
}

#[test]
fn names_what_is_not_in_this_build() {
    let text = include_str!("../../../examples/fleets/datacenter.yaml");
    let fleet = parse(text).unwrap();
    let missing = fleet.startable().expect_err("vllm is not built yet");
    expect![[r#"
        fleet.yaml:21:21: pools[0].engine.kind: the engine vllm is not available in this build
          remedy: use kind: reference or kind: sim, or kind: openai in every pool
        fleet.yaml:30:21: pools[1].engine.kind: the engine vllm is not available in this build
          remedy: use kind: reference or kind: sim, or kind: openai in every pool
        2 faults in fleet.yaml"#]]
    .assert_eq(&missing.to_string());
    assert!(fleet.unsupported().iter().all(|u| u.required), "{:?}", fleet.unsupported());
}

#[test]
fn a_router_that_anybody_reaches_is_worth_a_word() {
    let notes = |router: &str| {
        let fleet = parse(&with_head(&format!("router: {router}\npools: [{{ name: all, role: both }}]\n")));
        explain::notes(&fleet.unwrap())
    };
    assert!(notes("{ listen: 127.0.0.1:8080 }").is_empty());
    let open = notes("{ listen: 0.0.0.0:8080 }");
    assert!(open.len() == 1 && open[0].contains("router.auth"), "{open:?}");
    let clear = notes("{ listen: 0.0.0.0:8080, auth: { keys_file: keys.yaml } }");
    assert!(clear.len() == 1 && clear[0].contains("router.tls"), "{clear:?}");
    let tls = "tls: { cert_file: a.pem, key_file: b.pem }";
    assert!(
        notes(&format!("{{ listen: 0.0.0.0:8080, auth: {{ keys_file: keys.yaml }}, {tls} }}")).is_empty()
    );
}

#[test]
fn tokens_of_an_identity_provider_are_signed_with_private_keys() {
    let jwt = |jwt: &str| {
        let router = format!("router: {{ auth: {{ keys_file: k, isolation: request, jwt: {jwt} }} }}");
        parse(&with_head(&format!("{router}\npools: [{{ name: all, role: both }}]\n")))
    };
    let fleet = jwt("{ jwks_file: j, issuer: \"https://id\", audience: baton }").unwrap();
    let spec = fleet.router.auth.unwrap().jwt.unwrap();
    assert_eq!(spec.algorithms, [JwtAlgorithm::Rs256, JwtAlgorithm::Es256]);
    assert_eq!((spec.tenant_claim.as_str(), spec.leeway), ("tenant", std::time::Duration::from_secs(60)));
    assert_eq!(spec.keys, JwksSource::File("j".into()));
    let faults = jwt("{ issuer: i, algorithms: [HS256, none] }").unwrap_err().to_string();
    expect![[r#"
        fleet.yaml:3:58: router.auth.jwt.audience: is missing
          remedy: write `audience:` with the `aud` of tokens for this router
        fleet.yaml:3:68: router.auth.jwt.issuer: is no https:// URL, and there is neither jwks_url nor jwks_file: nothing says where its keys are
          remedy: write `jwks_url:` or `jwks_file:`, or the issuer's URL
        fleet.yaml:3:84: router.auth.jwt.algorithms[0]: is HS256, which is not one of RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA
          remedy: write one of RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA
        fleet.yaml:3:91: router.auth.jwt.algorithms[1]: is none, which is not one of RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA
          remedy: write one of RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA
        4 faults in fleet.yaml"#]].assert_eq(&faults);
}

#[test]
fn keys_of_an_identity_provider_come_from_a_file_or_from_itself() {
    let jwt = |jwt: &str| {
        let router = format!("router: {{ auth: {{ keys_file: k, jwt: {{ audience: baton, {jwt} }} }} }}");
        parse(&with_head(&format!("{router}\npools: [{{ name: all, role: both }}]\n")))
    };
    let source = |text: &str| jwt(text).unwrap().router.auth.unwrap().jwt.unwrap().keys;
    assert_eq!(source("issuer: \"https://id.example/\""), JwksSource::Remote(RemoteJwks::new(None)));
    let mut given = RemoteJwks::new(Some("http://127.0.0.1:9/keys".to_owned()));
    given.refresh = std::time::Duration::from_secs(2);
    given.ca_file = Some("ca.pem".into());
    let text = "issuer: i, jwks_url: \"http://127.0.0.1:9/keys\", ca_file: ca.pem, refresh_ms: 2000";
    assert_eq!(source(text), JwksSource::Remote(given));
    let faults = |text: &str| jwt(text).unwrap_err().to_string();
    expect![[r#"
        fleet.yaml:3:78: router.auth.jwt.jwks_url: is http://id.example/keys in quotes, which is not https://HOST/PATH of its JSON Web Key Set; http:// only for a loopback address
          remedy: write https://HOST/PATH of its JSON Web Key Set; http:// only for a loopback address"#]]
    .assert_eq(&faults("issuer: i, jwks_url: \"http://id.example/keys\""));
    expect![[r#"
        fleet.yaml:3:92: router.auth.jwt.jwks_url: is given beside jwks_file, from which nothing is fetched
          remedy: keep jwks_file, or what says how keys are fetched"#]]
    .assert_eq(&faults("issuer: i, jwks_file: j, jwks_url: \"https://id.example/keys\""));
}

#[test]
fn agents_that_other_hosts_can_reach_share_a_token() {
    let fleet = |transfer: &str| {
        format!(
            "version: 1\nmodel: {{ path: examples/models/tiny }}\npools:\n  - name: a\n    role: both\n    transfer: {{ {transfer} }}\n"
        )
    };
    let faults = parse(&fleet("bind: 10.0.0.7, backends: [plugin, tcp]")).expect_err("no token, no plugin");
    expect![[r#"
        fleet.yaml:6:15: pools[0].transfer.plugin: is missing
          remedy: write `plugin:` with the path of the plugin's shared object
        fleet.yaml:6:23: pools[0].transfer.bind: is 10.0.0.7, where other hosts can connect, and the agents share no token
          remedy: add auth: { token_file: PATH } with the same file for every pool, or bind 127.0.0.1
        2 faults in fleet.yaml"#]].assert_eq(&faults.to_string());
    let ours = parse(&fleet("bind: 10.0.0.7, auth: { token_file: t }")).unwrap();
    assert_eq!(ours.pools[0].transfer.token_file.as_deref(), Some(std::path::Path::new("t")));
}

#[test]
fn number_formats_the_engines_lack_and_scales_without_fp8_are_named() {
    let pool = |kv: &str| with_head(&format!("pools: [{{ name: all, role: both, kv: {{ {kv} }} }}]\n"));
    let fleet = parse(&pool("dtype: fp8_e4m3, scales: head, layout: lbhnc")).unwrap();
    expect![[r#"
        fleet.yaml:3:47: pools[0].kv.dtype: a KV cache in fp8_e4m3 for the engine reference is not available in this build
          remedy: write bf16, f16 or f32"#]]
    .assert_eq(&fleet.startable().expect_err("no engine has it").to_string());
    assert!(parse(&pool("dtype: f16, layout: b2lnhd")).unwrap().startable().is_ok());
    faults(
        &pool("dtype: f16, scales: block"),
        &expect![[r#"
        fleet.yaml:3:60: pools[0].kv.scales: is block, but f16 numbers have no scales
          remedy: remove it, or write dtype: fp8_e4m3"#]],
    );
}

#[test]
fn all_faults_of_a_file_are_listed_at_once() {
    let text = "version: 2
model: { path: examples/models/none, served_ass: [a] }
conductor: { listen: 7400, store: zookeeper }
router:
  listen: 127.0.0.1:99999
  polices: { kind: fast }
  limits: { body: 4 pounds, queue: -1, queue: 3 }
pools:
  - name: GPU
    role: prefil
    kv: { block_tokens: 0, layout: NHD, dtype: fp4, memory: [1] }
    transfer: { backends: [shm, shm, smoke], integrity: yes }
    replicas: two
  - role: decode
    engine: { kind: vllm, api_key: abc }
";
    faults(
        text,
        &expect![[r#"
        fleet.yaml:1:10: version: is 2, which is not 1, the only version there is
          remedy: write 1, the only version there is
        fleet.yaml:2:16: model.path: model directory examples/models/none does not exist
          remedy: give the path of a model directory; a relative one is looked up beside the fleet file, then in the working directory
        fleet.yaml:2:38: model.served_ass: unknown key `served_ass`
          remedy: did you mean `served_as`?
        fleet.yaml:3:22: conductor.listen: is 7400, which is not an address and a port, like 127.0.0.1:8080
          remedy: write an address and a port, like 127.0.0.1:8080 (the default is 127.0.0.1:7400)
        fleet.yaml:3:35: conductor.store: is zookeeper, which is not `embedded`, or a section `etcd:` with endpoints
          remedy: write `embedded`, or a section `etcd:` with endpoints
        fleet.yaml:5:11: router.listen: is 127.0.0.1:99999, which is not an address and a port, like 127.0.0.1:8080
          remedy: write an address and a port, like 127.0.0.1:8080 (the default is 127.0.0.1:8080)
        fleet.yaml:6:3: router.polices: unknown key `polices`
          remedy: did you mean `policy`?
        fleet.yaml:7:19: router.limits.body: is 4 pounds, which is not a size from 1 KiB to 1 GiB, like 64MiB
          remedy: write a size from 1 KiB to 1 GiB, like 64MiB (the default is 4 MiB)
        fleet.yaml:7:36: router.limits.queue: is -1, which is not a whole number from 0 to 1000000
          remedy: write a whole number from 0 to 1000000 (the default is 1024)
        fleet.yaml:7:40: router.limits.queue: key is given a second time (first in line 7)
          remedy: keep one of them
        fleet.yaml:9:11: pools[0].name: is GPU, which is not a name of at most 58 characters of a-z, 0-9 and '-'
          remedy: write a name of at most 58 characters of a-z, 0-9 and '-'
        fleet.yaml:10:11: pools[0].role: is prefil, which is not one of prefill, decode, both
          remedy: did you mean `prefill`?
        fleet.yaml:11:25: pools[0].kv.block_tokens: is 0, which is not a whole number from 1 to 1024
          remedy: write a whole number from 1 to 1024 (the default is 16)
        fleet.yaml:11:36: pools[0].kv.layout: is NHD, which is not one of nhd, hnd, b2lnhd, b2lhnd, l2bnhd, l2bhnd, lb2nhd, lb2hnd, lbnhc, lbhnc, lhbnc, blnhc, blhnc, bhlnc
          remedy: did you mean `nhd`?
        fleet.yaml:11:48: pools[0].kv.dtype: is fp4, which is not one of bf16, f16, f32, fp8_e4m3
          remedy: write one of bf16, f16, f32, fp8_e4m3
        fleet.yaml:11:61: pools[0].kv.memory: is a list, not a single value
          remedy: write a size from 1 KiB to 16 TiB, like 64MiB (the default is 256 MiB)
        fleet.yaml:12:33: pools[0].transfer.backends[1]: names shm again
          remedy: name each backend once, best first
        fleet.yaml:12:38: pools[0].transfer.backends[2]: is smoke, which is not one of shm, tcp, cma, libfabric, ucx, plugin, file, object
          remedy: write one of shm, tcp, cma, libfabric, ucx, plugin, file, object
        fleet.yaml:12:57: pools[0].transfer.integrity: is yes, which is not one of digest, off
          remedy: write one of digest, off
        fleet.yaml:13:15: pools[0].replicas: is two, which is not a whole number from 0 to 1024
          remedy: write a whole number from 0 to 1024 (the default is 1)
        fleet.yaml:14:5: pools[1].name: is missing
          remedy: write `name:` with a name of at most 58 characters of a-z, 0-9 and '-'
        fleet.yaml:15:13: pools[1].engine.url: is missing
          remedy: write `url:` with a URL without user and password, like http://127.0.0.1:8001
        fleet.yaml:15:27: pools[1].engine.api_key: would hold a secret in clear text
          remedy: write the secret into a file and give its path as `api_key_file:`
        23 faults in fleet.yaml"#]],
    );
}

#[test]
fn unreadable_yaml_says_where() {
    faults(
        "version: 1\n  model: [",
        &expect![[r#"
            fleet.yaml:2:8: is not YAML: mapping values are not allowed in this context
              remedy: correct the YAML here or just before; indentation and unclosed brackets are the usual causes"#]],
    );
    faults(
        "version: 1\npools: *all\n",
        &expect![[r#"
            fleet.yaml:2:8: is not YAML: while parsing node, found unknown anchor
              remedy: correct the YAML here or just before; indentation and unclosed brackets are the usual causes"#]],
    );
    faults(
        "a: &a [1]\nb: 2\n",
        &expect![[r#"
            fleet.yaml:1:7: uses a YAML anchor or alias
              remedy: write the value out where it is needed"#]],
    );
    faults(
        "version: !!int 1\n",
        &expect![[r#"
            fleet.yaml:1:16: carries a YAML tag
              remedy: remove the `!` and the word after it"#]],
    );
    faults(
        "version: 1\n---\nversion: 1\n",
        &expect![[r#"
            fleet.yaml:2:1: holds a second document
              remedy: keep one document per file: remove `---` and what follows"#]],
    );
    faults(
        "? [a]\n: b\n",
        &expect![[r#"
            fleet.yaml:1:3: has a list as a key
              remedy: write `key: value` with a word as the key"#]],
    );
    faults(
        "- a\n- b\n",
        &expect![[r#"
            fleet.yaml:1:1: the document is a list, not a section
              remedy: write `key: value` pairs"#]],
    );
    faults(
        "",
        &expect![[r#"
        fleet.yaml:1:1: version: is missing
          remedy: write `version:` with 1, the only version there is
        fleet.yaml:1:1: model: is missing
          remedy: write `model:` with a section, such as { path: examples/models/tiny }
        fleet.yaml:1:1: pools: is missing
          remedy: write `pools:` with at least one pool, such as `- { name: all, role: both }`
        3 faults in fleet.yaml"#]],
    );
    faults(
        "version: 1\nx: \u{7}\n",
        &expect![[r#"
            fleet.yaml:2:4: character '\u{7}' cannot stand in YAML
              remedy: remove it; is this a text file?"#]],
    );
}

#[test]
fn hostile_yaml_is_refused() {
    let nested = |levels: usize| format!("version: {}{}", "[".repeat(levels), "]".repeat(levels));
    assert!(parse(&nested(50_000)).is_err());
    let deep = nested(100);
    assert!(parse(&deep).unwrap_err().to_string().contains("16 levels deep"));
    let wide = format!("version: [{}]", "1,".repeat(200_000));
    assert!(parse(&wide).unwrap_err().to_string().contains("more than 100000 values"));
    let long = format!("version: {}", "1".repeat(2 << 20));
    assert!(parse(&long).unwrap_err().to_string().contains("at most 1048576 bytes"));
    let bomb = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n";
    assert!(parse(bomb).unwrap_err().to_string().contains("anchor or alias"));
}

#[test]
fn parts_that_do_not_go_together_are_faults() {
    faults(
        &with_head("pools: [{ name: p, role: prefill }]\n"),
        &expect![[r#"
            fleet.yaml:3:26: pools: has no pool that generates: every role is prefill
              remedy: add a pool with role: decode, or make one role: both"#]],
    );
    faults(
        &with_head("pools: []\n"),
        &expect![[r#"
            fleet.yaml:3:8: pools: has no pool
              remedy: add at least one pool, such as `- { name: all, role: both }`"#]],
    );
    faults(
        &with_head("pools: [{ name: a, role: both }, { name: a, role: both }]\n"),
        &expect![[r#"
            fleet.yaml:3:42: pools[1].name: is a, the name of pools[0] too
              remedy: give each pool its own name"#]],
    );
    let backends = "pools:
  - { name: p, role: prefill, transfer: { backends: [shm], integrity: off } }
  - { name: d, role: decode, transfer: { backends: [tcp] } }
";
    faults(
        &with_head(backends),
        &expect![[r#"
        fleet.yaml:4:71: pools[1].transfer.integrity: is digest, but off in p: one side computes digests the other must verify
          remedy: write the same in both pools
        fleet.yaml:5:13: pools[1].transfer.backends: is [tcp], but p has only [shm]
          remedy: name at least one backend in both pools; tcp works between any two hosts
        2 faults in fleet.yaml"#]],
    );
    let engines = "pools:
  - { name: p, role: prefill, engine: { kind: sim } }
  - { name: d, role: decode }
";
    faults(
        &with_head(engines),
        &expect![[r#"
            fleet.yaml:4:47: pools[1].engine.kind: is reference, but sim in p: a simulated KV cache means nothing to a real engine
              remedy: use sim in both pools, or in neither"#]],
    );
    let seeds = "pools:
  - { name: a, role: both, engine: { kind: sim } }
  - { name: b, role: both, engine: { kind: sim, seed: 7 } }
  - { name: c, role: both, engine: { kind: sim, seed: 0 } }
";
    faults(
        &with_head(seeds),
        &expect![[r#"
        fleet.yaml:5:55: pools[1].engine.seed: is 7, but 0 in a: they would make up different answers
          remedy: write the same seed in every sim pool"#]],
    );
    let ports = "router: { listen: 127.0.0.1:7501 }
pools:
  - { name: a, role: both, listen: 127.0.0.1:7500, replicas: 2 }
  - { name: b, role: both, listen: 127.0.0.1:65535, replicas: 2 }
";
    faults(
        &with_head(ports),
        &expect![[r#"
        fleet.yaml:5:36: pools[0].listen: takes 127.0.0.1:7500 to port 7501, which overlaps router.listen (127.0.0.1:7501)
          remedy: give one of them another port
        fleet.yaml:6:36: pools[1].listen: leaves too few ports above it for 2 replicas
          remedy: use a lower port
        2 faults in fleet.yaml"#]],
    );
    let memory = "pools:
  - name: a
    role: both
    accelerator: simulated
    kv: { memory: 4KiB, block_tokens: 64 }
    transfer: { path: gpu_direct, staging: 4KiB }
    autoscale: { min: 3, max: 4 }
";
    faults(
        &with_head(memory),
        &expect![[r#"
        fleet.yaml:7:19: pools[0].kv.memory: holds less than two blocks of 64 KiB
          remedy: write at least 128 KiB, or a smaller block_tokens
        fleet.yaml:8:23: pools[0].transfer.path: is gpu_direct, but the KV cache is not in GPU memory (accelerator: simulated)
          remedy: write path: auto, or accelerator: cuda
        fleet.yaml:8:44: pools[0].transfer.staging: is 4 KiB, less than two blocks of 64 KiB
          remedy: write at least 128 KiB, or a smaller block_tokens
        fleet.yaml:9:16: pools[0].autoscale: goes from 3 to 4, which leaves out the 1 replicas of the pool
          remedy: widen it or change replicas
        4 faults in fleet.yaml"#]],
    );
}

#[test]
fn a_broken_model_directory_is_a_fault() {
    let root = tempfile::tempdir().unwrap();
    model_dir(root.path());
    let dir = root.path().join("examples/models/tiny");
    let text = with_head("pools: [{ name: all, role: both }]\n");
    std::fs::remove_file(dir.join("model.safetensors")).unwrap();
    assert!(parse_in(root.path(), &text).unwrap_err().to_string().contains("holds no *.safetensors file"));
    std::fs::remove_file(dir.join("tokenizer.json")).unwrap();
    assert!(parse_in(root.path(), &text).unwrap_err().to_string().contains("tokenizer.json does not exist"));
    for (config, problem) in [
        ("{", "config.json is not a model configuration: EOF while parsing"),
        ("{}", "missing field `num_hidden_layers`"),
        (&CONFIG.replace("128", "0"), "hidden_size is 0, which cannot be"),
        (&CONFIG.replace("\":4,", "\":99999999999,"), "is 99999999999, which cannot be"),
    ] {
        std::fs::write(dir.join("config.json"), config).unwrap();
        let faults = parse_in(root.path(), &text).unwrap_err().to_string();
        assert!(faults.contains(problem), "{faults}");
    }
    std::fs::remove_file(dir.join("config.json")).unwrap();
    assert!(parse_in(root.path(), &text).unwrap_err().to_string().contains("config.json cannot be read"));
}

#[test]
fn the_environment_is_expanded_and_never_shown() {
    let text = with_head(
        "router: { listen: \"127.0.0.1:${PORT}\" }\npools: [{ name: all, role: both, advertise: \"${SECRET}\" }]\n",
    );
    let fleet = parse(&text).unwrap();
    assert_eq!(fleet.router.listen.address.port(), 9000);
    assert_eq!(fleet.pools[0].advertise.as_deref(), Some("hunter2"));
    assert!(!explain::explain(&fleet).contains("hunter2"));
    let text = with_head(
        "router: { policy: { seed: \"${SECRET}\" } }\npools: [{ name: \"${NOPE}\", role: both, advertise: \"${x\" }]\n",
    );
    faults(
        &text,
        &expect![[r#"
        fleet.yaml:3:27: router.policy.seed: is ${SECRET}, which is not a whole number from 0 to 18446744073709551615
          remedy: write a whole number from 0 to 18446744073709551615 (the default is 0)
        fleet.yaml:4:17: pools[0].name: needs the environment variable NOPE, which is not set
          remedy: set NOPE, or write the value here
        fleet.yaml:4:51: pools[0].advertise: has `${` that is not followed by NAME} in "${x"
          remedy: write ${NAME}, or $${ for a literal ${
        3 faults in fleet.yaml"#]],
    );
}

#[test]
fn secrets_in_clear_text_are_refused() {
    let text = with_head(
        "conductor: { store: { etcd: { endpoints: [http://root:pw@etcd:2379], auth: { user: root, password: pw } } } }
pools: [{ name: all, role: both }]\n",
    );
    faults(
        &text,
        &expect![[r#"
            fleet.yaml:3:43: conductor.store.etcd.endpoints[0]: is http://(credentials)@..., which is not a URL without user and password, like http://127.0.0.1:8001
              remedy: write a URL without user and password, like http://127.0.0.1:8001
            fleet.yaml:3:76: conductor.store.etcd.auth.password_file: is missing
              remedy: write `password_file:` with the path of a file that holds the password
            fleet.yaml:3:90: conductor.store.etcd.auth.password: would hold a secret in clear text
              remedy: write the secret into a file and give its path as `password_file:`
            3 faults in fleet.yaml"#]],
    );
}

#[test]
fn relative_model_paths_are_found_beside_the_file_first() {
    let root = tempfile::tempdir().unwrap();
    model_dir(root.path());
    let file = root.path().join("fleet.yaml");
    std::fs::write(&file, with_head("pools: [{ name: all, role: both }]\n")).unwrap();
    let fleet = Fleet::load(&file).unwrap();
    let directory = fleet.model.directory.expect("a directory");
    assert_eq!(directory.path, root.path().join("examples/models/tiny"));
    let missing = Fleet::load(&root.path().join("none.yaml")).unwrap_err().to_string();
    assert!(missing.contains("none.yaml: cannot be read: No such file"), "{missing}");
    std::fs::write(&file, b"\xff\xfe").unwrap();
    assert!(Fleet::load(&file).unwrap_err().to_string().contains("is not text (UTF-8)"));
}

fn is_told(result: Result<Fleet, Faults>) {
    match result {
        Ok(fleet) => assert!(!explain::explain(&fleet).is_empty()),
        Err(faults) => {
            for fault in faults.list() {
                assert!(!fault.problem.is_empty() && !fault.remedy.is_empty());
            }
            assert!(!faults.list().is_empty());
        }
    }
}

fn parse_without_disk(text: &str) -> Result<Fleet, Faults> {
    Fleet::parse(text, &Source { name: "f".to_owned(), directory: None, environment: &|_| None })
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "\\PC*") {
        is_told(parse_without_disk(&text));
    }

    #[test]
    fn any_yaml_like_text_is_read_or_refused(text in "([a-z]{1,3}|[\\[\\]{}:,&*!|>'\"#?%@`~-]|\n| |\t|\\$\\{){0,80}") {
        is_told(parse_without_disk(&text));
    }

    #[test]
    fn a_mutated_fleet_is_read_or_refused(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3_u8), 1..8),
        datacenter in any::<bool>(),
    ) {
        let source = if datacenter {
            include_str!("../../../examples/fleets/datacenter.yaml")
        } else {
            defaults::LAPTOP_FLEET
        };
        let mut bytes = source.as_bytes().to_vec();
        for (index, byte, edit) in edits {
            let index = index.index(bytes.len());
            match edit {
                0 => bytes[index] = byte,
                1 => bytes.insert(index, byte),
                _ => { bytes.remove(index); }
            }
        }
        is_told(parse_without_disk(&String::from_utf8_lossy(&bytes)));
    }
}

#[test]
fn a_byte_order_mark_is_no_part_of_the_first_key() {
    assert!(parse(&format!("\u{feff}{}", with_head("pools: [{ name: a, role: both }]\n"))).is_ok());
}

#[test]
fn a_fault_does_not_pass_terminal_codes_on() {
    faults(
        "version: 1\nmodel: { path: '' }\npools: [{ name: \"a\\e[31m\\n\", role: both }]\n",
        &expect![[r#"
            fleet.yaml:2:16: model.path: is empty, which is not the path of a model directory
              remedy: write the path of a model directory
            fleet.yaml:3:17: pools[0].name: is a\u{1b}[31m\n in quotes, which is not a name of at most 58 characters of a-z, 0-9 and '-'
              remedy: write a name of at most 58 characters of a-z, 0-9 and '-'
            2 faults in fleet.yaml"#]],
    );
}

#[test]
fn a_pipe_in_place_of_a_model_file_is_refused_at_once() {
    let root = tempfile::tempdir().unwrap();
    model_dir(root.path());
    let config = root.path().join("examples/models/tiny/config.json");
    std::fs::remove_file(&config).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&config).status().unwrap().success());
    let faults = parse_in(root.path(), &with_head("pools: [{ name: a, role: both }]\n")).unwrap_err();
    assert!(faults.to_string().contains("not a regular file"), "{faults}");
}

#[test]
fn a_fault_that_a_part_found_in_the_model_stands_where_its_path_does() {
    let fleet = parse(&with_head("pools: [{ name: a, role: both }]\n")).unwrap();
    let expected = "fleet.yaml:2:16: model.path: is worn\n  remedy: get another";
    assert_eq!(fleet.model_fault("is worn", "get another").to_string(), expected);
}
