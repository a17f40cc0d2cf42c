//! `baton`: one binary for every part of a fleet, for starting all of it on one machine, and for looking at it.
//!
//! ```text
//! args ──► config (file < environment < flag) ──► run, until a signal ──► exit code
//! ```
//!
//! Exit codes: 0 ok, 1 failed, 2 bad usage or configuration. Results go to stdout, everything else to stderr.
#![forbid(unsafe_code)]

mod args;
mod bench;
mod check;
mod doctor;
mod failure;
mod key;
mod kv;
mod logging;
mod operate;
mod output;
mod parent;
mod part;
mod remote;
mod signals;
mod status;
mod table;
mod up;

use std::process::ExitCode;

use baton_config::environment::Environment;
use clap::Parser;
use tikv_jemallocator::Jemalloc;

use args::{Args, Command};
use failure::Failure;
use logging::Logging;

/// glibc's keeps what it once had: a router of which 2,000 clients have left stays as large as it was with them. This one has
/// a thread that gives memory back even while nothing happens; `.cargo/config.toml` holds its settings, and `_RJEM_MALLOC_CONF`
/// others at run time.
#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // A closed pipe must not turn `--help` into a panic.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let environment = Environment::read();
    match Logging::resolve(&args, &environment).and_then(|logging| run(args, &logging, &environment)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::report(&failure.to_string());
            failure.code()
        }
    }
}

fn run(args: Args, logging: &Logging, environment: &Environment) -> Result<(), Failure> {
    output::settle(logging.format);
    if let Some(parent) = args.command.parent_pid() {
        parent::die_with(parent)?;
    }
    logging.start();
    match args.command {
        Command::Up(up) => up::run(up, logging, environment),
        Command::Conductor(args) => part::conductor::run(&args, environment),
        Command::Router(args) => part::router::run(&args, environment),
        Command::Worker(args) => part::worker::run(&args, environment),
        Command::Check(args) => check::run(&args, environment),
        Command::Status(args) => status::run(&args, environment),
        Command::Top(args) => status::top::run(&args, environment),
        Command::Drain(args) => operate::drain(&args, environment),
        Command::Scale(args) => operate::scale(&args, environment),
        Command::Doctor(args) => doctor::run(&args),
        Command::Bench(args) => bench::run(&args, logging),
        Command::Key(args) => key::run(&args),
        Command::Kv(args) => kv::run(&args),
    }
}
