//! The header and its Rust twin have one layout.

use std::mem::offset_of;
use std::process::Command;

use super::support::source;
use crate::backend::fabric::driver::{ADDRESS_MAX_BYTES, CALL_MAX, KEY_MAX_BYTES};
use crate::backend::plugin::abi::*;

macro_rules! layout {
    ($($c:literal is $rust:ty { $($field:ident),* })*) => {
        vec![$(
            (format!("sizeof({})", $c), size_of::<$rust>()),
            $((format!("offsetof({}, {})", $c, stringify!($field)), offset_of!($rust, $field)),)*
        )*]
    };
}

#[test]
fn the_header_and_its_rust_twin_agree() {
    let mut expected = layout! {
        "baton_error" is RawError { what, remedy }
        "baton_open_options" is RawOpenOptions { size, reserved, bind }
        "baton_info" is RawInfo {
            flags, rails, message_max, op_max, nap_us, reserved, wire, detail, no_cuda, no_neuron
        }
        "baton_memory" is RawMemory { address, len, place, device, dmabuf, reserved, dmabuf_offset }
        "baton_blob" is RawBlob { bytes, room, len }
        "baton_local" is RawLocal { registration, offset, len }
        "baton_remote" is RawRemote { peer, key, offset }
        "baton_done" is RawDone { op, bytes, status, reserved, why }
        "baton_driver_table" is RawTable {
            abi_version, size, open, close, info, address, register_memory, deregister, connect, disconnect,
            import_key, forget, read, write, send, receive, cancel_receive, poll, arm, wait_fd
        }
    };
    let numbers = [
        ("BATON_ABI_VERSION", ABI_VERSION as usize),
        ("BATON_CALL_MAX_MS", CALL_MAX.as_millis() as usize),
        ("BATON_ADDRESS_MAX", ADDRESS_MAX_BYTES),
        ("BATON_KEY_MAX", KEY_MAX_BYTES),
        ("BATON_OK", OK as usize),
        ("BATON_FAILED", FAILED as usize),
        ("BATON_AGAIN", AGAIN as usize),
        ("BATON_RANGE", RANGE as usize),
        ("BATON_SAME_HOST", SAME_HOST as usize),
        ("BATON_CAN_READ", CAN_READ as usize),
        ("BATON_CAN_WRITE", CAN_WRITE as usize),
        ("BATON_TAKES_CUDA", TAKES_CUDA as usize),
        ("BATON_TAKES_NEURON", TAKES_NEURON as usize),
        ("BATON_PLACE_HOST", PLACE_HOST as usize),
        ("BATON_PLACE_CUDA", PLACE_CUDA as usize),
        ("BATON_PLACE_NEURON", PLACE_NEURON as usize),
        ("BATON_ACCESS_LOCAL", ACCESS_LOCAL as usize),
        ("BATON_ACCESS_REMOTE_READ", ACCESS_REMOTE_READ as usize),
        ("BATON_ACCESS_REMOTE_WRITE", ACCESS_REMOTE_WRITE as usize),
    ];
    expected.extend(numbers.map(|(name, value)| (name.to_owned(), value)));

    let directory = tempfile::tempdir().unwrap();
    let (program, binary) = (directory.path().join("layout.c"), directory.path().join("layout"));
    let prints: String = expected.iter().map(|(what, _)| format!("P({what});\n")).collect();
    let head = "#include <stddef.h>\n#include <stdio.h>\n#include \"baton_driver.h\"\n#define P(x) printf(\"%zu\\n\", (size_t)(x))\n";
    std::fs::write(&program, format!("{head}int main(void) {{\n{prints}return 0;\n}}\n")).unwrap();
    let include = source("");
    // C99, strictly: the header asks for nothing newer.
    let built = Command::new("cc")
        .args(["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-I"])
        .arg(include)
        .arg(&program)
        .arg("-o")
        .arg(&binary)
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let output = Command::new(&binary).output().unwrap();
    let found: Vec<usize> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| line.parse().unwrap()).collect();
    let found: Vec<(String, usize)> = expected.iter().map(|(what, _)| what.clone()).zip(found).collect();
    assert_eq!(found, expected);
}
