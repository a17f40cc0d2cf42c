//! Which crate may import which: the directions of ARCHITECTURE.md, read from `cargo metadata`.

use std::collections::BTreeSet;
use std::process::Command;

/// Each package with the packages of this workspace it may depend on.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("baton-config", &[]),
    ("baton-libfabric-sys", &[]),
    ("baton-ucx-sys", &[]),
    ("baton-transfer", &["baton-config", "baton-libfabric-sys", "baton-ucx-sys"]),
    ("baton-conductor", &["baton-config"]),
    ("baton-engine", &["baton-config"]),
    ("baton-worker-agent", &["baton-config", "baton-conductor", "baton-transfer", "baton-engine"]),
    ("baton-router", &["baton-config", "baton-conductor"]),
    (
        "baton",
        &[
            "baton-config",
            "baton-conductor",
            "baton-transfer",
            "baton-engine",
            "baton-worker-agent",
            "baton-router",
        ],
    ),
    ("baton-integration", &["baton-config", "baton-conductor", "baton-transfer", "baton-engine"]),
];

#[test]
fn crates_import_only_what_the_architecture_allows() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let ours: BTreeSet<&str> = packages.iter().map(|p| p["name"].as_str().unwrap()).collect();
    let known: BTreeSet<&str> = MAY_IMPORT.iter().map(|(name, _)| *name).collect();
    assert_eq!(
        ours, known,
        "a package came or went: say in MAY_IMPORT and ARCHITECTURE.md what it may import"
    );
    for package in packages {
        let name = package["name"].as_str().unwrap();
        let (_, allowed) = MAY_IMPORT.iter().find(|(known, _)| *known == name).unwrap();
        for dependency in package["dependencies"].as_array().unwrap() {
            let dependency = dependency["name"].as_str().unwrap();
            assert!(
                !ours.contains(dependency) || allowed.contains(&dependency),
                "{name} must not import {dependency}"
            );
        }
    }
}

#[test]
fn only_engine_and_transfer_may_hold_unsafe_code() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for safe in ["config", "conductor", "worker-agent", "router", "cli", "integration"] {
        let entry = ["src/lib.rs", "src/main.rs"].map(|file| root.join(safe).join(file));
        let text = entry.iter().find_map(|path| std::fs::read_to_string(path).ok()).unwrap();
        assert!(text.contains("#![forbid(unsafe_code)]"), "{safe} must forbid unsafe code");
    }
}
