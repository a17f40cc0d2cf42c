//! Compiles and loads the stand-ins.

use std::ffi::{CStr, c_char, c_int};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW, Symbol};

/// A stand-in for a library, loaded for as long as the process lives.
pub(crate) struct Fake(Library);

impl Fake {
    /// The stand-in of this source file, which the loader then knows as `soname`.
    fn load(source: &str, soname: &str) -> Self {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        let library = directory.join(format!("{soname}.{}", std::process::id()));
        let status = Command::new("cc")
            .args(["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-D_GNU_SOURCE"])
            .arg("-I")
            .arg(here.join("src/device/cuda"))
            .arg(here.join("tests/fakes").join(source))
            .arg(format!("-Wl,-soname,{soname}"))
            .arg("-o")
            .arg(&library)
            .status()
            .expect("a C compiler is there: it links Rust's programs too");
        assert!(status.success(), "{source} does not compile");
        // SAFETY: a library of this project, without initialisers.
        let loaded = unsafe { Library::open(Some(&library), RTLD_NOW | RTLD_LOCAL) }.unwrap();
        // It stays mapped.
        std::fs::remove_file(library).unwrap();
        Self(loaded)
    }

    /// Things the process still holds of the stand-in.
    pub(crate) fn live(&self) -> i32 {
        // SAFETY: the signature in the source.
        let live: Symbol<extern "C" fn() -> c_int> = unsafe { self.0.get(b"fake_live") }.unwrap();
        live()
    }

    /// Lets the next call of a function fail with a status.
    pub(crate) fn fail(&self, call: &CStr, status: i32) {
        // SAFETY: the signature in the source.
        let fail: Symbol<extern "C" fn(*const c_char, c_int)> = unsafe { self.0.get(b"fake_fail") }.unwrap();
        fail(call.as_ptr(), status);
    }
}

/// The CUDA driver and its compiler.
pub(crate) fn cuda() -> &'static Fake {
    static CUDA: OnceLock<(Fake, Fake)> = OnceLock::new();
    &CUDA.get_or_init(|| (Fake::load("cuda.c", "libcuda.so"), Fake::load("nvrtc.c", "libnvrtc.so"))).0
}

/// The Neuron runtime.
pub(crate) fn neuron() -> &'static Fake {
    static NEURON: OnceLock<Fake> = OnceLock::new();
    NEURON.get_or_init(|| Fake::load("nrt.c", "libnrt.so.1"))
}
