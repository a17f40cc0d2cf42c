//! The manifests of `examples/kubernetes`: rendered as a user renders them, checked against the schemas of Kubernetes.

use std::process::Command;

use baton_integration::binary;

#[test]
fn every_manifest_is_what_kubernetes_and_baton_take() {
    let tools = binary::root().join("target/kubernetes");
    let python = tools.join("bin/python");
    assert!(
        python.exists(),
        "no {}: run the tests through `bash integration/test.sh`, which installs it",
        python.display()
    );
    let output = Command::new(python)
        .arg(binary::root().join("integration/kubernetes/check.py"))
        .arg(binary::root().join("examples/kubernetes"))
        .arg(binary::baton())
        .arg(&tools)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("overlays are good"));
}
