//! Where the `baton` binary is.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The repository root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or_else(|| Path::new("."))
}

/// The release binary, built if need be: tests drive what users run.
///
/// # Panics
/// When it cannot be built.
pub fn baton() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--release", "--quiet", "--package", "baton"]).current_dir(root());
        // What cargo tells a test about its package makes build scripts that look at it, and all that depends on them,
        // run anew: minutes for nothing.
        for (name, _) in std::env::vars_os() {
            let told = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CRATE_", "CARGO_BIN_"];
            if name.to_str().is_some_and(|name| told.iter().any(|told| name.starts_with(told))) {
                build.env_remove(&name);
            }
        }
        let status = build.status();
        assert!(status.is_ok_and(|s| s.success()), "the release binary does not build");
        target_dir().join("release/baton")
    })
}

/// The target directory: the test executable lies in `<target>/<profile>/deps`.
fn target_dir() -> PathBuf {
    let executable = std::env::current_exe().unwrap_or_default();
    executable.ancestors().nth(3).map_or_else(|| root().join("target"), Path::to_path_buf)
}
