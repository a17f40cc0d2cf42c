//! What `baton bench router` is asked to do.

use std::path::PathBuf;

use crate::bench::router::Workload;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Without --url a fleet of simulated engines is started, with one router; figures straight from the engines' own
OpenAI surface stand beside those of the router, measured in turns. With --url any gateway is measured, in front of engines that
--engine-url names. Workloads: short, shared, stream, paced, large; quiet for memory and the time of a start; prefixes, zipf, chats
for routing quality. What each of them is: docs/benchmarks.md. CPU is that of the gateway alone.

Examples:
  baton bench router
  baton bench router --workload short --concurrency 1,256 --seconds 5 --policy round_robin
  baton bench router --workload large --passing
  baton bench router --workload chats --workers 4 --hold
  baton bench router --url http://127.0.0.1:30000 --pid 4711 --engine-url http://127.0.0.1:21000,http://127.0.0.1:21001"
)]
pub(crate) struct BenchRouterArgs {
    /// What is asked for [default: short, shared, stream, paced, large].
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub(crate) workload: Vec<Workload>,
    /// Requests at once, each on a connection that is kept [default: those of the workload].
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=16_384))]
    pub(crate) concurrency: Vec<u32>,
    /// Seconds of each figure; of workloads with a rate, at least as long as their requests take.
    #[arg(long, default_value_t = 2.0, value_name = "SECONDS", value_parser = super::seconds)]
    pub(crate) seconds: f64,
    /// Workers of the fleet that is started.
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(crate) workers: u32,
    /// Engines that take time take N times as much, and requests come N times as slowly: for more workers than this machine's
    /// processors can drive.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) stretch: u32,
    /// Policy of its router.
    #[arg(long, default_value = "kv_aware")]
    pub(crate) policy: String,
    /// Measure a router that passes requests on to the engines' own OpenAI surface, as to servers of other projects.
    #[arg(long, conflicts_with = "url")]
    pub(crate) passing: bool,
    /// Directory of the model whose tokenizer and template are used.
    #[arg(long, value_name = "DIR", default_value = "examples/models/tiny")]
    pub(crate) model: PathBuf,
    /// Start that fleet, print one JSON object that says where it is, and wait for Ctrl-C.
    #[arg(long, conflicts_with = "url")]
    pub(crate) hold: bool,
    /// The gateway to measure; of several, connections take turns.
    #[arg(long, value_name = "URLS", value_delimiter = ',')]
    pub(crate) url: Vec<String>,
    /// Processes whose CPU and memory are the gateway's.
    #[arg(long, value_name = "PIDS", value_delimiter = ',', requires = "url")]
    pub(crate) pid: Vec<u32>,
    /// The engines behind it, whose counters are read.
    #[arg(long, value_name = "URLS", value_delimiter = ',', requires = "url")]
    pub(crate) engine_url: Vec<String>,
    /// Leave out the figures straight from the engines.
    #[arg(long)]
    pub(crate) no_direct: bool,
    /// Name of the model in requests.
    #[arg(long, value_name = "ID", default_value = "bench", requires = "url")]
    pub(crate) model_id: String,
    /// Print one JSON object a row.
    #[arg(long)]
    pub(crate) json: bool,
}
