//! The only place that writes to stdout and stderr. A reader that went away (`| head`) is not an error.

use std::io::{self, Write};
use std::sync::OnceLock;

use serde_json::json;

use crate::args::LogFormat;
use crate::failure::Failure;

/// How lines on stderr look; as text until it is known.
static FORMAT: OnceLock<LogFormat> = OnceLock::new();

/// Settles how lines on stderr look.
pub(crate) fn settle(format: LogFormat) {
    // Settled once, before anything is written: a second time changes nothing.
    let _ = FORMAT.set(format);
}

/// Writes a result to stdout.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    print_on(text).map(drop)
}

/// Writes one of many results to stdout; whether anybody still reads them.
pub(crate) fn print_on(text: &str) -> Result<bool, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::because("cannot write to stdout", &error)),
    }
}

/// Says something to the person at the terminal.
pub(crate) fn tell(message: &str) {
    match FORMAT.get() {
        Some(LogFormat::Json) => pass_on(&json!({ "level": "INFO", "message": message }).to_string()),
        Some(LogFormat::Text) | None => pass_on(message),
    }
}

/// Says why the command failed.
pub(crate) fn report(message: &str) {
    match FORMAT.get() {
        Some(LogFormat::Json) => pass_on(&json!({ "level": "ERROR", "message": message }).to_string()),
        Some(LogFormat::Text) | None => pass_on(&format!("error: {message}")),
    }
}

/// Writes a line to stderr as it is; nobody can be told if that fails.
pub(crate) fn pass_on(line: &str) {
    let mut out = io::stderr().lock();
    let _ = writeln!(out, "{line}");
}
