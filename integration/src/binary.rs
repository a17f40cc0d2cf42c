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
        let status = Command::new(env!("CARGO"))
            .args(["build", "--release", "--quiet", "--package", "baton"])
            .current_dir(root())
            .status();
        assert!(status.is_ok_and(|s| s.success()), "the release binary does not build");
        target_dir().join("release/baton")
    })
}

/// The target directory: the test executable lies in `<target>/<profile>/deps`.
fn target_dir() -> PathBuf {
    let executable = std::env::current_exe().unwrap_or_default();
    executable.ancestors().nth(3).map_or_else(|| root().join("target"), Path::to_path_buf)
}
