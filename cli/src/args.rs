//! The command line.

mod bench;

use std::net::SocketAddr;
use std::path::PathBuf;

use baton_config::{PoolName, WorkerId};
use clap::{Parser, Subcommand, ValueEnum};

pub(crate) use self::bench::{Bench, BenchArgs, BenchIndexArgs, BenchRouterArgs, BenchTransferArgs};

/// One OpenAI-compatible endpoint in front of LLM engines that prefill on one worker and decode on another.
#[derive(Debug, Parser)]
#[command(
    name = "baton",
    version,
    arg_required_else_help = true,
    after_help = "Start here:
  baton up                      a whole fleet on this machine; Ctrl-C stops it
  baton check fleet.yaml        what a fleet file means, or everything that is wrong with it
  baton status                  what a running fleet is doing

Exit codes: 0 ok, 1 failed, 2 bad usage or configuration.
Values are taken from flags, else from BATON_CONDUCTOR, BATON_FLEET, BATON_LOG and BATON_LOG_FORMAT, else from the
fleet file, else from the defaults that `baton check` prints."
)]
pub(crate) struct Args {
    /// What to log: error, warn, info, debug, trace, also per module [default: info for parts of a fleet, else warn].
    #[arg(long, global = true, value_name = "FILTER")]
    pub(crate) log: Option<String>,
    /// How to log, on stderr [default: text].
    #[arg(long, global = true, value_name = "FORMAT")]
    pub(crate) log_format: Option<LogFormat>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a whole fleet on this machine.
    Up(UpArgs),
    /// Run the conductor of a fleet.
    Conductor(ConductorArgs),
    /// Run the router of a fleet.
    Router(RouterArgs),
    /// Run one worker of a pool.
    Worker(WorkerArgs),
    /// Explain a fleet file, or list everything that is wrong with it.
    Check(CheckArgs),
    /// Show what a running fleet is doing.
    Status(StatusArgs),
    /// Show what a running fleet is doing on the whole terminal, again and again.
    Top(TopArgs),
    /// Let a worker finish what it has and leave.
    Drain(DrainArgs),
    /// Change the number of workers of a pool.
    Scale(ScaleArgs),
    /// Say which backends and devices work on this machine, and why the others do not.
    Doctor(DoctorArgs),
    /// Measure, with the raw limit of the machine beside each figure.
    Bench(BenchArgs),
    /// Make a key for a tenant of the router.
    Key(KeyArgs),
    /// Say how much KV cache a model needs and how long moving it takes.
    Kv(KvArgs),
}

impl Command {
    /// Whether it is a part of a fleet, which runs until it is told to end.
    pub(crate) fn is_part(&self) -> bool {
        matches!(self, Self::Conductor(_) | Self::Router(_) | Self::Worker(_))
    }

    /// The launcher this process must not outlive.
    pub(crate) fn parent_pid(&self) -> Option<u32> {
        match self {
            Self::Conductor(args) => args.part.parent_pid,
            Self::Router(args) => args.part.parent_pid,
            Self::Worker(args) => args.part.parent_pid,
            _ => None,
        }
    }
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Without FLEET: a conductor, a router, two prefill workers that emulate a device, and two decode
workers with another KV layout, all serving a tiny model. Prints one line on stdout when requests can be served:
  ready http://127.0.0.1:8080/v1 model=tiny conductor=http://127.0.0.1:41173

Examples:
  baton up
  baton up fleet.yaml --listen 127.0.0.1:9000
  baton --log info up"
)]
pub(crate) struct UpArgs {
    /// The fleet file [default: a small built-in fleet].
    pub(crate) fleet: Option<PathBuf>,
    /// Where the router listens, whatever the file says.
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub(crate) listen: Option<SocketAddr>,
}

