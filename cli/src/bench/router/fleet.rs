//! The fleet that is measured: `baton up` of simulated engines, in processes of their own.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use baton_conductor::api::Listing;
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::process;
use super::workload::Engines;
use crate::failure::Failure;

/// From start to the line that says that it is ready.
const READY_WITHIN: Duration = Duration::from_secs(60);
const ENDED_WITHIN: Duration = Duration::from_secs(20);
/// What requests call the model.
pub(super) const MODEL_ID: &str = "bench";
/// The longest prompt is 1 MB, and takes a token for some bytes.
const CONTEXT_TOKENS: u32 = 1 << 20;

/// A running fleet.
#[derive(Debug)]
pub(super) struct Fleet {
    launchers: Vec<Child>,
    pub(super) place: Place,
    // Removed with the fleet.
    _directory: TempDir,
}

/// Where the parts of a fleet are.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Place {
    pub(super) router: String,
    pub(super) router_pid: u32,
    pub(super) conductor: String,
    pub(super) engines: Vec<String>,
    /// The fleet file, for further routers.
    config: String,
    /// The model directory.
    model: String,
    /// A router that passes requests on to the same engines, where one was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) passing: Option<Passing>,
}

/// A router that passes requests on.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Passing {
    pub(super) router: String,
    pub(super) router_pid: u32,
}

impl Place {
    /// The fleet file.
    pub(super) fn config(&self) -> &str {
        &self.config
    }
}

/// What to start.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) engines: Engines,
    /// Times as slow as engines that take time could be.
    pub(super) stretch: u32,
    pub(super) workers: u32,
    pub(super) policy: &'a str,
    pub(super) model: &'a Path,
    /// Also a router that passes requests on.
    pub(super) passing: bool,
}

impl Fleet {
    pub(super) async fn start(wanted: Wanted<'_>) -> Result<Self, Failure> {
        let failed =
            |error: std::io::Error| Failure::because("the fleet of the bench cannot be set up", &error);
        let directory = tempfile::tempdir().map_err(failed)?;
        let model = directory.path().join("model");
        copy_model(wanted.model, &model)?;
        let config = directory.path().join("fleet.yaml");
        fs::write(&config, document(&wanted, &model)).map_err(failed)?;
        let (launcher, line) = launch(&config).await?;
        let mut launchers = vec![launcher];
        let mut place = place(&line, &launchers[0], &config, &model).await?;
        if wanted.passing {
            let config = directory.path().join("passing.yaml");
            fs::write(&config, passing_document(wanted.policy, &place.engines)).map_err(failed)?;
            let (launcher, line) = launch(&config).await?;
            let (router, router_pid) = router(&line, &launcher)?;
            place.passing = Some(Passing { router, router_pid });
            launchers.push(launcher);
        }
        Ok(Self { launchers, place, _directory: directory })
    }

    /// Ends it.
    pub(super) async fn stop(self) {
        for mut launcher in self.launchers.into_iter().rev() {
            if let Some(pid) = launcher.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)) {
                // Ended already, else.
                let _ = kill_process(pid, Signal::TERM);
            }
            let _ = tokio::time::timeout(ENDED_WITHIN, launcher.wait()).await;
        }
    }
}

/// Starts a fleet and waits until it is ready; gives what it says then.
async fn launch(config: &Path) -> Result<(Child, String), Failure> {
    let failed = |error: std::io::Error| Failure::because("the fleet of the bench cannot be started", &error);
    let mut launcher = Command::new(std::env::current_exe().map_err(failed)?)
        .args(["--log", "warn", "up"])
        .arg(config)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Ctrl-C in the terminal is for this process, which stops the fleet.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let Some(stdout) = launcher.stdout.take() else {
        return Err(Failure::failed("no stdout of baton up"));
    };
    let mut lines = BufReader::new(stdout).lines();
    match tokio::time::timeout(READY_WITHIN, lines.next_line()).await {
        Ok(Ok(Some(line))) => Ok((launcher, line)),
        _ => Err(Failure::failed("the fleet of the bench did not get ready: see above")),
    }
}

/// Where the router of a fleet is, and its process: `ready http://ROUTER/v1 model=ID conductor=http://CONDUCTOR`.
fn router(line: &str, launcher: &Child) -> Result<(String, u32), Failure> {
    let url = line.split(' ').nth(1).and_then(|url| url.strip_suffix("/v1"));
    let url = url.ok_or_else(|| Failure::failed(format!("baton up said {line:?}")))?;
    let children = process::children(launcher.id().unwrap_or_default());
    let is_router = |words: &[String]| words.iter().any(|word| word == "router");
    let pid = children.iter().find(|(_, words)| is_router(words)).map(|(pid, _)| *pid);
    let pid = pid.ok_or_else(|| Failure::failed("the router of the bench is gone"))?;
    Ok((url.to_owned(), pid))
}

/// Finds the parts.
async fn place(line: &str, launcher: &Child, config: &Path, model: &Path) -> Result<Place, Failure> {
    let (router, router_pid) = router(line, launcher)?;
    let conductor = line.split(' ').find_map(|word| word.strip_prefix("conductor="));
    let conductor = conductor.ok_or_else(|| Failure::failed(format!("baton up said {line:?}")))?;
    let failed = |error: reqwest::Error| Failure::because("the workers of the bench", &error);
    let url = format!("{conductor}/v1/workers?metadata=no");
    let listing = crate::remote::client()?.get(url).send().await.map_err(failed)?;
    let listing: Listing = listing.json().await.map_err(failed)?;
    let engines = listing.workers.iter().map(|worker| format!("http://{}", worker.record.address));
    Ok(Place {
        router,
        router_pid,
        conductor: conductor.to_owned(),
        engines: engines.collect(),
        config: config.display().to_string(),
        model: model.display().to_string(),
        passing: None,
    })
}

