//! NVIDIA GPUs, against the stand-in for the CUDA driver.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};

use baton_transfer::device::cuda::{self, CudaDevice};
use baton_transfer::{Device, HostMemory, Place};

use crate::fakes::{self, Fake};
use crate::suite;

/// The stand-in counts what the whole process holds of it, and fails the next call of anybody: one test at a time.
fn driver() -> (&'static Fake, MutexGuard<'static, ()>) {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    (fakes::cuda(), turn)
}

const ARENA_BYTES: usize = 1 << 20;

#[test]
fn a_gpu_does_what_every_device_does_and_gives_everything_back() {
    let (driver, _turn) = driver();
    for check in [suite::moves_bytes, suite::overlaps_copies, suite::digests, suite::relayouts] {
        let device = CudaDevice::open(0, ARENA_BYTES).unwrap();
        assert_eq!((device.kind(), device.len()), ("cuda", ARENA_BYTES));
        assert_eq!(device.kernel_target(), Ok("sm_80"));
        check(&device);
        drop(device);
        assert_eq!(driver.live(), 0, "contexts, memory, streams, events or modules were not given back");
    }
}

#[test]
fn a_block_larger_than_the_scratch_memory_is_digested() {
    let (_driver, _turn) = driver();
    let device = CudaDevice::open(0, 66 << 20).unwrap();
    let bytes = suite::Noise::new(9).bytes(1 << 20);
    for at in 0..66 {
        device.write(at << 20, &bytes);
    }
    let found =
        device.kernels().unwrap().digest_blocks(&[(0, suite::seed(1)), (64, suite::seed(2))], 65 << 20);
    let mut expected = bytes.repeat(66);
    expected.truncate(66 << 20);
    let digest =
        |at: usize, index| baton_transfer::block_digest(suite::seed(index), &expected[at..at + (65 << 20)]);
    assert_eq!(found.unwrap(), [digest(0, 1), digest(64, 2)]);
}

#[test]
fn memory_of_a_gpu_can_be_registered() {
    let (driver, _turn) = driver();
    let device = CudaDevice::open(0, 100_000).unwrap();
    let span = device.span().unwrap();
    assert_eq!((span.place(), span.len()), (Place::Cuda(0), 100_000));
    assert!(span.dmabuf().is_some_and(|(_, offset)| offset == 0), "GPU 0 exports dma-bufs");
    drop(device);
    assert!(driver.live() > 0, "a span keeps the memory");
    drop(span);
    assert_eq!(driver.live(), 0);
    let device = CudaDevice::open(1, 4096).unwrap();
    assert!(device.span().unwrap().dmabuf().is_none(), "GPU 1 is registered by address");
}

#[test]
fn what_the_driver_refuses_is_named_and_nothing_stays_behind() {
    let (driver, _turn) = driver();
    let error = CudaDevice::open(7, 4096).unwrap_err();
    assert_eq!(error.what, "GPU 7 is not there: the driver shows 2");
    let error = CudaDevice::open(0, 4 << 30).unwrap_err();
    assert_eq!(
        error.what,
        "Fake GPU 0 (GPU 0) does not give 4294967296 bytes: cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY"
    );
    for call in [c"cuDevicePrimaryCtxRetain", c"cuMemsetD8_v2", c"cuStreamCreate"] {
        driver.fail(call, 719);
        match CudaDevice::open(0, 4096) {
            Err(error) => assert!(error.what.ends_with("CUDA_ERROR_LAUNCH_FAILED"), "{error}"),
            // The first stream belongs to the kernels, without which a device works.
            Ok(device) => assert!(device.kernels().is_err(), "{call:?} failed"),
        }
        assert_eq!(driver.live(), 0, "after {call:?}");
    }
    driver.fail(c"cuModuleLoadData", 222);
    let device = CudaDevice::open(0, 4096).unwrap();
    let why = device.kernels().err().unwrap();
    assert_eq!(why, "the driver does not take the kernels for sm_80: cuModuleLoadData: CUDA error 222");
}

#[test]
fn failed_copies_and_kernels_are_errors_and_failed_compute_is_a_panic() {
    let (driver, _turn) = driver();
    let device = CudaDevice::open(0, ARENA_BYTES).unwrap();
    let memory = HostMemory::allocate(1 << 16, "test").unwrap();
    driver.fail(c"cuMemcpyDtoHAsync_v2", 719);
    let error = device.copy_to_host(16, &memory, 0, 32).unwrap_err();
    assert_eq!(error.to_string(), "a copy of 32 bytes at 16 from cuda memory failed");
    driver.fail(c"cuEventRecord", 719);
    // It is waited for with its stream instead.
    device.copy_to_host(16, &memory, 0, 32).unwrap();
    driver.fail(c"cuEventSynchronize", 719);
    assert!(device.submit_from_host(0, &memory, 0, 32).unwrap().finish().is_err());
    driver.fail(c"cuLaunchKernel", 719);
    let error = device.kernels().unwrap().digest_blocks(&[(0, suite::seed(0))], 4096).unwrap_err();
    assert_eq!(error.to_string(), "digests of blocks on cuda failed");
    driver.fail(c"cuMemcpyDtoHAsync_v2", 719);
    let compute = catch_unwind(AssertUnwindSafe(|| device.read(0, &mut [0; 8])));
    assert!(compute.is_err(), "nothing can be computed without the device");
    suite::digests(&device);
    for out_of_range in [
        |device: &CudaDevice, memory: &HostMemory| {
            drop(device.submit_to_host(ARENA_BYTES - 8, memory, 0, 9));
        },
        |device: &CudaDevice, memory: &HostMemory| drop(device.submit_from_host(0, memory, 1 << 16, 1)),
        |device: &CudaDevice, _: &HostMemory| {
            drop(device.kernels().unwrap().digest_blocks(&[(ARENA_BYTES, suite::seed(0))], 1));
        },
    ] {
        assert!(catch_unwind(AssertUnwindSafe(|| out_of_range(&device, &memory))).is_err());
    }
}

#[test]
fn the_probe_shows_driver_gpus_and_compiler() {
    let (driver, _turn) = driver();
    let found: Vec<String> =
        cuda::probe().iter().map(|p| format!("{} {}: {}", p.works, p.name, p.detail)).collect();
    assert_eq!(
        found,
        [
            "true cuda driver: CUDA 12.4",
            "true cuda GPU 0: Fake GPU 0, 1 GiB, compute capability 8.0, 2 copy engines",
            "true cuda GPU 0 to network cards: dma-buf",
            "true cuda GPU 0 to other GPUs: reaches 1",
            "true cuda GPU 1: Fake GPU 1, 1 GiB, compute capability 8.0, 2 copy engines",
            "true cuda GPU 1 to network cards: by address, with the module nvidia-peermem; no dma-buf",
            "false cuda GPU 1 to other GPUs: reaches none directly",
            "true cuda compiler: NVRTC 12.4, for sm_70 to sm_90",
        ]
    );
    assert_eq!(driver.live(), 0, "a probe holds nothing");
}