/// What every long-running part is told.
#[derive(Debug, clap::Args)]
pub(crate) struct PartArgs {
    /// The fleet file [default: a small built-in fleet].
    #[arg(long, value_name = "FLEET")]
    pub(crate) config: Option<PathBuf>,
    /// Where it listens, whatever the file says; port 0 is any free one.
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub(crate) listen: Option<SocketAddr>,
    /// Ends at once when this process ends; given by `baton up`.
    #[arg(long, hide = true, value_name = "PID")]
    pub(crate) parent_pid: Option<u32>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  baton conductor --config fleet.yaml
  baton conductor --config fleet.yaml --name conductor-0 --url http://conductor-0.conductor:7400")]
pub(crate) struct ConductorArgs {
    #[command(flatten)]
    pub(crate) part: PartArgs,
    /// What the other conductors on the same store call it; unique among them [default: HOST-PID].
    #[arg(long, value_parser = conductor_name)]
    pub(crate) name: Option<String>,
    /// Where operators and the other conductors reach it [default: where it listens].
    #[arg(long, value_name = "URL")]
    pub(crate) url: Option<String>,
    /// Where the embedded store keeps epochs and operators' wishes over restarts, unless the file says.
    #[arg(long, value_name = "PATH")]
    pub(crate) state_file: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  baton router --config fleet.yaml --listen 0.0.0.0:8080")]
pub(crate) struct RouterArgs {
    #[command(flatten)]
    pub(crate) part: PartArgs,
    /// URLs of the conductors, separated by commas and tried in order, whatever the file says.
    #[arg(long, value_name = "URLS")]
    pub(crate) conductor: Option<String>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  baton worker --config fleet.yaml --pool decode
  baton worker --config fleet.yaml --pool decode --name decode-1 --listen 127.0.0.1:7511")]
pub(crate) struct WorkerArgs {
    #[command(flatten)]
    pub(crate) part: PartArgs,
    /// The pool it belongs to.
    #[arg(long)]
    pub(crate) pool: PoolName,
    /// Its name, unique in the fleet [default: the pool's name, a dash, and the index].
    #[arg(long)]
    pub(crate) name: Option<WorkerId>,
    /// Which replica of the pool it is, from 0: added to the pool's ports [default: the number NAME ends in, or 0].
    #[arg(long)]
    pub(crate) index: Option<u16>,
    /// URLs of the conductors, separated by commas and tried in order, whatever the file says.
    #[arg(long, value_name = "URLS")]
    pub(crate) conductor: Option<String>,
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Prints every value and whether it is a default, the size of a KV block in each pool, and the way
blocks take between each pair of prefill and decode pools. Exits with 2 and lists every fault, if there is one.

Example:
  baton check fleet.yaml"
)]
pub(crate) struct CheckArgs {
    /// The fleet file [default: the built-in fleet].
    pub(crate) fleet: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ConductorUrl {
    /// URLs of the conductors, separated by commas: the first that answers is asked [default: those of the fleet file,
    /// else http://127.0.0.1:7400].
    #[arg(long, value_name = "URLS")]
    pub(crate) conductor: Option<String>,
    /// The fleet file: names the conductors, and the token and certificates to show them.
    #[arg(long, value_name = "FLEET")]
    pub(crate) config: Option<PathBuf>,
    /// File of the token to show, whatever the fleet file says.
    #[arg(long, value_name = "PATH")]
    pub(crate) token_file: Option<PathBuf>,
    /// Authority of the conductors' certificates, whatever the fleet file says.
    #[arg(long, value_name = "PATH")]
    pub(crate) ca_file: Option<PathBuf>,
    /// Certificate to show, whatever the fleet file says.
    #[arg(long, value_name = "PATH", requires = "client_key_file")]
    pub(crate) client_cert_file: Option<PathBuf>,
    /// Key of the certificate to show.
    #[arg(long, value_name = "PATH", requires = "client_cert_file")]
    pub(crate) client_key_file: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  baton status
  baton status --watch
  baton status --conductor http://127.0.0.1:41173 --json | jq .problems")]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) conductor: ConductorUrl,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
    /// Look again every so many seconds, until Ctrl-C.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub(crate) watch: Option<u32>,
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Shows what `baton status` does, the worst first, as much of it as the terminal has lines. While no
conductor answers, the last picture stays, and how old it is. Ctrl-C ends it.

Examples:
  baton top
  baton top --every 5 --conductor http://10.0.0.1:7400,http://10.0.0.2:7400"
)]
pub(crate) struct TopArgs {
    #[command(flatten)]
    pub(crate) conductor: ConductorUrl,
    /// Look again every so many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub(crate) every: u32,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "The worker takes no new requests, finishes what it has, and leaves.

Examples:
  baton drain decode-1
  baton drain decode-1 --wait 60")]
pub(crate) struct DrainArgs {
    /// Name of the worker.
    pub(crate) worker: WorkerId,
    /// Wait until it has left, for so many seconds at most, and say on stderr what it waits for; exit code 1 if it is still
    /// there then.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "180", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub(crate) wait: Option<u32>,
    #[command(flatten)]
    pub(crate) conductor: ConductorUrl,
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "The number stays until another is given, whatever the autoscaler thinks; `auto` takes it back.

Examples:
  baton scale decode 4
  baton scale decode auto"
)]
pub(crate) struct ScaleArgs {
    /// Name of the pool.
    pub(crate) pool: PoolName,
    /// Number of workers, or `auto`: as the autoscaler or the fleet file has it.
    #[arg(value_parser = replicas)]
    pub(crate) replicas: WantedReplicas,
    #[command(flatten)]
    pub(crate) conductor: ConductorUrl,
}

#[derive(Debug, clap::Args)]
pub(crate) struct DoctorArgs {
    /// Print one JSON object a row.
    #[arg(long)]
    pub(crate) json: bool,
    /// Address of the network interface that libfabric and UCX are tried on.
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    pub(crate) bind: std::net::IpAddr,
    /// Try the shared object of a plugin, too.
    #[arg(long, value_name = "PATH")]
    pub(crate) plugin: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct KeyArgs {
    #[command(subcommand)]
    pub(crate) command: KeyCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// Print a new key, and the line of the file of keys that lets it in.
    #[command(after_help = "The key is kept nowhere: the line holds only a keyed hash of it.

Example:
  baton key new --tenant acme")]
    New {
        /// Whose it is to be: 1 to 64 characters of a-z, 0-9, -, _ and .
        #[arg(long, value_name = "NAME")]
        tenant: String,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  baton kv examples/models/tiny")]
pub(crate) struct KvArgs {
    /// A Hugging Face model directory.
    pub(crate) model_dir: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A name that can be part of a key.
fn conductor_name(text: &str) -> Result<String, String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
    if (1..=128).contains(&text.len()) && text.chars().all(good) {
        return Ok(text.to_owned());
    }
    Err("write at most 128 letters, digits, dashes, dots and colons".to_owned())
}

/// How many workers an operator wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WantedReplicas {
    /// So many.
    Number(u32),
    /// No matter: others decide.
    Auto,
}

/// Parses a number of workers, or `auto`.
fn replicas(text: &str) -> Result<WantedReplicas, String> {
    let number = || text.parse().map(WantedReplicas::Number);
    if text == "auto" {
        Ok(WantedReplicas::Auto)
    } else {
        number().map_err(|_| "write a number, or auto".to_owned())
    }
}

/// Parses `IP:PORT` or `localhost:PORT`.
fn address(text: &str) -> Result<SocketAddr, String> {
    let numeric = match text.strip_prefix("localhost:") {
        Some(port) => format!("127.0.0.1:{port}"),
        None => text.to_owned(),
    };
    numeric.parse().map_err(|_| "write an address and a port, like 127.0.0.1:8080".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_conductors_name_can_be_part_of_a_key() {
        assert!(conductor_name("conductor-0.conductor:7400").is_ok());
        assert!(conductor_name("").is_err() && conductor_name("a/b").is_err());
    }

    #[test]
    fn addresses_are_numeric_or_localhost() {
        assert_eq!(address("localhost:80").unwrap().to_string(), "127.0.0.1:80");
        assert_eq!(address("[::1]:80").unwrap().to_string(), "[::1]:80");
        assert!(address("80").is_err() && address("example.com:80").is_err());
    }
}
