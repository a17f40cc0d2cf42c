//! The official `openai` and `anthropic` Python clients against `baton up`.

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

/// Runs a script of this folder, which ends well or says why not.
async fn passes(script: &str, url: String) {
    let path = binary::root().join("integration").join(script);
    let run = move || Command::new(python()).arg(path).arg(url).output().unwrap();
    let output = tokio::task::spawn_blocking(run).await.unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("all good"), "{script}");
}

#[tokio::test]
async fn the_official_clients_are_served() {
    let fleet = Fleet::start(FleetOptions::laptop()).await;
    passes("openai_client.py", format!("{}/v1", fleet.router)).await;
    passes("anthropic_client.py", fleet.router.clone()).await;
    fleet.stop().await;
}
