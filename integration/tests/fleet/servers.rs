//! `engine: { kind: openai }` over real processes: a fleet in front of two other fleets, each of which is an
//! OpenAI-compatible server like any other.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use baton_integration::access::{certificates, new_key, write_secret};
use baton_integration::client::Prompt;
use baton_integration::fleet::{Fleet, FleetOptions};
use baton_integration::process::{children, eventually, signal};
use baton_integration::prompts;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

/// For a change of a server to reach the worker beside it and the router in front.
const NOTICED_WITHIN: Duration = Duration::from_secs(20);

async fn server() -> Fleet {
    let pool =
        "  - { name: all, role: both, engine: { kind: reference, threads: 1 }, kv: { memory: 64MiB } }\n";
    Fleet::start(FleetOptions::tiny(pool)).await
}

/// A fleet that passes requests on to `servers`, which know the model as `tiny`.
async fn in_front_of(servers: &[&Fleet]) -> Fleet {
    let urls: Vec<&str> = servers.iter().map(|server| server.router.as_str()).collect();
    in_front_of_urls(&urls).await
}

async fn in_front_of_urls(urls: &[&str]) -> Fleet {
    let document = format!(
        "version: 1\nmodel: {{ id: front, served_as: [tiny] }}\nrouter: {{ listen: 127.0.0.1:0, policy: {{ kind: round_robin }} }}\n\
         pools:\n  - name: servers\n    role: both\n    engine: {{ kind: openai, urls: [{}], model: tiny, pass_fields: [baton] }}\n",
        urls.join(", ")
    );
    Fleet::start(FleetOptions { document }).await
}

/// The router among the processes of a fleet.
fn router_of(fleet: &Fleet) -> Option<u32> {
    let is_router = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|word| word == b"router")
    };
    children(fleet.launcher_pid()).into_iter().find(is_router)
}

/// An answer without what differs from one to the next.
fn lasting(text: &str) -> Vec<Value> {
    let lines = text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
    lines
        .map(|data| {
            let mut chunk: Value = serde_json::from_str(data).expect("JSON");
            let object = chunk.as_object_mut().expect("an object");
            object.remove("id").expect("an id");
            object.remove("created").expect("a time");
            chunk
        })
        .collect()
}

#[tokio::test]
async fn answers_are_those_of_the_server_whole_and_streamed() {
    let server = server().await;
    let front = in_front_of(&[&server]).await;
    let (direct, through) = (server.client(), front.client());
    for length in [1, 40, 300] {
        let prompt = Prompt::Tokens(prompts::random_tokens(length as u64, length));
        let expected = direct.complete(&prompt, 12, &json!({ "ignore_eos": true })).await.unwrap();
        let answer = through.complete(&prompt, 12, &json!({ "ignore_eos": true })).await.unwrap();
        assert_eq!((answer.proof(), &answer.text), (expected.proof(), &expected.text));
    }
    let ask = |model: &str| {
        json!({
            "model": model, "messages": [{ "role": "user", "content": "Tell me a story." }], "temperature": 0,
            "max_tokens": 24, "stream": true, "stream_options": { "include_usage": true }, "logprobs": true
        })
    };
    let path = "/v1/chat/completions";
    let expected = direct.open(path, &ask("tiny")).await.unwrap().text().await.unwrap();
    let answer = through.open(path, &ask("tiny")).await.unwrap().text().await.unwrap();
    assert_eq!(lasting(&answer), lasting(&expected));
    assert!(answer.ends_with("data: [DONE]\n\n"));
    let renamed = through.open(path, &ask("front")).await.unwrap().text().await.unwrap();
    assert!(lasting(&renamed).iter().all(|chunk| chunk["model"] == "front"), "{renamed}");
    // What the server refuses is refused in its words; what no server would take never gets there.
    let beyond = json!({ "model": "tiny", "prompt": "a", "max_tokens": 1_000_000 });
    assert_eq!(
        through.post("/v1/completions", &beyond).await.unwrap(),
        direct.post("/v1/completions", &beyond).await.unwrap()
    );
    let (status, answer) = through
        .post("/v1/completions", &json!({ "model": "tiny", "prompt": "a", "magic": 1 }))
        .await
        .unwrap();
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("magic")));
    front.stop().await;
    server.stop().await;
}

