//! A whole fleet under `baton up`, from a fleet document to an empty process table.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::binary;
use crate::client::Client;
use crate::process::{alive, children, eventually, signal};

/// From start to the ready line on a machine that is busy with other tests.
pub const READY_WITHIN: Duration = Duration::from_secs(60);
/// From SIGTERM to the end of the last process of an idle fleet.
pub const STOPPED_WITHIN: Duration = Duration::from_secs(20);

/// What a test varies about a fleet.
#[derive(Debug, Clone)]
pub struct FleetOptions {
    /// The fleet document; `{root}` stands for the repository root.
    pub document: String,
}

impl FleetOptions {
    /// The default fleet, with router and conductor on free ports.
    ///
    /// # Panics
    /// When the example is not there.
    pub fn laptop() -> Self {
        let path = binary::root().join("examples/fleets/laptop.yaml");
        let document = std::fs::read_to_string(path).expect("the default fleet document");
        let document = document.replace("path: examples/", "path: {root}/examples/");
        let document = document.replace("127.0.0.1:7400", "127.0.0.1:0");
        Self { document: document.replace("router: { ", "router: { listen: 127.0.0.1:0, ") }
    }

    /// The tiny model with these pools (YAML list items).
    pub fn tiny(pools: &str) -> Self {
        let document = format!(
            "version: 1\nmodel: {{ id: tiny, path: {{root}}/examples/models/tiny }}\nrouter: {{ listen: 127.0.0.1:0 }}\npools:\n{pools}"
        );
        Self { document }
    }
}

/// A running `baton up`.
pub struct Fleet {
    launcher: Child,
    directory: tempfile::TempDir,
    stderr: Arc<Mutex<Vec<String>>>,
    /// The ready line.
    pub ready: String,
    /// `http://host:port` of the router.
    pub router: String,
    /// `http://host:port` of the conductor.
    pub conductor: String,
    http: reqwest::Client,
    descendants: Vec<u32>,
}

