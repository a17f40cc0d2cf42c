//! Logs, on stderr.

use std::io;

use baton_config::environment::Environment;
use clap::ValueEnum;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::args::{Args, LogFormat};
use crate::failure::Failure;

/// What to log and how, resolved from environment and flags.
#[derive(Debug, Clone)]
pub(crate) struct Logging {
    /// Whether somebody asked for a filter.
    pub(crate) given: Option<String>,
    pub(crate) format: LogFormat,
    filter: Targets,
}

impl Logging {
    pub(crate) fn resolve(args: &Args, environment: &Environment) -> Result<Self, Failure> {
        let given = args.log.clone().or_else(|| environment.log.clone());
        // A part says what happens to it; a command says only what is wrong.
        let default = if args.command.is_part() { "info" } else { "warn" };
        let filter = parse(given.as_deref().unwrap_or(default)).map_err(|error| {
            let text = given.as_deref().unwrap_or_default();
            Failure::Usage(format!(
                "log filter {text:?}: {error}; write a level, like debug, or baton_router=debug,info"
            ))
        })?;
        let format = match (args.log_format, environment.log_format.as_deref()) {
            (Some(format), _) => format,
            (None, Some(word)) => LogFormat::from_str(word, true)
                .map_err(|_| Failure::Usage(format!("BATON_LOG_FORMAT is {word:?}; write text or json")))?,
            (None, None) => LogFormat::Text,
        };
        Ok(Self { given, format, filter })
    }

    /// The flags that have another process of this program log alike; `default` where nobody asked for a filter.
    pub(crate) fn flags(&self, default: &str) -> Vec<String> {
        let filter = self.given.as_deref().unwrap_or(default);
        let format = match self.format {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        };
        ["--log", filter, "--log-format", format].map(str::to_owned).into()
    }

    /// Starts logging for the rest of the process.
    pub(crate) fn start(&self) {
        // A reader of stderr that went away must not end the process.
        let layer = fmt::layer().with_writer(io::stderr).with_ansi(false).log_internal_errors(false);
        let layer = match self.format {
            LogFormat::Text => layer.boxed(),
            LogFormat::Json => layer.json().flatten_event(true).boxed(),
        };
        tracing_subscriber::registry().with(layer.with_filter(self.filter.clone())).init();
    }
}

/// Levels, and levels of modules; a lone word that is no level would otherwise pass for a module.
fn parse(text: &str) -> Result<Targets, String> {
    for word in text.split(',').map(str::trim).filter(|word| !word.contains('=')) {
        word.parse::<LevelFilter>().map_err(|_| format!("{word:?} is not a level"))?;
    }
    text.parse::<Targets>().map_err(|error| error.to_string())
}
