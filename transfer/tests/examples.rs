//! The examples run, over every backend that works here.
#![cfg(test)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use baton_transfer::{LibfabricOptions, UcxOptions, probe};

/// Generous: all tests of the workspace may be running beside it.
const PATIENCE: Duration = Duration::from_secs(60);

/// An example, which cargo builds beside the tests.
fn example(name: &str) -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let path = tests.parent().and_then(Path::parent).unwrap().join("examples").join(name);
    assert!(path.exists(), "{} is not built: `cargo build --examples`", path.display());
    path
}

fn two_processes(backend: &str) -> Output {
    let mut child = Command::new(example("two_processes"))
        .args(["--backend", backend])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("{backend}: hangs: {:?}", child.wait_with_output().unwrap());
        }
        std::thread::yield_now();
        std::thread::park_timeout(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

fn runs_over(backend: &str) {
    let output = two_processes(backend);
    let said = String::from_utf8_lossy(&output.stdout);
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{backend}: {said}{complaints}");
    let kind = backend.split(':').next().unwrap();
    assert!(said.contains(&format!("path {kind}: ")) && said.ends_with("ok\n"), "{backend}: {said}");
    println!("{said}");
}

#[test]
fn two_processes_over_shared_memory() {
    runs_over("shm");
}

#[test]
fn two_processes_over_tcp() {
    runs_over("tcp");
}

#[test]
fn two_processes_over_copies_by_the_kernel() {
    let probe = probe::cma();
    match probe.works {
        true => runs_over("cma"),
        false => println!("skipped: {}", probe.detail),
    }
}

#[test]
fn two_processes_over_libfabric() {
    let [library, providers @ ..] = &probe::libfabric(&LibfabricOptions::default())[..] else {
        panic!("the probe says something")
    };
    match library.works && providers.iter().any(|provider| provider.works) {
        true => runs_over("libfabric"),
        false => println!("skipped: {}", library.detail),
    }
}

#[test]
fn two_processes_over_ucx() {
    let probe = &probe::ucx(&UcxOptions::default())[0];
    match probe.works {
        true => runs_over("ucx"),
        false => println!("skipped: {}", probe.detail),
    }
}

#[test]
fn two_processes_over_a_plugin() {
    let directory = tempfile::tempdir().unwrap();
    let plugin = directory.path().join("libbaton_cma.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("plugin/example/baton_cma.c");
    let built = Command::new("cc")
        .args(["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O2", "-shared", "-fPIC", "-o"])
        .arg(&plugin)
        .arg(source)
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    runs_over(&format!("plugin:{}", plugin.display()));
}

#[test]
fn what_cannot_be_is_said() {
    let wrong = [
        ("carrier-pigeon", "there is no backend carrier-pigeon"),
        ("plugin:/none.so", "there is no plugin at /none.so"),
    ];
    for (backend, why) in wrong {
        let output = two_processes(backend);
        assert!(!output.status.success(), "{backend}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(why), "{output:?}");
    }
}