impl Fleet {
    /// Starts a fleet and waits for its ready line.
    ///
    /// # Panics
    /// When it is not ready in [`READY_WITHIN`]; what it wrote to stderr is shown.
    pub async fn start(options: FleetOptions) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("fleet.yaml");
        let document = options.document.replace("{root}", &binary::root().display().to_string());
        std::fs::write(&path, document).expect("the fleet document is written");
        let mut launcher = Command::new(binary::baton())
            .arg("up")
            .arg(&path)
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("baton up starts");
        let stderr = Arc::new(Mutex::new(Vec::new()));
        collect(launcher.stderr.take(), &stderr);
        let lines = first_line(launcher.stdout.take());
        let ready = match tokio::task::spawn_blocking(move || lines.recv_timeout(READY_WITHIN)).await {
            Ok(Ok(line)) => line,
            other => {
                let _ = launcher.kill();
                panic!("no ready line ({other:?}); stderr:\n{}", joined(&stderr));
            }
        };
        let word =
            |prefix: &str| ready.split(' ').find_map(|word| word.strip_prefix(prefix)).map(str::to_owned);
        let router = ready.split(' ').nth(1).and_then(|url| url.strip_suffix("/v1")).map(str::to_owned);
        let (router, conductor) = (
            router.expect("the ready line has the URL"),
            word("conductor=").expect("the ready line names the conductor"),
        );
        let descendants = children(launcher.id());
        assert!(!descendants.is_empty(), "a fleet is made of processes");
        Self {
            launcher,
            directory,
            stderr,
            ready,
            router,
            conductor,
            http: baton_conductor::http::client(),
            descendants,
        }
    }

    /// A client of its router.
    pub fn client(&self) -> Client {
        Client::new(&self.router)
    }

    /// The launcher's process id.
    pub fn launcher_pid(&self) -> u32 {
        self.launcher.id()
    }

    /// The fleet's own directory (its fleet document is `fleet.yaml` there).
    pub fn directory(&self) -> &std::path::Path {
        self.directory.path()
    }

    /// Everything written to stderr so far.
    pub fn stderr(&self) -> String {
        joined(&self.stderr)
    }

    /// GETs a JSON document.
    ///
    /// # Panics
    /// When there is no good answer.
    pub async fn get_json(&self, url: &str) -> serde_json::Value {
        let answer = self.http.get(url).timeout(Duration::from_secs(5)).send().await.expect("an answer");
        assert!(answer.status().is_success(), "{url}: {}", answer.status());
        answer.json().await.expect("JSON")
    }

    /// GETs a text, `/metrics` say.
    ///
    /// # Panics
    /// When there is no good answer.
    pub async fn get_text(&self, url: &str) -> String {
        let answer = self.http.get(url).timeout(Duration::from_secs(5)).send().await.expect("an answer");
        assert!(answer.status().is_success(), "{url}: {}", answer.status());
        answer.text().await.expect("text")
    }

    /// The workers as `baton status --json` shows them.
    ///
    /// # Panics
    /// When the command fails.
    pub async fn status(&self) -> serde_json::Value {
        let conductor = self.conductor.clone();
        let output = tokio::task::spawn_blocking(move || {
            Command::new(binary::baton()).args(["status", "--json", "--conductor", &conductor]).output()
        })
        .await
        .expect("joined")
        .expect("baton status runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("status --json is JSON")
    }

    /// Name, pool and process id of every worker of a pool.
    ///
    /// # Panics
    /// When the status has not the promised shape.
    pub async fn workers(&self, pool: &str) -> Vec<(String, u32)> {
        let status = self.status().await;
        let workers = status["workers"].as_array().expect("workers");
        workers
            .iter()
            .filter(|worker| worker["pool"] == pool)
            .map(|worker| {
                let pid = worker["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
                (worker["name"].as_str().expect("a name").to_owned(), pid.expect("a pid"))
            })
            .collect()
    }

    /// Waits until the block states of every ready worker say that nothing is held for any request.
    pub async fn eventually_nothing_held(&self, within: Duration) {
        eventually("all KV blocks free or shared again", within, async || {
            let status = self.status().await;
            let held = |worker: &serde_json::Value| {
                ["reserved", "filling", "valid", "quarantined"]
                    .iter()
                    .map(|state| worker["kv_blocks"][*state].as_u64().unwrap_or(u64::MAX / 8))
                    .sum::<u64>()
            };
            let workers = status["workers"].as_array()?;
            (!workers.is_empty() && workers.iter().map(held).sum::<u64>() == 0).then_some(())
        })
        .await;
    }

    /// Asks the launcher to stop and checks that every process is gone.
    ///
    /// # Panics
    /// When a process is left, or the exit code is not 0.
    pub async fn stop(mut self) {
        let mut all = children(self.launcher.id());
        all.extend(&self.descendants);
        signal(self.launcher.id(), Signal::TERM);
        let status = eventually("the launcher exits", STOPPED_WITHIN, async || {
            self.launcher.try_wait().ok().flatten()
        })
        .await;
        assert!(status.success(), "{status}; stderr:\n{}", joined(&self.stderr));
        let left: Vec<u32> = all.into_iter().filter(|pid| alive(*pid)).collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        if matches!(self.launcher.try_wait(), Ok(Some(_))) {
            return;
        }
        // A failing test: no ceremony, but nothing may be left to disturb the next one.
        let left = children(self.launcher.id());
        let _ = self.launcher.kill();
        let _ = self.launcher.wait();
        let deadline = Instant::now() + Duration::from_secs(5);
        while left.iter().any(|pid| alive(*pid)) && Instant::now() < deadline {
            std::thread::yield_now();
        }
        if std::thread::panicking() {
            let text = joined(&self.stderr);
            let lines: Vec<&str> = text.lines().collect();
            let tail = &lines[lines.len().saturating_sub(60)..];
            let _ = std::io::Write::write_all(
                &mut std::io::stderr(),
                format!("last lines of the fleet:\n{}\n", tail.join("\n")).as_bytes(),
            );
        }
    }
}

fn collect(stream: Option<impl std::io::Read + Send + 'static>, into: &Arc<Mutex<Vec<String>>>) {
    let (stream, into) = (stream.expect("a pipe"), Arc::clone(into));
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            into.lock().unwrap_or_else(PoisonError::into_inner).push(line);
        }
    });
}

fn first_line(stream: Option<impl std::io::Read + Send + 'static>) -> Receiver<String> {
    let stream = stream.expect("a pipe");
    let (sender, receiver) = sync_channel(1);
    std::thread::spawn(move || {
        let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
        if let Some(line) = lines.next() {
            let _ = sender.send(line);
        }
        lines.for_each(drop);
    });
    receiver
}

fn joined(lines: &Mutex<Vec<String>>) -> String {
    lines.lock().unwrap_or_else(PoisonError::into_inner).join("\n")
}
