//! The environment: the layer between the fleet file and the flags.
//!
//! A value is taken from the flag if it was given, else from the environment, else from the file. Besides
//! these variables, a fleet file may name others by `${NAME}`. Nothing else in Baton reads the environment.

/// The variables Baton reads by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Environment {
    /// `BATON_LOG`: log filter, such as `info` or `baton_router=debug,warn`.
    pub log: Option<String>,
    /// `BATON_LOG_FORMAT`: `text` or `json`.
    pub log_format: Option<String>,
    /// `BATON_CONDUCTOR`: URL of the conductor.
    pub conductor: Option<String>,
    /// `BATON_FLEET`: path of the fleet file.
    pub fleet: Option<String>,
}

impl Environment {
    /// Reads them; empty ones count as unset.
    pub fn read() -> Self {
        Self {
            log: variable("BATON_LOG"),
            log_format: variable("BATON_LOG_FORMAT"),
            conductor: variable("BATON_CONDUCTOR"),
            fleet: variable("BATON_FLEET"),
        }
    }
}

/// One variable, if it is set to something that is text.
#[expect(clippy::disallowed_methods, reason = "this is the one place that reads the environment")]
pub(crate) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