/// A server that speaks TLS and asks for a key, as hosted ones do.
#[tokio::test]
async fn a_server_over_tls_is_believed_by_its_authority_and_shown_the_key_of_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let (at, files) = (|name: &str| folder.path().join(name), folder.path().display());
    certificates(folder.path(), &[("server", "127.0.0.1")]);
    let (key, line) = new_key("front");
    write_secret(&at("keys.yaml"), &format!("version: 1\ntenants:\n- name: front\n  keys:\n  {line}\n"));
    write_secret(&at("engine.key"), &key);
    let mut options = FleetOptions::tiny("  - { name: all, role: both, kv: { memory: 16MiB } }\n");
    options.document = options.document.replace(
        "listen: 127.0.0.1:0 }",
        &format!(
            "listen: 127.0.0.1:0, tls: {{ cert_file: {files}/server.pem, key_file: {files}/server.key }}, auth: {{ keys_file: {files}/keys.yaml }} }}"
        ),
    );
    let server = Fleet::start(options).await;
    assert!(server.router.starts_with("https://"), "{}", server.router);
    let document = format!(
        "version: 1\nmodel: {{ id: tiny }}\nrouter: {{ listen: 127.0.0.1:0 }}\npools:\n  - name: servers\n    role: both\n    engine: {{ kind: openai, url: \"{}\", pass_fields: [baton], api_key_file: {files}/engine.key, ca_file: {files}/ca.pem }}\n",
        server.router
    );
    let front = Fleet::start(FleetOptions { document }).await;
    let client = front.client();
    let answer = client.complete(&Prompt::from("Hello"), 4, &json!({ "ignore_eos": true })).await.unwrap();
    assert_eq!(answer.tokens.len(), 4);
    let body =
        json!({ "model": "tiny", "prompt": "a", "max_tokens": 50, "ignore_eos": true, "stream": true });
    let text = client.open("/v1/completions", &body).await.unwrap().text().await.unwrap();
    assert!(text.ends_with("data: [DONE]\n\n") && lasting(&text).len() > 1, "{text}");
    // Another key in the file counts without a restart.
    let (other, line) = new_key("front");
    write_secret(&at("keys.yaml"), &format!("version: 1\ntenants:\n- name: front\n  keys:\n  {line}\n"));
    write_secret(&at("engine.key"), &other);
    eventually("the new key is shown", NOTICED_WITHIN, async || {
        client.complete(&Prompt::from("Hello"), 1, &json!({})).await.ok()
    })
    .await;
    front.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn a_client_that_leaves_is_felt_behind_the_server() {
    let server = server().await;
    let front = in_front_of(&[&server]).await;
    let body =
        json!({ "model": "tiny", "prompt": "Once", "max_tokens": 4000, "ignore_eos": true, "stream": true });
    let mut answer = front.client().open("/v1/completions", &body).await.unwrap();
    assert!(answer.chunk().await.unwrap().is_some());
    let running = async || {
        let status = server.status().await;
        status["workers"][0]["requests_running"].as_u64().expect("a number")
    };
    eventually("the engine works on it", NOTICED_WITHIN, async || (running().await == 1).then_some(())).await;
    drop(answer);
    eventually("the engine is let go", NOTICED_WITHIN, async || (running().await == 0).then_some(())).await;
    front.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn a_killed_server_costs_its_streams_and_nothing_else_and_comes_back() {
    let servers = [server().await, server().await];
    let front = in_front_of(&[&servers[0], &servers[1]]).await;
    let client = front.client();
    // A stream on each of them.
    let body =
        json!({ "model": "tiny", "prompt": "Once", "max_tokens": 4000, "ignore_eos": true, "stream": true });
    let mut streams = Vec::new();
    for _ in 0..2 {
        let mut stream = client.open("/v1/completions", &body).await.unwrap();
        assert!(stream.chunk().await.unwrap().is_some());
        streams.push(stream);
    }
    let pid = router_of(&servers[0]).expect("a router");
    signal(pid, Signal::KILL);
    let killed = Instant::now();
    for turn in 0..8 {
        let answer = client.complete(&Prompt::from("Hello"), 4, &json!({ "ignore_eos": true })).await;
        assert_eq!(answer.unwrap_or_else(|error| panic!("request {turn}: {error:#}")).tokens.len(), 4);
    }
    println!("eight requests after the kill took {:?}", killed.elapsed());
    let mut broken = 0;
    for stream in streams {
        let text =
            tokio::time::timeout(Duration::from_secs(60), stream.text()).await.expect("in time").unwrap();
        let last = text.trim_end().rsplit("\n\n").next().unwrap_or_default().to_owned();
        match last.as_str() {
            "data: [DONE]" => {}
            error => {
                assert!(error.contains("\"code\":\"worker_lost\""), "{error}");
                broken += 1;
            }
        }
    }
    assert_eq!(broken, 1, "the stream of the killed server, and no other");
    // Its launcher starts it again on the same port; the worker beside it notices, the router sends it requests.
    eventually("it serves again", NOTICED_WITHIN, async || {
        let before = served(&servers[0]).await?;
        client.complete(&Prompt::from("Hello"), 4, &json!({ "ignore_eos": true })).await.expect("an answer");
        client.complete(&Prompt::from("Hello"), 4, &json!({ "ignore_eos": true })).await.expect("an answer");
        (served(&servers[0]).await? > before).then_some(())
    })
    .await;
    println!("the killed server served again {:?} after the kill", killed.elapsed());
    let [first, second] = servers;
    front.stop().await;
    first.stop().await;
    second.stop().await;
}

/// Requests for completions that a fleet's router has answered; `None` while it does not answer.
async fn served(fleet: &Fleet) -> Option<u64> {
    let answer =
        baton_conductor::http::client().get(format!("{}/metrics", fleet.router)).send().await.ok()?;
    let text = answer.text().await.ok()?;
    let name = "baton_router_requests_total{code=\"200\",route=\"/v1/completions\"} ";
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.parse().ok()
}

#[tokio::test]
async fn a_frozen_server_is_found_out_and_waited_for() {
    let server = server().await;
    let front = in_front_of(&[&server]).await;
    let pid = router_of(&server).expect("a router");
    let state = async || front.status().await["workers"][0]["state"].as_str().map(str::to_owned);
    eventually("it is well", NOTICED_WITHIN, async || (state().await? == "ready").then_some(())).await;
    signal(pid, Signal::STOP);
    eventually("it is found out", NOTICED_WITHIN, async || (state().await? == "unhealthy").then_some(()))
        .await;
    signal(pid, Signal::CONT);
    eventually("it is well again", NOTICED_WITHIN, async || (state().await? == "ready").then_some(())).await;
    let answer =
        front.client().complete(&Prompt::from("Hello"), 4, &json!({ "ignore_eos": true })).await.unwrap();
    assert_eq!(answer.tokens.len(), 4);
    front.stop().await;
    server.stop().await;
}

/// A server process that dies of prompts that say `deadly`.
struct Mortal {
    process: Child,
    port: u16,
}

impl Mortal {
    async fn start(port: u16) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/deadly_server.py");
        let mut process = Command::new("python3")
            .arg(script)
            .arg(port.to_string())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("python3 runs");
        let mut lines = BufReader::new(process.stdout.take().expect("a pipe")).lines();
        let line = lines.next_line().await.expect("it speaks").expect("it listens");
        Self { process, port: line.parse().expect("a port") }
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

async fn ask(front: &Fleet, text: &str) -> (u16, Value) {
    let body = json!({ "model": "tiny", "messages": [{ "role": "user", "content": text }], "max_tokens": 4 });
    front.client().post("/v1/chat/completions", &body).await.unwrap()
}

#[tokio::test]
async fn a_request_that_kills_servers_is_kept_from_the_third() {
    let mut servers = [Mortal::start(0).await, Mortal::start(0).await, Mortal::start(0).await];
    let urls: Vec<String> = servers.iter().map(Mortal::url).collect();
    let urls: Vec<&str> = urls.iter().map(String::as_str).collect();
    let front = in_front_of_urls(&urls).await;
    assert_eq!(ask(&front, "harmless").await.0, 200);
    let (status, answer) = ask(&front, "deadly").await;
    assert_eq!((status, &answer["error"]["code"]), (502, &json!("worker_lost")), "two died");
    for _ in 0..3 {
        let (status, answer) = ask(&front, "deadly").await;
        assert_eq!((status, &answer["error"]["code"]), (500, &json!("request_failed_repeatedly")));
    }
    let ended = servers.iter_mut().map(|server| server.process.try_wait().unwrap().is_some());
    assert_eq!(ended.filter(|ended| *ended).count(), 2);
    assert_eq!(ask(&front, "harmless").await.0, 200);
    front.stop().await;
}

#[tokio::test]
async fn a_request_that_kills_a_server_in_two_lives_does_not_get_a_third() {
    let mut server = Mortal::start(0).await;
    let front = in_front_of_urls(&[&server.url()]).await;
    for life in [1, 2] {
        eventually("it serves", NOTICED_WITHIN, async || {
            (ask(&front, "harmless").await.0 == 200).then_some(())
        })
        .await;
        // One that is dying may still take a connection: whether anybody listens is then asked after the answer.
        let codes = [json!("worker_lost"), json!("request_failed_repeatedly")];
        let (_, answer) = ask(&front, "deadly").await;
        assert!(codes[..life].contains(&answer["error"]["code"]), "life {life}: {answer}");
        let died = tokio::time::timeout(NOTICED_WITHIN, server.process.wait()).await;
        assert!(died.is_ok(), "it died in life {life}");
        server = Mortal::start(server.port).await;
    }
    eventually("it serves", NOTICED_WITHIN, async || (ask(&front, "harmless").await.0 == 200).then_some(()))
        .await;
    let (status, answer) = ask(&front, "deadly").await;
    assert_eq!((status, &answer["error"]["code"]), (500, &json!("request_failed_repeatedly")));
    assert!(server.process.try_wait().unwrap().is_none(), "it lives");
    front.stop().await;
}
