//! Who is a member of a fleet, with real processes: names have one holder, lives end, and strangers are told nothing.

use std::fs::{self, Permissions};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_integration::access::{certificates, write_secret};
use baton_integration::etcd::Etcd;
use baton_integration::process::{eventually, signal};
use baton_integration::{Fleet, FleetOptions, Prompt, binary, ports};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::sync::Mutex;

const ONE: &str = "  - { name: all, role: both, engine: { kind: sim }, kv: { memory: 16MiB } }\n";
const TOKEN: &str = "k7Jw0pQx9ZfLr2TnVb5Ys8HdMc3Ge6Ua";
const PATIENCE: Duration = Duration::from_secs(60);

/// A process of its own, killed with its owner.
struct Process(Child);

impl Process {
    fn start(args: &[&str]) -> Self {
        let child = Command::new(binary::baton())
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self(child)
    }

    /// Waits for the end: whether it went well, and what it said.
    async fn ended(&mut self) -> (bool, String) {
        let status =
            eventually("the process ends", PATIENCE, async || self.0.try_wait().ok().flatten()).await;
        let mut text = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        (status.success(), text)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn write(folder: &Path, name: &str, content: &str) -> PathBuf {
    let path = folder.join(name);
    write_secret(&path, content);
    path
}

fn document(conductor: &str, pools: &str) -> String {
    let root = binary::root().display();
    format!(
        "version: 1\nmodel: {{ id: tiny, path: {root}/examples/models/tiny }}\nconductor: {{ {conductor} }}\nrouter: {{ listen: 127.0.0.1:0 }}\npools:\n{pools}"
    )
}

fn run(args: &[&str]) -> Output {
    Command::new(binary::baton()).args(args).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

async fn worker(http: &reqwest::Client, conductor: &str, name: &str) -> Option<Value> {
    let listing = http.get(format!("{conductor}/v1/workers")).send().await.ok()?;
    let listing: Value = listing.json().await.ok()?;
    listing["workers"].as_array()?.iter().find(|worker| worker["worker"] == name).cloned()
}

#[tokio::test]
async fn a_second_worker_of_a_name_is_told_who_has_it() {
    let fleet = Fleet::start(FleetOptions::tiny(ONE)).await;
    let http = baton_conductor::http::client();
    let holder = worker(&http, &fleet.conductor, "all-0").await.unwrap();
    let config = fleet.directory().join("fleet.yaml").display().to_string();
    let conductor = fleet.conductor.clone();
    let claim =
        ["worker", "--config", &config, "--pool", "all", "--name", "all-0", "--conductor", &conductor];
    let mut second = Process::start(&[&claim[..], &["--listen", "127.0.0.1:0"]].concat());
    let (well, said) = second.ended().await;
    assert!(!well, "{said}");
    let address = holder["address"].as_str().unwrap();
    let wanted = format!(
        "the name all-0 is taken by the live worker at {address} (pid {}, epoch {})",
        holder["pid"], holder["epoch"]
    );
    assert!(said.contains(&wanted), "{wanted:?} is not in\n{said}");
    let after = worker(&http, &fleet.conductor, "all-0").await.unwrap();
    assert_eq!(after["epoch"], holder["epoch"], "the holder was not disturbed");
    fleet.client().complete(&Prompt::from("Hello"), 2, &json!({})).await.unwrap();
    fleet.stop().await;
}

#[tokio::test]
async fn a_worker_that_finds_no_conductor_ends_well_when_it_is_told_to() {
    let server = "  - { name: all, role: both, engine: { kind: openai, url: \"http://127.0.0.1:1\" } }\n";
    for pool in [ONE, server] {
        let folder = tempfile::tempdir().unwrap();
        let conductor = format!("listen: 127.0.0.1:{}", ports::free().port());
        let config = write(folder.path(), "fleet.yaml", &document(&conductor, pool)).display().to_string();
        let listen = format!("127.0.0.1:{}", ports::free().port());
        let mut worker =
            Process::start(&["worker", "--config", &config, "--pool", "all", "--listen", &listen]);
        let http = baton_conductor::http::client();
        eventually("the worker is there", PATIENCE, async || {
            http.get(format!("http://{listen}/livez")).send().await.ok()
        })
        .await;
        signal(worker.0.id(), Signal::TERM);
        let (well, said) = worker.ended().await;
        assert!(well && !said.contains("error: "), "{said}");
    }
}

#[test]
fn a_part_that_is_not_told_where_the_conductor_is_says_so_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let config =
        write(folder.path(), "fleet.yaml", &document("listen: 127.0.0.1:0", ONE)).display().to_string();
    for part in [&["router", "--config", &config][..], &["worker", "--config", &config, "--pool", "all"]] {
        let refused = run(part);
        assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
        assert!(stderr(&refused).contains("give its URL with --conductor"), "{}", stderr(&refused));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_workers_with_one_name_at_two_conductors_of_one_etcd() {
    let etcd = Etcd::start(1).await;
    let folder = tempfile::tempdir().unwrap();
    let store = format!("store: {{ etcd: {{ endpoints: [{}] }} }}", etcd.endpoints().join(", "));
    let config = write(folder.path(), "fleet.yaml", &document(&store, ONE)).display().to_string();
    let listen = [ports::free().port(), ports::free().port()].map(|port| format!("127.0.0.1:{port}"));
    let _conductors = listen
        .each_ref()
        .map(|listen| Process::start(&["conductor", "--config", &config, "--listen", listen]));
    let http = baton_conductor::http::client();
    for listen in &listen {
        eventually("a conductor is ready", PATIENCE, async || {
            let ready = http.get(format!("http://{listen}/readyz")).send().await.ok()?;
            ready.status().is_success().then_some(())
        })
        .await;
    }
    let mut workers = listen.each_ref().map(|conductor| {
        let url = format!("http://{conductor}");
        let claim = ["worker", "--config", &config, "--pool", "all", "--name", "all-0", "--conductor", &url];
        Process::start(&[&claim[..], &["--listen", "127.0.0.1:0"]].concat())
    });
    let loser = eventually("one of them ends", PATIENCE, async || {
        workers.iter_mut().position(|worker| worker.0.try_wait().unwrap().is_some())
    })
    .await;
    let (well, said) = workers[loser].ended().await;
    assert!(!well && said.contains("the name all-0 is taken by the live worker at 127.0.0.1:"), "{said}");
    let winner = workers[1 - loser].0.id();
    for listen in &listen {
        let url = format!("http://{listen}");
        eventually("each conductor shows the other one ready", PATIENCE, async || {
            let shown = worker(&http, &url, "all-0").await?;
            (shown["state"] == "ready" && shown["pid"] == winner).then_some(())
        })
        .await;
    }
    assert!(said.contains(&format!("(pid {winner}, ")), "the holder is named: {said}");
}

/// The last line is the bound of the design, with room for a machine that does other things.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_restarted_on_its_address_serves_at_once_and_its_former_life_is_over() {
    let fleet = Fleet::start(FleetOptions::tiny(ONE)).await;
    let http = baton_conductor::http::client();
    let former = worker(&http, &fleet.conductor, "all-0").await.unwrap();
    let (pid, address) = (former["pid"].as_u64().unwrap(), former["address"].as_str().unwrap().to_owned());
    let former = former["epoch"].as_u64().unwrap();
    let served: Arc<Mutex<Option<Instant>>> = Arc::default();
    signal(u32::try_from(pid).unwrap(), Signal::KILL);
    let mut requests = tokio::task::JoinSet::new();
    let (client, first) = (fleet.client(), served.clone());
    requests.spawn(async move {
        while first.lock().await.is_none() {
            if client.complete(&Prompt::from("Hello"), 1, &json!({})).await.is_ok() {
                *first.lock().await = Some(Instant::now());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let (again, ready) = eventually("the worker is ready again", PATIENCE, async || {
        let again = worker(&http, &fleet.conductor, "all-0").await?;
        let fresh = again["epoch"].as_u64()? > former && again["state"] == "ready";
        fresh.then(|| (again, Instant::now()))
    })
    .await;
    let first = eventually("a request is served", PATIENCE, async || *served.lock().await).await;
    assert_eq!(again["address"], address.as_str(), "on the same address");
    let took = first.saturating_duration_since(ready);
    eprintln!("first good request {took:.2?} after the restarted worker was ready");

    let keepalive = json!({"epoch": former, "seq": 1_000_000, "state": "ready"});
    let conductor = &fleet.conductor;
    let want = json!({"worker": "all-1", "epoch": former, "to_epoch": former, "from_token": 0});
    let handoff = format!("http://{address}/v1/handoffs/{:032x}/want", 7);
    for request in [
        http.post(format!("{conductor}/v1/workers/all-0/keepalive")).json(&keepalive),
        http.delete(format!("{conductor}/v1/workers/all-0?epoch={former}")),
        http.post(handoff).json(&want),
    ] {
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), 409, "{answer:?}");
    }
    for (of, least) in [(conductor.clone(), 2.0), (format!("http://{address}"), 1.0)] {
        let text = fleet.get_text(&format!("{of}/metrics")).await;
        let line = text.lines().find_map(|line| line.strip_prefix("baton_stale_epoch_refused_total "));
        assert!(line.is_some_and(|count| count.parse::<f64>().unwrap() >= least), "{of}: {line:?}");
    }
    let last = worker(&http, conductor, "all-0").await.unwrap();
    assert_eq!(last["epoch"], again["epoch"], "and the new life goes on");
    assert!(took < Duration::from_secs(1) + Duration::from_secs(4), "{took:?}");
    fleet.stop().await;
}

#[tokio::test]
async fn a_fleet_with_token_and_certificates_serves_and_strangers_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    certificates(folder.path(), &[("server", "127.0.0.1"), ("client", "fleet")]);
    let token = write(folder.path(), "token", TOKEN).display().to_string();
    let wrong = write(folder.path(), "wrong", &TOKEN.to_lowercase()).display().to_string();
    let at = folder.path().display();
    let conductor = format!(
        "listen: 127.0.0.1:0, auth: {{ token_file: {token} }}, allowed_addresses: [127.0.0.0/8], tls: {{ cert_file: {at}/server.pem, key_file: {at}/server.key, client_ca_file: {at}/ca.pem, ca_file: {at}/ca.pem, client_cert_file: {at}/client.pem, client_key_file: {at}/client.key }}"
    );
    let fleet = Fleet::start(FleetOptions { document: document(&conductor, ONE) }).await;
    assert!(fleet.conductor.starts_with("https://127.0.0.1:"), "{}", fleet.ready);
    fleet.client().complete(&Prompt::from("Hello"), 2, &json!({})).await.unwrap();

    let url = fleet.conductor.clone();
    let config = fleet.directory().join("fleet.yaml").display().to_string();
    let known = ["--conductor", &url, "--config", &config];
    let status = run(&[&["status", "--json"], &known[..]].concat());
    let status: Value =
        serde_json::from_slice(&status.stdout).unwrap_or_else(|_| panic!("{}", stderr(&status)));
    assert_eq!(status["workers"][0]["state"], "ready", "{status}");
    let (ca, cert, key) = (format!("{at}/ca.pem"), format!("{at}/client.pem"), format!("{at}/client.key"));
    let certified = ["--ca-file", &ca, "--client-cert-file", &cert, "--client-key-file", &key];
    let plain = url.replace("https:", "http:");
    for (flags, expected) in [
        (vec!["--conductor", &url], "shows a certificate of an authority that is not trusted here"),
        (vec!["--conductor", &plain], "this port speaks TLS: use https://"),
        (vec!["--conductor", &url, "--ca-file", &ca], "asks for a client certificate"),
        ([&["--conductor", &url], &certified[..]].concat(), "asks for a token"),
        (
            [&["--conductor", &url, "--token-file", &wrong], &certified[..]].concat(),
            "is not this conductor's",
        ),
    ] {
        for command in [&["status"][..], &["drain", "all-0"], &["scale", "all", "3"]] {
            let refused = run(&[command, &flags[..]].concat());
            assert!(!refused.status.success() && stderr(&refused).contains(expected), "{}", stderr(&refused));
        }
    }
    let drained =
        run(&[&["scale", "all", "1", "--conductor", &url, "--token-file", &token], &certified[..]].concat());
    assert!(drained.status.success(), "{}", stderr(&drained));
    // Restarted by its launcher, it registers as before.
    let pid = status["workers"][0]["pid"].as_u64().unwrap();
    signal(u32::try_from(pid).unwrap(), Signal::KILL);
    eventually("the worker is back", PATIENCE, async || {
        fleet.client().complete(&Prompt::from("Hello"), 2, &json!({})).await.ok()
    })
    .await;
    fleet.stop().await;
}

#[tokio::test]
async fn a_conductor_that_cannot_be_trusted_does_not_start() {
    let folder = tempfile::tempdir().unwrap();
    let config = |name: &str, conductor: &str| {
        write(folder.path(), name, &document(conductor, ONE)).display().to_string()
    };
    let open = config("open.yaml", "");
    let exposed = write(folder.path(), "exposed", TOKEN);
    fs::set_permissions(&exposed, Permissions::from_mode(0o644)).unwrap();
    let readable = config("readable.yaml", &format!("auth: {{ token_file: {} }}", exposed.display()));
    let state = write(folder.path(), "state", "baton-conductor-state 1 0000000000000000 2\n{}");
    let damaged =
        config("damaged.yaml", &format!("store: {{ embedded: {{ state_file: {} }} }}", state.display()));
    let cut = write(folder.path(), "cut", "baton-cond");
    let short = config("cut.yaml", &format!("store: {{ embedded: {{ state_file: {} }} }}", cut.display()));
    for (config, listen, expected) in [
        (&open, "0.0.0.0:0", "nobody proves who they are: set conductor.auth.token_file or"),
        (&readable, "127.0.0.1:0", "is open to every user of this machine (mode 0644): chmod o-rwx it"),
        (&damaged, "127.0.0.1:0", "is damaged (checksum and length are"),
        (&short, "127.0.0.1:0", "is damaged (it has no header line): move it away to start without it"),
    ] {
        let mut conductor = Process::start(&["conductor", "--config", config, "--listen", listen]);
        let (well, said) = conductor.ended().await;
        assert!(!well && said.contains(expected), "{expected:?} is not in\n{said}");
    }
    let (mut conductor, file) =
        (Process::start(&["conductor", "--config", &damaged, "--listen", "127.0.0.1:0"]), state.display());
    let (_, said) = conductor.ended().await;
    assert!(said.contains(&file.to_string()), "{said}");
    let checked = run(&["check", &config("listen.yaml", "listen: 0.0.0.0:7400")]);
    assert_eq!(checked.status.code(), Some(2));
    assert!(
        stderr(&checked).contains("remedy: add auth: { token_file: PATH } or tls:"),
        "{}",
        stderr(&checked)
    );
}
