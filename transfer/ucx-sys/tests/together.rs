//! Several threads of a process open the library at once.
#![cfg(test)]

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::process::{Command, Stdio};
use std::sync::{Arc, Barrier};
use std::thread;

use baton_ucx_sys::{
    Api, LoadError, UCP_FEATURE_AM, UCP_FEATURE_RMA, UCP_PARAM_FIELD_FEATURES, UCS_LOG_FUNC_RC_STOP, UCS_OK,
    Zeroed, ucp_params_t,
};

/// Marks the argument that turns the first test into another process.
const ROLE: &str = "ucx-opener";
const THREADS: usize = 8;
const PROCESSES: usize = 12;

unsafe extern "C" fn silent(
    _file: *const c_char,
    _line: c_uint,
    _function: *const c_char,
    _level: c_int,
    _component: *const c_void,
    _message: *const c_char,
    _arguments: *mut c_void,
) -> c_int {
    UCS_LOG_FUNC_RC_STOP
}

/// Opens the library and sets it up, which is when it would patch the calls that map memory.
fn open() -> Result<(), LoadError> {
    let api = Api::load(None, silent)?;
    let mut params = ucp_params_t::zeroed();
    params.field_mask = UCP_PARAM_FIELD_FEATURES;
    params.features = UCP_FEATURE_AM | UCP_FEATURE_RMA;
    let (major, minor, _) = api.version();
    let (mut config, mut context) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: parameters and configuration as UCX defines them, each of the two handles released once.
    unsafe {
        assert_eq!((api.ucp_config_read)(std::ptr::null(), std::ptr::null(), &raw mut config), UCS_OK);
        let status = (api.ucp_init_version)(major, minor, &raw const params, config, &raw mut context);
        (api.ucp_config_release)(config);
        assert_eq!(status, UCS_OK);
        // The end of a thread gives its memory back: over patched calls, if there were any.
        thread::spawn(|| drop(vec![1_u8; 8 << 20])).join().unwrap();
        (api.ucp_cleanup)(context);
    }
    Ok(())
}

/// Only the first opening of a process counts: this is done in processes of its own.
#[test]
fn the_other_process() {
    if !std::env::args().any(|argument| argument == ROLE) {
        assert!(std::env::args().all(|argument| !argument.contains(ROLE)));
        return;
    }
    let start = Arc::new(Barrier::new(THREADS));
    let opener = |_| {
        let start = Arc::clone(&start);
        thread::spawn(move || {
            start.wait();
            open().unwrap();
        })
    };
    let threads: Vec<_> = (0..THREADS).map(opener).collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn threads_that_open_the_library_at_once_do_not_disturb_each_other() {
    if let Err(error) = open() {
        println!("skipped: {error}");
        return;
    }
    for round in 0..PROCESSES {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "the_other_process", ROLE]).stdout(Stdio::null());
        let status = child.status().unwrap();
        assert!(status.success(), "process {round}: {status}");
    }
}
