//! AWS Neuron devices, against the stand-in for their runtime.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};

use baton_transfer::device::neuron::{self, NeuronDevice};
use baton_transfer::{Device, HostMemory, Place};

use crate::fakes::{self, Fake};
use crate::suite;

/// As for the CUDA driver: one test at a time.
fn runtime() -> (&'static Fake, MutexGuard<'static, ()>) {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    (fakes::neuron(), turn)
}

const ARENA_BYTES: usize = 1 << 20;

#[test]
fn a_neuron_device_does_what_every_device_does_and_gives_everything_back() {
    let (runtime, _turn) = runtime();
    neuron::load().unwrap();
    for check in [suite::moves_bytes, suite::overlaps_copies] {
        let device = NeuronDevice::open(1, ARENA_BYTES).unwrap();
        assert_eq!((device.kind(), device.len()), ("trainium", ARENA_BYTES));
        assert_eq!(device.kernels().err().unwrap(), "trainium has no kernels for blocks");
        check(&device);
        drop(device);
        assert_eq!(runtime.live(), 0);
    }
}

#[test]
fn copies_submitted_when_the_device_is_dropped_still_end() {
    let (runtime, _turn) = runtime();
    let device = NeuronDevice::open(0, ARENA_BYTES).unwrap();
    device.write(0, b"last words");
    let memory = HostMemory::allocate(4096, "test").unwrap();
    let copy = device.submit_to_host(0, &memory, 0, 10).unwrap();
    drop(device);
    copy.finish().unwrap();
    let mut bytes = [0; 10];
    memory.read(0, &mut bytes);
    assert_eq!(&bytes, b"last words");
    assert_eq!(runtime.live(), 0);
}

#[test]
fn memory_of_a_neuron_device_can_be_registered() {
    let (runtime, _turn) = runtime();
    let device = NeuronDevice::open(1, 100_000).unwrap();
    let span = device.span().unwrap();
    assert_eq!((span.place(), span.len()), (Place::Neuron(1), 100_000));
    assert_eq!(
        span.dmabuf().map(|(_, offset)| offset),
        Some(4096),
        "the runtime says where the tensor begins"
    );
    runtime.fail(c"nrt_get_dmabuf_fd_v2", 2);
    assert_eq!(device.span().unwrap().dmabuf().map(|(_, offset)| offset), Some(0), "as older runtimes do");
    drop(device);
    assert_eq!(runtime.live(), 1, "a span keeps the memory");
    drop(span);
    assert_eq!(runtime.live(), 0);
}

#[test]
fn what_the_runtime_refuses_is_named_and_nothing_stays_behind() {
    let (runtime, _turn) = runtime();
    let error = NeuronDevice::open(7, 4096).unwrap_err();
    assert_eq!(error.what, "NeuronCore 7 does not give 4096 bytes: nrt_tensor_allocate: NRT_INVALID");
    let error = NeuronDevice::open(0, 4 << 30).unwrap_err();
    assert!(error.what.ends_with("nrt_tensor_allocate: NRT_RESOURCE"), "{error}");
    runtime.fail(c"nrt_tensor_memset", 6);
    let error = NeuronDevice::open(0, 4096).unwrap_err();
    assert!(error.what.ends_with("nrt_tensor_memset: NRT_HW_ERROR"), "{error}");
    assert_eq!(runtime.live(), 0);

    let device = NeuronDevice::open(0, 4096).unwrap();
    let memory = HostMemory::allocate(4096, "test").unwrap();
    runtime.fail(c"nrt_tensor_read", 5);
    let error = device.copy_to_host(16, &memory, 0, 32).unwrap_err();
    assert_eq!(error.to_string(), "a copy of 32 bytes at 16 from trainium memory failed");
    device.copy_to_host(16, &memory, 0, 32).unwrap();
    runtime.fail(c"nrt_tensor_write", 1103);
    assert!(catch_unwind(AssertUnwindSafe(|| device.write(0, b"numbers"))).is_err());
    assert!(catch_unwind(AssertUnwindSafe(|| drop(device.submit_to_host(4090, &memory, 0, 7)))).is_err());
}

#[test]
fn the_probe_shows_runtime_and_cores_without_taking_them() {
    let (_runtime, _turn) = runtime();
    let found: Vec<String> =
        neuron::probe().iter().map(|p| format!("{} {}: {}", p.works, p.name, p.detail)).collect();
    assert_eq!(found[..2], ["true neuron runtime: libnrt 2.31.7.0", "true neuron cores: 1 of 2 visible"]);
    assert!(found[2].contains("neuron devices"), "{found:?}");
}
