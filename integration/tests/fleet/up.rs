//! `baton up`: one ready line, nothing left behind, and one clear sentence for what stands in the way.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use baton_integration::process::{alive, children, eventually, open_files, signal};
use baton_integration::{Fleet, FleetOptions, Prompt, binary};
use rustix::process::Signal;
use serde_json::json;

const PAIR: &str = "  - { name: prefill, role: prefill, kv: { memory: 16MiB } }\n  - { name: decode, role: decode, kv: { memory: 16MiB } }\n";

fn up(document: &str) -> Output {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fleet.yaml");
    std::fs::write(&path, document.replace("{root}", &binary::root().display().to_string())).unwrap();
    let mut child = Command::new(binary::baton())
        .arg("up")
        .arg(&path)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while child.try_wait().unwrap().is_none() {
        if std::time::Instant::now() > deadline {
            child.kill().unwrap();
            let output = child.wait_with_output().unwrap();
            panic!("still up after 30 s: {}", String::from_utf8_lossy(&output.stderr));
        }
        std::thread::yield_now();
    }
    child.wait_with_output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test]
async fn the_ready_line_is_the_contract_and_everything_else_goes_to_stderr() {
    let fleet = Fleet::start(FleetOptions::tiny(PAIR)).await;
    let words: Vec<&str> = fleet.ready.split(' ').collect();
    assert_eq!(words.len(), 4, "{}", fleet.ready);
    assert_eq!((words[0], words[2]), ("ready", "model=tiny"));
    assert!(words[1].starts_with("http://127.0.0.1:") && words[1].ends_with("/v1"), "{}", fleet.ready);
    assert!(words[3].starts_with("conductor=http://127.0.0.1:"), "{}", fleet.ready);
    assert!(fleet.stderr().contains("curl"), "a curl to paste: {}", fleet.stderr());
    assert_eq!(children(fleet.launcher_pid()).len(), 4, "conductor, router and two workers, each a process");
    fleet.stop().await;
}

#[tokio::test]
async fn a_killed_launcher_leaves_nothing_behind() {
    let fleet = Fleet::start(FleetOptions::tiny(PAIR)).await;
    let answer = fleet.client().complete(&Prompt::from("Hello"), 4, &json!({})).await.unwrap();
    assert_eq!(answer.tokens.len(), 4);
    let parts = children(fleet.launcher_pid());
    signal(fleet.launcher_pid(), Signal::KILL);
    eventually("every part ends with its launcher", Duration::from_secs(5), async || {
        parts.iter().all(|pid| !alive(*pid)).then_some(())
    })
    .await;
    let segments = std::fs::read_dir("/dev/shm")
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().contains("baton"));
    assert_eq!(segments.count(), 0, "a segment is left in /dev/shm");
}

#[tokio::test]
async fn control_c_stops_all_of_it_while_requests_finish() {
    let fleet = Fleet::start(FleetOptions::tiny(PAIR)).await;
    let client = fleet.client();
    let mut request = tokio::task::JoinSet::new();
    request.spawn(
        async move { client.complete(&Prompt::from("Hello"), 400, &json!({"ignore_eos": true})).await },
    );
    eventually("the request is running", Duration::from_secs(10), async || {
        let status = fleet.status().await;
        let running =
            status["workers"].as_array()?.iter().any(|worker| worker["requests_running"].as_u64() > Some(0));
        running.then_some(())
    })
    .await;
    let directory = fleet.directory().to_path_buf();
    let entries = || {
        std::fs::read_dir(&directory).unwrap().flatten().map(|entry| entry.file_name()).collect::<Vec<_>>()
    };
    assert_eq!(entries(), ["fleet.yaml"], "no file is made beside the fleet document");
    fleet.stop().await;
    let answer = request
        .join_next()
        .await
        .unwrap()
        .unwrap()
        .expect("a request in flight at the signal is answered in full");
    assert_eq!(answer.tokens.len(), 400);
}

#[tokio::test]
async fn scale_adds_and_removes_workers() {
    let fleet = Fleet::start(FleetOptions::tiny(PAIR)).await;
    let scale = |count: &'static str| {
        let conductor = fleet.conductor.clone();
        let output = Command::new(binary::baton())
            .args(["scale", "decode", count, "--conductor", &conductor])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
    };
    for (count, wanted) in [("2", 2), ("1", 1)] {
        scale(count);
        eventually("the pool has the size asked for", Duration::from_secs(30), async || {
            (fleet.workers("decode").await.len() == wanted).then_some(())
        })
        .await;
        let answer = fleet.client().complete(&Prompt::from("Hello"), 4, &json!({})).await.unwrap();
        assert_eq!(answer.tokens.len(), 4);
    }
    fleet.stop().await;
}

#[tokio::test]
async fn a_drained_worker_leaves_and_the_rest_serves() {
    let mut options = FleetOptions::tiny(PAIR);
    options.document = options.document.replace("role: decode,", "role: decode, replicas: 2,");
    let fleet = Fleet::start(options).await;
    let name = fleet.workers("decode").await[0].0.clone();
    let output = Command::new(binary::baton())
        .args(["drain", &name, "--conductor", &fleet.conductor])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    eventually("the drained worker is gone or draining", Duration::from_secs(30), async || {
        let status = fleet.status().await;
        let workers = status["workers"].as_array()?;
        workers.iter().all(|worker| worker["name"] != *name || worker["state"] != "ready").then_some(())
    })
    .await;
    let answer = fleet.client().complete(&Prompt::from("Hello"), 4, &json!({})).await.unwrap();
    assert_eq!(answer.tokens.len(), 4);
    fleet.stop().await;
}

