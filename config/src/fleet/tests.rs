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
    let scaling = parse(&with_head(SCALING)).unwrap();
    let scaling = scaling.resolved().iter().filter(|value| value.path.contains("[0].autoscale"));
    let openai = parse(PASSING).unwrap();
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
    let faults = jwt("{ issuer: i, algorithms: [HS256, none] }").unwrap_err().to_string();
    expect![[r#"
        fleet.yaml:3:58: router.auth.jwt.jwks_file: is missing
          remedy: write `jwks_file:` with the path of the JSON Web Key Set of the identity provider
        fleet.yaml:3:58: router.auth.jwt.audience: is missing
          remedy: write `audience:` with the `aud` of tokens for this router
        fleet.yaml:3:84: router.auth.jwt.algorithms[0]: is HS256, which is not one of RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA
          remedy: write one of RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA
        fleet.yaml:3:91: router.auth.jwt.algorithms[1]: is none, which is not one of RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA
          remedy: write one of RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA
        4 faults in fleet.yaml"#]].assert_eq(&faults);
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

fn conductor(keys: &str) -> String {
    with_head(&format!("conductor: {{ {keys} }}\npools: [{{ name: all, role: both }}]\n"))
}

#[test]
fn who_may_speak_with_the_conductor_is_read() {
    let open = parse(&conductor("listen: 127.0.0.1:7400")).unwrap().conductor;
    assert_eq!((open.guard.authenticates(), open.access), (false, ConductorAccess::default()));
    let token = parse(&conductor("listen: 10.0.0.7:7400, auth: { token_file: t }")).unwrap().conductor;
    assert!(token.guard.authenticates() && token.guard.tls.is_none());
    assert_eq!(token.endpoints, ["http://10.0.0.7:7400"]);
    assert_eq!(token.access.token_file.as_deref(), Some(Path::new("t")));
    let keys = "listen: 0.0.0.0:7400, allowed_addresses: [10.0.0.0/8, ::1], tls: { cert_file: c, key_file: k, client_ca_file: a, ca_file: b, client_cert_file: d, client_key_file: e }";
    let ConductorSpec { guard, access, endpoints, .. } = parse(&conductor(keys)).unwrap().conductor;
    assert!(guard.authenticates() && guard.token_file.is_none());
    assert_eq!(endpoints, ["https://127.0.0.1:7400"]);
    assert_eq!(
        guard.allowed_addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.0.0.0/8", "::1/128"]
    );
    assert_eq!(access.identity.map(|identity| identity.key_file).as_deref(), Some(Path::new("e")));
    assert_eq!(guard.tls.and_then(|tls| tls.client_ca_file).as_deref(), Some(Path::new("a")));
}

#[test]
fn a_conductor_that_anybody_reaches_asks_who_they_are() {
    faults(
        &conductor("listen: 0.0.0.0:7400"),
        &expect![[r#"
        fleet.yaml:3:22: conductor.listen: is 0.0.0.0:7400, where other hosts can connect, and nobody proves who they are
          remedy: add auth: { token_file: PATH } or tls: { cert_file: PATH, key_file: PATH, client_ca_file: PATH }, or listen on 127.0.0.1"#]],
    );
    faults(
        &conductor("listen: 10.0.0.7:7400, tls: { cert_file: c, key_file: k }"),
        &expect![[r#"
        fleet.yaml:3:22: conductor.listen: is 10.0.0.7:7400, where other hosts can connect, and nobody proves who they are
          remedy: add auth: { token_file: PATH } or tls: { cert_file: PATH, key_file: PATH, client_ca_file: PATH }, or listen on 127.0.0.1"#]],
    );
    faults(
        &conductor("listen: 10.0.0.7:7400, auth: { token: secret }"),
        &expect![[r#"
        fleet.yaml:3:43: conductor.auth.token_file: is missing
          remedy: write `token_file:` with the path of a file of at least 32 random characters
        fleet.yaml:3:45: conductor.auth.token: would hold a secret in clear text
          remedy: write the secret into a file and give its path as `token_file:`
        2 faults in fleet.yaml"#]],
    );
    faults(
        &conductor("tls: { cert_file: c, client_key_file: k }"),
        &expect![[r#"
        fleet.yaml:3:19: conductor.tls.key_file: is missing
          remedy: write `key_file:` with the path of the PEM file of the key
        fleet.yaml:3:19: conductor.tls.client_cert_file: is missing
          remedy: write `client_cert_file:` with the path of the PEM file of the certificate
        2 faults in fleet.yaml"#]],
    );
    faults(
        &conductor("tls: { client_ca_file: a }, allowed_addresses: []"),
        &expect![[r#"
        fleet.yaml:3:12: conductor.allowed_addresses: is empty: no worker could register
          remedy: name at least one range, or remove the key
        fleet.yaml:3:37: conductor.tls.client_ca_file: asks clients for certificates, but the conductor itself has none
          remedy: add cert_file: PATH and key_file: PATH
        2 faults in fleet.yaml"#]],
    );
    faults(
        &conductor(
            "endpoints: [https://a, http://b:1], tls: { cert_file: c, key_file: k }, allowed_addresses: [10.0.0.1/8, 10/8, ::/200]",
        ),
        &expect![[r#"
            fleet.yaml:3:37: conductor.endpoints[1]: is plain HTTP, but the conductor speaks TLS
              remedy: write https://b:1
            fleet.yaml:3:106: conductor.allowed_addresses[0]: has bits beyond its prefix
              remedy: write 10.0.0.0/8
            fleet.yaml:3:118: conductor.allowed_addresses[1]: is 10/8, which is not a range of addresses, like 10.0.0.0/8
              remedy: write a range of addresses, like 10.0.0.0/8
            fleet.yaml:3:124: conductor.allowed_addresses[2]: is ::/200, which is not a range of addresses, like 10.0.0.0/8
              remedy: write a range of addresses, like 10.0.0.0/8
            4 faults in fleet.yaml"#]],
    );
}

#[test]
fn etcd_is_reached_with_tls_or_without() {
    let text = with_head(
        "conductor: { store: { etcd: { endpoints: [http://a:2379, https://b:2379], tls: { ca_file: ca, cert_file: c } } } }
pools: [{ name: all, role: both }]\n",
    );
    faults(
        &text,
        &expect![[r#"
        fleet.yaml:3:43: conductor.store.etcd.endpoints[0]: is plain HTTP beside a `tls` section
          remedy: write https, or remove `tls`
        fleet.yaml:3:80: conductor.store.etcd.tls.key_file: is missing
          remedy: write `key_file:` with the path of the certificate's key
        2 faults in fleet.yaml"#]],
    );
    let text = with_head(
        "conductor: { store: { etcd: { endpoints: [https://b:2379] } } }
pools: [{ name: all, role: both }]\n",
    );
    faults(
        &text,
        &expect![[r#"
        fleet.yaml:3:43: conductor.store.etcd.endpoints[0]: is HTTPS, but no authority is known
          remedy: add `tls: { ca_file: PATH }`"#]],
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

/// A pool with every kind of default of autoscaling.
const SCALING: &str = "pools:
  - { name: all, role: both, autoscale: { scaler: webhook, webhook: { url: \"https://scaler.example\" } } }
  - name: decode
    role: decode
    replicas: 2
    autoscale: { max: 4, dry_run: true, scaler: kubernetes, target: { itl_ms: 40 }, kubernetes: { kind: Deployment, name: decode } }
  - { name: prefill, role: prefill, autoscale: { min: 0, max: 8, scaler: process, target: { queue_wait_ms: 100, ttft_ms: 900 } } }
";

#[test]
fn explains_autoscaling() {
    let fleet = parse(&with_head(SCALING)).unwrap();
    let text = explain::explain(&fleet);
    let from = text.find("autoscaling\n").unwrap();
    let section = text[from..].split("\ntransfer paths").next().unwrap();
    expect![[r#"
        autoscaling
          all: 1 to 1 workers, by POST https://scaler.example
            grows when prompts wait 250 ms or 80 % of the KV blocks are held, 10 % over for 3000 ms
            shrinks when fewer would have done for 300000 ms; they drain first
          decode: 1 to 4 workers, by the scale of Deployment decode in namespace default (dry run: only told)
            grows when 80 % of the KV blocks are held or a token takes 40 ms, 10 % over for 3000 ms
            shrinks when fewer would have done for 300000 ms; they drain first
          prefill: 0 to 8 workers, by baton up
            grows when prompts wait 100 ms or the first token takes 900 ms, 10 % over for 3000 ms
            shrinks when fewer would have done for 300000 ms; they drain first
    "#]]
    .assert_eq(section);
    let [all, decode, prefill] = fleet.pools.as_slice() else { panic!("three pools") };
    let scale = |pool: &Pool| pool.autoscale.clone().unwrap();
    assert_eq!(scale(all).target, Autoscale::new(Role::Both, 1, 1).target);
    assert_eq!((scale(decode).min, scale(decode).max, scale(decode).dry_run), (1, 4, true));
    assert_eq!(scale(decode).target.queue_wait, None, "decode workers have no queue of prompts");
    assert_eq!(scale(prefill).target.kv_percent, None);
    assert_eq!(scale(prefill).target.ttft, Some(Duration::from_millis(900)));
}

#[test]
fn faults_of_autoscaling_have_remedies() {
    let text = "pools:
  - name: a
    role: prefill
    autoscale: { min: 3, max: 2, target: { kv_occupancy: 80, ttft_ms: 0 }, scaler: kubernetes }
  - name: b
    role: decode
    autoscale: { target: { queue_wait_ms: 5 }, scaler: webhook, webhook: { url: \"http://h\", ca_file: ca.pem, secret: x } }
  - name: c
    role: both
    autoscale: { scaler: process, kubernetes: { kind: DaemonSet, name: Upper_Case }, tolerance: 5, down_after_ms: 10 }
  - name: d
    role: both
    autoscale: { scaler: kubernetes, kubernetes: { kind: DaemonSet, name: Upper_Case, namespace: \"a.b\" } }
";
    faults(
        &with_head(text),
        &expect![[r#"
        fleet.yaml:6:16: pools[0].autoscale.kubernetes: is missing
          remedy: write `kubernetes:` with the object to scale, such as { kind: Deployment, name: prefill }
        fleet.yaml:6:23: pools[0].autoscale.min: is 3, more than max, which is 2
          remedy: lower min or raise max
        fleet.yaml:6:58: pools[0].autoscale.target.kv_occupancy: is a target of decode workers, which this pool has none of
          remedy: remove it, or set queue_wait_ms or ttft_ms instead
        fleet.yaml:6:71: pools[0].autoscale.target.ttft_ms: is 0, which is not a whole number of milliseconds from 1 to 600000
          remedy: write a whole number of milliseconds from 1 to 600000
        fleet.yaml:9:43: pools[1].autoscale.target.queue_wait_ms: is a target of prefill workers, which this pool has none of
          remedy: remove it, or set kv_occupancy or itl_ms instead
        fleet.yaml:9:102: pools[1].autoscale.webhook.ca_file: is given, but the url is not https
          remedy: write https:// in url
        fleet.yaml:9:110: pools[1].autoscale.webhook.secret: would hold a secret in clear text
          remedy: write the secret into a file and give its path as `secret_file:`
        fleet.yaml:12:47: pools[2].autoscale.kubernetes: is given, but the scaler is process
          remedy: write scaler: kubernetes, or remove the section
        fleet.yaml:12:86: pools[2].autoscale.tolerance: unknown key `tolerance`
          remedy: remove it; the keys here are min, max, target, tolerance_percent, up_after_ms, down_after_ms, dry_run, scaler, kubernetes, webhook
        fleet.yaml:12:115: pools[2].autoscale.down_after_ms: is 10, which is not a whole number from 1000 to 86400000
          remedy: write a whole number from 1000 to 86400000 (the default is 300000)
        fleet.yaml:15:58: pools[3].autoscale.kubernetes.kind: is DaemonSet, which is not one of Deployment, StatefulSet
          remedy: write one of Deployment, StatefulSet
        fleet.yaml:15:75: pools[3].autoscale.kubernetes.name: is Upper_Case, which is not a name of a-z, 0-9, '-' and '.'
          remedy: write a name of a-z, 0-9, '-' and '.'
        fleet.yaml:15:98: pools[3].autoscale.kubernetes.namespace: is a.b in quotes, which is not a name of at most 63 characters of a-z, 0-9 and '-'
          remedy: write a name of at most 63 characters of a-z, 0-9 and '-' (the default is default)
        13 faults in fleet.yaml"#]],
    );
    let text = "pools:
  - { name: p, role: prefill, autoscale: { max: 2, scaler: kubernetes, kubernetes: { kind: Deployment, name: x } } }
  - { name: d, role: decode, autoscale: { min: 0, max: 2, scaler: kubernetes, kubernetes: { kind: Deployment, name: x } } }
";
    faults(
        &with_head(text),
        &expect![[r#"
        fleet.yaml:5:48: pools[1].autoscale.min: is 0, and no other pool that generates keeps a worker: the fleet could scale to nothing
          remedy: write min: 1
        fleet.yaml:5:117: pools[1].autoscale.kubernetes.name: is x, which pool p scales too
          remedy: give each pool an object of its own
        2 faults in fleet.yaml"#]],
    );
}

/// A fleet whose requests are passed on, with every key.
const PASSING: &str = "version: 1
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
          router.policy.spill_requests       0                         default
          router.policy.session_header       x-session-id              default
          router.limits.body                 4 MiB                     default
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