/// The text side of a model, with a KV cache of 32 bytes a token and a context that takes every prompt.
fn copy_model(from: &Path, to: &Path) -> Result<(), Failure> {
    let name = from.display();
    let unread = |error: &dyn std::error::Error| {
        Failure::Usage(format!("--model {name} is not a directory of a model with a tokenizer: {error}"))
    };
    fs::create_dir(to).map_err(|error| Failure::because("no directory for the model", &error))?;
    for file in fs::read_dir(from).map_err(|error| unread(&error))?.flatten() {
        let file_name = file.file_name();
        let text = file_name.to_string_lossy();
        // What the router reads; weights are not needed.
        if text.ends_with(".json") || text.ends_with(".jinja") {
            fs::copy(file.path(), to.join(&file_name)).map_err(|error| unread(&error))?;
        }
    }
    let path = to.join("config.json");
    let text = fs::read_to_string(&path).map_err(|error| unread(&error))?;
    let mut config: Value = serde_json::from_str(&text).map_err(|error| unread(&error))?;
    for (key, value) in [
        ("num_hidden_layers", 1),
        ("num_key_value_heads", 1),
        ("head_dim", 8),
        ("max_position_embeddings", CONTEXT_TOKENS),
    ] {
        config[key] = value.into();
    }
    fs::write(&path, config.to_string()).map_err(|error| unread(&error))
}

fn document(wanted: &Wanted<'_>, model: &Path) -> String {
    // Microseconds of a step, of a token of prompt, of a step of answers; blocks of KV, tokens of prompt a step takes.
    let (prefill_base, prefill_token, decode_base, blocks, chunk) = match wanted.engines {
        Engines::Fast => (0, 0, 0, 1 << 18, CONTEXT_TOKENS / 2),
        Engines::Paced => (0, 0, 20_000, 1 << 16, 1 << 16),
        Engines::Still => (3_600_000_000, 0, 3_600_000_000, 1 << 16, 1 << 16),
        Engines::Timed => (2000 * wanted.stretch, 40 * wanted.stretch, 2000 * wanted.stretch, 1600, 512),
    };
    let times = format!(
        "prefill_us_base: {prefill_base}, prefill_us_per_token: {prefill_token}, decode_us_base: {decode_base}"
    );
    let Wanted { workers, policy, .. } = *wanted;
    // One pool that does both, as behind any gateway; limits that nothing here reaches.
    format!(
        "version: 1
model: {{ id: {MODEL_ID}, path: {} }}
conductor: {{ listen: 127.0.0.1:0 }}
router:
  listen: 127.0.0.1:0
  policy: {{ kind: {policy} }}
  disaggregation: never
  limits: {{ body: 16MiB, queue: 4096, in_flight: 16384, connections: 32768 }}
pools:
  - name: sim
    role: both
    replicas: {workers}
    engine: {{ kind: sim, check_kv: false, {times}, prefill_ns_per_token2: 0, decode_us_per_seq: 0, decode_ns_per_context_token: 0, prefill_chunk: {chunk}, max_batch: 16384, max_waiting: 16384 }}
    kv: {{ block_tokens: 16, blocks: {blocks} }}
    limits: {{ in_flight: 16384, body: 64MiB }}
",
        model.display()
    )
}

/// The same engines as servers of another project.
fn passing_document(policy: &str, engines: &[String]) -> String {
    format!(
        "version: 1
model: {{ id: {MODEL_ID} }}
conductor: {{ listen: 127.0.0.1:0 }}
router:
  listen: 127.0.0.1:0
  policy: {{ kind: {policy} }}
  limits: {{ body: 16MiB, queue: 4096, in_flight: 16384, connections: 32768 }}
pools:
  - name: servers
    role: both
    engine: {{ kind: openai, urls: [{}] }}
    limits: {{ in_flight: 16384 }}
",
        engines.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fleet_of_the_bench_is_a_good_one() {
        let directory = tempfile::tempdir().unwrap();
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny");
        let model = directory.path().join("model");
        copy_model(&tiny, &model).unwrap();
        for engines in [Engines::Fast, Engines::Paced, Engines::Still, Engines::Timed] {
            let wanted = Wanted {
                engines,
                stretch: 64,
                workers: 3,
                policy: "round_robin",
                model: &tiny,
                passing: false,
            };
            let path = directory.path().join("fleet.yaml");
            fs::write(&path, document(&wanted, &model)).unwrap();
            let fleet = baton_config::fleet::Fleet::load(&path).unwrap();
            assert_eq!(fleet.pools[0].replicas, 3);
            let shape = fleet.model.directory.unwrap().shape;
            assert_eq!(shape.max_context, CONTEXT_TOKENS);
            let block = fleet.pools[0].kv.geometry(&shape).block_bytes();
            assert_eq!(block, 16 * 32);
        }
        let path = directory.path().join("passing.yaml");
        let engines = ["http://127.0.0.1:1".to_owned(), "http://127.0.0.1:2".to_owned()];
        fs::write(&path, passing_document("kv_aware", &engines)).unwrap();
        assert!(baton_config::fleet::Fleet::load(&path).unwrap().passes_on());
    }
}
