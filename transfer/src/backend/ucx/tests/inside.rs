//! UCX as a guest of this process, and what it cannot do here.

use std::ffi::{c_int, c_void};
use std::path::Path;

use super::*;
use crate::memory::Place;

unsafe extern "C" {
    fn munmap(address: *mut c_void, len: usize) -> c_int;
    fn mmap(a: *mut c_void, b: usize, c: c_int, d: c_int, e: c_int, f: i64) -> *mut c_void;
    fn madvise(address: *mut c_void, len: usize, advice: c_int) -> c_int;
}

/// The first instructions of what UCX likes to patch.
fn code() -> Vec<[u8; 16]> {
    let functions = [munmap as *const (), mmap as *const (), madvise as *const ()];
    let first = |at: *const ()| {
        // SAFETY: code of the C library, which is readable and longer than this.
        unsafe { at.cast::<[u8; 16]>().read() }
    };
    functions.into_iter().map(first).collect()
}

/// The signals this process has handlers for.
fn caught() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    status.lines().find(|line| line.starts_with("SigCgt")).unwrap().to_owned()
}

#[test]
fn ucx_takes_no_signals_patches_no_code_and_leaves_the_process_idle() {
    let before = (caught(), code());
    let (Some(near), Some(far)) = (End::open(false), End::open(false)) else { return };
    let mut link = Linked::new(near, far, 1 << 20, Access::RemoteRead);
    link.read(0, 0, 1 << 20, 1).unwrap();
    assert_eq!(link.wait(1), Ok(1 << 20));
    assert!(before == (caught(), code()), "{} is now {}", before.0, caught());
    // Idle: nothing to poll for, and the thread may sleep.
    until(&mut [&mut link.near, &mut link.far], |ends| {
        ends[0].driver.arm() && ends[1].driver.arm() && ends[0].driver.core.slots.busy().is_empty()
    });
}

#[test]
fn a_missing_library_is_named_with_what_helps() {
    for missing in ["/nowhere/libucp.so.0", "libucp-of-nobody.so.0"] {
        let error = library::open(Some(Path::new(missing))).err().unwrap();
        assert!(error.what.contains(missing), "{error}");
        assert!(error.what.contains("cannot open shared object file"), "in the loader's words: {error}");
        assert!(error.remedy.contains("libucx0"), "{error:?}");
    }
    // A library that is no UCX.
    let error = library::open(Some(Path::new("libc.so.6"))).err().unwrap();
    assert!(error.what.contains("libc.so.6 has no ucs_status_string"), "{error}");
}

#[test]
fn device_memory_without_its_module_says_so() {
    let Some(mut end) = End::open(false) else { return };
    let host = memory(4096, 0);
    if end.driver.core.context.cuda().is_err() {
        // SAFETY: it is refused before anything looks at it.
        let span = unsafe {
            MemorySpan::new(host.span().address(), 4096, Place::Cuda(0), None, std::sync::Arc::new(()))
        };
        let error = end.driver.register(&span, Access::Local).unwrap_err();
        assert!(error.what.contains("CUDA") && error.remedy.contains("CUDA"), "{error:?}");
        let info = &end.driver.info.device_memory;
        assert!(info.iter().any(|(kind, works)| *kind == "cuda" && works.is_err()), "{info:?}");
    }
    // SAFETY: as above.
    let span = unsafe {
        MemorySpan::new(host.span().address(), 4096, Place::Neuron(0), None, std::sync::Arc::new(()))
    };
    assert!(end.driver.register(&span, Access::Local).unwrap_err().what.contains("Neuron"));
}

#[test]
fn options_that_cannot_work_are_errors() {
    let Ok(api) = library::get() else { return };
    let open = |options: UcxOptions| UcxDriver::open(api, &options, None).err().unwrap();
    let error = open(UcxOptions { bind: [192, 0, 2, 77].into(), transports: None });
    assert!(error.what.contains("192.0.2.77"), "{error}");
    for transports in ["nothing_like_it", "tcp\0", ""] {
        let error = open(UcxOptions { transports: Some(transports.to_owned()), ..UcxOptions::default() });
        assert!(!error.remedy.is_empty(), "{error:?}");
    }
}

#[test]
fn the_probe_tells_what_works() {
    let found = probe(&UcxOptions::default());
    let ucx = found.iter().find(|probe| probe.name == "ucx").unwrap();
    if library::get().is_ok() {
        assert!(ucx.works && ucx.detail.contains("tcp/lo"), "{ucx:?}");
        assert_eq!(found.len(), 3);
    }
    assert!(
        found.iter().all(|probe| probe.works || probe.remedy.as_ref().is_some_and(|text| !text.is_empty()))
    );
    let driver = open(&UcxOptions::default());
    if let Ok(driver) = driver {
        assert!(driver.info().wire.len() <= 64 && driver.info().same_host);
        assert!(driver.address().len() <= ADDRESS_MAX_BYTES);
    }
}
