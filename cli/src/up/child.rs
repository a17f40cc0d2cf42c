//! One child process: started, listened to, awaited.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{ChildStderr, Command};
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use super::roster::PartId;
use crate::args::LogFormat;
use crate::failure::Failure;
use crate::output;

/// Longer lines are cut into several.
const LINE_MAX_BYTES: u64 = 16 << 10;

/// A child ended.
#[derive(Debug)]
pub(super) struct Exit {
    pub(super) id: PartId,
    pub(super) pid: u32,
    pub(super) status: ExitStatus,
    /// Its error, or else the last thing it said.
    pub(super) last_line: Option<String>,
}

impl Exit {
    /// How it ended, in words.
    pub(super) fn reason(&self) -> String {
        use std::os::unix::process::ExitStatusExt;
        let how = match (self.status.code(), self.status.signal()) {
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => "an unknown end".to_owned(),
        };
        match &self.last_line {
            // What it said last is why it ended only where it failed by itself.
            Some(line) if self.status.code().is_some_and(|code| code != 0) => message_of(line),
            _ => how,
        }
    }
}

/// A running child.
#[derive(Debug)]
pub(super) struct Child {
    pub(super) pid: u32,
}

/// What children have in common.
#[derive(Debug)]
pub(super) struct Nursery {
    pub(super) executable: PathBuf,
    pub(super) format: LogFormat,
    pub(super) exits: mpsc::Sender<Exit>,
    pub(super) tasks: TaskTracker,
}

impl Nursery {
    /// Starts this binary with `args`.
    pub(super) fn start(&self, id: &PartId, args: Vec<String>) -> Result<Child, Failure> {
        // A binary that was replaced meanwhile is still there as what this process runs.
        let executable =
            if self.executable.exists() { self.executable.as_path() } else { Path::new("/proc/self/exe") };
        let mut child = Command::new(executable)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // Ctrl-C in the terminal is for the launcher alone, which stops the parts in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| Failure::because(format!("{id} cannot be started"), &error))?;
        let pid = child.id().unwrap_or_default();
        let stderr = child.stderr.take();
        let (id, exits, format) = (id.clone(), self.exits.clone(), self.format);
        self.tasks.spawn(async move {
            let last_line = forward(&id, stderr, format).await;
            if let Ok(status) = child.wait().await {
                // The launcher no longer listens once it is ending.
                let _ = exits.send(Exit { id, pid, status, last_line }).await;
            }
        });
        Ok(Child { pid })
    }
}

impl Child {
    /// Sends a signal; an ended child is left alone.
    pub(super) fn signal(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, signal);
        }
    }
}

/// Passes on what a child says, each line with its name, and returns the last one.
async fn forward(id: &PartId, stderr: Option<ChildStderr>, format: LogFormat) -> Option<String> {
    let mut reader = BufReader::new(stderr?);
    let mut last = None;
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut reader).take(LINE_MAX_BYTES).read_until(b'\n', &mut line).await;
        if !matches!(read, Ok(count) if count > 0) {
            return last;
        }
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        if text.is_empty() {
            continue;
        }
        match format {
            // The launcher tells what ended a part, once.
            _ if is_error(&text) => {}
            LogFormat::Text => output::tell(&format!("[{id}] {text}")),
            LogFormat::Json => output::pass_on(&text),
        }
        // What ended a part stands in its error line, whatever it logs after that.
        if is_error(&text) || !last.as_deref().is_some_and(is_error) {
            last = Some(text);
        }
    }
}

fn is_error(line: &str) -> bool {
    line.starts_with("error: ") || line.starts_with(r#"{"level":"ERROR","message""#)
}

/// What a line says, without its dress.
fn message_of(line: &str) -> String {
    let json = serde_json::from_str::<serde_json::Value>(line).ok();
    let message = json.as_ref().and_then(|value| value.get("message")).and_then(|value| value.as_str());
    let text = message.unwrap_or(line);
    text.strip_prefix("error: ").unwrap_or(text).to_owned()
}
