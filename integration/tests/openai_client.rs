//! The official `openai` Python client against `baton up`, chat, streaming and completions.
#![cfg(test)]

use std::path::PathBuf;
use std::process::Command;

use baton_integration::{Fleet, FleetOptions, binary};

fn python() -> PathBuf {
    let python = binary::root().join("target/openai-venv/bin/python");
    assert!(
        python.exists(),
        "no {}: run the tests through `bash integration/test.sh`, which installs it",
        python.display()
    );
    python
}

#[tokio::test]
async fn the_official_client_is_served() {
    let fleet = Fleet::start(FleetOptions::laptop()).await;
    let url = format!("{}/v1", fleet.router);
    let script = binary::root().join("integration/openai_client.py");
    let output =
        tokio::task::spawn_blocking(move || Command::new(python()).arg(script).arg(url).output().unwrap())
            .await
            .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("all good"));
    fleet.stop().await;
}