#[tokio::test]
async fn a_watched_status_ends_with_its_reader() {
    let fleet =
        Fleet::start(FleetOptions::tiny("  - { name: all, role: both, engine: { kind: sim } }\n")).await;
    for json in [false, true] {
        let mut command = Command::new(binary::baton());
        command.args(["status", "--watch=1", "--conductor", &fleet.conductor]);
        if json {
            command.arg("--json");
        }
        let mut watch = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut first = String::new();
        BufReader::new(watch.stdout.take().unwrap()).read_line(&mut first).unwrap();
        assert!(!first.is_empty());
        // Whoever read is gone by now.
        let ended = eventually("it ends", Duration::from_secs(10), async || watch.try_wait().unwrap()).await;
        assert!(ended.success(), "{ended}");
    }
    fleet.stop().await;
}

#[tokio::test]
async fn top_shows_the_fleet_on_a_terminal_and_gives_it_back() {
    let fleet =
        Fleet::start(FleetOptions::tiny("  - { name: all, role: both, engine: { kind: sim } }\n")).await;
    // A conductor that is not there is passed over.
    // In the place of the shell: one that waits for its child may end by the same signal.
    let top = format!("exec {} top --conductor 127.0.0.1:1,{}", binary::baton().display(), fleet.conductor);
    let mut command = Command::new("script");
    command.args(["--quiet", "--return", "--command", &top, "/dev/null"]);
    let mut on_terminal = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut shown = on_terminal.stdout.take().unwrap();
    let text = std::thread::spawn(move || {
        let (mut text, mut some) = (Vec::new(), [0; 4096]);
        let frames = |text: &[u8]| text.windows(3).filter(|at| at == b"\x1b[H").count();
        while frames(&text) < 3 {
            match shown.read(&mut some).unwrap() {
                0 => break,
                more => text.extend_from_slice(&some[..more]),
            }
        }
        (text, shown)
    });
    let (mut text, mut rest) = text.join().unwrap();
    on_terminal.stdin.take().unwrap().write_all(b"\x03").unwrap();
    rest.read_to_end(&mut text).unwrap();
    let text = String::from_utf8_lossy(&text);
    assert!(["Ctrl-C ends it", "POOL", "WORKER"].iter().all(|part| text.contains(part)), "{text}");
    assert!(text.starts_with("\x1b[?1049h"), "{text:?}");
    // The terminal sends the signal before it echoes the key: on a busy machine that comes last.
    let (_, after) = text.rsplit_once("\x1b[?1049l").expect("the shell's screen is back");
    assert!(["", "^C"].contains(&after.trim()), "{text:?}");
    let ended =
        eventually("it ends", Duration::from_secs(10), async || on_terminal.try_wait().unwrap()).await;
    assert!(ended.success(), "{ended}");
    fleet.stop().await;
}

#[test]
fn a_port_in_use_is_one_clear_sentence() {
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = holder.local_addr().unwrap().to_string();
    let document = FleetOptions::tiny(PAIR).document.replace("127.0.0.1:0", &address);
    let output = up(&document);
    assert!(matches!(output.status.code(), Some(1 | 2)), "{:?}", output.status);
    assert!(output.stdout.is_empty(), "nothing is ready");
    assert!(stderr(&output).contains(&address), "{}", stderr(&output));
}

#[test]
fn a_missing_model_is_one_clear_sentence() {
    let document =
        FleetOptions::tiny(PAIR).document.replace("/examples/models/tiny", "/examples/models/none");
    let output = up(&document);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("examples/models/none"), "{}", stderr(&output));
}

#[test]
fn a_broken_checkpoint_is_named_and_nothing_is_left() {
    let directory = tempfile::tempdir().unwrap();
    let model = binary::root().join("examples/models/tiny");
    for entry in std::fs::read_dir(model).unwrap().flatten() {
        std::fs::copy(entry.path(), directory.path().join(entry.file_name())).unwrap();
    }
    let weights = directory.path().join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    let document = FleetOptions::tiny(PAIR)
        .document
        .replace("{root}/examples/models/tiny", &directory.path().display().to_string());
    let output = up(&document);
    assert!(matches!(output.status.code(), Some(1 | 2)), "{:?}", output.status);
    assert!(stderr(&output).contains("model.safetensors"), "{}", stderr(&output));
    assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
}

#[tokio::test]
async fn no_descriptor_and_no_block_is_lost_over_many_requests() {
    let fleet = Fleet::start(FleetOptions::tiny(PAIR)).await;
    let client = fleet.client();
    let files = |pids: &[u32]| pids.iter().map(|pid| open_files(*pid, "").len()).sum::<usize>();
    let round = async || {
        let one = |index: u32| {
            let client = client.clone();
            async move { client.complete(&Prompt::Tokens(vec![10 + index; 70]), 3, &json!({})).await }
        };
        for answer in futures_util::future::join_all((0..40).map(one)).await {
            answer.unwrap();
        }
    };
    let parts = children(fleet.launcher_pid());
    // Connections are kept alive, and now and then one more is made: of forty requests at once there are never many more
    // than at the beginning. Of descriptors that requests leave behind there are more after every round.
    let (mut most, mut settled) = (0, 0);
    for _ in 0..60 {
        round().await;
        let now = files(&parts);
        settled = if now > most { 0 } else { settled + 1 };
        most = most.max(now);
        if settled == 5 {
            break;
        }
    }
    assert_eq!(settled, 5, "there are ever more open files: {most}");
    fleet.eventually_nothing_held(Duration::from_secs(5)).await;
    fleet.stop().await;
}
