//! How a command fails: what to say, and the exit code.

use std::error::Error;
use std::fmt;
use std::process::ExitCode;

use baton_config::fault::Faults;

/// Why a command did not do its job.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line or the configuration must change first: exit code 2.
    Usage(String),
    /// Something went wrong: exit code 1.
    Failed(String),
}

impl Failure {
    /// A failure with the chain of its causes.
    pub(crate) fn because(what: impl fmt::Display, cause: &dyn Error) -> Self {
        Self::Failed(format!("{what}: {}", chain(cause)))
    }

    /// A failure that says what it is by itself, with the chain of its causes.
    pub(crate) fn of(cause: &dyn Error) -> Self {
        Self::Failed(chain(cause))
    }

    pub(crate) fn failed(what: impl Into<String>) -> Self {
        Self::Failed(what.into())
    }

    pub(crate) fn code(&self) -> ExitCode {
        match self {
            Self::Usage(_) => ExitCode::from(2),
            Self::Failed(_) => ExitCode::FAILURE,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(message) | Self::Failed(message) => f.write_str(message),
        }
    }
}

impl From<Faults> for Failure {
    fn from(faults: Faults) -> Self {
        Self::Usage(faults.to_string())
    }
}

/// An error and its causes in one line; a cause already told by its effect is not repeated.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
