//! One part of a fleet as a process of its own: a conductor, a router or a worker.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use crate::process::{eventually, signal};
use crate::{binary, ports};

/// A part of a fleet; killed with this value.
pub struct Part {
    /// What the test calls it.
    pub name: String,
    /// Where it listens, `http://host:port`.
    pub url: String,
    child: Child,
}

impl Part {
    /// Starts `baton` with `arguments`, the fleet file and a free port to listen on.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(fleet: &Path, name: &str, arguments: &[&str]) -> Self {
        let address = ports::free();
        let child = Command::new(binary::baton())
            .args(arguments)
            .args(["--config", &fleet.display().to_string(), "--listen", &address.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("baton starts");
        Self { name: name.to_owned(), child, url: format!("http://{address}") }
    }

    /// Sends it a signal.
    pub fn signal(&self, what: Signal) {
        signal(self.child.id(), what);
    }

    /// What it answers to a GET, if that is a good answer.
    pub async fn get(&self, path: &str) -> Option<String> {
        let request = baton_conductor::http::client().get(format!("{}{path}", self.url));
        let answer = request.timeout(Duration::from_secs(1)).send().await.ok()?;
        if answer.status().is_success() { answer.text().await.ok() } else { None }
    }

    /// Waits until it says that it is ready.
    pub async fn until_ready(&self, within: Duration) {
        eventually(&format!("{} is ready", self.name), within, async || {
            self.get("/readyz").await.map(|_| ())
        })
        .await;
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
