//! What the binary says and how it exits.
#![cfg(test)]

use std::io::Read;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use expect_test::{Expect, expect};

/// The repository root, where the built-in fleet finds its model.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn baton() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    command.current_dir(root()).stdin(Stdio::null());
    for name in ["BATON_LOG", "BATON_LOG_FORMAT", "BATON_CONDUCTOR", "BATON_FLEET"] {
        command.env_remove(name);
    }
    command
}

fn run(args: &[&str]) -> Output {
    baton().args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Exit code and stderr of a command that must print nothing on stdout.
fn refused(args: &[&str], code: i32, expected: &Expect) {
    let output = run(args);
    assert_eq!(text(&output.stdout), "", "{args:?}");
    assert_eq!(output.status.code(), Some(code), "{args:?}: {}", text(&output.stderr));
    expected.assert_eq(&text(&output.stderr));
}

/// A fleet file of the tiny model with something more.
fn fleet_file(directory: &Path, rest: &str) -> String {
    let model = root().join("examples/models/tiny").canonicalize().unwrap();
    let path = directory.join("fleet.yaml");
    std::fs::write(&path, format!("version: 1\nmodel: {{ path: {} }}\n{rest}", model.display())).unwrap();
    path.display().to_string()
}

#[test]
fn help_and_version_go_to_stdout() {
    let version = run(&["--version"]);
    assert!(version.status.success());
    assert_eq!(text(&version.stdout), concat!("baton ", env!("CARGO_PKG_VERSION"), "\n"));
    let commands = [
        "up",
        "conductor",
        "router",
        "worker",
        "check",
        "status",
        "drain",
        "scale",
        "doctor",
        "kv",
        "bench transfer",
        "bench router",
        "bench index",
    ];
    for command in commands {
        let words: Vec<&str> = command.split(' ').chain(["--help"]).collect();
        let help = run(&words);
        assert!(help.status.success(), "{command}");
        assert!(text(&help.stdout).contains("Usage: baton"), "{command}");
    }
}

#[test]
fn bad_usage_exits_with_2() {
    assert_eq!(run(&[]).status.code(), Some(2));
    let output = run(&["statsu"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("'status'"), "the nearest command is named");
    for args in
        [["scale", "decode", "many"], ["drain", "Not/A/Name", "--conductor=x"], ["up", "--listen", "8080"]]
    {
        assert_eq!(run(&args).status.code(), Some(2), "{args:?}");
    }
    refused(
        &["--log", "loud", "doctor"],
        2,
        &expect![[r#"
        error: log filter "loud": "loud" is not a level; write a level, like debug, or baton_router=debug,info
    "#]],
    );
    refused(
        &["status", "--conductor", "ftp://x"],
        2,
        &expect![[r#"
        error: conductor "ftp://x" is not a URL: write http://HOST:PORT or https://HOST:PORT
    "#]],
    );
    refused(
        &["worker", "--pool", "nope"],
        2,
        &expect![[r#"
        error: the fleet has no pool nope; it has prefill, decode
    "#]],
    );
    refused(
        &["kv", "nowhere"],
        2,
        &expect![[r#"
        error: model directory nowhere does not exist; give a Hugging Face model directory, like examples/models/tiny
    "#]],
    );
    refused(
        &["check", "nowhere.yaml"],
        2,
        &expect![[r#"
        error: nowhere.yaml: cannot be read: No such file or directory (os error 2)
          remedy: give the path of a readable fleet file
    "#]],
    );
}

#[test]
fn check_explains_or_lists_every_fault() {
    let good = run(&["check"]);
    assert!(good.status.success(), "{}", text(&good.stderr));
    assert!(
        text(&good.stdout).contains("prefill -> decode: shm, else tcp; prefill host_buffered, decode direct")
    );
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fleet.yaml");
    std::fs::write(
        &path,
        "version: 1\nrouters: {}\nmodel: { path: none }\npools: [{ name: a, role: both }]\n",
    )
    .unwrap();
    let bad = run(&["check", &path.display().to_string()]);
    assert_eq!(bad.status.code(), Some(2));
    let shown = text(&bad.stderr).replace(&path.display().to_string(), "fleet.yaml");
    expect![[r#"
        error: fleet.yaml:2:1: routers: unknown key `routers`
          remedy: did you mean `router`?
        fleet.yaml:3:16: model.path: model directory none does not exist
          remedy: give the path of a model directory; a relative one is looked up beside the fleet file, then in the working directory
        2 faults in fleet.yaml
    "#]].assert_eq(&shown);
}

#[test]
fn the_fleet_file_of_the_environment_is_used_unless_a_flag_says_otherwise() {
    let directory = tempfile::tempdir().unwrap();
    let file = fleet_file(directory.path(), "pools: [{ name: lonely, role: both }]\n");
    let by_environment = baton().arg("check").env("BATON_FLEET", &file).output().unwrap();
    assert!(text(&by_environment.stdout).contains("lonely: 1 x both"));
    let by_flag =
        baton().args(["check", "examples/fleets/sim.yaml"]).env("BATON_FLEET", &file).output().unwrap();
    assert!(text(&by_flag.stdout).contains("decode: 2 x decode, sim on cpu"));
}

#[test]
fn a_reader_that_went_away_is_no_error() {
    for args in [vec!["check"], vec!["--help"], vec!["kv", "examples/models/tiny"], vec!["doctor", "--json"]]
    {
        let mut child = baton().args(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let mut stderr = String::new();
        child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        let status = child.wait().unwrap();
        assert!(status.success(), "{args:?}: {status} {stderr}");
        assert_eq!(stderr, "", "{args:?}");
    }
}

#[test]
fn failures_are_json_when_logs_are() {
    let output = run(&["--log-format", "json", "status", "--conductor", "http://127.0.0.1:1"]);
    assert_eq!(output.status.code(), Some(1));
    let line: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(line["level"], "ERROR");
    assert!(line["message"].as_str().unwrap().contains("no conductor answers at http://127.0.0.1:1"));
}

#[test]
fn reports_are_json_on_demand() {
    let kv: serde_json::Value =
        serde_json::from_slice(&run(&["kv", "--json", "examples/models/tiny"]).stdout).unwrap();
    assert_eq!(kv["dtypes"][0]["bytes_per_token"], 1024);
    let doctor = text(&run(&["doctor", "--json"]).stdout);
    let works = |name: &str| {
        let rows = doctor.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        rows.into_iter().find(|row| row["name"] == name).map(|row| row["works"] == true)
    };
    assert_eq!((works("tcp"), works("shm"), works("vllm")), (Some(true), Some(true), Some(false)));
    // For people each remedy stands below its reason, in the same column.
    let table = text(&run(&["doctor"]).stdout);
    let mut lines = table.lines();
    let detail_at = lines.next().unwrap().find("DETAIL").unwrap();
    let remedies: Vec<&str> =
        lines.filter(|line| line[..detail_at].trim().is_empty()).map(|line| &line[detail_at..]).collect();
    let lacking = doctor.lines().filter(|line| !line.ends_with("\"remedy\":null}")).count();
    assert_eq!(remedies.len(), lacking, "{table}");
    assert!(remedies.iter().all(|remedy| remedy.starts_with("remedy: ")), "{table}");
}

#[test]
fn the_doctor_tells_a_library_that_does_not_load_from_one_that_is_not_there() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let libraries = [
        ("libfabric", "libfabric.so.1"),
        ("ucx", "libucp.so.0"),
        ("cuda driver", "libcuda.so.1"),
        ("cuda compiler", "libnvrtc.so.12"),
        ("neuron runtime", "libnrt.so.1"),
        ("plugin none.so", "none.so"),
    ];
    for (_, file) in libraries {
        std::fs::write(at(file), "cut short").unwrap();
    }
    let mut command = baton();
    command.args(["doctor", "--json", "--plugin"]).arg(at("none.so"));
    let output = command.env("LD_LIBRARY_PATH", directory.path()).output().unwrap();
    let found: Vec<serde_json::Value> =
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (name, file) in libraries {
        let row = found.iter().find(|row| row["name"] == name).unwrap();
        let (detail, remedy) = (row["detail"].as_str().unwrap(), row["remedy"].as_str().unwrap());
        assert!(row["works"] == false && !remedy.is_empty(), "{row}");
        assert!(detail.contains(&format!("{}: file too short", at(file).display())), "{row}");
    }
}

#[test]
fn up_says_what_stands_in_the_way() {
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = holder.local_addr().unwrap().to_string();
    let output = run(&["up", "--listen", &address]);
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(1), ""));
    assert_eq!(
        text(&output.stderr),
        format!(
            "error: cannot listen on {address}: another process listens there: stop it, or choose another with --listen\n"
        )
    );
    let directory = tempfile::tempdir().unwrap();
    let file = fleet_file(directory.path(), "pools: [{ name: a, role: both, kv: { memory: 16TiB } }]\n");
    let output = run(&["up", &file]);
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(2), ""));
    let shown = text(&output.stderr);
    assert!(
        shown.starts_with("error: the workers of this fleet take 16 TiB of KV cache, but this"),
        "{shown}"
    );
    let file = fleet_file(
        directory.path(),
        "pools: [{ name: a, role: both, engine: { kind: vllm, url: http://x } }]\n",
    );
    let output = run(&["up", &file]);
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(2), ""));
    expect![[r#"
        error: fleet.yaml:3:48: pools[0].engine.kind: the engine vllm is not available in this build
          remedy: use kind: reference or kind: sim, or kind: openai in every pool
    "#]]
    .assert_eq(&text(&output.stderr).replace(&file, "fleet.yaml"));
}

#[test]
fn a_part_does_not_outlive_its_launcher() {
    // Process 1 is not this test: a part that was started by it must not run.
    let output = run(&["conductor", "--listen", "127.0.0.1:0", "--parent-pid", "1"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(text(&output.stderr), "error: the launcher (process 1) is gone\n");
}

#[test]
fn a_model_directory_that_no_part_could_use_is_refused_before_any_is_started() {
    let directory = tempfile::tempdir().unwrap();
    let good = root().join("examples/models/tiny");
    let cases: [(&str, &str, &str); 4] = [
        ("config.json", r#""LlamaForCausalLM""#, "this architecture is not supported"),
        ("config.json", r#""hidden_size": 128"#, "hidden_size"),
        ("tokenizer.json", "{", "does not load as a tokenizer"),
        ("model.safetensors", "", "(the file is cut short)"),
    ];
    for (index, (file, cut, expected)) in cases.into_iter().enumerate() {
        let model = directory.path().join(index.to_string());
        std::fs::create_dir(&model).unwrap();
        for entry in std::fs::read_dir(&good).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
        }
        let mut bytes = std::fs::read(model.join(file)).unwrap();
        match cut {
            "" => bytes.truncate(bytes.len() / 2),
            cut => {
                let text = String::from_utf8(bytes).unwrap();
                assert!(text.contains(cut), "{file} holds {cut}");
                let with = if cut.starts_with("\"Llama") { r#""MixtralForCausalLM""# } else { r#""x": 1"# };
                bytes = text.replacen(cut, if cut == "{" { "{{" } else { with }, 1).into_bytes();
            }
        }
        std::fs::write(model.join(file), bytes).unwrap();
        let fleet = directory.path().join("fleet.yaml").display().to_string();
        let document = format!(
            "version: 1\nmodel: {{ path: {} }}\npools: [{{ name: all, role: both }}]\n",
            model.display()
        );
        std::fs::write(&fleet, document).unwrap();
        for command in ["check", "up"] {
            let output = run(&[command, &fleet]);
            let message = text(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{command}: {message}");
            assert!(
                message.contains("fleet.yaml:2:16: model.path: ") && message.contains(expected),
                "{message}"
            );
            assert_eq!(text(&output.stdout), "");
        }
    }
}

/// Every backend gives its rows or the reason why not; nothing is said about the figures.
#[test]
fn the_transfer_bench_measures_every_backend_that_works_here() {
    let args =
        ["bench", "transfer", "--json", "--seconds", "0.001", "--shape", "3x4KiB", "--shape", "2x512KiB"];
    let output = run(&args);
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{stderr}");
    let rows: Vec<serde_json::Value> =
        stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for backend in ["shm", "cma", "libfabric", "ucx", "tcp"] {
        let rows: Vec<_> = rows.iter().filter(|row| row["backend"] == backend).collect();
        let said = |start: &str| stderr.lines().any(|line| line.starts_with(&format!("{backend}: {start}")));
        assert!(!rows.is_empty() || !["shm", "tcp"].contains(&backend), "{backend} always works: {stderr}");
        for op in ["read", "write"] {
            let rows_of = rows.iter().filter(|row| row["op"] == op).count();
            let excused = said(&format!("no {op}: ")) || rows.is_empty() && said("");
            assert_eq!(rows_of, if excused { 0 } else { 4 }, "{backend} {op}, 2 shapes: {stdout}{stderr}");
        }
        for field in
            ["p50_us", "p99_us", "gb_per_s", "cpu_s_per_gb", "raw_p50_us", "raw_cpu_s_per_gb", "ratio"]
        {
            assert!(rows.iter().all(|row| row[field].as_f64().unwrap() > 0.0), "{field}: {rows:?}");
        }
    }
    let documented = std::fs::read_to_string(root().join("docs/transfer.md")).unwrap();
    for key in rows[0].as_object().unwrap().keys() {
        assert!(documented.contains(&format!("`{key}`")), "docs/transfer.md says what {key} is");
    }
    let table = run(&["bench", "transfer", "--seconds", "0.001", "--backend", "shm", "--shape", "3x4KiB"]);
    let table = text(&table.stdout);
    assert!(
        table.starts_with("BACKEND") && table.contains("3 x 4 KiB") && table.contains("memcpy"),
        "{table}"
    );
    for bad in
        ["--shape=0x4KiB", "--shape=4096x1MiB", "--shape=64", "--backend=smoke", "--seconds=0", "--op=copy"]
    {
        assert_eq!(run(&["bench", "transfer", bad]).status.code(), Some(2), "{bad}");
    }
}

#[test]
fn a_transfer_bench_says_why_nothing_was_measured() {
    let plugin = "/nowhere/libnone.so";
    let output = run(&["bench", "transfer", "--shape", "1x4KiB", "--plugin", plugin]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stdout).starts_with(&format!("plugin: there is no plugin at {plugin}: ")),
        "{output:?}"
    );
    assert!(text(&output.stderr).ends_with("error: nothing was measured\n"), "{output:?}");
    // Also the other process says only what it was told to, and how.
    let quiet = run(&["--log", "error", "bench", "transfer", "--shape", "1x4KiB", "--plugin", plugin]);
    assert_eq!(text(&quiet.stderr), "error: nothing was measured\n");
    let json = run(&["--log-format", "json", "bench", "transfer", "--shape", "1x4KiB", "--plugin", plugin]);
    let lines: Vec<serde_json::Value> =
        text(&json.stderr).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.len() > 2, "a warning of each process, and the failure: {lines:?}");
}

#[test]
fn a_backend_that_breaks_costs_a_bench_no_other_backends_rows() {
    let directory = tempfile::tempdir().unwrap();
    let plugin = directory.path().join("libbroken.so");
    let source = root().join("transfer/plugin/tests/broken.c");
    let mut cc = Command::new("cc");
    cc.args(["-DWRONG_OP_UNKNOWN", "-O2", "-shared", "-fPIC", "-o"]).arg(&plugin).arg(source);
    assert!(cc.status().unwrap().success());
    let mut command = baton();
    command.args(["bench", "transfer", "--json", "--seconds", "0.001", "--shape", "2x64KiB", "--op", "read"]);
    command.args(["--backend", "shm,plugin,tcp", "--plugin"]).arg(plugin);
    let output = command.output().unwrap();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let rows: Vec<serde_json::Value> =
        stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let measured: Vec<_> = rows.iter().map(|row| row["backend"].as_str().unwrap()).collect();
    assert_eq!(measured, ["shm", "shm", "tcp", "tcp"], "{stderr}");
    let why = "the plugin broke a rule and was closed";
    assert!(stderr.contains("plugin: no read: ") && stderr.contains(why), "{stderr}");
    assert!(stderr.lines().last().unwrap().starts_with("error: not all was measured: "), "{stderr}");
}

#[test]
fn a_bench_of_the_router_gives_the_figures_of_both_ways() {
    let output = run(&[
        "bench",
        "router",
        "--workload",
        "short,shared",
        "--concurrency",
        "2",
        "--seconds",
        "0.2",
        "--workers",
        "2",
        "--json",
    ]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let rows: Vec<serde_json::Value> =
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), 2);
    for (row, (workload, tokens)) in rows.iter().zip([("short", 4), ("shared", 64)]) {
        assert_eq!(row["workload"], workload);
        assert_eq!(row["failed"], 0, "{row}");
        let requests = row["requests"].as_u64().unwrap();
        assert!(requests > 0 && row["tokens"] == requests * tokens, "{row}");
        for figure in
            ["req_per_s", "first_p50_us", "cpu_s", "cpu_s_per_1000", "cpu_us_per_token", "resident_mib"]
        {
            assert!(row[figure].as_f64().unwrap() > 0.0, "{figure} in {row}");
        }
        assert!(row["direct"]["first_p50_us"].as_f64().unwrap() > 0.0, "{row}");
    }
    assert!(rows[1]["hit_rate"].as_f64().unwrap() > 0.0, "{}", rows[1]);
    assert!(rows[0]["worst_share"].as_f64().unwrap() >= 0.5, "{}", rows[0]);
}

#[test]
fn a_bench_of_another_gateway_needs_its_address() {
    refused(
        &["bench", "router", "--url", "127.0.0.1:1"],
        2,
        &expect![[r#"
            error: "127.0.0.1:1" is not what can be measured: write http://HOST:PORT
        "#]],
    );
}
